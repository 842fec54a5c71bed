"""Random 128^3 crops of a 512x512x300 CT: from the cache of int16 volumes, against reading the .nii.gz for each with nibabel
and against MONAI's pipeline, with one and with eight crops of a loaded volume.

    pip install --no-deps monai && python tests/benchmarks/ct_crops.py

Everything in one process, alternating A B A B; medians of the paired ratios, with the smallest and largest.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import nibabel
import numpy as np
import timing
from scipy.ndimage import zoom

from common import ct

SHAPE, SIDE, WINDOW = (512, 512, 300), 128, (-1000, 1000)
SIZE = (SIDE, SIDE, SIDE)
paired = partial(timing.paired, rounds=5, clock=time.perf_counter)  # waiting for files counts


def write_volume(path: Path) -> None:
    """Soft shapes between air and bone with noise, which gzip packs by half, as it does real scans. Stored as LPS."""
    rng = np.random.default_rng(0)
    volume = zoom(rng.normal(-300, 500, (8, 8, 6)), (64, 64, 50), order=1).astype(np.float32)
    volume = (volume + rng.normal(0, 18, SHAPE).astype(np.float32)).clip(-1024, 3071).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-0.7, -0.7, 1.0, 1.0])), path)


def monai_pipeline(path: Path, crops: int) -> Callable[[], object]:
    from monai import transforms

    steps = [
        transforms.LoadImaged("ct", image_only=True),
        transforms.EnsureChannelFirstd("ct"),
        transforms.Orientationd("ct", axcodes="RAS"),
        transforms.ScaleIntensityRanged("ct", *WINDOW, -1, 1, clip=True),
        transforms.RandSpatialCropSamplesd("ct", SIZE, num_samples=crops, random_size=False),
    ]
    pipeline = transforms.Compose(steps)
    assert pipeline({"ct": path})[0]["ct"].shape == (1, *SIZE)
    return lambda: pipeline({"ct": path})


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "patient1.nii.gz")
        write_volume(path)
        began, began_cpu = time.perf_counter(), time.process_time()
        [scan] = ct.prepare_scans([path], Path(folder, "cache"))
        once = time.perf_counter() - began, time.process_time() - began_cpu
        print(f"{path.stat().st_size / 1e6:.0f} MB .nii.gz to {scan.array.stat().st_size / 1e6:.0f} MB in the cache, once:"
              f" {once[0]:.1f} s, {once[1]:.1f} s of a CPU")  # fmt: skip
        rng = np.random.default_rng(0)

        def read(count: int, body: float) -> list[np.ndarray]:
            corners = [ct.random_corner(scan, SIZE, rng, body) for _ in range(count)]
            return [ct.to_unit(ct.crop(scan, corner, SIZE, WINDOW[0]), *WINDOW) for corner in corners]

        def milliseconds(function: Callable[[], object], *, cold: bool = False) -> float:
            taken = []
            for _ in range(20):
                if cold:
                    with open(scan.array, "rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                function()
                taken.append((time.perf_counter() - began) * 1e3)
            return statistics.median(taken)

        os.sync()  # what is not written yet cannot be forgotten
        parts = {
            "corner of a crop, half of it body": lambda: ct.random_corner(scan, SIZE, rng, 0.5),
            "crop": lambda: ct.crop(scan, ct.random_corner(scan, SIZE, rng, 0.0), SIZE, WINDOW[0]),
            "corner, crop, to [-1, 1]": lambda: read(1, 0.5),
        }
        for name, part in parts.items():
            print(f"{name}: {milliseconds(part):.1f} ms, {milliseconds(part, cold=True):.1f} when the file is not in memory")

        def nibabel_crop() -> np.ndarray:
            volume = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
            corner = ct.random_corner(scan, SIZE, rng, 0.0)
            part = volume[tuple(slice(at, at + SIDE) for at in corner)]
            return ct.to_unit(np.ascontiguousarray(part), *WINDOW)

        results["one crop, against nibabel"] = paired(lambda: read(1, 0.5), nibabel_crop)
        if find_spec("monai"):
            for count in (1, 8):
                name = f"{count} crop{'s' * (count > 1)} of a volume, against MONAI"
                results[name] = paired(lambda count=count: read(count, 0.5), monai_pipeline(path, count))
        else:
            print("MONAI is not installed: pip install --no-deps monai")
    for name, r in results.items():
        print(
            f"{name}: {r['ours_ms']:.1f} ms against {r['theirs_ms']:.0f} ms,"
            f" {r['faster']:.0f} times as fast [{r['least']:.0f}, {r['most']:.0f}]"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
