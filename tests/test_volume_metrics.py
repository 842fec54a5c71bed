"""Metrics of volumes against torchmetrics and SciPy, masks against a phantom whose parts are known."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torchmetrics.functional.image import structural_similarity_index_measure

from common.volume_metrics import anatomy, resize_baseline, scores
from common.volume_report import ScanView, plane, planes_sheet, summary, write_csv

WINDOW = {"hu_min": -1000, "hu_max": 1000}


def phantom(shape: tuple[int, int, int] = (80, 64, 40), seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A chest of ellipses, which ends at the first and last plane, above a table; and where its parts are."""
    x, y, z = np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in shape), indexing="ij", sparse=True)
    body = (x / 0.85) ** 2 + ((y - 0.1) / 0.7) ** 2 + 0 * z < 1
    lung = np.zeros(shape, bool)
    for side in (-0.42, 0.42):
        lung |= ((x - side) / 0.3) ** 2 + ((y - 0.1) / 0.45) ** 2 + (z / 0.8) ** 2 < 1
    vessel = np.zeros(shape, bool)
    for a, b in itertools.product((-0.5, -0.35, 0.35, 0.5), (-0.1, 0.15, 0.3)):
        vessel |= (x - a) ** 2 + (y - b) ** 2 + 0 * z < 0.05**2
    hu = np.full(shape, -1000.0)
    hu[body] = 45
    hu[lung] = -850
    hu[vessel & lung] = 300
    hu[np.broadcast_to((x**2 + (y + 0.42) ** 2 < 0.12**2), shape)] = 450
    table = np.broadcast_to(np.abs(y + 0.78 + 0 * x) < 2 / shape[1], shape)
    hu[table] = -150
    hu += np.random.default_rng(seed).normal(0, 20, shape)
    return np.rint(hu).astype(np.int16), {"body": body, "lung": lung, "table": table}


def tensors(*volumes: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(volume) for volume in volumes]


def noisy(hu: np.ndarray, sigma: float = 60, seed: int = 1) -> np.ndarray:
    return np.rint(hu + np.random.default_rng(seed).normal(0, sigma, hu.shape)).astype(np.int16)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


PHANTOM, PARTS = phantom()
CROP = PHANTOM[10:47, 12:41, 5:36]
SMALL = PHANTOM[15:32, 20:42, 8:27]
PAIRS = {
    "noise": (noisy(CROP), CROP),
    "resized": (resize_baseline(CROP, 1.0), CROP),
    "shifted": (CROP + np.int16(150), CROP),
    "as small as the window": (noisy(SMALL[:11, :12, :13]), SMALL[:11, :12, :13]),
    "smaller than the window": (noisy(SMALL[:6, :8, :2]), SMALL[:6, :8, :2]),
}


# ---------------------------------------------------------------------------------------------------------------------
# scores


