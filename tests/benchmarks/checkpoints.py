"""Saving and loading a checkpoint against accelerate's save_state and load_state: 25 million weights (100 MB) with Adam.

    python tests/benchmarks/checkpoints.py

Ours syncs every file to the disk, hashes it and renames the folder at the end; it reads with a check of every hash.
accelerate does none of it, so the second line gives it the syncs, without which a checkpoint is lost with the power. Wall
time: a disk that is busy otherwise shows.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import small_jobs
import timing
import torch
from accelerate import Accelerator
from torch import nn

from common.checkpoints import RunFolder
from common.cli import RunConfig

ROUNDS = 5


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """With a step done, so that Adam has its moments."""
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(1, 2048)).sum().backward()
    optimizer.step()
    return model, optimizer


def sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def measure() -> Iterator[timing.Result]:
    logging.getLogger("run").setLevel(logging.WARNING)  # not a line for every load
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*network())
    folder = Path(tempfile.mkdtemp(dir=small_jobs.work()))
    config = RunConfig(output_dir=folder / "ours", resume_from="auto")
    run = RunFolder(config, accelerator, {})
    parts = {"model": model}, {"optimizer": optimizer}
    theirs = folder / "theirs"
    numbers = iter(range(1000))

    def save() -> None:
        run.save({"step": next(numbers)}, *parts)

    def save_theirs(synced: bool) -> None:
        shutil.rmtree(theirs, ignore_errors=True)  # ours deletes its oldest in every save too
        accelerator.save_state(str(theirs))
        if synced:
            sync(theirs)

    def load_theirs() -> None:
        accelerator.load_state(str(theirs))

    def pairs(ours: Callable[[], object], other: Callable[[], object]) -> dict[str, float]:
        return timing.paired(ours, other, rounds=ROUNDS, clock=time.perf_counter)

    yield timing.Result(
        "save, 100 MB of weights and Adam", "save_state", unit="ms", **pairs(save, partial(save_theirs, False))
    )
    yield timing.Result("the same", "save_state and fsync", unit="ms", **pairs(save, partial(save_theirs, True)))
    yield timing.Result("load, hashes verified", "load_state", unit="ms", **pairs(lambda: run.resume(*parts), load_theirs))


if __name__ == "__main__":
    timing.show(measure())
