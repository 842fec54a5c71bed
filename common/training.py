"""What the four training loops share: randomness and schedules as functions of the step, the averaged weights, and the
decisions that all ranks take together. The loop itself stands in each script."""

import copy
import hashlib
import logging
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.cli import RunConfig, UserError
from common.launch import stop_requested

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# functions of the step


def hashed(*key: int) -> int:
    """A 32-bit number that (seed, step, ...) alone determines. A generator of NumPy's does that too: in train_ultimate's
    step, whose work drives it out of the processor's caches, drawing the images' side took 157 us with it, 26 with this."""
    packed = struct.pack(f"<{len(key)}Q", *(number % 2**64 for number in key))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest())


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout and other noise of one micro-batch: nothing to save, and ranks do not repeat each other's noise."""
    value = hashed(seed, step, micro, rank)
    torch.default_generator.manual_seed(value)  # 1 us; torch.manual_seed asks every backend in turn, 116 us a step
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed(value)


def cosine(step: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """A group's own `scale` multiplies the rate (layer-wise rates). No scheduler: `prepare` would multiply its steps."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


Place = tuple[dict, str]


def places(model: nn.Module) -> list[Place]:
    """Where parameters and buffers stand, each once. Listed once, since a walk through the modules takes 0.5 ms; not the
    tensors themselves, since wrapping a model anew may put other buffers in their place (on two CPU processes it does)."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            found |= {id(tensor): (owner, name) for name, tensor in owner.items() if tensor is not None}
    return list(found.values())


def standing(where: list[Place]) -> list[Tensor]:
    return [owner[name] for owner, name in where]


class EMA:
    """An averaged copy of the model for evaluation and export. The decay grows with the step, so that the average follows
    the model at first. Floating buffers are averaged too: running statistics belong to the weights of their time (a router
    whose running mean was copied sent all images to three of seven experts, measured). Counters are copied."""

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        pairs = list(zip(places(self.module), places(model), strict=True))
        floating = [owner[name].is_floating_point() for (owner, name), _ in pairs]
        self.averaged = [pair for pair, yes in zip(pairs, floating, strict=True) if yes]
        self.copied = [pair for pair, yes in zip(pairs, floating, strict=True) if not yes]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*map(standing, zip(*self.averaged, strict=True)), 1 - decay)
        for mine, theirs in self.copied:
            mine[0][mine[1]].copy_(theirs[0][theirs[1]])

    def share_buffers(self) -> None:
        """Before an evaluation: each rank has running statistics of its own batches, and rank 0's are what is saved."""
        if dist.is_initialized():
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------------------------------
# decisions that all ranks take together


def add(totals: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
    """Sum the terms of a micro-batch up. The first is taken as it is: for 50 terms 0 + tensor costs 0.15 ms."""
    for name, value in terms.items():
        totals[name] = totals[name] + value.detach() if name in totals else value.detach()


@dataclass
class Verdict:
    """What all ranks know of a step before any of them updates its weights."""

    terms: dict[str, float]
    grad_norm: float
    stop: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm) and all(map(math.isfinite, self.terms.values()))


def agree(accelerator: Accelerator, terms: dict[str, Tensor], grad_norm: Tensor) -> Verdict:
    """Loss terms summed over processes and the stop request of any process, in the one collective and the one transfer of a
    step (0.3 ms over gloo). The gradient's norm is that of the averaged gradients, equal on all ranks already."""
    values, ranks = torch.stack([grad_norm, *terms.values()]).detach().double(), accelerator.num_processes
    if ranks == 1:
        norm, *sums = values.tolist()
        stop = stop_requested()
    else:
        values = torch.cat([values, values.new_tensor([stop_requested()])])
        norm, *sums, stop = accelerator.reduce(values, "sum").tolist()
    return Verdict(dict(zip(terms, sums, strict=True)), norm / ranks, stop > 0)


def agree_to_stop(accelerator: Accelerator) -> bool:
    """The stop request alone, after something long that was not a training step."""
    if accelerator.num_processes == 1:
        return stop_requested()
    return accelerator.reduce(torch.tensor(float(stop_requested()), device=accelerator.device), "sum").item() > 0


class FiniteGuard:
    """Skips and counts steps whose loss or gradient is not finite: on all ranks, since `Verdict.finite` is equal on all.

    BatchNorm has taken the bad batch into its running statistics by then, so buffers are put back."""

    def __init__(self, model: nn.Module, limit: int, scaler: object | None):
        # an fp16 loss scale halves from 65536 when gradients overflow: that is its search, not a broken run
        self.limit = limit + (24 if scaler else 0)
        self.buffers = [p for p in places(model) if not isinstance(p[0][p[1]], nn.Parameter)]
        self.total = self.in_a_row = 0
        self.kept = [buffer.clone() for buffer in standing(self.buffers)]

    def remember(self) -> None:
        for kept, buffer in zip(self.kept, standing(self.buffers), strict=True):
            kept.copy_(buffer)

    def passes(self, verdict: Verdict, step: int) -> bool:
        if verdict.finite:
            self.in_a_row = 0
            self.remember()
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        for buffer, kept in zip(standing(self.buffers), self.kept, strict=True):
            buffer.copy_(kept)
        bad = [name for name, value in verdict.terms.items() if not math.isfinite(value)] or ["the gradient"]
        logger.warning(
            "Step %d is skipped on all processes: %s is not finite (%d in a row)", step, ", ".join(bad), self.in_a_row
        )
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (--max-skipped-steps), last at"
                f" step {step}: lower --lr, check the data, or use --mixed-precision bf16 or no. The last checkpoint is"
                " intact."
            )
        return False

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.remember()