def slow_ssim_map(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    x, y = ((v.clip(-1000, 1000) + 1000.0) / 2000 for v in (output, target))

    def blur(maps: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(maps, 1.5, radius=5, mode="mirror")

    mean_x, mean_y = blur(x), blur(y)
    variances, covariance = blur(x * x + y * y) - mean_x**2 - mean_y**2, blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
    return light * (2 * covariance + 9e-4) / (variances + 9e-4)


@pytest.mark.parametrize("output, target", PAIRS.values(), ids=PAIRS)
def test_ssim_against_scipy(output, target):
    expected = slow_ssim_map(output, target)
    mask = np.random.default_rng(0).random(target.shape) < 0.2
    found = scores(*tensors(output, target), **WINDOW, masks={"some": torch.from_numpy(mask)})
    assert found["ssim"] == pytest.approx(expected.mean(), abs=1e-5)
    assert found["ssim_some"] == pytest.approx(expected[mask].mean(), abs=1e-5)


def test_ssim_is_that_of_torchmetrics_and_inside_that_of_monai():
    """MONAI, which is not needed here, counts the windows that fit, which are those of torchmetrics away from the border."""
    output, target = tensors(noisy(SMALL), SMALL)
    unit = [(v[None, None].double().clamp(-1000, 1000) + 1000) / 2000 for v in (output, target)]
    mean, full = structural_similarity_index_measure(*unit, data_range=1.0, return_full_image=True)
    inner = torch.zeros(SMALL.shape, dtype=torch.bool)
    inner[5:-5, 5:-5, 5:-5] = True
    found = scores(output, target, **WINDOW, masks={"inner": inner})
    assert found["ssim"] == pytest.approx(mean.item(), abs=1e-5)
    assert found["ssim_inner"] == pytest.approx(full[0, 0][5:-5, 5:-5, 5:-5].mean().item(), abs=1e-5)
    assert abs(found["ssim"] - found["ssim_inner"]) > 1e-3


@pytest.mark.parametrize("slab", [1, 3, 10, 99])
def test_slabs_change_nothing(slab):
    output, target = tensors(*PAIRS["noise"])
    masks = {"lung": target < -400}
    whole = scores(output, target, **WINDOW, masks=masks, slab=len(output))
    assert scores(output, target, **WINDOW, masks=masks, slab=slab) == pytest.approx(whole, rel=1e-6)


def test_errors_are_those_of_the_clipped_volumes_inside_each_mask():
    output, target = PAIRS["noise"]
    output, target = output.copy(), target.copy()
    target[:5], output[:9, :4] = -3024, 3000  # the padding of a scanner, metal
    mask = np.random.default_rng(0).random(target.shape) < 0.2
    found = scores(*tensors(output, target), hu_min=-900, hu_max=600, masks={"some": torch.from_numpy(mask)}, slab=4)
    error = output.clip(-900, 600).astype(float) - target.clip(-900, 600)
    for suffix, kept in (("", error.ravel()), ("_some", error[mask])):
        assert found["hu_rmse" + suffix] == pytest.approx(math.sqrt((kept**2).mean()), rel=1e-6)
        assert found["hu_mae" + suffix] == pytest.approx(np.abs(kept).mean(), rel=1e-6)
        assert found["psnr" + suffix] == pytest.approx(20 * math.log10(1500 / math.sqrt((kept**2).mean())), abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 1), (3, 4, 30), (40, 1, 2)])
def test_any_size_has_a_score(shape):
    target = np.random.default_rng(0).integers(-1000, 400, shape).astype(np.int16)
    same = scores(*tensors(target, target), **WINDOW, masks={})
    assert same["psnr"] == 100 and same["ssim"] == pytest.approx(1, abs=1e-6) and same["hu_rmse"] == 0
    other = scores(*tensors(noisy(target, 200), target), **WINDOW, masks={})
    assert all(map(math.isfinite, other.values())) and other["ssim"] < 0.99999


def test_a_mask_without_voxels_has_no_entry():
    target = torch.from_numpy(CROP)
    found = scores(target, target, **WINDOW, masks={"body": target > -500, "lung": target > 5000})
    assert sorted(found) == sorted(
        f"{name}{tissue}" for name in ("psnr", "ssim", "hu_rmse", "hu_mae") for tissue in ("", "_body")
    )


def test_float_volumes_are_not_rounded():
    target = torch.from_numpy(CROP)
    assert scores(target + 0.25, target, hu_min=-2000, hu_max=2000, masks={})["hu_mae"] == pytest.approx(0.25)


def test_shapes_that_differ_are_refused():
    target = torch.from_numpy(CROP)
    with pytest.raises(ValueError, match="must have one shape"):
        scores(target[:, :, 1:], target, **WINDOW, masks={})
    with pytest.raises(ValueError, match="must have one shape"):
        scores(target, target, **WINDOW, masks={"body": target[..., :1] > 0})


# ---------------------------------------------------------------------------------------------------------------------
# body and lungs


