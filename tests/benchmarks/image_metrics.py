"""Image metrics per batch against what a user would find: NumPy with loops over blocks, as the codes in circulation have it,
for UIQM and UCIQE; pytorch-msssim and torchmetrics for SSIM.

    python tests/benchmarks/image_metrics.py

Four images of 256 x 256.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.nn.functional as F
from test_metrics import distorted, slow_uciqe, slow_uiqm, smooth, tensor
from timing import Result, optional, paired, show
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from common.metrics import NR_VARIANTS, ssim, uciqe, uiqm

Metric = Callable[[Tensor, Tensor], Tensor]
IMAGES = [distorted(smooth(256, 256, k % 3), seed=k, sigma=8) for k in range(4)]


def without_reference() -> Iterator[Result]:
    x = tensor(*IMAGES).contiguous()
    for fast, slow in ((uiqm, slow_uiqm), (uciqe, slow_uciqe)):
        for variant in NR_VARIANTS:

            def ours(fast=fast, variant=variant) -> np.ndarray:
                return fast(x, variant).numpy()

            def theirs(slow=slow, variant=variant) -> np.ndarray:
                return np.array([slow(image, variant) for image in IMAGES])

            np.testing.assert_allclose(ours(), theirs(), rtol=1e-4)
            found = paired(ours, theirs)
            yield Result(f"{fast.__name__} {variant}", "NumPy with loops", unit="ms", goal=1, **found)


def compare_ssim(against: str, theirs: Metric, equal: Metric) -> Iterator[Result]:
    """`equal` is what their numbers must be equal to, `ssim` what is timed."""
    target = tensor(*IMAGES).contiguous() / 255
    output = (target + 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    output.requires_grad_()

    def value(metric: Metric) -> Tensor:
        with torch.no_grad():
            return metric(output, target)

    def gradient(metric: Metric) -> Tensor:
        return torch.autograd.grad(metric(output, target).mean(), output)[0]

    for what, run in (("ssim", value), ("ssim with gradient", gradient)):
        mine, other = run(equal), run(theirs)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        yield Result(what, against, unit="ms", goal=1, **paired(partial(run, ssim), partial(run, theirs), times=3))


def msssim_library() -> Iterator[Result]:
    import pytorch_msssim

    yield from compare_ssim("pytorch-msssim", partial(pytorch_msssim.ssim, data_range=1, size_average=False), ssim)


def torchmetrics_library() -> Iterator[Result]:
    def bordered(x: Tensor, y: Tensor) -> Tensor:
        """torchmetrics averages over the border too, with mirrored images."""
        return ssim(*(F.pad(image, (5, 5, 5, 5), "reflect") for image in (x, y)))

    theirs = partial(structural_similarity_index_measure, data_range=1.0, reduction="none")
    yield from compare_ssim("torchmetrics", theirs, bordered)


def measure() -> Iterator[Result]:
    yield from without_reference()
    yield from torchmetrics_library()
    yield from optional("pytorch_msssim", msssim_library())


if __name__ == "__main__":
    show(measure())
