"""What the four training loops share: starting processes, dealing data, randomness and schedules as functions of the step,
decisions that all ranks take together, EMA, early stopping. The loop itself stands in each script."""

import copy
import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import accelerate.optimizer
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from common.cli import RunConfig, UserError, die_with_parent
from common.logs import check_tracker, setup_logging

logger = logging.getLogger("run")

# How long a rank waits for the others in a collective. Not 10 minutes: accelerate drops a value equal to its default and
# gloo would then wait for 30 (measured).
PATIENCE = timedelta(minutes=5)

# AcceleratedOptimizer asks twice a step whether the package lomo is installed: 25 stat() calls each, half of accelerate's
# whole overhead (0.1 ms of 0.24 ms a step here, more on network storage).
accelerate.optimizer.is_lomo_available = lambda: False


# ---------------------------------------------------------------------------------------------------------------------
# processes


def start(config: RunConfig) -> Accelerator:
    """Launch guards, process group, signals and logging. Each guard is one sentence with the fix."""
    setup_logging()
    check_tracker(config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in (
        "true",
        "1",
        "yes",
    )
    check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 0 if on_cpu else torch.accelerator.device_count())
    precision = config.mixed_precision
    if on_cpu:
        if precision == "fp16":
            raise UserError("--mixed-precision fp16 needs a GPU; on a CPU leave the flag out or use bf16.")
        if precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
            precision = "no"
            logger.info("No GPU is visible: training on the CPU in float32 instead of fp16")
    else:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    _open_group_of_this_attempt(on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,  # without it N processes on a machine without a GPU each believe that they are alone
        mixed_precision=precision,
        # sync_with_dataloader=False: a step's micro-batches are fetched together, and the loader's end must not sync early
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.accumulation_steps, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # one copy of the gradients less
        ],
    )
    if accelerator.num_processes != world:
        raise UserError(
            f"The launcher started {world} processes but each of them sees {accelerator.num_processes}: they would train alone and"
            " write over each other. Use one of accelerate_configs/, or add --num_processes 1."
        )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _note)  # only now: while the rendezvous waits in C++ a handler could not run
    logger.info(
        "Process %d/%d started on %s%s", accelerator.process_index, world, accelerator.device,
        f" in {accelerator.mixed_precision}" if accelerator.mixed_precision != "no" else "",
    )  # fmt: skip
    return accelerator


def check_devices(processes: int, devices: int) -> None:
    """accelerate would let two processes share a GPU without a word. No device at all: they train on the CPU over gloo."""
    if devices and processes > devices:
        raise UserError(
            f"{processes} processes were launched on this machine, which shows {devices} GPU{'s' * (devices > 1)}: add"
            f" --num_processes {devices} (or check CUDA_VISIBLE_DEVICES)."
        )
    if not devices and processes > 1:
        logger.info("No GPU is visible: %d processes train on the CPU", processes)