@pytest.mark.parametrize("shape", [(80, 64, 40), (190, 333, 33)])
def test_body_and_lungs_are_found(shape):
    hu, parts = phantom(shape)
    masks = anatomy(hu)
    assert all(mask.shape == shape and mask.dtype == bool for mask in masks.values())
    assert overlap(masks["body"], parts["body"]) > 0.99 and not (masks["body"] & parts["table"]).any()
    assert overlap(masks["lung"], parts["lung"]) > 0.98
    assert not (masks["lung"] & ~masks["body"]).any()
    vessels = ndimage.binary_erosion(parts["lung"], iterations=3) & (hu > 100)
    assert (masks["lung"] & vessels).sum() > 0.9 * vessels.sum()


def test_bowel_gas_is_no_lung_and_a_thin_belly_has_none():
    hu, parts = phantom()
    hu[parts["lung"]] = noisy(np.full(parts["lung"].sum(), 50, np.int16), 20)
    assert not anatomy(hu)["lung"].any()
    x, y, z = np.indices(hu.shape)
    hu[(x - 40) ** 2 + (y - 34) ** 2 + (z - 20) ** 2 < 12**2] = -1000
    masks = anatomy(hu)
    assert not masks["lung"].any() and overlap(masks["body"], parts["body"]) > 0.99


def test_a_touching_table_is_cut_off():
    hu, parts = phantom()
    bottom = np.flatnonzero(parts["body"].any((0, 2)))[0]
    hu[:, bottom - 2 : bottom] = -150
    body = anatomy(hu)["body"]
    near = ndimage.binary_dilation(parts["body"], np.ones((3, 3, 3)), iterations=2)
    assert not (body & ~near).any() and overlap(body, parts["body"]) > 0.99


def test_half_a_body_still_has_one_lung():
    hu, parts = phantom()
    masks = anatomy(hu[:40])  # cut through the middle
    assert overlap(masks["body"], parts["body"][:40]) > 0.99 and overlap(masks["lung"], parts["lung"][:40]) > 0.97


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (5, 5, 5), (200, 1, 7)])
@pytest.mark.parametrize("value", [-1000, -3024, 40])
def test_uniform_and_tiny_volumes(shape, value):
    masks = anatomy(np.full(shape, value, np.int16))
    assert masks["body"].all() if value == 40 else not masks["body"].any()
    assert not masks["lung"].any()


# ---------------------------------------------------------------------------------------------------------------------
# the codec that does nothing


@pytest.mark.parametrize("bits, factor", [(2.0, 2), (0.25, 4)])
def test_baseline_is_average_pooling_and_trilinear_interpolation(bits, factor):
    hu = PHANTOM[:40, :32, :24]
    small = F.avg_pool3d(torch.from_numpy(hu)[None, None].double(), factor).round()
    large = F.interpolate(small, size=hu.shape, mode="trilinear", align_corners=False)[0, 0].round()
    found = resize_baseline(hu, bits)
    assert found.dtype == np.int16 and np.abs(found - large.numpy()).max() <= 1  # halves round either way
    assert (found == large.numpy()).mean() > 0.99


def grid_of_baseline(shape: tuple[int, int, int], bits: float) -> int:
    """How many numbers the baseline keeps, as the rank of what it makes of each axis."""
    ranks = []
    for axis in range(3):
        step = np.random.default_rng(axis).integers(-1000, 1000, (shape[axis], 300)).astype(float)
        waves = [np.moveaxis(np.broadcast_to(step[:, k, None, None], (shape[axis], 1, 1)), 0, axis) for k in range(300)]
        kept = [resize_baseline(np.rint(wave).astype(np.int16), bits).ravel() for wave in waves]
        values = np.linalg.svd(np.array(kept, float), compute_uv=False)
        ranks.append(int((values > 30 * math.sqrt(shape[axis])).sum()))
    return math.prod(ranks)


