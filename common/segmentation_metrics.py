"""Metrics of camouflaged and salient object segmentation: those of pysodmetrics, per image, at the masks' own size.

A saved map has only 256 levels. So one histogram per image, split by truth and by quadrant of the S-measure, holds all that
the metrics are made of, in integers; only the weighted F-measure needs the pixels' places.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import UserError
from common.images import find_images, read_image
from common.metrics import to_uint8

logger = logging.getLogger("run")

EPS = float(np.spacing(1))  # MATLAB's eps, which the published codes add to denominators

# ---------------------------------------------------------------------------------------------------------------------
# all but the weighted F-measure, from counts


def _counts(predictions: Tensor, targets: Tensor) -> Tensor:
    """(B, 4, 2, 256): pixels per quadrant, truth and level. The quadrants meet behind the object's centroid."""
    batch, height, width = targets.shape
    y, x = (torch.arange(size, device=targets.device) for size in (height, width))
    mask = targets.to(torch.uint8)  # whose sums take half the time of a bool's
    rows, columns = mask.sum(2, dtype=torch.int), mask.sum(1, dtype=torch.int)
    area = rows.sum(1).clamp_min(1)
    lower = y > ((rows * y).sum(1).double() / area).round()[:, None]
    right = x > ((columns * x).sum(1).double() / area).round()[:, None]
    index = predictions.short()  # int16 all the way: a tenth of the time of int32 with its temporaries
    index += mask.short() * 256
    index += (lower.short() * 1024)[:, :, None]
    index += (right.short() * 512)[:, None]
    return torch.stack([torch.bincount(image.flatten(), minlength=2048) for image in index]).view(batch, 4, 2, 256)


def _stretch(low: Tensor, high: Tensor) -> Tensor:
    """(B, 256): what min-max normalisation makes of each level; a constant map stays as it is. In pysodmetrics's order of
    operations, because it rounds the results down to levels again."""
    constant = low == high
    low, high = (torch.where(constant, c, x).double()[:, None] / 255 for c, x in ((0, low), (255, high)))
    return (torch.arange(256, device=low.device).double() / 255 - low) / (high - low)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a / torch.where(b == 0, 1, b)