def _open_group_of_this_attempt(on_cpu: bool) -> None:
    """torchrun keeps one store for all of its --max_restarts attempts, so that new ranks read the addresses of dead ones:
    6 of 12 restarts failed or hung. With the store's keys prefixed by the attempt 12 of 12 worked."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and "RANK" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, PATIENCE)
        if not on_cpu:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "gloo" if on_cpu else "nccl", store=dist.PrefixStore(f"attempt{attempt}", store),
            rank=int(os.environ["RANK"]), world_size=world, timeout=PATIENCE,
        )  # fmt: skip


_signals: list[int] = []


def _note(number: int, frame: object) -> None:
    if number == signal.SIGINT and signal.SIGINT in _signals:
        raise KeyboardInterrupt  # asked twice: leave at once, without a checkpoint
    _signals.append(number)


def stop_requested() -> bool:
    """Has this process been asked to stop? Act on it only through `agree`, so that all ranks stop at the same step."""
    return bool(_signals)


# ---------------------------------------------------------------------------------------------------------------------
# data: which process sees which sample when


class StepSampler(Sampler):
    """This process's micro-batches of keys (epoch, index) for optimizer steps `start`, `start + 1`, ... to the last one.

    The order is a permutation of (seed, epoch), cut to whole global batches: any number of processes sees the same samples in
    the same step, and a resumed run starts in the middle of an epoch at no cost. Keys carry the epoch, so augmentation can be
    drawn from (seed, epoch, index) in any worker.

    `costs` (e.g. nodes squared) puts samples of like cost into one micro-batch. With `budget` a process's micro-batch
    has about this cost instead of `batch_size` samples; the number of steps in an epoch stays constant.
    """

    def __init__(
        self,
        size: int,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        costs: np.ndarray | None = None,
        budget: float | None = None,
    ):
        self.size, self.seed, self.costs = size, config.seed, costs
        self.parts = config.accumulation_steps * accelerator.num_processes
        self.processes, self.rank, self.accumulation = (
            accelerator.num_processes,
            accelerator.process_index,
            config.accumulation_steps,
        )
        self.samples_per_step = config.batch_size * self.parts if budget is None else None
        self.cost_per_step = None if budget is None else budget * self.parts
        self.steps_per_epoch = int(costs.sum() // self.cost_per_step) if budget else size // self.samples_per_step
        if self.steps_per_epoch == 0:
            raise UserError(
                f"The training set's {size} samples do not fill one step of"
                f" {f'{self.samples_per_step} samples' if budget is None else 'this budget'}: lower --batch-size or --accumulation-steps."
            )
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or math.inf)
        self.size_of_step = self.samples_per_step if budget is None else self.cost_per_step  # part of a run's identity
        self.start = 0
        self._epoch, self._batches = -1, []

    def global_batch(self, step: int) -> np.ndarray:
        """The indices of all samples of one optimizer step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            if self.cost_per_step is None:
                order = order[: self.steps_per_epoch * self.samples_per_step]
                self._batches = np.split(order, self.steps_per_epoch)
            else:
                middle = np.cumsum(self.costs[order]) - self.costs[order] / 2
                cuts = np.searchsorted(middle, self.cost_per_step * np.arange(1, self.steps_per_epoch + 1))
                self._batches = np.split(order, cuts)[:-1]
            self._epoch = epoch
        return self._batches[position]

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """The global batch cut into accumulation x processes parts; part micro * processes + rank is this rank's."""
        batch = self.global_batch(step)
        if self.costs is not None:
            batch = batch[np.argsort(self.costs[batch], kind="stable")]
        if self.cost_per_step is None:
            return np.split(batch, self.parts)
        if len(batch) < self.parts:
            raise UserError(
                f"A step of this budget holds {len(batch)} samples for {self.parts} micro-batches: raise the budget."
            )
        share = np.cumsum(self.costs[batch]) / self.costs[batch].sum()
        cuts = np.searchsorted(share, np.arange(1, self.parts) / self.parts)
        lowest = np.arange(1, self.parts)  # every part keeps at least one sample
        return np.split(
            batch, np.clip(np.maximum.accumulate(cuts - lowest) + lowest, lowest, len(batch) - self.parts + lowest)
        )

    def balance(self, step: int) -> tuple[float, float]:
        """(padding waste, imbalance): the share of the cost that pads smaller samples to their batch's largest, and the
        busiest process's cost over the mean, 1 when all are equally busy."""
        parts = [self.costs[part] for part in self.micro_batches(step)]
        padded = np.array([len(part) * part.max() for part in parts])
        busy = padded.reshape(self.accumulation, self.processes).sum(0)
        return float(1 - sum(part.sum() for part in parts) / padded.sum()), float(busy.max() / busy.mean())

    def __len__(self) -> int:
        return (self.total_steps - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.total_steps):
            epoch = step // self.steps_per_epoch
            for part in self.micro_batches(step)[self.rank :: self.processes]:
                yield [(epoch, int(index)) for index in part]


class EvalSampler(Sampler):
    """Batches 0, 1, 2, ... of the set, dealt to the processes in turn: every sample once, in the same batches on any number
    of processes, so that each sample's values are the same to the bit."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        accelerator: Accelerator,
        *,
        costs: np.ndarray | None = None,
        batches: int | None = None,
    ):
        order = np.arange(size) if costs is None else np.argsort(costs, kind="stable")
        every = [order[i : i + batch_size].tolist() for i in range(0, size, batch_size)][:batches]
        self.size = sum(map(len, every))
        self.batches = every[accelerator.process_index :: accelerator.num_processes]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _start_worker(_: int) -> None:
    os.setpgrp()  # torchrun signals whole process groups: workers would die before the checkpoint that they still feed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(
            number, signal.SIG_DFL
        )  # not SIG_IGN: the loader ends its workers with SIGTERM and would wait for ever
    die_with_parent()
    torch.set_num_threads(1)


def make_loader(dataset, sampler: Sampler, config: RunConfig, collate: Callable | None = None) -> DataLoader:
    """A loader over a sampler that has dealt the batches already, which is why it is marked as prepared:
    `accelerator.prepare` would deal them a second time."""
    workers = min(config.num_workers, len(sampler))
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0,
        worker_init_fn=_start_worker, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(config.seed),  # else each iterator draws from the global generator
    )  # fmt: skip
    loader._is_accelerate_prepared = True
    return loader


class StepLoader:
    """Yields one optimizer step's micro-batches at a time, on the device. `waited` is the seconds spent waiting for data."""

    def __init__(self, loader: DataLoader, accelerator: Accelerator):
        self.batches, self.device = iter(loader), accelerator.device
        self.accumulation, self.waited = loader.batch_sampler.accumulation, 0.0

    def __next__(self) -> list:
        began = time.perf_counter()
        batches = [send_to_device(next(self.batches), self.device, non_blocking=True) for _ in range(self.accumulation)]
        self.waited += time.perf_counter() - began
        return batches


