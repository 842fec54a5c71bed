"""Image metrics per batch against what a user would find: NumPy with loops over blocks, as the codes in circulation have it,
for UIQM and UCIQE; pytorch-msssim and torchmetrics for SSIM.

    pip install scikit-image pytorch-msssim torchmetrics && python tests/benchmarks/image_metrics.py

Four images of 256 x 256, one thread, one process, alternating A B A B; medians of the paired ratios, with the smallest and
largest, of CPU time, which other programs disturb least. Both sides must give the same numbers first.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from pytorch_msssim import ssim as pytorch_msssim
from test_metrics import distorted, slow_uciqe, slow_uiqm, smooth, tensor
from timing import paired
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from common.metrics import NR_VARIANTS, ssim, uciqe, uiqm

IMAGES = [distorted(smooth(256, 256, k % 3), seed=k, sigma=8) for k in range(4)]


def without_reference() -> dict[str, dict[str, float]]:
    x, results = tensor(*IMAGES).contiguous(), {}
    for fast, slow in ((uiqm, slow_uiqm), (uciqe, slow_uciqe)):
        for variant in NR_VARIANTS:

            def ours(fast=fast, variant=variant):
                return fast(x, variant).numpy()

            def theirs(slow=slow, variant=variant):
                return np.array([slow(image, variant) for image in IMAGES])

            np.testing.assert_allclose(ours(), theirs(), rtol=1e-4)
            results[f"{fast.__name__} {variant}, NumPy with loops"] = paired(ours, theirs)
    return results


def similarity() -> dict[str, dict[str, float]]:
    target = tensor(*IMAGES).contiguous() / 255
    output = (target + 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    output.requires_grad_()

    def msssim_package(x, y):
        return pytorch_msssim(x, y, data_range=1, size_average=False)

    def torchmetrics_package(x, y):
        return torchmetrics_ssim(x, y, data_range=1.0, reduction="none")

    def value(metric) -> torch.Tensor:
        with torch.no_grad():
            return metric(output, target)

    def gradient(metric) -> torch.Tensor:
        return torch.autograd.grad(metric(output, target).mean(), output)[0]

    def bordered(x, y):
        """torchmetrics averages over the border too, with mirrored images: what it must equal, but not what is timed."""
        return ssim(*(torch.nn.functional.pad(image, (5, 5, 5, 5), "reflect") for image in (x, y)))

    results = {}
    packages = (("pytorch-msssim", msssim_package, ssim), ("torchmetrics", torchmetrics_package, bordered))
    for name, theirs, equal in packages:
        for what, run in (("ssim", value), ("ssim and its gradient", gradient)):
            mine, other = run(equal), run(theirs)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
            results[f"{what}, {name}"] = paired(partial(run, ssim), partial(run, theirs), times=3)
    return results


def main() -> None:
    torch.set_num_threads(1)
    results = without_reference() | similarity()
    print(f"{'':40}{'ours':>10}{'theirs':>12}{'times as fast':>30}")
    for name, r in results.items():
        spread = f"{r['faster']:.2f} [{r['least']:.2f}, {r['most']:.2f}]"
        print(f"{name:40}{r['ours_ms']:7.1f} ms{r['theirs_ms']:9.1f} ms{spread:>30}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
