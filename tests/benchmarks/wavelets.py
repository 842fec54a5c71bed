"""The Haar transform against ptwt, the PyTorch library for wavelets, and PyWavelets.

    python tests/benchmarks/wavelets.py

Maps of features are channels last, as the network has them; images are contiguous, as losses get them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pywt
import torch
from timing import Result, optional, paired, show
from torch import Tensor

from common.wavelets import haar, inverse_haar

FEATURES = torch.randn(4, 32, 128, 128, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
IMAGES = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(1))


def bands(x: Tensor) -> list[Tensor]:
    low, high = haar(x)
    return [low, *high.chunk(3, 1)]


def there_and_back(x: Tensor) -> list[Tensor]:
    low, high = haar(x)
    return [inverse_haar(low, high * 0.5)]


def gradient(transform: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(sum(part.square().sum() for part in transform(x)), x)[0]


def pywavelets() -> Iterator[Result]:
    images = IMAGES.numpy()
    low, details = pywt.dwt2(images, "haar")
    for mine, theirs in zip(bands(IMAGES), (low, *details), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs))
    found = paired(partial(haar, IMAGES), partial(pywt.dwt2, images, "haar"), times=20)
    yield Result("Haar transform of 4 x 3 x 256 x 256", "PyWavelets", unit="ms", goal=1, **found)


def ptwt_library() -> Iterator[Result]:
    import ptwt

    def their_bands(x: Tensor) -> list[Tensor]:
        low, details = ptwt.wavedec2(x, "haar", level=1)
        return [low, *details]

    def their_there_and_back(x: Tensor) -> list[Tensor]:
        low, *details = their_bands(x)
        return [ptwt.waverec2((low, ptwt.WaveletDetailTuple2d(*(band * 0.5 for band in details))), "haar")]

    for what, x, ours, theirs in (
        ("Haar transform of 4 x 3 x 256 x 256 with its gradient", IMAGES, bands, their_bands),
        ("Haar transform and inverse of 4 x 32 x 128 x 128, gradient", FEATURES, there_and_back, their_there_and_back),
    ):
        for mine, other in zip((*ours(x), gradient(ours, x)), (*theirs(x), gradient(theirs, x)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        found = paired(partial(gradient, ours, x), partial(gradient, theirs, x), times=10)
        yield Result(what, "ptwt", unit="ms", goal=1, **found)


def measure() -> Iterator[Result]:
    yield from pywavelets()
    yield from optional("ptwt", ptwt_library())


if __name__ == "__main__":
    show(measure())
