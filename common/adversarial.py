"""Adversarial training: losses per sample in float32, the schedule of the discriminators, and how strong they may be.

What has a state keeps it as numbers that are equal on all processes and fit into JSON. Steps are counted by the optimizer
steps finished before: the first step of a run is step 0.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from common.cli import UserError
from common.losses import in_float32, per_sample

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# losses of one discriminator: logits (B, 1, ...), one per place


@in_float32
def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """1: the discriminator knows nothing; 0: it tells all places apart, and is taught no further."""
    return (per_sample(F.relu(1 - real)) + per_sample(F.relu(1 + fake))) / 2


@in_float32
def hinge_g(fake: Tensor) -> Tensor:
    return -per_sample(fake)


@in_float32
def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    return (per_sample(F.softplus(-real)) + per_sample(F.softplus(fake))) / 2


@in_float32
def vanilla_g(fake: Tensor) -> Tensor:
    """Not minus the discriminator's loss, whose gradient vanishes where the discriminator is sure."""
    return per_sample(F.softplus(-fake))


@in_float32
def l1(output: Tensor, target: Tensor) -> Tensor:
    return per_sample((output - target).abs())


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the distance between a discriminator's features, (B, ...) each; the real ones learn nothing."""
    return torch.stack([l1(mine, theirs.detach()) for mine, theirs in zip(fake, real, strict=True)]).mean(0)


@in_float32
def beyond(logits: Tensor, bound: float) -> Tensor:
    return per_sample(F.relu(logits - bound).square())


@dataclass
class LeCAM:
    """Regularisation of one discriminator where data are few (Tseng et al. 2021): its answers on real samples are held down
    to the running mean of those on fakes, and the other way round.

    The means are those of the finished steps, so that the loss does not depend on the number of processes or micro-batches.
    Before the first `update` it is zero."""

    decay: float = 0.99
    real: float | None = field(default=None, init=False)
    fake: float | None = field(default=None, init=False)

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.real is None:
            return torch.zeros(len(real), device=real.device)
        return beyond(real, self.fake) + beyond(-fake, -self.real)

    def update(self, real: float, fake: float) -> None:
        """Once per optimizer step with its mean logits over all processes."""
        if self.real is None:
            self.real, self.fake = real, fake
        self.real += (1 - self.decay) * (real - self.real)
        self.fake += (1 - self.decay) * (fake - self.fake)

    def state_dict(self) -> dict[str, float | None]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.real, self.fake = state["real"], state["fake"]


# ---------------------------------------------------------------------------------------------------------------------
# when and how strongly


@dataclass
class GanSchedule:
    """When the discriminators train and how much of their weight the generator sees: a function of the step, times a factor
    that backs off while validation PSNR is well below what reconstruction alone had reached."""

    start: int | None
    """First step whose generator sees the discriminators; None or negative: there are none."""
    warmup: int = 0
    """Steps before `start` in which the discriminators train already: an untrained one only disturbs."""
    ramp: int = 0
    """Steps in which the weight rises to 1."""
    tolerance: float = 1.0
    """dB below the best PSNR without discriminators at which the factor is halved."""
    factor: float = field(default=1.0, init=False)
    best: float | None = field(default=None, init=False)

    @property
    def on(self) -> bool:
        return self.start is not None and self.start >= 0

    def trains_discriminator(self, step: int) -> bool:
        return self.on and step >= self.start - self.warmup

    def generator_weight(self, step: int) -> float:
        if not self.on or step < self.start:
            return 0.0
        return self.factor * min(1.0, (step - self.start + 1) / max(self.ramp, 1))

    def check(self, total_steps: int) -> None:
        """Before training: say when it begins, refuse what never begins."""
        if not self.on:
            logger.info("No discriminator: the generator learns from the reconstruction alone")
            return
        if self.start >= total_steps:
            raise UserError(
                f"--discriminator-iter-start {self.start} is never reached: this run has {total_steps} steps. Give a smaller"
                " one, train longer (--epochs, --max-steps), or give -1 for no discriminator."
            )
        full = self.start + max(self.ramp, 1) - 1
        logger.info(
            "Discriminator trains from step %d, generator sees it from step %d of %d, full weight at %d%s",
            max(self.start - self.warmup, 0), self.start, total_steps, full,
            "" if full < total_steps else ", which is after the end",
        )  # fmt: skip

    def update(self, step: int, psnr: float) -> bool:
        """After each evaluation, with the number of finished steps. True when the factor has changed.

        Without an evaluation before the start, the first one after it is what others are compared with."""
        if not self.on:
            return False
        if step <= self.start or self.best is None:
            self.best = psnr if self.best is None else max(self.best, psnr)
            return False
        if psnr < self.best - self.tolerance:
            self.factor /= 2
            logger.warning(
                "Validation PSNR has fallen to %.2f dB, more than %g dB (--gan-psnr-tolerance) below the %.2f dB reached"
                " without the discriminator: the adversarial losses are halved to %g of their weight",
                psnr, self.tolerance, self.best, self.factor,
            )  # fmt: skip
            return True
        if self.factor < 1 and psnr >= self.best - self.tolerance / 2:
            self.factor *= 2
            logger.info(
                "Validation PSNR is back at %.2f dB: the adversarial losses are doubled to %g of their weight",
                psnr, self.factor,
            )  # fmt: skip
            return True
        return False

    def state_dict(self) -> dict[str, float | None]:
        return {"factor": self.factor, "best": self.best}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.factor, self.best = state["factor"], state["best"]


class AdaptiveWeight:
    """Weight at which the adversarial losses pull at the decoder's last layer as strongly as the reconstruction does (Esser
    et al. 2021): the ratio of the norms of both gradients there.

    Of the whole step's gradients, not of each micro-batch's: with a weight per process each would follow another loss, and
    the sum of their gradients would be that of none; and the norm of a mean is not the mean of norms, so that the run would
    depend on processes and accumulation. The whole step's are known only after its last backward pass, and a weight within
    the step would need an exchange in every micro-batch. So `value`, smoothed, is of the finished steps: 0 in the first."""

    def __init__(self, limit: float = 10.0, decay: float = 0.95):
        self.limit, self.decay = limit, decay
        self.mean: float | None = None
        self.sums: Tensor | None = None

    @property
    def value(self) -> float:
        return 0.0 if self.mean is None else self.mean

    def add(self, rec_grad: Tensor, gan_grad: Tensor) -> None:
        """The gradients of a micro-batch, the adversarial one before any weight, schedule or factor. Loss scales are to be
        taken out, or the same in both and throughout the step."""
        pair = torch.stack([rec_grad.detach().flatten(), gan_grad.detach().flatten()]).float()
        self.sums = pair if self.sums is None else self.sums + pair

    def update(self, accelerator: Accelerator) -> None:
        """Once per step on every process, also when the step is skipped. Nothing is learnt of a step without an adversarial
        gradient or with one that is not finite."""
        if self.sums is None:
            return
        sums, self.sums = accelerator.reduce(self.sums, "sum"), None
        reconstruction, adversarial = sums.norm(dim=1).tolist()
        if not math.isfinite(reconstruction + adversarial) or adversarial == 0:
            return
        ratio = min(reconstruction / adversarial, self.limit)
        self.mean = ratio if self.mean is None else self.decay * self.mean + (1 - self.decay) * ratio

    def state_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.mean = state["mean"]
