"""Data: which process sees which sample when, and how an evaluation sees each sample once."""

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from common.cli import RunConfig, UserError, die_with_parent
from common.launch import stop_requested


class StepSampler(Sampler):
    """This process's micro-batches of keys (epoch, index) for optimizer steps `start`, `start + 1`, ... to the last one.

    The order is a permutation of (seed, epoch), cut to whole global batches: any number of processes sees the same samples
    in the same step, and a resumed run starts in the middle of an epoch at no cost. Keys carry the epoch, so augmentation
    can be drawn from (seed, epoch, index) in any worker.

    `costs` (e.g. numbers of nodes) puts samples of like cost into one micro-batch, and gives all micro-batches of a step
    about the same cost: `batch_size` is then the mean number of samples in one. With `budget` a step has about this cost
    per micro-batch instead of a number of samples; the number of steps in an epoch stays constant.
    """

    def __init__(
        self,
        size: int,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        costs: np.ndarray | None = None,
        budget: float | None = None,
        first_epoch: int = 0,
    ):
        self.first_epoch = first_epoch  # of a later stage, whose steps are counted from 0
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
            step = f"{self.samples_per_step} samples" if budget is None else "this budget"
            raise UserError(
                f"The training set's {size} samples do not fill one step of {step}:"
                " lower --batch-size or --accumulation-steps."
            )
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or math.inf)
        self.size_of_step = self.samples_per_step if budget is None else self.cost_per_step  # part of a run's identity
        self.start = 0
        self._batches: dict[int, list[np.ndarray]] = {}

    def global_batch(self, step: int) -> np.ndarray:
        """The indices of all samples of one optimizer step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._batches:
            order = np.random.default_rng([self.seed, self.first_epoch + epoch]).permutation(self.size)
            if self.cost_per_step is None:
                order = order[: self.steps_per_epoch * self.samples_per_step]
                self._batches[epoch] = np.split(order, self.steps_per_epoch)
            else:
                middle = np.cumsum(self.costs[order]) - self.costs[order] / 2
                cuts = np.searchsorted(middle, self.cost_per_step * np.arange(1, self.steps_per_epoch + 1))
                self._batches[epoch] = np.split(order, cuts)[:-1]
            self._batches.pop(epoch - 2, None)  # two are kept: the loader may be an epoch ahead of the loop
        return self._batches[epoch][position]

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """The global batch cut into accumulation x processes parts; part micro * processes + rank is this rank's."""
        batch = self.global_batch(step)
        if self.costs is None:
            return np.split(batch, self.parts)
        batch = batch[np.argsort(self.costs[batch], kind="stable")]
        if len(batch) < self.parts:
            raise UserError(
                f"A step of this budget holds {len(batch)} samples for {self.parts} micro-batches: raise the budget."
            )
        share = np.cumsum(self.costs[batch]) / self.costs[batch].sum()
        cuts = np.searchsorted(share, np.arange(1, self.parts) / self.parts + 1e-9, side="right")  # like costs: like parts
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
            epoch = self.first_epoch + step // self.steps_per_epoch
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
        batches = [next(self.batches) for _ in range(self.accumulation)]
        if self.device.type != "cpu":  # there it would copy nothing in 0.1 ms
            batches = send_to_device(batches, self.device, non_blocking=True)
        self.waited += time.perf_counter() - began
        return batches


def fingerprint(values: np.ndarray) -> str:
    """A short hash, e.g. of a split: printed, stored with the checkpoint and compared on resume."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:12]


def content_hash(digests: Iterable[str]) -> str:
    """Of a training set by its samples' own hashes, whatever their files are called and in whatever order."""
    return fingerprint(np.frombuffer("".join(sorted(digests)).encode(), np.uint8))


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
