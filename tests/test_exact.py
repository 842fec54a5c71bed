"""Processes, accumulation, loader workers and launcher change nothing: the same batches, losses and metrics.

This file is also a program that the tests launch: its last part runs in 1, 2 and 3 real processes and writes what it saw."""

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from helpers import ROOT, assert_same_run, rows, run
from torch import nn

from common import data, launch, training
from common.causal_sets import Store
from common.cli import RunConfig, sentences
from common.demo_data import causal_sets
from scripts import train_quantumgrav as script

STEPS, GLOBAL_BATCH = 30, 12
TASKS = ("manifold_like", "class", "curvature")  # half of the sets have no curvature: the labels per process vary


# ---------------------------------------------------------------------------------------------------------------------
# the script, launched as users do


@pytest.fixture(scope="module")
def flags(sets):
    return [
        *("--dataset-path", sets, "--tracker", "none", "--epochs", 9, "--max-steps", STEPS, "--log-every", 1, "--lr", 1e-3),
        *("--eval-every", 10, "--save-every", 10, "--width", 16, "--layers", 1, "--coarse-grain", 0.3, "--tasks", *TASKS),
    ]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The folder of a run with this global batch, made when first asked for."""

    @cache
    def get(processes=1, accumulation=1, workers=0, via=None) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        batch = GLOBAL_BATCH // processes // accumulation
        dealt = ["--batch-size", batch, "--accumulation-steps", accumulation, "--num-workers", workers]
        run([*flags, *dealt, "--output-dir", folder], processes=processes, via=via)
        return folder

    return get


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (3, 1)])
def test_the_same_global_batch_gives_the_same_run(trained, processes, accumulation):
    one, other = trained(), trained(processes, accumulation)
    assert len(rows(one, "train")) == STEPS
    assert_same_run(other, one, rtol=1e-5)
    first, theirs = rows(one, "val")[0], rows(other, "val")[0]
    assert theirs == pytest.approx(first, rel=1e-6)


def test_loader_workers_change_not_a_bit(trained):
    assert_same_run(trained(workers=2), trained(workers=0))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("via", ["accelerate", "torchrun"])
def test_the_launcher_changes_not_a_bit(trained, via, processes):
    assert_same_run(trained(processes, via=via), trained(processes))


@pytest.fixture
def interrupted(trained, tmp_path):
    """The run of one process as a kill shortly after the checkpoint of step 20 would have left it."""
    folder = tmp_path / "run"
    shutil.copytree(trained(), folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    (folder / "DONE").unlink()
    return folder


def test_another_global_batch_is_refused_and_the_flags_that_the_refusal_names_continue_the_run(trained, interrupted, flags):
    resume = [*flags, "--num-workers", 0, "--output-dir", interrupted, "--resume-from", "auto"]
    text = run([*resume, "--batch-size", 12], processes=2, ok=False)
    assert "trained with samples per step = 12, this launch has 24: the order of the data would change." in text
    assert text.count("[RANK 0] ERROR") == 1 and "Traceback" not in text
    remedy = re.search(r"With 2 processes pass (--batch-size \d+ --accumulation-steps \d+)\.", text)[1]
    assert "Resumed from step 20" in run([*resume, *remedy.split()], processes=2)
    assert_same_run(interrupted, trained(), rtol=1e-5)


def test_another_dataset_is_refused(interrupted, flags, tmp_path):
    """Even one of the same size, whose sample numbers are split in the same way."""
    causal_sets.write(tmp_path / "others", 203, seed=2, preset="zoo", n_min=8, n_max=16, progress=False)
    others = [*flags, "--dataset-path", tmp_path / "others", "--batch-size", 12, "--num-workers", 0]
    text = run([*others, "--output-dir", interrupted, "--resume-from", "auto"], ok=False)
    assert re.search(r"trained with data split = \w{12}, this launch has \w{12}", text) and "Traceback" not in text


# ---------------------------------------------------------------------------------------------------------------------
# its parts, in 1, 2 and 3 processes


@pytest.fixture(scope="module")
def seen(sets, tmp_path_factory):
    """What `main` below wrote on this many processes."""

    @cache
    def get(processes: int) -> dict:
        out = tmp_path_factory.mktemp("seen") / "seen.json"
        run([sets, out], processes=processes, script=__file__, env={"PYTHONPATH": str(ROOT)})
        return json.loads(out.read_text())

    return get


EVERY_NUMBER = pytest.mark.parametrize("processes", [1, 2, 3])
SIZES = (1, 5, 17, 21)  # of validation sets, in batches of 4: fewer batches than processes, and last batches of one sample
SAMPLES, EPOCHS = 53, 3


@EVERY_NUMBER
def test_evaluation_is_the_same_to_the_bit(seen, processes):
    assert seen(processes)["evaluation"] == seen(1)["evaluation"]


@EVERY_NUMBER
@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_comes_twice_in_an_epoch_and_only_a_changing_tail_is_left_out(seen, processes, workers):
    steps = seen(processes)["ledger"][str(workers)]
    assert steps == seen(1)["ledger"]["0"]  # the same samples in the same steps
    left_out = []
    for epoch in range(EPOCHS):
        dealt = [index for step in steps for e, index in step if e == epoch]
        assert len(dealt) == len(set(dealt)) == SAMPLES // GLOBAL_BATCH * GLOBAL_BATCH
        left_out.append(set(range(SAMPLES)) - set(dealt))
    assert all(tail != left_out[0] for tail in left_out[1:])


@EVERY_NUMBER
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_label_weighs_the_same_wherever_it_falls(seen, processes, accumulation):
    whole = np.array(seen(1)["weights"]["1"])
    assert np.abs(np.array(seen(processes)["weights"][str(accumulation)]) - whole).max() < 1e-12
    if processes * accumulation > 1:  # the usual way, a mean over each micro-batch's labels, gives another model
        assert np.abs(np.array(seen(processes)["weights of means"][str(accumulation)]) - whole).max() > 1e-4


@EVERY_NUMBER
def test_running_statistics_are_each_ranks_own_until_they_are_shared_and_other_buffers_may_not_differ(seen, processes):
    found = seen(processes)["statistics"]
    assert len({tuple(mean) for mean in found["before"]}) == processes
    assert found["after"] == found["before"][:1] * processes and not found["waits"]
    assert ("after a change: the processes hold different weights" in found["drifted"]) == (processes > 1)


@EVERY_NUMBER
def test_the_batch_that_fits_everywhere_is_found_without_changing_the_step(seen, processes):
    found = seen(processes)["found"]
    assert found["flags"] == [[6, 2] if processes == 1 else [3, 4]] * processes  # 8 samples fit on rank 0, 3 on the others
    assert found["samples per step"] == 12 * processes
    assert np.abs(np.array(found["weights"]) - np.array(found["weights unsplit"])).max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# the program that `seen` launches


def evaluate(accelerator, store: Store, size: int) -> dict[str, float]:
    config = script.Config(width=16, layers=1, num_workers=0, tasks=TASKS)
    part = script.CausalSets(store, np.arange(size), config)
    tasks = script.Tasks.of(store, np.arange(len(store)), TASKS)
    torch.manual_seed(0)
    model = script.CausalNet(config, tasks.outputs())
    dealt = data.EvalSampler(size, 4, accelerator, costs=part.sizes)
    return script.evaluate(model, tasks, data.make_loader(part, dealt, config, script.collate), accelerator)[0]


class Keys(torch.utils.data.Dataset):
    """Samples that are their own keys, so that what arrives says what was dealt."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(key)


