"""The four scripts on data that take seconds to make, and their own main() with a visitor: what the benchmarks of whole
processes share."""

import atexit
import contextlib
import functools
import importlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import RunConfig, parse, sentences

if TYPE_CHECKING:
    from accelerate import Accelerator

JOBS = ("quantumgrav", "student", "ultimate", "vqgan")


@functools.cache
def work() -> Path:
    """A folder that stays until this process ends: its benchmarks share the data."""
    folder = tempfile.TemporaryDirectory(prefix="benchmarks-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def data_flags(job: str) -> tuple[str, ...]:
    """Make a job's data, once; the flags that train on it in this process alone."""
    folder = work() / job
    shared = ["--tracker", "none", "--num-workers", "0", "--epochs", "9999"]
    shared += ["--eval-every", "999999", "--save-every", "999999"]
    if job == "quantumgrav":
        from common.demo_data.causal_sets import write

        write(folder, 1500, seed=0, preset="zoo", progress=False)
        return *shared, "--dataset-path", str(folder), "--transfer-path", "None", "--baseline-sets", "0"
    if job == "student":
        from common.demo_data.underwater import write

        write(folder, 80, test=1, nonref=1, progress=False)
        shared += ["--train-root", f"{folder}/UIEB", "--pseudo-root", f"{folder}/pseudo", "--perceptual-weight", "0"]
        return *shared, "--val-ref-root", "None", "--val-nonref-root", "None", "--val-images", "2", "--test-images", "2"
    if job == "ultimate":
        from common.demo_data.camouflage import write

        write(folder, 80, test=4, noncam=0, progress=False)
        shared += ["--dataset-path", str(folder), "--backbone", "test_resnet", "--backbone-weights", "none"]
        return *shared, "--multi-scale", "1", "--stage1-epochs", "0", "--warmup-epochs", "0", "--val-share", "0.05"
    from common.demo_data.ct import write

    write(folder, 6, seed=0, size=(56, 48, 56), progress=False)
    shared += ["--dataset-path", f"{folder}/scans", "--val-patients", "1", "--test-patients", "0", "--n-codes", "512"]
    shared += ["--tile-size", "64", "--blocks", "1", "--perceptual-weight", "0"]  # all of both networks from the first step:
    return *shared, "--discriminator-iter-start", "0", "--discriminator-warmup", "0", "--gan-ramp", "0"


class Finished(Exception):
    """A visitor has seen enough."""


Visitor = Callable[[int, RunConfig, "Accelerator"], None]


def train(job: str, flags: list[str], visit: Visitor, *, demo: bool = False) -> None:
    """The script's own main(), on every rank. Before each step `visit(steps done, config, accelerator)` is called; raising
    Finished ends the run. With `demo` the sizes are those of --demo where `flags` does not say more."""
    script = importlib.import_module(f"scripts.train_{job}")
    start, fetch, steps = script.launch.start, script.data.StepLoader.__next__, itertools.count()
    config = parse(script.Config, [*["--demo"] * demo, *flags])
    config.demo = False  # its sizes, not its data

    def visited_start(config: RunConfig) -> "Accelerator":
        accelerator = start(config)
        script.data.StepLoader.__next__ = lambda loader: visit(next(steps), config, accelerator) or fetch(loader)
        return accelerator

    script.launch.start = visited_start
    with sentences(), contextlib.suppress(Finished):
        script.main(config)


def output(name: str) -> list[str]:
    """The flag for a fresh run folder."""
    return ["--output-dir", tempfile.mkdtemp(prefix=f"{name}-", dir=work())]


def python(*words: str, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Start a benchmark's own file again, with these words; on several processes by accelerate."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/2xcpu.yaml")]
    return subprocess.Popen(
        [sys.executable, *launcher * (processes > 1), *words], cwd=ROOT, env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def answer(started: subprocess.Popen) -> str:
    """What it printed last."""
    said, log = started.communicate()
    if started.returncode:
        raise RuntimeError(f"{' '.join(started.args)} failed:\n{log[-3000:]}")
    return said.splitlines()[-1]
