"""The pieces of common/training.py, each against the property it promises."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from common.cli import RunConfig, UserError
from common.data import EvalSampler, StepSampler, gather_samples
from common.launch import check_devices
from common.training import (
    EMA,
    EarlyStopping,
    FiniteGuard,
    Rule,
    Verdict,
    cosine,
    find_batch_size,
    hashed,
    seed_step,
    set_lr,
)


def rank_of(index: int, count: int):
    return SimpleNamespace(process_index=index, num_processes=count)


def config(**values) -> RunConfig:
    return RunConfig(**{"epochs": 3, "batch_size": 2, **values})


# -- data order


@pytest.mark.parametrize("size", [12, 17, 53])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_once_an_epoch_but_a_tail_that_changes(size, processes):
    settings = config(batch_size=12 // processes)
    samplers = [StepSampler(size, settings, rank_of(r, processes)) for r in range(processes)]
    keys = [[key for batch in sampler for key in batch] for sampler in samplers]
    tails = []
    for epoch in range(3):
        seen = [index for mine in keys for e, index in mine if e == epoch]
        assert len(seen) == len(set(seen)) == size // 12 * 12
        tails.append(frozenset(range(size)) - set(seen))
    assert size % 12 == 0 or len(set(tails)) > 1


@pytest.mark.parametrize("costs", [False, True])
def test_each_step_has_the_same_samples_on_any_number_of_processes(costs):
    cost = np.random.default_rng(0).integers(1, 30, 53).astype(float) if costs else None

    def samples(processes, accumulation):
        settings = config(batch_size=12 // processes // accumulation, accumulation_steps=accumulation)
        samplers = [list(StepSampler(53, settings, rank_of(r, processes), costs=cost)) for r in range(processes)]
        steps = len(samplers[0]) // accumulation
        return [
            sorted(k for s in samplers for batch in s[i * accumulation : (i + 1) * accumulation] for k in batch)
            for i in range(steps)
        ]

    assert samples(1, 1) == samples(2, 1) == samples(3, 2) == samples(1, 4) == samples(2, 3)


def test_a_run_that_starts_in_the_middle_sees_what_is_left():
    whole = list(StepSampler(53, config(), rank_of(0, 1)))
    late = StepSampler(53, config(), rank_of(0, 1))
    late.start = 31  # in the second epoch
    assert list(late) == whole[31:] and len(late) == len(whole) - 31


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_budget_of_cost_gives_equal_steps_and_even_work(processes):
    cost = np.random.default_rng(1).integers(40, 81, 600).astype(float) ** 2
    budget = 8 * 60.0**2 * (6 // processes)
    samplers = [StepSampler(600, config(), rank_of(r, processes), costs=cost, budget=budget) for r in range(processes)]
    batches = [list(s) for s in samplers]
    assert len({len(b) for b in batches}) == 1 and all(part for b in batches for part in b)
    for epoch in range(3):
        seen = [i for mine in batches for batch in mine for e, i in batch if e == epoch]
        assert len(seen) == len(set(seen)) > 600 * 0.9
    work = np.array([[cost[[i for _, i in part]].sum() for part in b] for b in batches])
    assert work.max() < 1.4 * budget and work.min() > 0.6 * budget
    assert (
        samplers[0].steps_per_epoch
        == StepSampler(600, config(), rank_of(0, 1), costs=cost, budget=budget * processes).steps_per_epoch
    )


def test_batches_of_like_cost_waste_little_padding():
    size = np.random.default_rng(2).integers(40, 81, 640)
    settings = config(batch_size=16, accumulation_steps=4)

    def waste(sampler):
        parts = [size[[i for _, i in batch]] for batch in sampler]
        return 1 - sum((p**2).sum() for p in parts) / sum(len(p) * p.max() ** 2 for p in parts)

    sorted_waste = waste(StepSampler(640, settings, rank_of(0, 1), costs=size.astype(float) ** 2))
    assert sorted_waste < 0.15 < waste(StepSampler(640, settings, rank_of(0, 1)))


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_have_even_work_at_a_fixed_number_of_samples_too(processes):
    cost = np.random.default_rng(3).integers(40, 81, 960).astype(float)
    sampler = StepSampler(960, config(batch_size=16), rank_of(0, processes), costs=cost)
    steps = range(sampler.steps_per_epoch)

    def busiest(parts: list[np.ndarray]) -> float:
        work = [len(part) * part.max() for part in parts]
        return max(work) / np.mean(work)

    equal = np.mean([busiest(np.split(np.sort(cost[sampler.global_batch(step)]), processes)) for step in steps])
    assert np.mean([sampler.balance(step)[1] for step in steps]) < min(1.15, equal - 0.05)
    assert all(len(part) for step in steps for part in sampler.micro_batches(step))


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_samples_of_one_cost_are_dealt_in_equal_numbers(processes, batch):
    sampler = StepSampler(512, config(batch_size=batch), rank_of(0, processes), costs=np.full(512, 40.0))
    assert {len(part) for part in sampler.micro_batches(1)} == {batch}


def test_a_sample_as_large_as_all_others_leaves_no_process_without_any():
    costs = np.r_[np.ones(62), 1e9, 1e12]
    sampler = StepSampler(64, config(batch_size=4), rank_of(0, 16), costs=costs)
    assert sorted(np.concatenate(sampler.micro_batches(0))) == list(range(64))
    assert all(len(part) for part in sampler.micro_batches(0))


def test_too_little_data_is_a_sentence():
    with pytest.raises(UserError, match="5 samples do not fill one step of 8 samples: lower --batch-size"):
        StepSampler(5, config(batch_size=8), rank_of(0, 1))


@pytest.mark.parametrize("size", [1, 5, 17, 21])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_batches_are_the_same_for_any_number_of_processes(size, processes):
    alone = list(EvalSampler(size, 4, rank_of(0, 1)))
    dealt = [list(EvalSampler(size, 4, rank_of(r, processes))) for r in range(processes)]
    assert sorted(b for mine in dealt for b in mine) == sorted(alone)
    assert sorted(i for b in alone for i in b) == list(range(size))


def test_gathered_samples_must_be_the_whole_set():
    batches = [
        {"id": torch.tensor([2, 0]), "x": torch.tensor([[2.0], [0.0]])},
        {"id": torch.tensor([1]), "x": torch.tensor([[1.0]])},
    ]
    table = gather_samples(rank_of(0, 1), batches, 3)
    assert table["id"].tolist() == [0, 1, 2] and table["x"][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="3 samples, 3 of them different, of a set of 4"):
        gather_samples(rank_of(0, 1), batches, 4)
    with pytest.raises(RuntimeError, match="2 samples, 1 of them different"):
        gather_samples(rank_of(0, 1), [{"id": torch.tensor([1, 1])}], 2)


# -- functions of the step


def test_noise_depends_on_step_micro_batch_and_rank_and_nothing_else():
    def noise(*key):
        seed_step(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(s, t, m, r) for s in range(2) for t in range(3) for m in range(2) for r in range(2)]
    assert len({noise(*key) for key in keys}) == len(keys)
    assert noise(0, 2, 1, 1) == noise(0, 2, 1, 1)
    assert hashed(0, 2, 1, 1) == 822195455  # of any machine: a run that goes on elsewhere keeps its noise
    assert hashed(2**64 - 1, 0) != hashed(0, 0)
    drawn = np.bincount([hashed(7, step) % 3 for step in range(3000)])
    assert drawn.min() > 900 and len({hashed(7, step) for step in range(3000)}) == 3000


def test_schedule_warms_up_and_ends_at_its_floor():
    values = [cosine(step, 100, warmup=10, floor=0.1) for step in range(101)]
    assert values[0] == 0.1 and values[9] == values[10] == 1 and values[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD([{"params": [model.weight], "scale": 0.1}, {"params": [model.bias]}], lr=1)
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.5]


def test_ema_follows_the_formula_in_weights_and_running_statistics_and_copies_counters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.5)

    def averaged(module: nn.Module) -> list[torch.Tensor]:
        return [v for v in (*module.parameters(), *module.buffers()) if v.is_floating_point()]

    expected = [v.detach().clone() for v in averaged(model)]
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(8, 2))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * v.detach() for e, v in zip(expected, averaged(model), strict=True)]
    for mine, theirs in zip(averaged(ema.module), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert ema.module[1].num_batches_tracked == model[1].num_batches_tracked == 20
    assert not any(p.requires_grad for p in ema.module.parameters())


# -- decisions


def test_a_bad_step_is_skipped_counted_and_undone_in_the_buffers():
    model = nn.BatchNorm1d(1)
    guard = FiniteGuard(model, limit=3, scaler=None)
    good, bad = Verdict({"loss": 1.0}, 1.0, False), Verdict({"loss": math.nan}, math.nan, False)
    model(torch.tensor([[1.0], [3.0]]))
    assert guard.passes(good, 1)
    kept = model.running_mean.clone()
    model(torch.tensor([[math.nan], [3.0]]))
    assert not guard.passes(bad, 2) and torch.equal(model.running_mean, kept)
    assert not guard.passes(Verdict({"loss": 1.0}, math.inf, False), 3)
    again = FiniteGuard(model, limit=3, scaler=None)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(UserError, match="3 steps in a row .* last at step 4: lower --lr"):
        again.passes(bad, 4)


class Alone:
    is_main_process, num_processes = True, 1


def stop_at(rules, series, **options) -> list[tuple[bool, bool]]:
    """The answers to a series of metrics, with the state going through JSON each time, as a resume would."""
    names = [r.metric for r in rules]
    answers, state = [], None
    for values in series:
        stopper = EarlyStopping(rules, **options)
        if state:
            stopper.load_state_dict(json.loads(state))
        answers.append(stopper.update(Alone(), dict(zip(names, values, strict=True))))
        state = json.dumps(stopper.state_dict(), allow_nan=False)
    return answers


def test_early_stopping_counts_evaluations_without_improvement():
    Accelerator(cpu=True)
    loss = Rule("loss")
    assert stop_at([loss], [(3,), (2,), (2.5,), (2.1,), (1,), (1,), (1,)], patience=2) == [
        (True, False), (True, False), (False, False), (False, True), (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert stop_at([loss], [(1,)] * 5, patience=0)[-1] == (False, False)
    # delta, and a maximum
    assert [b for b, _ in stop_at([Rule("f1", "max", delta=0.1)], [(0.5,), (0.55,), (0.61,)], patience=9)] == [
        True,
        False,
        True,
    ]
    # a best score given beforehand
    assert [b for b, _ in stop_at([Rule("loss", initial=2.0)], [(3,), (1,)], patience=9)] == [False, True]
    # patience runs only after the grace period
    assert [s for _, s in stop_at([Rule("loss", grace=3)], [(1,), (2,), (2,), (2,), (2,)], patience=2)] == [False] * 4 + [
        True
    ]
    # any or all of several rules; only those that improved get a new best
    two = [Rule("loss"), Rule("f1", "max")]
    series = [(2, 0.5), (1, 0.4), (3, 0.6), (0.5, 0.7)]
    assert [b for b, _ in stop_at(two, series, patience=9)] == [True, True, True, True]
    assert [b for b, _ in stop_at(two, series, patience=9, combine="all")] == [True, False, False, True]
    # smoothing
    assert [b for b, _ in stop_at([Rule("loss", window=2)], [(4,), (2,), (3,), (1,)], patience=9)] == [
        True,
        True,
        True,
        True,
    ]
    assert [b for b, _ in stop_at([Rule("loss", window=2)], [(4,), (2,), (5,), (1,)], patience=9)] == [
        True,
        True,
        False,
        False,
    ]


def test_find_batch_size_keeps_the_samples_per_step(caplog):
    accelerator = Accelerator(cpu=True)
    settings = config(batch_size=24, accumulation_steps=1)
    tried = []

    def attempt(count):
        tried.append(count)
        if count > 7:
            raise torch.OutOfMemoryError("simulated")

    find_batch_size(accelerator, settings, attempt)
    assert tried == [24, 12, 8, 6] and (settings.batch_size, settings.accumulation_steps) == (6, 4)
    assert accelerator.gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="not even one sample"):
        find_batch_size(accelerator, config(), lambda count: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RuntimeError, match="a bug"):  # anything else is not taken for a lack of memory
        find_batch_size(accelerator, config(), lambda count: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_more_processes_than_gpus_is_a_sentence():
    check_devices(2, 2)
    check_devices(2, 0)  # no GPU at all: gloo on the CPU
    with pytest.raises(
        UserError, match="8 processes were launched on this machine, which shows 2 GPUs: add --num_processes 2"
    ):
        check_devices(8, 2)