def ledger(accelerator, workers: int) -> list[list[list[int]]]:
    """The keys of each step over all processes, in order."""
    config = RunConfig(batch_size=GLOBAL_BATCH // accelerator.num_processes, epochs=EPOCHS, num_workers=workers)
    sampler = data.StepSampler(SAMPLES, config, accelerator)
    steps = data.StepLoader(data.make_loader(Keys(), sampler, config), accelerator)
    mine = [torch.cat(next(steps)).tolist() for _ in range(sampler.total_steps)]
    return [sorted(key for share in step for key in share) for step in zip(*gather_object([mine]), strict=True)]


class Curved(torch.utils.data.Dataset):
    """Vectors in float64 with a label, which half of them miss."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.label = torch.from_numpy(rng.normal(size=(SAMPLES, 3))), torch.from_numpy(rng.normal(size=SAMPLES))
        self.label[torch.from_numpy(rng.random(SAMPLES) < 0.5)] = torch.nan

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"x": self.x[key[1]], "curvature": self.label[key[1]]}


def train(accelerator, config: RunConfig, *, means: bool = False) -> list[float]:
    """Weights after a few steps, in float64 and with one denominator per step; or with each micro-batch's own mean."""
    accelerator.gradient_accumulation_steps = config.accumulation_steps
    tasks = script.Tasks(("curvature",), classes=(), dimensions=(), curvature=(0.0, 1.0))
    sampler = data.StepSampler(SAMPLES, config, accelerator)
    curved = Curved()
    known = curved.label.isfinite()
    steps = data.StepLoader(data.make_loader(curved, sampler, config), accelerator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(sampler.total_steps):
        batches = next(steps)
        count = int(known[sampler.global_batch(step)].sum())
        for batch in batches:
            with accelerator.accumulate(model):
                loss = tasks.losses({"curvature": model(batch["x"])}, batch)["curvature"].sum()
                own = max(int(batch["curvature"].isfinite().sum()), 1)
                accelerator.backward(loss / own if means else loss / count * sampler.parts)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def find_batch(accelerator) -> dict:
    def attempt(samples: int) -> None:
        if samples > (3 if accelerator.process_index else 8):
            raise torch.OutOfMemoryError("simulated")

    asked = RunConfig(batch_size=12, epochs=2, num_workers=0)
    config = RunConfig(batch_size=12, epochs=2, num_workers=0)
    training.find_batch_size(accelerator, config, attempt)
    return {
        "flags": gather_object([[config.batch_size, config.accumulation_steps]]),
        "samples per step": data.StepSampler(SAMPLES, config, accelerator).samples_per_step,
        "weights": train(accelerator, config),
        "weights unsplit": train(accelerator, asked),
    }


def statistics(accelerator) -> dict:
    """Averaged running statistics of three batches that differ between ranks, before and after they are shared, and what
    the check of the replicas says of them and of a buffer that is no running statistic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    model.register_buffer("load", torch.zeros(2))
    model = training.own_buffers(accelerator.prepare(model))
    raw = accelerator.unwrap_model(model)
    ema = training.EMA(raw, 0.5)
    rng = np.random.default_rng(accelerator.process_index)
    for step in range(3):
        model(torch.from_numpy(rng.normal(size=(8, 3)))).sum().backward()
        ema.update(step)
    before = gather_object([ema.module[1].running_mean.tolist()])
    ema.share_buffers()
    after = gather_object([ema.module[1].running_mean.tolist()])
    training.check_replicas(accelerator, raw, "in training")
    raw.load += accelerator.process_index
    waits = accelerator.num_processes > 1 and model.will_sync_module_buffers()
    try:
        training.check_replicas(accelerator, raw, "after a change")
        drifted = ""
    except RuntimeError as error:
        drifted = str(error)
    return {"before": before, "after": after, "drifted": drifted, "waits": waits}


def main(sets: Path, out: Path) -> None:
    accelerator = launch.start(RunConfig(output_dir=out.parent, tracker="none"))
    store = Store(sets)

    def settings(accumulation: int) -> RunConfig:
        batch = GLOBAL_BATCH // accelerator.num_processes // accumulation
        return RunConfig(batch_size=batch, accumulation_steps=accumulation, epochs=2, num_workers=0)

    result = {
        "evaluation": [evaluate(accelerator, store, size) for size in SIZES],
        "ledger": {workers: ledger(accelerator, workers) for workers in (0, 2)},
        "weights": {n: train(accelerator, settings(n)) for n in (1, 2)},
        "weights of means": {n: train(accelerator, settings(n), means=True) for n in (1, 2)},
        "found": find_batch(accelerator),
        "statistics": statistics(accelerator),
    }
    if accelerator.is_main_process:
        out.write_text(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    with sentences():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
