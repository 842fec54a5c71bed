"""The script under test and the flags that make it small."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SMALL = {  # script: (flags, batch flags with their value for one process, other settings)
    "quantumgrav": (
        "--dataset-path {sets} --split 0.7 0.19 0.11 --tasks manifold_like class curvature --width 16 --layers 1"
        " --coarse-grain 0.3 --baseline-sets 0 --lr 1e-3 --epochs 9 --max-steps 30 --eval-every 10 --save-every 5",
        {"--batch-size": 12},
        {"rtol": 2e-5, "atol": 1e-6, "early": ("--lr", 0.1)},
    ),
    "student": (
        "--train-root {water}/UIEB --pseudo-root {water}/pseudo --val-ref-root {water}/testset_ref"
        " --val-nonref-root {water}/testset_nonref --img-size 32 --width 8 --blocks 1 1 2 --heads 4 --perceptual-weight 0"
        " --val-images 3 --warmup-steps 2 --epochs 9 --max-steps 16 --eval-every 7 --save-every 4",
        {"--batch-size": 4},
        {"rtol": 2e-5, "atol": 1e-6},
    ),
    "ultimate": (
        "--dataset-path {camouflaged} --backbone test_convnext --backbone-weights none --img-size 64 --width 16 --top-k 2"
        " --stage1-epochs 2 --epochs 6 --warmup-epochs 1 --progressive-unfreeze --multi-scale 1 1.5"
        " --eval-every 3 --save-every 5",
        {"--batch-size": 8, "--stage2-batch-size": 4},
        {"rtol": 2e-5, "atol": 1e-3, "early": ("--lr", 1e-9, "--stage2-lr", 1e-9, "--min-lr", 0)},
    ),
    "vqgan": (
        "--dataset-path {chests}/scans --patch-size 16 16 16 --tile-size 32 --width 4 --blocks 1 --n-codes 32 --disc-width 4"
        " --disc-layers 2 --perceptual-weight 0 --val-patients 2 --test-patients 3 --crops-per-scan 3 --warmup-steps 2"
        " --discriminator-iter-start 4 --discriminator-warmup 2 --gan-ramp 3 --epochs 9 --max-steps 10 --eval-every 5"
        " --save-every 4",
        {"--batch-size": 4},
        {"rtol": 2e-4, "atol": 2e-6, "idle": ("image.head.bias", "video.head.bias")},  # the hinge's halves cancel exactly
    ),
}
ANY = "--epochs 99 --max-steps 16 --eval-every 7 --save-every 4"  # what a script gets before --script-args
DATA = ("sets", "water", "camouflaged", "chests")  # fixtures of tests/conftest.py that {name} in the flags stands for


@dataclass(frozen=True)
class Job:
    """A script and what makes it small."""

    script: Path
    args: tuple[str, ...]
    batches: dict[str, int]
    """Flags of a batch size per process with their value for one process; multiples of 4."""
    cwd: Path
    rtol: float = 1e-3
    atol: float = 1e-5
    early: tuple = ("--lr", 1e-9)
    """Flags under which the evaluations soon stop improving."""
    idle: tuple[str, ...] = ()
    """Beginnings of the names of parameters that may get no gradient in so short a run."""

    @classmethod
    def of(cls, script: Path, name: str, given: str | None, data: Callable[[str], Path], demo: Callable[[], Path]) -> "Job":
        """`name`: whose small flags to begin with. `data` makes a dataset, `demo` a folder for what the script makes."""
        small, batches, settings = SMALL.get(name, ("", {"--batch-size": 4}, {}))
        if name in SMALL:
            flags, cwd = f"{small} {given or ''}", Path.cwd()
        elif given:
            flags, cwd = f"{ANY} {given}", Path.cwd()
        else:
            flags, cwd = f"--demo {ANY}", demo()
        args = [a.format_map({d: data(d) for d in DATA if f"{{{d}}}" in a}) for a in shlex.split(flags)]
        return cls(script, tuple(args), batches, cwd, **settings)
