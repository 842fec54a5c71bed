"""Two ways of doing the same, timed in turn."""

import statistics
import time
from collections.abc import Callable


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], *, times: int = 1, rounds: int = 5,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:  # fmt: skip
    """A B A B ...: medians of the times of a call and of the paired ratios, with the smallest and largest ratio."""

    def timed(function: Callable[[], object], times: int) -> float:
        began = clock()
        for _ in range(times):
            function()
        return (clock() - began) / times

    timed(ours, 2), timed(theirs, 2)
    pairs = [(timed(ours, times), timed(theirs, times)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_ms": mine * 1e3,
        "theirs_ms": other * 1e3,
        "faster": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }
