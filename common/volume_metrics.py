"""Metrics of a reconstructed CT volume in HU: the whole volume, body and lungs, and the baseline that has to be beaten.

Volumes are (x, y, z) in RAS order. Half of a chest CT is air, which any codec gets right: numbers of the whole volume need
those of the body and the lungs beside them.
"""

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SIGMA, RADIUS = 1.5, 5  # SSIM's Gaussian window of 11 voxels
WINDOW = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
WINDOW = (WINDOW / WINDOW.sum()).tolist()


def scores(
    output: Tensor, target: Tensor, *, hu_min: float, hu_max: float, masks: dict[str, Tensor], slab: int = 8
) -> dict[str, float]:
    """psnr, hu_rmse, hu_mae and ssim of one volume (X, Y, Z), and the same inside each mask, as psnr_lung. Both volumes are
    clipped to the window, whose width is the data range. PSNR is capped at 100 dB like that of images. A mask without
    voxels has no entry.

    SSIM is the three-dimensional one (Wang et al. 2004): Gaussian window of 11^3 voxels and sigma 1.5, population
    covariance, hu_min counting as 0. The volume is mirrored at its borders, which is torchmetrics' convention: every voxel
    has a value, so a mask may touch the border and a volume may be smaller than the window. MONAI counts only windows that
    fit, which is the mean over a mask of the voxels at least 5 from the border.

    The work is done for `slab` planes of the first axis at a time: beside the volumes it needs about 60 bytes for each
    voxel of slab + 10 planes.
    """
    shapes = {tuple(volume.shape) for volume in (output, target, *masks.values())}
    if len(shapes) > 1 or output.ndim != 3:
        raise ValueError(f"Volumes and masks must have one shape (X, Y, Z), not {', '.join(map(str, sorted(shapes)))}.")
    sums = {name: np.zeros(4) for name in ("", *masks)}
    for start in range(0, len(output), slab):
        stop = min(start + slab, len(output))
        x, y = (_mirrored(volume, start, stop, output.device).clamp(hu_min, hu_max) for volume in (output, target))
        inner = tuple(slice(RADIUS, -RADIUS) for _ in range(3))
        error = x[inner] - y[inner]
        maps = [error.square(), error.abs(), _ssim_map(x, y, hu_min, hu_max)]
        sums[""] += [error.numel(), *_totals(maps)]
        for name, mask in masks.items():
            inside = mask[start:stop].to(output.device)
            sums[name] += [int(inside.sum()), *_totals([torch.where(inside, values, 0) for values in maps])]
    found = {}
    for name, values in sums.items():
        count, squares, absolutes, similarity = values.tolist()
        if count:
            suffix = f"_{name}" if name else ""
            error = squares / count
            found[f"psnr{suffix}"] = -10 * math.log10(max(error / (hu_max - hu_min) ** 2, 1e-10))
            found[f"ssim{suffix}"] = similarity / count
            found[f"hu_rmse{suffix}"] = math.sqrt(error)
            found[f"hu_mae{suffix}"] = absolutes / count
    return found


def _totals(maps: list[Tensor]) -> list[float]:
    return torch.stack([values.sum(dtype=torch.float64) for values in maps]).tolist()