def fingerprint(values: np.ndarray) -> str:
    """A short hash, e.g. of a split: printed, stored with the checkpoint and compared on resume."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:12]


def made_by_main(accelerator: Accelerator, path: Path, make: Callable[[], object]) -> None:
    """Rank 0 makes `path`, however long it takes; the others look for it, since no collective waits that long."""
    if accelerator.is_main_process and not path.exists():
        make()
    while not path.exists():
        if stop_requested():
            raise UserError(f"Stopped while waiting for rank 0 to make {path}.")
        time.sleep(0.2)


def gather_samples(accelerator: Accelerator, batches: Sequence[dict[str, Tensor]], size: int) -> dict[str, np.ndarray]:
    """Per-sample values of all processes as one table sorted by "id". One collective for a whole evaluation.

    Not `gather_for_metrics`: that one pads the last round with repeated samples and asks for equal numbers of batches."""
    keys = batches[0].keys() if batches else ()
    mine = {key: torch.cat([batch[key] for batch in batches]).cpu().numpy() for key in keys}
    parts = [part for part in (gather_object([mine]) if accelerator.num_processes > 1 else [mine]) if part]
    table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(table["id"], kind="stable")
    table = {key: values[order] for key, values in table.items()}
    unique = len(np.unique(table["id"]))
    if unique != size or len(order) != size:
        raise RuntimeError(f"evaluation saw {len(order)} samples, {unique} of them different, of a set of {size}")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# functions of the step


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Dropout and other noise of one micro-batch: nothing to save, and ranks do not repeat each other's noise."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1)[0]))


def cosine(step: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """A group's own `scale` multiplies the rate (layer-wise rates); no scheduler object, so nothing for `prepare` to multiply."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


class EMA:
    """An averaged copy of the model for evaluation and export. The decay grows with the step, so that the average follows
    the model at first. Buffers are copied, not averaged."""

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def share_buffers(self) -> None:
        """Before a distributed evaluation: DDP keeps rank 0's running statistics, each rank's copy holds its own."""
        if dist.is_initialized():
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)


# ---------------------------------------------------------------------------------------------------------------------
# decisions that all ranks take together


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
    stop = torch.tensor(float(stop_requested()), device=grad_norm.device)
    values = torch.stack([stop, *(term.detach() for term in terms.values())]).double()
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, "sum")
    stop_sum, *sums, norm = torch.cat([values, grad_norm.detach().double()[None]]).tolist()
    return Verdict(dict(zip(terms, sums, strict=True)), norm, stop_sum > 0)


def agree_to_stop(accelerator: Accelerator) -> bool:
    """The stop request alone, after something long that was not a training step."""
    if accelerator.num_processes == 1:
        return stop_requested()
    return accelerator.reduce(torch.tensor(float(stop_requested()), device=accelerator.device), "sum").item() > 0


class FiniteGuard:
    """Skips steps whose loss or gradient is not finite: on all ranks, since `Verdict.finite` is the same on all, and counted.

    BatchNorm has taken the bad batch into its running statistics by then, so floating buffers are put back."""

    def __init__(self, model: nn.Module, limit: int, scaler: object | None):
        # an fp16 loss scale halves from 65536 when gradients overflow: that is its search, not a broken run
        self.limit = limit + (24 if scaler else 0)
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.total = self.in_a_row = 0
        self.remember()

    def remember(self) -> None:
        self.kept = [b.clone() for b in self.buffers]

    def passes(self, verdict: Verdict, step: int) -> bool:
        if verdict.finite:
            self.in_a_row = 0
            self.remember()
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        bad = [name for name, value in verdict.terms.items() if not math.isfinite(value)] or ["the gradient"]
        logger.warning(
            "Step %d is skipped on all processes: %s is not finite (%d in a row)", step, ", ".join(bad), self.in_a_row
        )
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} steps in a row had a loss or gradient that is not finite (--max-skipped-steps), last at step"
                f" {step}: lower --lr, check the data, or use --mixed-precision bf16 or no. The last checkpoint is intact."
            )
        return False

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
        self.remember()


def check_replicas(accelerator: Accelerator, module: nn.Module, where: str) -> None:
    """All ranks must hold the same weights to the bit: a sum of the bit patterns, compared across ranks."""
    if accelerator.num_processes == 1:
        return
    views = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [(p.detach().view(views[p.element_size()]).long() * (i + 1)).sum() for i, p in enumerate(module.parameters())]
    gathered = accelerator.gather(torch.stack(sums).sum()[None]).tolist()
    if len(set(gathered)) > 1:
        raise RuntimeError(
            f"{where}: the processes hold different weights (checksums {gathered}); their updates have drifted apart"
        )


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
    """Set --batch-size to the largest that fits on every rank, and --accumulation-steps so that a step has as many samples as
    asked. `attempt(n)` runs forward and backward on n of the largest samples with the bare model, no collectives: a rank
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
