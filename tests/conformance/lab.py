"""Runs of the script under test, what they left, and how two of them differ in the words of somebody who wrote it."""

import json
import math
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from helpers import Launch, rows
from jobs import Job
from safetensors.numpy import load_file

HOOK = Path(__file__).parent / "hook"


def fail(text: str) -> NoReturn:
    """Without a traceback: the reader wants to know what is wrong with the script."""
    pytest.fail(text, pytrace=False)


@dataclass
class Lab:
    job: Job
    folder: Path
    patience: float
    via: str | None = "python"
    """How the run starts that all others are compared with: as users start it."""
    runs: dict[str, Path | str] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    # -- launching

    def args(self, processes: int, accumulation: int, workers: int, output: Path, more: tuple) -> list[str]:
        parts = processes * accumulation
        dealt = [item for flag, batch in self.job.batches.items() for item in (flag, batch // parts)]
        fixed = ["--accumulation-steps", accumulation, "--num-workers", workers, "--tracker", "none", "--log-every", 1]
        return [str(a) for a in (*self.job.args, *dealt, *fixed, *more, "--output-dir", output)]

    def start(
        self,
        output: Path,
        *more,
        processes: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        via: str | None = None,
        **plan,
    ) -> Launch:
        ledger = ledger_of(output)
        shutil.rmtree(ledger, ignore_errors=True)
        ledger.mkdir(parents=True)
        plan |= {"ledger": str(ledger), "output": str(output)}
        paths = os.pathsep.join([str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"PYTHONPATH": paths, "CONFORMANCE": json.dumps(plan)}
        args = self.args(processes, accumulation, workers, output, more)
        given = {"processes": processes, "script": self.job.script, "env": env, "cwd": self.job.cwd}
        launch = Launch(args, via=via, config="cpu.yaml" if processes == 1 else "2xcpu.yaml", **given)
        self.launches.append(launch)
        return launch

    def end(self, launch: Launch, what: str) -> int:
        """Its exit code; a launch that does not end fails the check."""
        try:
            return launch.wait(self.patience)
        except AssertionError:
            fail(
                f"{what} did not end within {self.patience:.0f} s: some rank waits for another that has left or is"
                f" elsewhere (a collective that only some ranks reach?). Where each one stood:\n{tail(launch, 60)}"
            )

    def finish(self, launch: Launch, what: str) -> str:
        code = self.end(launch, what)
        if code:
            fail(f"{what} ended with exit code {code}:\n{tail(launch)}")
        return launch.output()

    def run(self, *more, **options) -> Path:
        """An undisturbed run, launched when it is first asked for; if it fails, every check that needs it does."""
        if not more and not options:
            options = {"via": self.via}
        usual = {"processes": 1, "accumulation": 1, "workers": 0, "via": None}
        key = repr((more, sorted((k, v) for k, v in options.items() if usual.get(k) != v or k not in usual)))
        if key not in self.runs:
            output = self.folder / f"run-{len(self.runs)}"
            try:
                self.finish(self.start(output, *more, **options), f"A run on {named(**options)}")
                self.runs[key] = output
            except pytest.fail.Exception as failure:
                self.runs[key] = str(failure)
        if isinstance(self.runs[key], str):
            fail(self.runs[key])
        return self.runs[key]

    def copy(self, run: Path, name: str) -> Path:
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(run, target)
        return target

    # -- moments of the undisturbed run

    def steps(self) -> int:
        return max(row["step"] for row in rows(self.run(), "train"))

    def saves(self) -> dict[int, int]:
        """Step of each checkpoint -> how often its writing touched the disk."""
        events = ledger(self.run())[0]
        found = Counter(e["at"] for e in events if e["event"] == "touch" and e["at"])
        commits = {e["at"] for e in events if e["event"] == "touch" and e["path"].startswith("checkpoints") and e["at"]}
        return {step: count for step, count in sorted(found.items()) if step in commits}

    def phases(self) -> list[int]:
        """Steps in which parameters get their first gradient, but for the first two: a last layer that begins with zeros
        passes none to the others in the first step."""
        found, step = [], 1
        for event in ledger(self.run())[0]:
            if event["event"] == "gradient" and step > 2:
                found.append(step)
            elif event["event"] == "step" and event["optimizer"] == 0:
                step = event["step"] + 1
        return sorted(set(found))

    def middle(self) -> int:
        """A step in the middle of an epoch with a logged step between it and the checkpoint before."""
        epochs = [row["epoch"] for row in rows(self.run(), "train")]
        saved = self.saves()
        for step in range(min(saved) + 1, self.steps() - 1):
            inside = epochs[step - 1] == epochs[step]
            if inside and saved.keys().isdisjoint((step - 1, step)) and step > self.steps() // 2:
                return step
        pytest.skip("no step lies between two checkpoints in the middle of an epoch: give a larger --save-every")


def named(processes: int = 1, accumulation: int = 1, workers: int = 0, via: str | None = None, **_) -> str:
    text = f"{processes} process{'es' * (processes > 1)}"
    text += f" x {accumulation} accumulation steps" * (accumulation > 1) + f" with {workers} loader workers" * (workers > 0)
    return text + f" started by {via}" * bool(via)


def tail(launch: Launch, lines: int = 25) -> str:
    return "\n".join(launch.output().splitlines()[-lines:])


def ledger_of(output: Path) -> Path:
    return output.with_name(output.name + "-ledger")


def ledger(run: Path) -> list[list[dict]]:
    """Events of each rank."""
    files = sorted(ledger_of(run).glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    found = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    if not found:
        pytest.skip("the suite's hook did not load: is Python started with -S or -I, or with another sitecustomize?")
    return found


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    return {f"{path.stem}/{k}": v for path in sorted(checkpoint.glob("*.safetensors")) for k, v in load_file(path).items()}


def optimizer_states(checkpoint: Path) -> dict[str, object]:
    return {path.stem: torch.load(path, weights_only=True)["state"] for path in sorted(checkpoint.glob("*.pt"))}


# ---------------------------------------------------------------------------------------------------------------------
# what a run did


def batches(events: list[dict], steps: int, accumulation: int) -> list[list[tuple]] | None:
    """The training samples of one rank per optimizer step, as (dataset, its size, index). None: not seen.

    Training data are what was last asked for before a backward pass; a key like (epoch, index) counts as its last number."""
    votes, last = Counter(), None
    for event in events:
        if event["event"] == "fetch":
            last = event["data"]
        elif event["event"] == "backward":
            votes[last] += 1
    training = {data for data, count in votes.items() if count > max(votes.values()) / 20}
    dealt = [e for e in events if e["event"] == "fetch" and e["data"] in training]
    if None in training or len(dealt) < steps * accumulation or any(e["keys"] is None for e in dealt):
        return None

    def index(key: object) -> int:
        return index(key[-1]) if isinstance(key, list) else key

    order = list(dict.fromkeys(e["data"] for e in dealt))  # ranks may number the datasets that they evaluate differently
    each = [[(order.index(e["data"]), e["size"], index(key)) for key in e["keys"]] for e in dealt]
    return [sum(each[s * accumulation : (s + 1) * accumulation], []) for s in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def close(a: object, b: object, rtol: float, atol: float) -> bool:
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == b or math.isclose(a, b, rel_tol=rtol, abs_tol=atol)
    return a == b


def short(value: object, other: object) -> str:
    """Enough digits to see the difference."""
    if not isinstance(value, float) or not isinstance(other, float):
        return str(value)
    return next((f"{value:.{n}g}" for n in (4, 6, 9, 12) if f"{value:.{n}g}" != f"{other:.{n}g}"), repr(value))


def first_difference(one: list[dict], other: list[dict], rtol: float = 0.0, atol: float = 0.0) -> tuple | None:
    """(step, key, value, value) of the first difference between rows; key None: one has a row that the other lacks."""
    for a, b in zip(one, other, strict=False):
        if a["step"] != b["step"]:
            return min(a["step"], b["step"]), None, a["step"], b["step"]
        for key in [*a, *(k for k in b if k not in a)]:
            if not close(a.get(key), b.get(key), rtol, atol):
                return a["step"], key, a.get(key), b.get(key)
    if len(one) != len(other):
        longer = one if len(one) > len(other) else other
        return longer[min(len(one), len(other))]["step"], None, len(one), len(other)
    return None


def tell(difference: tuple, here: str, there: str, advice: str) -> None:
    step, key, a, b = difference
    if key is None:
        fail(
            f"metrics.jsonl has other rows from step {step} on with {here} than with {there} ({a} / {b}): each step must"
            f" stand once, whatever the number of processes and interruptions. {advice}"
        )
    fail(f"{key} at step {step} differs between {here} and {there} ({short(a, b)} / {short(b, a)}): {advice}")


def assert_same_to_the_bit(run: Path, golden: Path, here: str, there: str, advice: str) -> None:
    """Rows, all networks and all optimizers."""
    if difference := first_difference(rows(run), rows(golden)):
        tell(difference, here, there, advice)
    mine, theirs = checkpoints(run)[-1], checkpoints(golden)[-1]
    a, b = tensors(mine), tensors(theirs)
    if a.keys() != b.keys() or mine.name != theirs.name:
        fail(f"{mine.name} of {here} and {theirs.name} of {there} hold other tensors. {advice}")
    for name in a:
        if not np.array_equal(a[name], b[name], equal_nan=True):
            worst = np.abs(a[name].astype(np.float64) - b[name]).max()
            fail(
                f"{name} of {mine.name} differs by up to {worst:.2g} between {here} and {there}, although the logged values"
                f" agree. {advice}"
            )
    try:
        torch.testing.assert_close(optimizer_states(mine), optimizer_states(theirs), rtol=0, atol=0)
    except AssertionError as error:
        first = str(error).strip().splitlines()[-1]
        fail(f"The optimizer of {mine.name} differs between {here} and {there} ({first}). {advice}")


def assert_finite(run: Path) -> None:
    bad = [name for name, value in tensors(checkpoints(run)[-1]).items() if not np.isfinite(value).all()]
    if bad:
        fail(
            f"One NaN on one rank has reached the weights ({', '.join(bad[:3])}, ...): test the gradient norm and the summed"
            " loss on all ranks and skip the step on all of them, buffers of BatchNorm included."
        )


SIGKILL, SIGTERM = int(signal.SIGKILL), int(signal.SIGTERM)