def _mirrored(volume: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Planes start ... stop - 1 with a rim of 5 voxels, which beyond the border is mirrored, as often as it takes."""
    for axis, (first, last) in enumerate(((start, stop), (0, volume.shape[1]), (0, volume.shape[2]))):
        size = volume.shape[axis]
        period = max(2 * size - 2, 1)
        place = torch.arange(first - RADIUS, last + RADIUS, device=volume.device) % period
        volume = volume.index_select(axis, torch.minimum(place, period - place))
    return volume.to(device).float()


def _blur(x: Tensor) -> Tensor:
    """Where the window fits. The four blurs of a slab as sums of shifted copies take 20 to 45 ns per voxel on one CPU core,
    as banded matrices 44 to 100, as depthwise convolutions 140 to 190; and on a GPU these two may round to TF32."""
    for axis in range(3):  # the slab's axis first: its rim is gone for the others
        size = x.shape[axis] - 2 * RADIUS
        blurred = x.narrow(axis, RADIUS, size) * WINDOW[RADIUS]
        for shift in range(RADIUS):
            blurred.add_(x.narrow(axis, shift, size), alpha=WINDOW[shift])
            blurred.add_(x.narrow(axis, 2 * RADIUS - shift, size), alpha=WINDOW[shift])
        x = blurred
    return x


def _ssim_map(x: Tensor, y: Tensor, hu_min: float, hu_max: float) -> Tensor:
    middle, width = (hu_min + hu_max) / 2, hu_max - hu_min
    x, y = (x - middle) / width, (y - middle) / width  # moments about the middle lose fewer digits
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x + y * y) - mean_x * mean_x - mean_y * mean_y  # their sum is all that is needed
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x * mean_x + mean_y * mean_y + 0.01**2)
    return light * (2 * covariance + 0.03**2) / (variances + 0.03**2)


# ---------------------------------------------------------------------------------------------------------------------
# where the body and the lungs are

CROSS = ndimage.generate_binary_structure(3, 1)
IN_PLANE = CROSS & np.array([False, True, False])  # neighbours within an axial plane
COARSE = 160  # voxels per axis on which components are found


def anatomy(hu: np.ndarray) -> dict[str, np.ndarray]:
    """Masks `body` and `lung`, by thresholds and connected components; either may be empty.

    The body is the largest piece above -500 HU after an opening, which cuts off the table and blankets, with everything it
    encloses in an axial plane. The lungs are what is below -400 HU in there, with the vessels that an axial plane shows
    inside of it, without pieces of less than 1 % of the body and without those of pure air (the bowel, the trachea where
    it is a piece of its own). A lung that is open to the side of the picture is taken for the outside.

    Pieces are found on every n-th voxel; within n voxels of their surface each voxel is judged by its own value.
    """
    steps = [math.ceil(size / COARSE) for size in hu.shape]
    places = [np.minimum(np.arange(0, n, step) + step // 2, n - 1) for n, step in zip(hu.shape, steps, strict=True)]
    small = hu[np.ix_(*places)]
    tissue = small > -500
    core = _largest(ndimage.binary_erosion(tissue, CROSS, border_value=1))
    body = _filled(ndimage.binary_dilation(core, CROSS) & tissue)
    labels, count = ndimage.label(body & (small < -400))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = sizes >= max(0.01 * body.sum(), 1)
    kept[0] = False
    for piece in np.flatnonzero(kept):
        kept[piece] = np.median(small[labels == piece]) > -950
    lung = _filled(kept[labels])
    return {"body": _refined(body, steps, hu > -500), "lung": _refined(lung, steps, hu < -400)}


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]) if count else mask


def _filled(mask: np.ndarray) -> np.ndarray:
    """With what it encloses in axial planes: all but the pieces of the rest that reach the side of their plane."""
    labels, count = ndimage.label(~mask, IN_PLANE)
    outside = np.zeros(count + 1, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[side] = True
    outside[0] = False  # the mask itself
    return ~outside[labels]


def _refined(mask: np.ndarray, steps: list[int], fits: np.ndarray) -> np.ndarray:
    """At full size, where a voxel at the mask's surface belongs to it if it fits."""
    certain = ndimage.binary_erosion(mask, CROSS, border_value=1)
    state = certain.astype(np.uint8) + ndimage.binary_dilation(mask, CROSS)
    for axis in (2, 1, 0):
        state = state.repeat(steps[axis], axis)[(slice(None),) * axis + (slice(fits.shape[axis]),)]
    return (state == 2) | ((state == 1) & fits)


# ---------------------------------------------------------------------------------------------------------------------
# the codec that does nothing


def resize_baseline(hu: np.ndarray, bits_per_voxel: float, stored_bits: int = 16) -> np.ndarray:
    """The volume after a resize to as many bits as a codec with `bits_per_voxel` uses, rounded up: averages over boxes of
    equal size, kept as whole HU, with trilinear interpolation between them. That is what resizing usually means, not the
    best of its kind: numbers fitted by least squares score 1.8 dB more at 0.14 bits and 3.1 at 1 bit (one demo scan)."""
    factor = (stored_bits / bits_per_voxel) ** (1 / 3)
    sizes = [min(math.ceil(n / factor - 1e-9), n) for n in hu.shape]
    down = [_averages(n, m) for n, m in zip(hu.shape, sizes, strict=True)]
    up = [_between(n, m) for n, m in zip(hu.shape, sizes, strict=True)]
    flat = np.stack([down[1] @ plane.astype(np.float32) @ down[2].T for plane in hu])
    small = np.rint(np.tensordot(down[0], flat, 1))
    planes = (up[1] @ plane @ up[2].T for plane in np.tensordot(up[0], small, 1))
    return np.stack([np.rint(plane).astype(np.int16) for plane in planes])


def _averages(size: int, boxes: int) -> np.ndarray:
    """(boxes, size): how much of each voxel lies in each of the boxes that share out the axis."""
    edges = np.linspace(0, size, boxes + 1)[:, None]
    voxels = np.arange(size)
    overlap = np.minimum(edges[1:], voxels + 1) - np.maximum(edges[:-1], voxels)
    return (overlap.clip(0) * boxes / size).astype(np.float32)


def _between(size: int, boxes: int) -> np.ndarray:
    """(size, boxes): linear interpolation between the boxes' middles, constant beyond the outermost."""
    place = ((np.arange(size) + 0.5) * boxes / size - 0.5).clip(0, boxes - 1)[:, None]
    return (1 - np.abs(place - np.arange(boxes))).clip(0).astype(np.float32)
