"""All metrics of an image against pysodmetrics, whose numbers must be the same first.

    python tests/benchmarks/segmentation_metrics.py

The maps have soft edges, mistakes and an object on a tenth of the image, as COD10K has; noise is the worst case.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter
from test_segmentation_metrics import Reference, alone
from timing import Result, paired, show

IMAGES = 3


def animal(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre = rng.uniform(0.3, 0.7, 2) * (height, width)
    away = np.hypot(y - centre[0], x - centre[1]) / np.sqrt(height * width)
    field = 0.18 - away + 0.25 * gaussian_filter(rng.normal(size=(height, width)), width / 40) * width / 40
    guess = field + 0.05 * gaussian_filter(rng.normal(size=(height, width)), width / 20) * width / 20
    return (255 / (1 + np.exp(-80 * guess))).round().astype(np.uint8), np.uint8(255) * (field > 0)


def noise(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = np.uint8(255) * (rng.random((height, width)) < 0.5)
    return rng.integers(0, 256, (height, width), dtype=np.uint8), target


def reference(prediction: np.ndarray, target: np.ndarray) -> dict[str, float | np.ndarray]:
    meters = Reference()
    meters.step(prediction, target)
    return meters.results()


def measure() -> Iterator[Result]:
    warnings.simplefilter("ignore")  # pysodmetrics on its Fmeasure
    cv2.setNumThreads(1)
    for make in (animal, noise):
        for height, width in ((352, 352), (768, 1024)):
            cases = [make(height, width, seed) for seed in range(IMAGES)]
            for case in cases:
                mine = alone(*case)
                for name, value in reference(*case).items():
                    np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-6, err_msg=name)
            first, second = cycle(cases), cycle(cases)
            found = paired(lambda c=first: alone(*next(c)), lambda c=second: reference(*next(c)), times=IMAGES)
            area = np.mean([target.mean() / 255 for _, target in cases])
            what = f"all metrics of an image, {width} x {height}, {make.__name__} on {area:.0%}"
            yield Result(what, "pysodmetrics", unit="ms", goal=1, **found)


if __name__ == "__main__":
    show(measure())
