"""Two processes with a thread each against one: steps per second of the same work per process, goal 0.90.

    python tests/benchmarks/scaling.py

Both launches are alive at once and take turns, a few steps each. Wall time counts, so two idle cores are needed: whatever
else runs on the machine hits the two processes more than the one, and the efficiency reads too low. A line says so when
others were at work meanwhile (Linux). What two busy cores lose by sharing caches and clock is in it, too.
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
BLOCK, PAIRS, GOAL = 5, 5, 0.90


def machine_busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def take_turns(job: str, mine: int, folder: Path, flags: list[str]) -> None:
    """Train in the turns mine, mine + 2, ... (0: the launch with one process, 1: with two), and print the seconds of each.
    The number of files in the folder is the number of the turn."""
    seconds: list[float] = []
    others: list[float] = []
    turn, began, began_own, began_all = mine, 0.0, 0.0, 0.0

    def wait_for(number: int) -> None:
        while len(list(folder.iterdir())) < number:
            time.sleep(0.05)  # at 5 ms those who wait used a third of a core

    def visit(step: int, config, accelerator) -> None:
        nonlocal turn, began, began_own, began_all
        if step == 0 or step % BLOCK:
            return
        if step > BLOCK:  # the first block, with both launches at work, warms up
            seconds.append(time.perf_counter() - began)
            others.append(machine_busy() - began_all - (time.process_time() - began_own))
            if accelerator.is_main_process:
                (folder / str(turn)).touch()
            turn += 2
        if len(seconds) == PAIRS:
            if accelerator.is_main_process:
                print(json.dumps([seconds, sum(others) / sum(seconds)]), flush=True)
            raise small_jobs.Finished
        wait_for(turn)
        accelerator.wait_for_everyone()  # they look at different moments
        began, began_own, began_all = time.perf_counter(), time.process_time(), machine_busy()

    small_jobs.train(job, flags, visit)


def measure() -> Iterator[timing.Result]:
    for job, flags in CASES.items():
        shared = Path(small_jobs.output("turns")[1])
        common = [*small_jobs.data_flags(job), *flags]
        launches = []
        for mine in (0, 1):
            words = (__file__, "turns", job, str(mine), str(shared), *common, *small_jobs.output(job))
            launches.append(small_jobs.python(*words, processes=mine + 1))
        try:
            (one, others), (two, _) = (json.loads(small_jobs.answer(launch)) for launch in launches)
        finally:
            for launch in launches:
                launch.terminate()  # the other would wait for its turn for ever
        note = f"; OTHERS USED {others:.1f} CORES" if others > 0.1 else ""
        found = timing.summary([(b / BLOCK * 1e3, a / BLOCK * 1e3) for a, b in zip(one, two, strict=True)])
        yield timing.Result(
            f"train_{job}.py, step of 2 processes x 1 thread", f"1 process{note}", unit="ms", goal=GOAL, **found
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["turns"]:
        take_turns(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
    else:
        timing.show(measure())
