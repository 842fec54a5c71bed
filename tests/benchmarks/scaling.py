"""Two processes with a thread each against one: seconds per step of the same work per process, goal 0.90.

    python tests/benchmarks/scaling.py

One process, two, and one again, each a launch of its own: what the machine loses or gains meanwhile is in both sides. Wall
time counts, so two idle cores are needed: whatever else runs on the machine hits the two processes more than the one, and
the efficiency reads too low. A line says so when others were at work meanwhile (Linux). What two busy cores lose by sharing
caches and clock is in it, too. (Launches that lived side by side and took turns read 0.03 to 0.06 less: cores that have
rested are faster for a second or two, and one process leaves them more rest.) Causal sets are dealt by size, so two
processes pad less than one, which is part of their number.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import small_jobs
import timing

CASES = {  # flags for steps of 100 to 300 ms
    "quantumgrav": ["--batch-size", "64"],
    "student": ["--width", "24", "--blocks", "1", "1", "2", "--img-size", "96", "--batch-size", "6"],
    "ultimate": ["--width", "48", "--img-size", "96", "--batch-size", "6"],
    "vqgan": ["--patch-size", *["32"] * 3, "--width", "8", "--disc-width", "8", "--batch-size", "4"],
}
BLOCK, BLOCKS, GOAL = 5, 7, 0.90


def machine_busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def train(job: str, flags: list[str]) -> None:
    """Print milliseconds per step, block by block, and how many cores were busy with anything but this process."""
    marks: list[tuple[float, float, float]] = []

    def visit(step: int, config, accelerator) -> None:
        if step and step % BLOCK == 0:  # the first block warms up
            marks.append((time.perf_counter(), time.process_time(), machine_busy()))
        if len(marks) > BLOCKS:
            wall, own, every = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
            steps = [(b[0] - a[0]) / BLOCK * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
            if accelerator.is_main_process:
                print(json.dumps([steps, (every - own) / wall]), flush=True)
            raise small_jobs.Finished

    small_jobs.train(job, flags, visit)


def measure() -> Iterator[timing.Result]:
    for job, flags in CASES.items():
        words = [__file__, "train", job, *small_jobs.data_flags(job), *flags]
        launches = (small_jobs.python(*words, *small_jobs.output(job), processes=n) for n in (1, 2, 1))
        (before, first), (two, second), (after, third) = (json.loads(small_jobs.answer(each)) for each in launches)
        others = max(first, second - 1, third)  # of two processes the other one is no stranger
        note = f"; OTHERS USED {others:.1f} CORES" if others > 0.1 else ""
        found = timing.summary([(mine, (a + b) / 2) for mine, a, b in zip(two, before, after, strict=True)])
        yield timing.Result(
            f"train_{job}.py, step of 2 processes x 1 thread", f"1 process{note}", unit="ms", goal=GOAL, **found
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2], sys.argv[3:])
    else:
        timing.show(measure())