@pytest.mark.parametrize("bits", [9 / 64, 13 / 8, 16.0, 20.0])
def test_baseline_has_at_least_the_bits_of_the_codec(bits):
    shape = (29, 17, 23)
    numbers = grid_of_baseline(shape, bits)
    assert min(bits, 16) * math.prod(shape) <= 16 * numbers <= 2.5 * bits * math.prod(shape)


def test_baseline_loses_nothing_when_nothing_is_asked():
    assert np.array_equal(resize_baseline(CROP, 16), CROP)
    flat = np.full((7, 1, 30), -1000, np.int16)
    assert np.array_equal(resize_baseline(flat, 0.01), flat)
    better, worse = (scores(*tensors(resize_baseline(CROP, b), CROP), **WINDOW, masks={})["psnr"] for b in (2, 0.14))
    assert better > worse + 2


# ---------------------------------------------------------------------------------------------------------------------
# reports


def test_planes_are_shown_as_radiologists_see_them():
    hu = np.zeros((7, 8, 9), np.int16)
    hu[6, 4, 4] = 1  # on the patient's right
    hu[3, 7, 4] = 2  # anterior
    hu[3, 4, 8] = 3  # superior
    axial, coronal, sagittal = (plane(hu, axis) for axis in (2, 1, 0))
    assert axial.shape == (8, 7) and axial[3, 0] == 1 and axial[0, 3] == 2
    assert coronal.shape == (9, 7) and coronal[4, 0] == 1 and coronal[0, 3] == 3
    assert sagittal.shape == (9, 8) and sagittal[4, 0] == 2 and sagittal[0, 3] == 3


def test_planes_sheet(tmp_path):
    hu = PHANTOM[::2, ::2]
    found = scores(*tensors(noisy(hu), hu), **WINDOW, masks={})
    views = [ScanView(name, hu, noisy(hu), (1.5, 1.5, mm), found) for name, mm in (("anna", 3.0), ("bert", 9.0))]
    planes_sheet(tmp_path / "deep" / "sheet.png", views, **WINDOW)
    picture = np.asarray(Image.open(tmp_path / "deep" / "sheet.png").convert("RGB"), int)
    assert picture.shape[0] > 2.5 * picture.shape[1]  # bert alone is three times as high as wide
    colour, half = picture.max(2) - picture.min(2), picture.shape[1] // 2
    assert (colour[:, :half] < 10).mean() > 0.98 and (colour[:, half:] > 60).mean() > 0.02


def test_summary_shows_every_tissue_beside_the_baseline():
    table = {"id": np.arange(3), "psnr": np.array([30.0, 31, 32]), "ssim": np.array([0.9, 0.91, 0.92])}
    table |= {"psnr_lung": np.array([26.0, np.nan, 28]), "ssim_lung": np.array([0.7, np.nan, 0.75])}  # one has no lungs
    table |= {f"resize_{name}": column - 0.5 for name, column in table.items() if name != "id"}
    text = summary({"val": table}, bits_per_voxel=0.25)
    assert "val, 3 scans, 0.25 bits per voxel (1:64)" in text and "nan" not in text
    rows = {tuple(line.split()[:2]): line.split() for line in text.splitlines() if "±" in line}
    shown = {title: (row[-6], row[-3]) for title, row in rows.items()}
    assert shown == {
        ("volume", "this"): ("31.00", "0.9100"),
        ("volume", "resize"): ("30.50", "0.4100"),
        ("lung", "this"): ("27.00", "0.7250"),
        ("lung", "resize"): ("26.50", "0.2250"),
    }
    one = {name: column[:1] for name, column in table.items()}
    assert "±" not in summary({"val": one}, bits_per_voxel=0.25)  # nothing is known of other scans


def test_csv_has_a_row_per_scan(tmp_path):
    write_csv(tmp_path / "val.csv", [f"scan{k}" for k in range(9)], {"id": np.array([4, 2]), "psnr": np.array([30.5, 31])})
    with open(tmp_path / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], float(row["psnr"])) for row in rows] == [("scan4", 30.5), ("scan2", 31.0)]