def _moments(counts: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number, mean and sum of squares about the mean, over the last dimension."""
    number = counts.sum(-1)
    mean = _ratio((counts * values).sum(-1), number)
    return number, mean, (counts * (values - mean[..., None]).square()).sum(-1)


def _s_measure(counts: Tensor, values: Tensor) -> Tensor:
    """Structure measure (Fan et al. 2017), alpha = 0.5. Two kinds of quadrants differ from pysodmetrics: one of constant map
    and truth counts 1, where its rounding errors may make that 0, and one without pixels is left out, where it gives NaN."""
    number, mean, squares = _moments(counts.sum(1), values[:, None])
    spread = (squares / (number - 1).clamp_min(1)).sqrt()
    mean = torch.stack([1 - mean[:, 0], mean[:, 1]], 1)  # the background is the object of the inverted map
    share = number / number.sum(1, keepdim=True)
    objects = (share * 2 * mean / (mean.square() + 1 + spread + EPS)).sum(1)

    both = counts.sum(2)
    number, x, squares = _moments(both, values[:, None])
    inside = counts[:, :, 1].sum(-1)
    y = _ratio(inside, number)
    covariance = (counts[:, :, 1] * (values[:, None] - x[..., None])).sum(-1)
    top = 4 * x * y * covariance / (number - 1 + EPS)
    bottom = (x.square() + y.square()) * (squares + inside * (1 - y)) / (number - 1 + EPS)
    constant = ((both > 0).sum(-1) <= 1) & ((inside == 0) | (inside == number))
    similarity = torch.where(constant, 1, top / (bottom + EPS))
    regions = (similarity * number).sum(1) / number.sum(1)

    whole = (counts.sum((1, 2)) * values).sum(1) / number.sum(1)
    score = (0.5 * objects + 0.5 * regions).clamp_min(0)
    return torch.where(share[:, 1] == 0, 1 - whole, torch.where(share[:, 0] == 0, whole, score))


def _e_measure(hits: Tensor, marked: Tensor, area: Tensor, pixels: int) -> Tensor:
    """Enhanced alignment measure (Fan et al. 2018) of binary maps: `hits` of the `marked` pixels are in the object."""
    total = torch.zeros_like(hits)
    misses = area - hits
    for number, a, b in (
        (hits, 1 - marked / pixels, 1 - area / pixels),
        (marked - hits, 1 - marked / pixels, -area / pixels),
        (misses, -marked / pixels, 1 - area / pixels),
        (pixels - marked - misses, -marked / pixels, -area / pixels),
    ):
        total += number * (2 * a * b / (a.square() + b.square() + EPS) + 1).square() / 4
    total = torch.where(area == 0, pixels - marked, torch.where(area == pixels, marked, total))
    return total / (pixels - 1 + EPS)


# ---------------------------------------------------------------------------------------------------------------------
# weighted F-measure, on the CPU

REACH = 3  # of the 7 x 7 Gaussian
WINDOW = np.exp(-(np.arange(-REACH, REACH + 1) ** 2) / (2 * 5.0**2))
WINDOW /= WINDOW.sum()
FAR = 128  # pixels from the object, where an error's weight is 2 to within 2e-8
# A pixel that the Gaussian reaches has an object pixel among these (y, x), nearest first. Which of equally near ones is
# taken changes the score; here it is the leftmost, then the uppermost, as in scipy's distance_transform_edt.
BORDER = 4
NEIGHBOURS = sorted(
    ((y, x) for y in range(-BORDER, BORDER + 1) for x in range(-BORDER, BORDER + 1) if 0 < y * y + x * x <= 2 * REACH**2),
    key=lambda place: (place[0] ** 2 + place[1] ** 2, place[1], place[0]),
)


def _grown(box: Sequence[int], margin: int) -> tuple[slice, slice]:
    x, y, width, height = box
    return slice(max(y - margin, 0), y + height + margin), slice(max(x - margin, 0), x + width + margin)


def _missed(error: np.ndarray, mask: np.ndarray) -> float:
    """Sum over the object of each pixel's error or, if that is less, of the error blurred. Around the object, but not beyond
    the image, the blur sees the error of the nearest object pixel."""
    around = cv2.dilate(mask, np.ones((2 * REACH + 1, 2 * REACH + 1), np.uint8)) - mask
    error, mask, around = (cv2.copyMakeBorder(x, *[BORDER] * 4, cv2.BORDER_CONSTANT, value=0) for x in (error, mask, around))
    error *= mask
    flat_error, flat_mask, left = error.ravel(), mask.ravel(), np.flatnonzero(around.view(bool))
    for y, x in NEIGHBOURS:
        nearest = left + (y * mask.shape[1] + x)
        hit = flat_mask[nearest] > 0
        flat_error[left[hit]] = flat_error[nearest[hit]]
        left = left[~hit]
    blurred = cv2.sepFilter2D(error, -1, WINDOW, WINDOW, borderType=cv2.BORDER_CONSTANT)
    return cv2.mean(np.minimum(error, blurred), mask)[0] * cv2.countNonZero(mask)


def _weighted_f(prediction: np.ndarray, mask: np.ndarray, values: np.ndarray, false: float) -> float:
    """Weighted F-measure (Margolin et al. 2014), beta = 1. `values` of the stretched levels, `false` their sum outside the
    object. Of the definition's two transforms of the whole image, the nearest pixels are needed only along the object and
    the distances only near it."""
    box = cv2.boundingRect(mask)
    if box[2] == 0:
        return 0.0
    area = cv2.countNonZero(mask)
    near = _grown(box, REACH)
    missed = _missed(cv2.LUT(prediction[near], (1 - values).astype(np.float32)), mask[near])

    near = _grown(box, FAR)
    prediction, mask = prediction[near], mask[near]
    wrong = cv2.LUT(prediction, (values > 0).view(np.uint8)) & (1 - mask)
    near = _grown(cv2.boundingRect(wrong | mask), 0)
    at = np.flatnonzero(wrong[near].view(bool))
    false *= 2
    if len(at):
        distance = cv2.distanceTransform(1 - mask[near], cv2.DIST_L2, cv2.DIST_MASK_PRECISE).ravel()[at]
        # The squares are integers, but OpenCV's last digit depends on where the array lies in memory.
        distance = np.sqrt(np.rint(np.square(distance, dtype=np.float64)))
        false -= float((values[prediction[near].ravel()[at]] * np.exp(distance * (math.log(0.5) / 5))).sum())

    hit = area - missed
    recall, precision = hit / area, hit / (hit + false + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


# ---------------------------------------------------------------------------------------------------------------------
# one image, a set, two folders


def score(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every metric of (B, H, W) maps, uint8 or floating in [0, 1] and then rounded to 8 bits as in a saved PNG, against
    masks of this size, bool or uint8 with the object above 128. Values are (B,), curves over the thresholds 0 ... 255
    (B, 256), all in float64 and where the maps are.

    As in pysodmetrics all but `iou` and `dice` see the map stretched to [0, 1], each image by itself:
    mae, sm (S-measure), wfm (weighted F-measure), and of fm (F-measure, beta^2 = 0.3), em (E-measure), iou and dice
    *_curve     at every threshold; `summarize` makes *_mean and *_max of them
    *_adp       at twice the mean of the stretched map, at most 1
    *_stretched at 0.5 of the stretched map, which pysodmetrics calls binary; iou and dice only
    iou, dice   at 0.5 of the map as it was saved: what is commonly meant by the names
    iou_saved_curve  the same at every threshold, to choose one by.

    Where the truth is empty, wfm, fm, iou and dice are 0, even for an empty map.
    """
    predictions = to_uint8(predictions)
    targets = targets if targets.dtype == torch.bool else targets > 128
    pixels = targets[0].numel()
    quadrants = _counts(predictions, targets).double()
    levels = torch.arange(256, device=targets.device)
    counts = quadrants.sum(1)
    present = counts.sum(1) > 0
    low, high = present.int().argmax(1), 255 - present.flip(1).int().argmax(1)
    values = _stretch(low, high)
    sums = (counts * values[:, None]).sum(2)
    area = counts[:, 1].sum(1, keepdim=True)

    twice = 2 * (counts.sum(1) * values).sum(1, keepdim=True) / pixels
    curve = (values * 255).floor()[:, None] >= levels[:, None]
    others = torch.stack([values >= twice.clamp_max(1), values > 0.5, (levels > 127).expand_as(values)], 1)
    above = counts @ torch.cat([curve, others], 1).double().mT
    hits, marked = above[:, 1], above.sum(1)

    maps, masks = (x.cpu().numpy() for x in (predictions, targets.to(torch.uint8)))
    rows = zip(maps, masks, values.cpu().numpy(), sums[:, 0].tolist(), strict=True)
    weighted = [_weighted_f(*row) for row in rows]
    saved = counts.flip(2).cumsum(2).flip(2)

    result = {
        "mae": (sums[:, 0] + area[:, 0] - sums[:, 1]) / pixels,
        "sm": _s_measure(quadrants, values),
        "wfm": torch.tensor(weighted, dtype=torch.float64, device=targets.device),
        "iou_saved_curve": _ratio(saved[:, 1], area + saved[:, 0]),
    }
    for name, at in (
        ("fm", _ratio(1.3 * hits, 0.3 * area + marked)),
        ("em", _e_measure(hits, marked, area, pixels)),
        ("iou", _ratio(hits, area + marked - hits)),
        ("dice", _ratio(2 * hits, area + marked)),
    ):
        result |= {f"{name}_adp": at[:, 256], f"{name}_curve": at[:, :256]}
        if name in ("iou", "dice"):
            result |= {f"{name}_stretched": at[:, 257], name: at[:, 258]}
    return result


def summarize(table: dict[str, np.ndarray]) -> dict[str, float]:
    """Of a set: the mean over its images, and of every curve, averaged over the images first, the mean and the maximum."""
    summary = {}
    for name, values in table.items():
        if name.endswith("_curve"):
            curve, name = values.mean(0), name.removesuffix("_curve")
            summary |= {f"{name}_mean": float(curve.mean()), f"{name}_max": float(curve.max())}
        elif name != "id":
            summary[name] = float(values.mean())
    return summary


def best_threshold(table: dict[str, np.ndarray]) -> float:
    """Where the mean IoU of the set's images is highest, of the levels of an 8-bit map."""
    return float(table["iou_saved_curve"].mean(0).argmax()) / 255


def _by_stem(folder: Path) -> dict[str, Path]:
    found = {}
    for path in find_images(folder):
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path} have one name, so maps and masks cannot be paired: give the folder of"
                " one data set's maps or masks alone."
            )
        found[path.stem] = path
    return found


