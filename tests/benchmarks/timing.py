"""Two ways of doing the same, measured in turn, and the line that says what came out."""

import importlib
import json
import multiprocessing
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
ROW = "{:58}{:>12}{:>12}{:>37}  {}"
INSTALL = "pip install --no-deps -r tests/benchmarks/requirements.txt"


@dataclass(frozen=True)
class Result:
    """A line of the table. Two ratios are never compared across lines: machines differ, pairs do not."""

    what: str
    """The work and its size: "SSIM in 3D with gradient, 96^3"."""
    against: str
    """Who else does it; "" when there is nobody to compare with."""
    ours: float | None
    """None where the library to compare with is not installed."""
    theirs: float | None
    unit: str
    """ms, s or MB: less is better."""
    ratio: float | None = None
    """Median over pairs of how many times better ours is."""
    least: float | None = None
    most: float | None = None
    goal: float | None = None
    """What the ratio should be at least."""

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.ratio is not None and self.ratio < self.goal


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], *, times: int = 1, rounds: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:  # fmt: skip
    """A B A B ...: medians of the times of a call and of the paired ratios, with the smallest and largest ratio. CPU time,
    which other programs disturb least; `time.perf_counter` where waiting for files counts."""

    def timed(function: Callable[[], object], times: int) -> float:
        began = clock()
        for _ in range(times):
            function()
        return (clock() - began) / times

    timed(ours, 1), timed(theirs, 1)
    return summary([(timed(ours, times) * 1e3, timed(theirs, times) * 1e3) for _ in range(rounds)])


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of (ours, theirs), less being better: the medians, and the ratio with its smallest and largest value."""
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ours": mine, "theirs": other, "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def fresh(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns in a process of its own, which did nothing before. It takes seconds to start."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def optional(library: str, results: Iterable[Result]) -> Iterator[Result]:
    """Results of a comparison that imports the library when it begins; where that is not installed, a line that says so."""
    try:
        yield from results
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        yield Result("", f"{library} is not installed: {INSTALL}", None, None, "")


def cells(result: Result) -> tuple[str, str, str, str, str]:
    def quantity(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f} {result.unit}" if value >= 100 else f"{value:.3g} {result.unit}"

    def times(value: float) -> str:
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    ratio = "" if result.ratio is None else times(result.ratio)
    spread = "" if result.least is None else f" [{times(result.least)}, {times(result.most)}]"
    below = f" BELOW {result.goal:.3g}" if result.missed else ""
    return result.what, quantity(result.ours), quantity(result.theirs), ratio + spread + below, result.against


def show(results: Iterable[Result], record: Path | None = None) -> None:
    """The table, each line as soon as it is measured; in the file `record` the same as lines of JSON."""
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries, about themselves
    print(ROW.format("", "ours", "theirs", "times better [spread]", "against"), flush=True)
    for result in results:
        print(ROW.format(*cells(result)), flush=True)
        if record:
            with record.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def show_module(name: str, record: Path) -> None:
    """Its last line in the file is what it cost; the memory is that of the largest process."""
    began = time.perf_counter()
    show(importlib.import_module(name).measure(), record)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    with record.open("a") as file:
        file.write(json.dumps({"seconds": round(time.perf_counter() - began), "peak_mb": round(peak / 1024)}) + "\n")


def processor() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M) if sys.platform == "linux" else None
    return found[1].strip() if found else platform.processor()


def commit() -> str:
    """With "-dirty" when the code is another; the pages that tools write are no code."""
    code = ("scripts/*.py", "common")
    git = partial(subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    changed = git(["git", "diff", "--quiet", "HEAD", "--", *code]).returncode
    found = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    return found + "-dirty" * bool(changed) if found else "not a git checkout"