class TermWatch:
    """Warns once of a loss term that has been zero or constant for `patience` steps: it trains nothing."""

    def __init__(self, patience: int = 50):
        self.patience = patience
        self.seen: dict[str, tuple[float, int]] = {}
        self.told: set[str] = set()

    def update(self, terms: dict[str, float]) -> None:
        for name, value in terms.items():
            before, times = self.seen.get(name, (math.nan, 0))
            times = times + 1 if abs(value - before) <= 1e-6 * abs(before) else 1
            self.seen[name] = (before if times > 1 else value, times)
            if times == self.patience and name not in self.told:
                self.told.add(name)
                logger.warning("The loss term %s has been %.4g for %d steps: it trains nothing", name, value, times)


def check_replicas(accelerator: Accelerator, module: nn.Module, where: str) -> None:
    """All ranks must hold the same weights to the bit, and the same buffers but for running statistics of their own batches:
    a sum of the bit patterns, compared across ranks."""
    if accelerator.num_processes == 1:
        return
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    shared = (part for part in module.modules() if not isinstance(part, nn.modules.batchnorm._NormBase))
    tensors = [*module.parameters(), *(buffer for part in shared for buffer in part.buffers(recurse=False))]
    sums = [(p.detach().view(views[p.element_size()]).long() * (i + 1)).sum() for i, p in enumerate(tensors)]
    gathered = accelerator.gather(torch.stack(sums).sum()[None]).tolist()
    if len(set(gathered)) > 1:
        raise RuntimeError(
            f"{where}: the processes hold different weights or buffers (checksums {gathered}); their updates have drifted"
            " apart"
        )


def rewrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Prepare a model again after parameters were frozen or thawed. DDP reads `requires_grad` when it is built: what thaws
    later is never averaged, and the replicas drift apart without a word."""
    raw = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator._models.clear()
    return own_buffers(accelerator.prepare_model(raw))


def own_buffers(model: nn.Module) -> nn.Module:
    """No rank waits for rank 0's buffers in every forward pass: two CPU processes had 0.86 of one's speed in train_vqgan and
    0.90 in train_ultimate with that wait, 0.91 in both without. Running statistics are read by evaluation alone, before
    which `EMA.share_buffers` sends them; a codebook or a router's load is made of reduced sums, the same on all ranks, which
    `check_replicas` sees to. By attribute, as the argument has another name since torch 2.15, and a warning under the old
    one."""
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False
    return model


@dataclass
class Rule:
    """What counts as better for one metric."""

    metric: str
    mode: str = "min"
    delta: float = 0.0
    grace: int = 0
    """Evaluations before patience may run out."""
    initial: float | None = None
    window: int = 1
    """The metric is averaged over this many evaluations first."""


@dataclass
class EarlyStopping:
    """Better when `any` or `all` rules improve; stops after `patience` evaluations without (0: never). Decided by rank 0."""

    rules: list[Rule]
    patience: int
    combine: str = "any"
    best: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    evaluations: int = 0
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.patience
        self.best = {rule.metric: rule.initial for rule in self.rules if rule.initial is not None}

    def update(self, accelerator: Accelerator, metrics: dict[str, float]) -> tuple[bool, bool]:
        """(better, stop): the same on every rank, because only rank 0's answer counts."""
        box = [None]
        if accelerator.is_main_process:
            box = [(self._judge(metrics), self.state_dict())]
        broadcast_object_list(box)
        better, state = box[0]
        self.load_state_dict(state)
        return better, self.patience > 0 and self.left <= 0

    def _judge(self, metrics: dict[str, float]) -> bool:
        self.evaluations += 1
        improved = {}
        for rule in self.rules:
            values = (self.history.get(rule.metric, []) + [metrics[rule.metric]])[-rule.window :]
            self.history[rule.metric] = values
            value, best = sum(values) / len(values), self.best.get(rule.metric)
            if best is None or (best - rule.delta > value if rule.mode == "min" else best + rule.delta < value):
                improved[rule.metric] = value
        better = bool(improved) if self.combine == "any" else len(improved) == len(self.rules)
        if better:
            self.best.update(improved)
            self.left = self.patience
        elif all(self.evaluations > rule.grace for rule in self.rules):
            self.left -= 1
        return better

    def state_dict(self) -> dict:
        return {"best": self.best, "history": self.history, "evaluations": self.evaluations, "left": self.left}

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, value)


def find_batch_size(accelerator: Accelerator, config: RunConfig, attempt: Callable[[int], None]) -> None:
    """Set --batch-size to the largest that fits on every rank, and --accumulation-steps so that a step has as many samples
    as asked. `attempt(n)` runs forward and backward on n of the largest samples with the bare model, no collectives: a rank
    that runs out of memory inside a collective would leave the others waiting."""
    share = config.batch_size * config.accumulation_steps
    fits = 0
    for size in (n for n in range(share, 0, -1) if share % n == 0):
        failed = False
        try:
            attempt(size)
        except (torch.OutOfMemoryError, MemoryError):
            failed = True
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            failed = True
        if torch.cuda.is_available():  # outside `except`, whose traceback holds the tensors
            torch.cuda.empty_cache()
        if not failed:
            fits = size
            break
    fits = min(gather_object([fits]))
    if fits == 0:
        raise UserError("--find-batch-size: not even one sample fits in memory; choose a smaller model or smaller samples.")
    config.batch_size, config.accumulation_steps = fits, share // fits
    accelerator.gradient_accumulation_steps = config.accumulation_steps
    logger.info(
        "--find-batch-size: batch %d x accumulation %d on each process", config.batch_size, config.accumulation_steps
    )
