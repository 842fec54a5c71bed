"""Where the time of a step goes, script by script, at the sizes of the demos.

    python tests/benchmarks/step_profile.py [quantumgrav] [student] [ultimate] [vqgan]

Nothing is written into the scripts: the names below are wrapped from outside before their main() runs. Time spent in one
of them inside another belongs to the inner one, except in an evaluation, a checkpoint and the like, which count as one thing
and stand beside the step. CPU time of one thread. (The file is not called profile.py: the standard library has a module of
that name, which torch loads.)
"""

import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps

import small_jobs
import timing

COMMON = {  # part of a step: module, dotted name
    "data": [("common.data", "StepLoader.__next__")],
    "backward": [("accelerate", "Accelerator.backward")],
    "clipping": [("torch.nn.utils", "clip_grad_norm_")],
    "optimizer": [("accelerate.optimizer", "AcceleratedOptimizer.step")],
    "averaged weights": [("common.training", "EMA.update")],
    "decisions": [
        ("common.training", "agree"), ("common.training", "FiniteGuard.passes"), ("common.training", "TermWatch.update"),
    ],
    "logging": [("common.logs", "RunLog.train")],
    "an evaluation": [("", "evaluate")],
    "a checkpoint": [("common.checkpoints", "RunFolder.save")],
    "an export": [("common.checkpoints", "RunFolder.export")],
}  # fmt: skip
OWN = {  # "" is the script itself
    "quantumgrav": {"forward": [("", "CausalNet.forward")], "losses": [("", "Tasks.losses"), ("", "CausalSets.counts")]},
    "student": {
        "forward": [("", "Student.forward")],
        "losses": [("", "loss_terms")],
        "a sheet of pictures": [("", "draw")],
    },
    "ultimate": {
        "forward": [("", "Segmenter.forward")],
        "losses": [("", "loss_terms")],
        "routing": [("", "routing"), ("", "Mixture.follow")],
    },
    "vqgan": {
        "forward": [("", "VQGAN.forward")],
        "discriminators forward": [("", "Discriminators.forward")],
        "losses": [("", "reconstruction_terms"), ("", "generator_terms"), ("", "discriminator_terms")],
        "codebook": [("common.quantizers", "EMACodebook.update")],
        "a sheet of pictures": [("", "draw")],
    },
}
WHOLE = ("an evaluation", "a sheet of pictures", "an export", "a checkpoint")
BLOCK, BLOCKS = 10, 4


class Clock:
    """CPU seconds by part, the innermost one counting; and how often each was entered."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.open: list[str] = ["rest"]
        self.last = time.process_time()

    def switch(self) -> None:
        now = time.process_time()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def wrap(self, part: str, module: str, name: str) -> None:
        owner = importlib.import_module(module)
        *parents, name = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        inner: Callable = getattr(owner, name)

        @wraps(inner)
        def outer(*arguments, **options):
            if self.open[-1] in WHOLE:
                return inner(*arguments, **options)
            self.switch()
            self.open.append(part)
            self.calls[part] += 1
            try:
                return inner(*arguments, **options)
            finally:
                self.switch()
                self.open.pop()

        setattr(owner, name, outer)


def profile(job: str, flags: list[str]) -> dict[str, float]:
    """Milliseconds per step of each part; of an evaluation and the like, per call."""
    clock, script = Clock(), f"scripts.train_{job}"
    for part, places in (COMMON | OWN[job]).items():
        for module, name in places:
            clock.wrap(part, module or script, name)
    found: dict[str, float] = {}

    def visit(step: int, config, accelerator) -> None:
        if step == BLOCK:  # warm by now
            clock.clear()
        elif step == BLOCK * (1 + BLOCKS):
            clock.switch()
            steps = {part: seconds / BLOCK / BLOCKS for part, seconds in clock.seconds.items() if part not in WHOLE}
            once = {part: clock.seconds[part] / clock.calls[part] for part in WHOLE if clock.calls[part]}
            found.update({part: 1e3 * seconds for part, seconds in (steps | once).items()})
            raise small_jobs.Finished

    small_jobs.train(job, flags, visit, demo=True)
    return found


def measure(jobs: tuple[str, ...] = small_jobs.JOBS) -> Iterator[timing.Result]:
    for job in jobs:
        words = [*small_jobs.data_flags(job), "--log-every", str(BLOCK), "--eval-every", str(3 * BLOCK)]
        found = json.loads(small_jobs.answer(small_jobs.python(__file__, "one", job, *words, *small_jobs.output(job))))
        parts = {part: ms for part, ms in found.items() if part not in WHOLE}
        step = sum(parts.values())
        yield timing.Result(f"train_{job}.py, a step of --demo", "", step, None, "ms")
        for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
            yield timing.Result(f"    {part}, {ms / step:.1%}", "", ms, None, "ms")
        for part in sorted(found.keys() - parts.keys()):
            yield timing.Result(f"    {part} beside it", "", found[part], None, "ms")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(profile(sys.argv[2], sys.argv[3:])))
    else:
        timing.show(measure(tuple(sys.argv[1:]) or small_jobs.JOBS))
