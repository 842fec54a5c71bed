"""Adversarial losses against numbers worked out by hand, the schedule and its back-off, and a weight that does not depend on
how a step is dealt to processes and micro-batches."""

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from common.adversarial import (
    AdaptiveWeight,
    GanSchedule,
    LeCAM,
    feature_matching,
    hinge_d,
    hinge_g,
    vanilla_d,
    vanilla_g,
)
from common.cli import UserError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32))


def volume(values: list[list[float]]) -> Tensor:
    """Logits (B, 1, 2, 1, 1) of a volume discriminator."""
    return torch.tensor(values)[:, None, :, None, None]


REAL, FAKE = volume([[3.0, 0.5], [-1.0, 1.0]]), volume([[-2.0, 0.0], [1.0, -0.5]])

# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_hinge_by_hand():
    # (0 + 0.5) / 2 and (0 + 1) / 2; (2 + 0) / 2 and (2 + 0.5) / 2
    torch.testing.assert_close(hinge_d(REAL, FAKE), torch.tensor([(0.25 + 0.5) / 2, (1 + 1.25) / 2]))
    torch.testing.assert_close(hinge_g(FAKE), torch.tensor([1.0, -0.25]))
    assert hinge_d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).item() == 1
    fake = FAKE.clone().requires_grad_()
    hinge_g(fake).sum().backward()  # no saturation for the generator
    assert torch.equal(fake.grad, torch.full_like(fake, -0.5))
    real = REAL.clone().requires_grad_()
    hinge_d(real, FAKE).sum().backward()  # a place beyond the margin teaches nothing
    assert torch.equal(real.grad, volume([[0.0, -0.25], [-0.25, 0.0]]))


def test_vanilla_is_cross_entropy_and_does_not_saturate():
    ones, zeros = torch.ones_like(REAL), torch.zeros_like(REAL)
    entropy = F.binary_cross_entropy_with_logits(REAL, ones, reduction="none")
    entropy = entropy + F.binary_cross_entropy_with_logits(FAKE, zeros, reduction="none")
    torch.testing.assert_close(vanilla_d(REAL, FAKE), entropy.flatten(1).mean(1) / 2)
    sure = torch.full((1, 1, 2), -20.0, requires_grad=True)
    vanilla_g(sure).sum().backward()
    torch.testing.assert_close(sure.grad, torch.full((1, 1, 2), -0.5))


def test_feature_matching_by_hand():
    fake = [torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True), torch.zeros(2, 4, 3, requires_grad=True)]
    real = [torch.tensor([[0.0, 1.0], [0.0, 2.0]], requires_grad=True), torch.full((2, 4, 3), 0.5, requires_grad=True)]
    value = feature_matching(fake, real)
    torch.testing.assert_close(value, torch.tensor([(1.5 + 0.5) / 2, (1.0 + 0.5) / 2]))  # layers alike, whatever their size
    value.sum().backward()
    assert all(x.grad is None for x in real) and torch.equal(fake[0].grad[0], torch.tensor([0.25, 0.25]))
    with pytest.raises(ValueError):
        feature_matching(fake, real[:1])


def lecam() -> LeCAM:
    regulariser = LeCAM()
    regulariser.update(0.3, -0.2)
    return regulariser


