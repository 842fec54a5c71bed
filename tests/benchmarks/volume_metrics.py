"""All scores of a volume against the SSIM alone of MONAI and torchmetrics, in float32. All must agree first with SciPy in
float64, to 2e-5.

    python tests/benchmarks/volume_metrics.py

Memory is the peak of a process of its own above what it had before.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from helpers import peak_memory
from test_volume_metrics import noisy, phantom, slow_ssim_map
from timing import Result, fresh, optional, paired, show
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from common.volume_metrics import scores

SIDE = 96
Method = Callable[[Tensor, Tensor], object]


def ours(output: Tensor, target: Tensor, masks: dict[str, Tensor] | None = None) -> dict[str, float]:
    return scores(output, target, hu_min=-1000, hu_max=1000, masks=masks or {})


def units(*volumes: Tensor) -> list[Tensor]:
    return [(volume[None, None].float().clamp(-1000, 1000) + 1000) / 2000 for volume in volumes]


def monai(output: Tensor, target: Tensor) -> float:
    from monai.metrics import SSIMMetric

    return SSIMMetric(spatial_dims=3, data_range=1.0)(*units(output, target)).item()


def torchmetrics(output: Tensor, target: Tensor) -> float:
    return structural_similarity_index_measure(*units(output, target), data_range=1.0).item()


def memory(method: Method) -> float:
    """In MB, of this process: call it in a fresh one."""
    pairs = [[torch.randint(-1000, 1000, (side,) * 3, dtype=torch.int16) for _ in range(2)] for side in (12, SIDE)]
    method(*pairs[0])  # what PyTorch needs once is no volume's memory
    return peak_memory(lambda: method(*pairs[1])) / 1e6


def compare(against: str, theirs: Callable[[Tensor, Tensor], float], megabytes: float, *, inner: bool) -> Iterator[Result]:
    """`inner`: they count only the windows that fit."""
    what = f"all scores of a volume of {SIDE}^3"
    volume, _ = phantom((SIDE, SIDE, SIDE))
    pair = [torch.from_numpy(side) for side in (noisy(volume), volume)]
    counted = torch.zeros(pair[0].shape, dtype=torch.bool)
    margin = slice(5, -5) if inner else slice(None)
    counted[margin, margin, margin] = True
    exact = slow_ssim_map(*(side.numpy() for side in pair))[counted.numpy()].mean()
    errors = [abs(value - exact) for value in (ours(*pair, {"counted": counted})["ssim_counted"], theirs(*pair))]
    assert max(errors) < 2e-5, (against, errors)
    found = paired(lambda: ours(*pair), lambda: theirs(*pair))
    yield Result(what, f"{against}, SSIM alone", unit="ms", goal=1, **found)
    other = fresh(memory, theirs)
    yield Result(f"{what}, memory", f"{against}, SSIM alone", megabytes, other, "MB", other / megabytes, goal=1)


def measure() -> Iterator[Result]:
    megabytes = fresh(memory, ours)
    yield from optional("monai", compare("MONAI", monai, megabytes, inner=True))
    yield from compare("torchmetrics", torchmetrics, megabytes, inner=False)


if __name__ == "__main__":
    show(measure())
