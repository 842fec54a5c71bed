"""Random 128^3 crops of a 512 x 512 x 300 CT: from the cache of int16 volumes, against reading the .nii.gz for each with
nibabel and against MONAI's pipeline, with one and with eight crops of a loaded volume.

    python tests/benchmarks/ct_crops.py

Crops at the same place must be the same first. The clock is the wall's: waiting for files counts.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nibabel
import numpy as np
from scipy.ndimage import zoom
from timing import Result, optional, paired, show

from common import ct

SHAPE, SIDE, WINDOW = (512, 512, 300), 128, (-1000, 1000)
SIZE, CORNER = (SIDE, SIDE, SIDE), (40, 300, 100)
paired = partial(paired, clock=time.perf_counter)


def write_volume(path: Path) -> None:
    """Soft shapes between air and bone with noise, which gzip packs by half, as it does real scans. Stored as LPS."""
    rng = np.random.default_rng(0)
    volume = zoom(rng.normal(-300, 500, (8, 8, 6)), (64, 64, 50), order=1).astype(np.float32)
    volume = (volume + rng.normal(0, 18, SHAPE).astype(np.float32)).clip(-1024, 3071).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-0.7, -0.7, 1.0, 1.0])), path)


def place(corner: ct.Triple) -> tuple[slice, ...]:
    return tuple(slice(at, at + SIDE) for at in corner)


def cached(scan: ct.Scan, corner: ct.Triple) -> np.ndarray:
    return ct.to_unit(ct.crop(scan, corner, SIZE, WINDOW[0]), *WINDOW)


def with_nibabel(path: Path, corner: ct.Triple) -> np.ndarray:
    volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
    return ct.to_unit(np.ascontiguousarray(volume[place(corner)]), *WINDOW)


def monai_library(path: Path, scan: ct.Scan, read: Callable[[int], object]) -> Iterator[Result]:
    from monai import transforms

    load = [
        transforms.LoadImaged("ct", image_only=True),
        transforms.EnsureChannelFirstd("ct"),
        transforms.Orientationd("ct", axcodes="RAS"),
        transforms.ScaleIntensityRanged("ct", *WINDOW, -1, 1, clip=True),
    ]
    whole = transforms.Compose(load)({"ct": path})["ct"][0].numpy()
    np.testing.assert_allclose(cached(scan, CORNER), whole[place(CORNER)], rtol=0, atol=1e-6)
    for count in (1, 8):
        pick = transforms.RandSpatialCropSamplesd("ct", SIZE, num_samples=count, random_size=False)
        pipeline = transforms.Compose([*load, pick])
        found = paired(partial(read, count), partial(pipeline, {"ct": path}))
        what = f"{count} random crop{'s' * (count > 1)} of {SIDE}^3 of a volume"
        yield Result(what, "MONAI from .nii.gz", unit="ms", goal=1, **found)


def milliseconds(function: Callable[[], object], scan: ct.Scan, cold: bool) -> float:
    taken = []
    for _ in range(20):
        if cold:
            with open(scan.array, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        function()
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def measure() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "patient1.nii.gz")
        write_volume(path)
        began = time.perf_counter()
        [scan] = ct.prepare_scans([path], Path(folder, "cache"))
        yield Result("a volume of 512 x 512 x 300 to the cache, once", "", time.perf_counter() - began, None, "s")
        rng = np.random.default_rng(0)

        def read(count: int) -> list[np.ndarray]:
            return [cached(scan, ct.random_corner(scan, SIZE, rng, body=0.5)) for _ in range(count)]

        os.sync()  # what is not written yet cannot be forgotten
        for where, cold in (("in memory", False), ("not in memory", True)):
            taken = milliseconds(partial(read, 1), scan, cold)
            yield Result(f"a random crop of {SIDE}^3, half of it body, file {where}", "", taken, None, "ms")
        np.testing.assert_array_equal(cached(scan, CORNER), with_nibabel(path, CORNER))
        theirs = partial(with_nibabel, path, CORNER)
        found = paired(partial(read, 1), theirs)
        yield Result(f"a random crop of {SIDE}^3", "nibabel from .nii.gz", unit="ms", goal=1, **found)
        yield from optional("monai", monai_library(path, scan, read))


if __name__ == "__main__":
    show(measure())