LOSSES = {
    "hinge": hinge_d,
    "vanilla": vanilla_d,
    "hinge_g": lambda real, fake: hinge_g(fake),
    "vanilla_g": lambda real, fake: vanilla_g(fake),
    "features": lambda real, fake: feature_matching([fake, 2 * fake], [real, 2 * real]),
    "lecam": lambda real, fake: lecam()(real, fake),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_float32_value_per_sample_whatever_its_mates(loss):
    real, fake = draw(3, 1, 4, 5), draw(3, 1, 4, 5, seed=1) * torch.tensor([1.0, 0.01, 30.0])[:, None, None, None]
    together = loss(real, fake)
    alone = torch.cat([loss(real[i : i + 1], fake[i : i + 1]) for i in range(3)])
    assert together.shape == (3,) and len(set(together.tolist())) == 3
    torch.testing.assert_close(together, alone)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(real.bfloat16(), fake.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, loss(real.bfloat16().float(), fake.bfloat16().float()))


# ---------------------------------------------------------------------------------------------------------------------
# LeCAM


def test_lecam_is_the_papers_formula_with_the_means_of_steps_before():
    regulariser = LeCAM(decay=0.9)
    assert torch.equal(regulariser(REAL, FAKE), torch.zeros(2))
    regulariser.update(1.0, -1.0)  # the first is taken as it is: a mean that starts at 0 would be wrong for long
    # real above -1: (4^2 + 1.5^2) / 2 and (0 + 2^2) / 2; fake below 1: (3^2 + 1^2) / 2 and (0 + 1.5^2) / 2
    expected = torch.tensor([9.125 + 5.0, 2.0 + 1.125])
    torch.testing.assert_close(regulariser(REAL, FAKE), expected)
    torch.testing.assert_close(regulariser(REAL, FAKE), expected)  # to be called as often as there are micro-batches
    regulariser.update(2.0, 1.0)
    assert (regulariser.real, regulariser.fake) == pytest.approx((1.1, -0.8))
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    regulariser(real, fake).sum().backward()
    assert (real.grad >= 0).all() and (fake.grad <= 0).all()  # both are pulled towards each other
    assert real.grad[0, 0, 0] > 0 and fake.grad[0, 0, 0] < 0


def test_lecam_goes_on_after_a_resume():
    one, other = LeCAM(), LeCAM()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    one.update(0.1, -0.7)
    assert torch.equal(other(REAL, FAKE), torch.zeros(2))  # of a checkpoint before the first step, too
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for regulariser in (one, other):
        regulariser.update(0.37, -0.11)
    assert torch.equal(one(REAL, FAKE), other(REAL, FAKE)) and one.state_dict() == other.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# schedule


def test_schedule_by_numbers():
    schedule = GanSchedule(start=10, warmup=4, ramp=5)
    trained = [step for step in range(20) if schedule.trains_discriminator(step)]
    assert trained == list(range(6, 20))
    weights = [schedule.generator_weight(step) for step in range(8, 17)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert [GanSchedule(start=3).generator_weight(step) for step in (2, 3, 4)] == [0, 1, 1]
    assert GanSchedule(start=2, warmup=5).trains_discriminator(0)


@pytest.mark.parametrize("start", [None, -1])
def test_no_discriminator(start, caplog):
    schedule = GanSchedule(start=start, warmup=5, ramp=5)
    with caplog.at_level(logging.INFO):
        schedule.check(100)
    assert "No discriminator" in caplog.text and "trains from" not in caplog.text
    assert not any(schedule.trains_discriminator(step) or schedule.generator_weight(step) for step in range(100))
    assert not schedule.update(1, 30.0) and not schedule.update(90, 3.0) and not schedule.generator_weight(95)


def test_the_start_is_told_and_one_that_is_never_reached_is_refused(caplog):
    caplog.set_level(logging.INFO)
    GanSchedule(start=10, warmup=4, ramp=5).check(11)
    told = (
        "Discriminator trains from step 6, generator sees it from step 10 of 11, full weight at 14, which is after the end"
    )
    assert caplog.messages == [told]
    GanSchedule(start=10, warmup=40, ramp=5).check(15)
    assert caplog.messages[1] == (
        "Discriminator trains from step 0, generator sees it from step 10 of 15, full weight at 14"
    )
    GanSchedule(start=10).check(11)
    assert caplog.messages[2].endswith("full weight at 10")
    for total in (10, 9):
        with pytest.raises(UserError, match=rf"--discriminator-iter-start 10 .*{total} steps.*--epochs, --max-steps.*-1"):
            GanSchedule(start=10, warmup=4, ramp=5).check(total)


def test_what_the_log_tells_is_what_happens(caplog):
    """The numbers of the sentence are the first steps at which it is so."""
    caplog.set_level(logging.INFO)
    for schedule in (GanSchedule(7, 3, 4), GanSchedule(0, 3, 0), GanSchedule(5, 0, 1)):
        schedule.check(50)
        told = [int(word.strip(",")) for word in caplog.messages[-1].split() if word.strip(",").isdigit()]
        first = [
            next(step for step in range(50) if schedule.trains_discriminator(step)),
            next(step for step in range(50) if schedule.generator_weight(step) > 0),
            50,
            next(step for step in range(50) if schedule.generator_weight(step) == 1),
        ]
        assert told == first


def test_back_off_and_recovery(caplog):
    schedule = GanSchedule(start=100, ramp=0, tolerance=1.0)
    for step, psnr in ((50, 29.0), (75, 30.0), (100, 31.0)):  # at 100 no generator step has seen the discriminator yet
        assert not schedule.update(step, psnr)
    assert not schedule.update(150, 30.001) and schedule.generator_weight(150) == 1
    assert not caplog.records
    assert schedule.update(200, 29.4) and schedule.generator_weight(200) == 0.5
    (warning,) = caplog.messages
    assert caplog.records[0].levelno == logging.WARNING
    assert all(part in warning for part in ("29.40 dB", "1 dB (--gan-psnr-tolerance)", "31.00 dB", "halved to 0.5"))
    assert schedule.update(250, 29.9) and schedule.generator_weight(250) == 0.25
    assert not schedule.update(300, 30.4) and schedule.factor == 0.25  # neither fallen nor back: 0.6 dB below
    assert schedule.update(350, 30.5) and schedule.factor == 0.5
    assert schedule.update(400, 35.0) and schedule.factor == 1
    assert not schedule.update(450, 35.0) and schedule.factor == 1
    assert not schedule.update(500, 30.1) and schedule.factor == 1  # of the reconstruction phase, not of what came later


def test_back_off_without_an_evaluation_before_the_start():
    schedule = GanSchedule(start=0, tolerance=0.5)
    assert not schedule.update(50, 25.0) and not schedule.update(100, 28.0)
    assert not schedule.update(150, 24.6) and schedule.update(200, 24.4)


def test_back_off_is_multiplied_into_the_ramp_and_survives_a_resume():
    schedule = GanSchedule(start=10, ramp=10, tolerance=1.0)
    schedule.update(10, 30.0)
    schedule.update(12, 20.0)
    resumed = GanSchedule(start=10, ramp=10, tolerance=1.0)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    for one in (schedule, resumed):
        assert [one.generator_weight(step) for step in (9, 14, 19, 30)] == pytest.approx([0, 0.25, 0.5, 0.5])
        assert one.update(20, 28.0) and one.factor == 0.25  # the best is remembered, too
    fresh = GanSchedule(start=10)
    fresh.load_state_dict(json.loads(json.dumps(GanSchedule(start=10).state_dict())))
    assert not fresh.update(5, 30.0) and fresh.best == 30


# ---------------------------------------------------------------------------------------------------------------------
# adaptive weight


class Recorder:
    """Rank 1 of two: what it would send."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.sent = tensor.clone()
        return tensor


class Both:
    """Rank 0, which receives that."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor + self.recorder.sent


@pytest.fixture(scope="module")
def alone() -> Accelerator:
    return Accelerator(cpu=True)


def gradients(step: int) -> tuple[Tensor, Tensor]:
    """Of four samples at a layer's weight (2, 3, 3): the first agree and the second do not, so that the ratio of the sums is
    about twice that of each sample."""
    return 1 + 0.2 * draw(4, 2, 3, 3, seed=step), draw(4, 2, 3, 3, seed=step + 100)


def test_adaptive_weight_depends_on_neither_processes_nor_accumulation(alone):
    whole, accumulated, dealt = (AdaptiveWeight(limit=1e4) for _ in range(3))
    for step in range(5):
        rec, gan = gradients(step)
        whole.add(rec.sum(0), gan.sum(0))
        whole.update(alone)
        for i in range(4):
            accumulated.add(rec[i], gan[i])
        accumulated.update(alone)
        other, recorder = AdaptiveWeight(), Recorder()
        for rank, mine in ((other, (2, 3)), (dealt, (0, 1))):
            for i in mine:
                rank.add(rec[i], gan[i])
        other.update(recorder)
        dealt.update(Both(recorder))
        for weight in (accumulated, dealt):
            assert weight.value == pytest.approx(whole.value, rel=1e-5)
        ratios = [float(rec[i].norm() / gan[i].norm()) for i in range(4)]
        assert whole.value > 1.4 * sum(ratios) / 4  # what a weight per micro-batch or process would be


def test_adaptive_weight_by_hand(alone):
    weight = AdaptiveWeight(limit=10.0, decay=0.75)
    weight.update(alone)  # a step without any discriminator
    assert weight.value == 0
    weight.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert weight.value == 0
    weight.add(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    assert weight.value == 0  # within the step nothing changes
    weight.update(alone)
    assert weight.value == pytest.approx(5 / 2)
    weight.add(torch.tensor([1.0]), torch.tensor([1e-6]))
    weight.update(alone)
    assert weight.value == pytest.approx(0.75 * 2.5 + 0.25 * 10)
    kept = weight.value
    for rec, gan in ((1.0, 0.0), (1.0, float("nan")), (float("inf"), 1.0), (float("inf"), float("inf"))):
        weight.add(torch.tensor([rec]), torch.tensor([gan]))
        weight.update(alone)
        assert weight.value == kept
    weight.add(torch.tensor([0.0]), torch.tensor([1.0]))  # nothing of the steps that were not finite is left
    weight.update(alone)
    assert weight.value == pytest.approx(0.75 * kept)


def test_adaptive_weight_with_a_loss_scale_and_half_types(alone):
    plain, scaled, half = (AdaptiveWeight() for _ in range(3))
    rec, gan = (grad[0] for grad in gradients(0))
    plain.add(rec, gan)
    scaled.add(65536 * rec, 65536 * gan)
    half.add((2e4 * rec).half(), (2e4 * gan).half())  # whose norms are beyond float16
    for weight in (plain, scaled, half):
        weight.update(alone)
    assert scaled.value == pytest.approx(plain.value, rel=1e-5) and half.value == pytest.approx(plain.value, rel=1e-3)


def test_adaptive_weight_is_a_number_without_a_graph_and_survives_a_resume(alone):
    weight, resumed = AdaptiveWeight(), AdaptiveWeight()
    resumed.load_state_dict(json.loads(json.dumps(weight.state_dict())))
    assert resumed.value == 0
    leaf = torch.ones(3, requires_grad=True)
    weight.add(leaf * 2, leaf * 3)
    assert not weight.sums.requires_grad
    weight.update(alone)
    resumed.load_state_dict(json.loads(json.dumps(weight.state_dict())))
    for one in (weight, resumed):
        one.add(torch.ones(3), torch.full((3,), 7.0))
        one.update(alone)
    assert resumed.value == weight.value == pytest.approx(0.95 * 2 / 3 + 0.05 / 7)