def _read_grey(path: Path) -> np.ndarray:
    pixels = read_image(path)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _score_files(prediction: Path, target: Path) -> tuple[dict[str, Tensor], bool]:
    prediction, mask = _read_grey(prediction), _read_grey(target)
    if 0 < mask.max() <= 128:
        raise UserError(
            f"{target}: no value is above 128, where masks hold their object, but some are {mask.max()}: store it as 255."
        )
    resized = prediction.shape != mask.shape
    if resized:
        prediction = cv2.resize(prediction, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return score(torch.from_numpy(prediction)[None], torch.from_numpy(mask)[None]), resized


def score_folders(predictions: Path, targets: Path, threads: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """The saved maps of one folder against the masks of another, paired by name whatever the ending. A row of `score` per
    pair with its "id", the place in the list of names. A map of another size is resized to its mask."""
    maps, masks = _by_stem(predictions), _by_stem(targets)
    names = sorted(maps.keys() & masks.keys())
    if not names:
        raise UserError(
            f"No file below {predictions} ({len(maps)} images) is named like one below {targets} ({len(masks)} images):"
            " a map must have its mask's name, whatever the ending."
        )
    for folder, alone in ((predictions, maps.keys() - masks.keys()), (targets, masks.keys() - maps.keys())):
        if alone:
            shown = ", ".join(sorted(alone)[:5]) + (", ..." if len(alone) > 5 else "")
            logger.warning("%d of the images in %s have no partner and are not scored: %s", len(alone), folder, shown)
    before = torch.get_num_threads()
    # Threads, because decoding, OpenCV and torch leave Python's lock alone: processes took 1.2 times as long. torch must not
    # start threads of its own in each of them.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = pool.map(lambda name: _score_files(maps[name], masks[name]), names)
        rows, resized = zip(*tqdm(work, "scoring", len(names), unit="image", leave=False, disable=None), strict=True)
    torch.set_num_threads(before)
    if any(resized):
        logger.warning("%d of %d maps were resized (bilinearly) to their masks' size", sum(resized), len(names))
    table = {column: torch.cat([row[column] for row in rows]).numpy() for column in rows[0]}
    return {"id": np.arange(len(names))} | table, names
