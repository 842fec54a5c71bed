"""How long a user waits: seconds to the first logged step, to the answer of --help; memory of each process of a tiny run.

    python tests/benchmarks/startup.py

The data exist already and are small; a data set of many files adds its own checks. Medians.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import small_jobs
import timing

TINY = {
    "quantumgrav": ["--width", "8", "--layers", "1", "--batch-size", "8"],
    "student": ["--width", "8", "--blocks", "1", "1", "1", "--img-size", "32", "--batch-size", "2"],
    "ultimate": ["--width", "16", "--img-size", "64", "--batch-size", "2"],
    "vqgan": ["--patch-size", *["16"] * 3, "--width", "4", "--disc-width", "4", "--batch-size", "1"],
}
ROUNDS = 3


def first_step(job: str, words: list[str]) -> tuple[float, float]:
    """Seconds from the command to the first row of metrics.jsonl, and the largest memory in MB until then."""
    output = small_jobs.output(job)
    command = [sys.executable, f"scripts/train_{job}.py", *words, "--log-every", "1", *output]
    began = time.perf_counter()
    started = subprocess.Popen(command, cwd=small_jobs.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = Path(output[1]) / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if started.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended before its first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    started.send_signal(signal.SIGTERM)  # saves and leaves
    _, _, usage = os.wait4(started.pid, 0)
    return seconds, usage.ru_maxrss / 1024


def measure() -> Iterator[timing.Result]:
    for job in small_jobs.JOBS:
        words = [*small_jobs.data_flags(job), *TINY[job]]
        help_command = [sys.executable, f"scripts/train_{job}.py", "--help"]
        helped = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run(help_command, cwd=small_jobs.ROOT, check=True, stdout=subprocess.DEVNULL)
            helped.append(time.perf_counter() - began)
        runs = [first_step(job, words) for _ in range(ROUNDS)]
        seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        yield timing.Result(f"train_{job}.py --help", "", statistics.median(helped), None, "s")
        yield timing.Result(f"train_{job}.py, command to first logged step", "", seconds, None, "s")
        yield timing.Result(f"train_{job}.py, largest memory of a process, tiny run", "", memory, None, "MB")


if __name__ == "__main__":
    timing.show(measure())
