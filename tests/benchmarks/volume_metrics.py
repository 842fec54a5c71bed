"""All scores of a volume against the SSIM alone of MONAI and torchmetrics, in float32. Both must agree first with SciPy
in float64; their distances from it are printed.

    pip install torchmetrics && pip install --no-deps monai && python tests/benchmarks/volume_metrics.py

One thread, alternating A B A B; medians of the paired ratios, with the smallest and largest, of CPU time, which other
programs disturb least. Memory is the peak above that before the call, each in a process of its own.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from monai.metrics import SSIMMetric
from test_volume_metrics import noisy, phantom, slow_ssim_map
from timing import paired
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from common.volume_metrics import scores

SIZES = (96, 160)


def ours(output: Tensor, target: Tensor, masks: dict[str, Tensor] | None = None) -> dict[str, float]:
    return scores(output, target, hu_min=-1000, hu_max=1000, masks=masks or {})


def units(*volumes: Tensor) -> list[Tensor]:
    return [(volume[None, None].float().clamp(-1000, 1000) + 1000) / 2000 for volume in volumes]


def monai(output: Tensor, target: Tensor) -> float:
    return SSIMMetric(spatial_dims=3, data_range=1.0)(*units(output, target)).item()


def torchmetrics(output: Tensor, target: Tensor) -> float:
    return structural_similarity_index_measure(*units(output, target), data_range=1.0).item()


METHODS = {"ours": ours, "MONAI": monai, "torchmetrics": torchmetrics}


def volumes(size: int) -> list[Tensor]:
    target, _ = phantom((size, size, size))
    return [torch.from_numpy(volume) for volume in (noisy(target), target)]


def peak(name: str, size: int) -> float:
    """In MB, of this process: call it in a fresh one."""
    METHODS[name](*volumes(12))  # what PyTorch needs once is no volume's memory
    pair = [torch.randint(-1000, 1000, (size, size, size), dtype=torch.int16) for _ in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    METHODS[name](*pair)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def compare(name: str, size: int) -> dict[str, float]:
    pair = volumes(size)
    inner = torch.zeros(pair[0].shape, dtype=torch.bool)
    inner[5:-5, 5:-5, 5:-5] = True
    key, exact = "ssim", slow_ssim_map(*(volume.numpy() for volume in pair))
    if name == "MONAI":  # which counts the windows that fit
        key, exact = "ssim_inner", exact[inner.numpy()]
    errors = [abs(value - exact.mean()) for value in (ours(*pair, {"inner": inner})[key], METHODS[name](*pair))]
    assert max(errors) < 2e-5, (name, errors)
    times = paired(lambda: ours(*pair), lambda: METHODS[name](*pair), rounds=3)
    return times | {"ours_error": errors[0], "theirs_error": errors[1]}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        print(peak(sys.argv[1], int(sys.argv[2])))
        return
    memory = {}
    for size in SIZES:  # before this process grows, which its children would inherit as their peak
        for name in METHODS:
            command = [sys.executable, __file__, name, str(size)]
            memory[name, size] = float(subprocess.check_output(command, text=True).split()[-1])
    print(f"{'':20}{'ours':>26}{'theirs':>26}{'times as fast':>24}")
    results = {}
    for size in SIZES:
        for name in ("MONAI", "torchmetrics"):
            r = compare(name, size)
            r |= {"ours_mb": memory["ours", size], "theirs_mb": memory[name, size]}
            results[f"{name} {size}"] = r
            spread = f"{r['faster']:.1f} [{r['least']:.1f}, {r['most']:.1f}]"
            sides = (
                f"{r[f'{who}_ms']:.0f} ms {r[f'{who}_mb']:.0f} MB {r[f'{who}_error']:.0e}" for who in ("ours", "theirs")
            )
            print(f"{name + f', {size}^3':20}" + "".join(f"{side:>26}" for side in sides) + f"{spread:>24}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
