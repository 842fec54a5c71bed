"""Metrics over whole sets of samples, and of images, each the published definition and tested against a reference.

Images are (B, 3, H, W) RGB, uint8 or floating in [0, 1]; the result is one number per image, whatever else the batch holds.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def confusion(target: np.ndarray, answer: np.ndarray, classes: int) -> np.ndarray:
    """Counts, rows are the truth, columns the answer."""
    return np.bincount(target.astype(int) * classes + answer.astype(int), minlength=classes * classes).reshape(
        classes, classes
    )


def weighted_f1(counts: np.ndarray) -> float:
    """F1 per class, weighted by how often the class occurs; a class that is neither true nor answered scores 0."""
    hit, true, answered = np.diag(counts), counts.sum(1), counts.sum(0)
    f1 = 2 * hit / np.maximum(true + answered, 1)
    return float((f1 * true).sum() / max(true.sum(), 1))


def auc(target: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half. NaN for one class."""
    positive = int((target > 0).sum())
    negative = len(target) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal scores
    return float((rank[inverse][target > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration(correct: np.ndarray, confidence: np.ndarray, bins: int = 10) -> tuple[float, np.ndarray]:
    """Expected calibration error (Guo et al. 2017) and, per bin, mean confidence, accuracy and share of the samples."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    safe = np.maximum(count, 1)
    mean = np.bincount(index, confidence, minlength=bins) / safe
    accuracy = np.bincount(index, correct.astype(float), minlength=bins) / safe
    share = count / max(len(correct), 1)
    return float((share * np.abs(mean - accuracy)).sum()), np.stack([mean, accuracy, share], 1)


# ---------------------------------------------------------------------------------------------------------------------
# images beside a reference


def to_uint8(images: Tensor) -> Tensor:
    """What an image file would hold."""
    return images if images.dtype == torch.uint8 else (images.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """In dB, for a data range of 1, over all channels of an image. Capped at 100 dB, the score of equal images: a single
    infinity would spoil the mean of a set."""
    levels = [x.float() if x.dtype == torch.uint8 else x.float() * 255 for x in (output, target)]  # exact for uint8
    error = (levels[0] - levels[1]).square().flatten(1).mean(1) / 255**2
    return -10 * error.clamp_min(1e-10).log10()


def _blur(maps: Tensor, window: Tensor) -> Tensor:
    """Each map of (1, N, H, W) by itself, where the window fits, as a depthwise convolution. `ssim` with its gradient takes
    29 CPU ms for 4 x 3 x 256 x 256; with the four moments side by side as more channels 44, with the images as batch 80, as
    banded matrices or eleven shifted sums about 50, with one map per batch entry 500. On a GPU a depthwise convolution does
    not round to TF32, as others do."""
    count = maps.shape[1]
    window = window.expand(count, 1, 1, 11).contiguous()
    return F.conv2d(F.conv2d(maps, window, groups=count), window.transpose(2, 3), groups=count)


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), mean over any number of channels: Gaussian window of 11 pixels and sigma 1.5
    where it fits whole, population covariance, data range 1. Differentiable, and computed in float32 even under autocast,
    which would lose the small variances."""
    batch, channels, height, width = output.shape
    if min(height, width) < 11:
        raise ValueError(f"SSIM's window of 11 x 11 pixels does not fit into an image of {width} x {height}.")
    if batch * channels == 1:  # the convolution of a single map is not a depthwise one
        return ssim(output.expand(1, 2, -1, -1), target.expand(1, 2, -1, -1))
    with torch.autocast(output.device.type, enabled=False):
        x, y = (_unit(images).reshape(1, -1, height, width) for images in (output, target))
        middle = y.detach().mean((2, 3), keepdim=True)
        x, y = x - middle, y - middle  # moments about it lose no digits: the error falls from 1e-5 to 1e-6
        window = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))
        window = window / window.sum()
        mean_x, mean_y = _blur(x, window), _blur(y, window)
        variances = _blur(x * x + y * y, window) - mean_x * mean_x - mean_y * mean_y  # their sum is all that is needed
        covariance = _blur(x * y, window) - mean_x * mean_y
        mean_x, mean_y = mean_x + middle, mean_y + middle
        light = (2 * mean_x * mean_y + 0.01**2) / (mean_x * mean_x + mean_y * mean_y + 0.01**2)
        return (light * (2 * covariance + 0.03**2) / (variances + 0.03**2)).view(batch, -1).mean(1)


def luminance(images: Tensor) -> Tensor:
    """(B, 1, H, W): Y of ITU-R BT.601 between 16/255 and 235/255, which is MATLAB's rgb2ycbcr over 255 and what the
    restoration literature calls the Y channel."""
    red, green, blue = _unit(images).split(1, 1)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255


def resize_256(images: Tensor) -> Tensor:
    """The 256 x 256 at which many papers score, whatever the image's own shape."""
    return F.interpolate(_unit(images), size=(256, 256), mode="bilinear", antialias=True, align_corners=False)


def fidelity(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """PSNR and SSIM as papers report them, which differ by 3.5 dB and 0.06 for one pair of images: RGB at the original size,
    luminance alone, and both images resized to 256 x 256. Rounded to 8 bits first, as written to a file."""
    output, target = to_uint8(output), to_uint8(target)
    pairs = {
        "": (output, target),
        "_y": (luminance(output), luminance(target)),
        "_256": (resize_256(output), resize_256(target)),
    }
    return {metric.__name__ + suffix: metric(*pair) for suffix, pair in pairs.items() for metric in (psnr, ssim)}


def grey_world(images: Tensor) -> Tensor:
    """The classical restoration that a network has to beat: each channel is scaled to the mean of all three. Floating."""
    images = _unit(images)
    mean = images.mean((2, 3), keepdim=True)
    gain = mean.mean(1, keepdim=True) / mean.clamp_min(1 / 255)  # a channel darker than one level is only noise
    return (images * gain).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# images without a reference
#
# Neither UIQM nor UCIQE is fully defined by its paper, and the codes in circulation disagree even on the sign of a change:
# doubling the saturation of one photograph moved UIQM from 3.00 to 2.39 (funie) and from 3.52 to 3.68 (matlab). So the
# variant is part of the metric's name. All of them see 8-bit images, because the codes do and because their rules for zeros
# would otherwise hang on rounding errors.

Variant = Literal["paper", "funie", "matlab"]
NR_VARIANTS: tuple[Variant, ...] = ("paper", "funie", "matlab")


def _pixels(images: Tensor, variant: Variant) -> Tensor:
    if variant not in NR_VARIANTS:
        raise ValueError(f"There is no variant {variant!r} of UIQM and UCIQE, only {', '.join(NR_VARIANTS)}.")
    height, width = images.shape[-2:]
    if min(height, width) < 10:
        raise ValueError(f"UIQM and UCIQE need at least 10 x 10 pixels, not {width} x {height}.")
    return to_uint8(images).contiguous()


def _counts(levels: Tensor, size: int) -> Tensor:
    """(B, size): how often each level 0 ... size - 1 occurs in each image. A pixel takes so few levels that trimming needs
    no sort."""
    levels = levels.flatten(1).int()
    first = size * torch.arange(len(levels), dtype=torch.int, device=levels.device)[:, None]
    return torch.bincount((levels + first).flatten(), minlength=size * len(levels)).view(-1, size)


def _between(counts: Tensor, start: int, stop: int) -> Tensor:
    """How many of each level's pixels stand at the places start ... stop - 1 when all are sorted."""
    return counts.cumsum(1).clamp(start, stop).diff(dim=1, prepend=counts.new_full((len(counts), 1), start))


def _trimmed_moments(levels: Tensor, bound: int, variant: Variant) -> tuple[Tensor, Tensor]:
    """Mean and variance of integers in [-bound, bound] without the lowest and the highest tenth."""
    counts = _counts(levels + bound, 2 * bound + 1)
    values = torch.arange(-bound, bound + 1, device=levels.device)
    pixels = levels[0].numel()
    left, right = -(-pixels // 10), pixels // 10
    start, stop, total = {
        "paper": (left, pixels - right, pixels - left - right),
        "funie": (left + 1, pixels - right, pixels - left - right),  # sums one pixel less than it divides by
        "matlab": ((pixels + 5) // 10, (9 * pixels + 5) // 10, 0.8 * pixels),
    }[variant]
    kept = _between(counts, start, stop)
    mean = (kept * values).sum(1) / total
    squares = (values - mean[:, None]).square()
    if variant == "funie":
        return mean, (counts * squares).sum(1) / pixels  # the variance of all pixels about the trimmed mean
    return mean, (kept * squares).sum(1) / total


def uicm_of(mean_rg: Tensor, mean_yb: Tensor, variance_rg: Tensor, variance_yb: Tensor) -> Tensor:
    """Equation 5 of the paper."""
    return -0.0268 * (mean_rg.square() + mean_yb.square()).sqrt() + 0.1586 * (variance_rg + variance_yb).sqrt()


def uicm(images: Tensor, variant: Variant) -> Tensor:
    """UIQM's colourfulness, see `uiqm`."""
    red, green, blue = _pixels(images, variant).int().unbind(1)
    mean_rg, variance_rg = _trimmed_moments(red - green, 255, variant)
    mean_yb, variance_yb = _trimmed_moments(red + green - 2 * blue, 510, variant)  # twice (R + G) / 2 - B
    return uicm_of(mean_rg, mean_yb / 2, variance_rg, variance_yb / 4)


def _extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each whole block: columns of a block first, which takes an eighth of max_pool2d's time."""
    height, width = x.shape[-2:]
    x = x[..., : height // size * size, : width // size * size].unflatten(-2, (-1, size))
    low, high = (y.unflatten(-1, (-1, size)) for y in (x.amin(-2), x.amax(-2)))
    return low.amin(-1), high.amax(-1)


def _cubic(x: Tensor, size: int) -> Tensor:
    """The rows stretched as MATLAB's imresize does: Keys's kernel with a = -1/2 and mirrored ends."""
    old = x.shape[-2]
    at = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) * old / size - 0.5
    index = at.floor().long() + torch.arange(-1, 3, device=x.device)[:, None]
    d = (at - index).abs()
    weight = torch.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2)
    index = torch.where(index < 0, -1 - index, torch.where(index >= old, 2 * old - 1 - index, index))
    stretched = 0
    for i, w in zip(index, weight, strict=True):
        stretched = x.index_select(-2, i).mul_(w[:, None]).add_(stretched)  # in place: half the time on a CPU
    return stretched


def _to_blocks_of_five(x: Tensor) -> Tensor:
    """The MATLAB code stretches both sides to the next multiple of 5, as soon as one of them is none. In double, because
    small differences end up in logarithms."""
    height, width = x.shape[-2:]
    if height % 5 == 0 and width % 5 == 0:
        return x
    x = _cubic(x.double().transpose(-1, -2).contiguous(), width - width % 5 + 5)
    return _cubic(x.transpose(-1, -2).contiguous(), height - height % 5 + 5)


def _modulus(ratio: Tensor, factor: Tensor) -> Tensor:
    """Modulus of the sum of factor x log(ratio) over a channel's blocks. Stretching may overshoot below zero, where MATLAB's
    logarithm has the imaginary part pi."""
    log = factor * ratio.abs().log()
    phase = torch.where(ratio < 0, factor * math.pi, 0)
    return torch.hypot(log.sum((2, 3)), phase.sum((2, 3)))


def uism(images: Tensor, variant: Variant) -> Tensor:
    """UIQM's sharpness, see `uiqm`."""
    x = _pixels(images, variant).float()
    height, width = x.shape[-2:]
    framed = F.pad(x, (1, 1, 1, 1), "replicate")
    down, right = framed[:, :, 2:] - framed[:, :, :-2], framed[..., 2:] - framed[..., :-2]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    right = right[:, :, :-2] + 2 * right[:, :, 1:-1] + right[:, :, 2:]
    if variant == "matlab":
        rows, columns = -(-height // 5) * 5, -(-width // 5) * 5
        low, high = _extremes(_to_blocks_of_five((down - right).abs())[:, :, :rows, :columns], 5)
        counted = (low != 0) & (high != 0)
        ratio = torch.where(counted, high / torch.where(counted, low, 1), 1)
        contrast = _modulus(ratio, torch.ones_like(ratio)) * 2 / (height / 5 * width / 5)
    else:
        low, high = _extremes((down.square() + right.square()).sqrt() * x, 10)
        contrast = 2 * torch.where(low > 0, high / torch.where(low > 0, low, 1), 1).log().mean((2, 3))
    weights = x.new_tensor([0.299, 0.587, 0.144 if variant == "funie" else 0.114])
    return (contrast.float() * weights).sum(1)


def uiconm(images: Tensor, variant: Variant) -> Tensor:
    """UIQM's contrast, see `uiqm`."""
    x = _pixels(images, variant).float()
    if variant == "matlab":
        low, high = _extremes(_to_blocks_of_five(x), 5)
        counted = (high != low) & (high + low != 0)
        ratio = torch.where(counted, (high - low) / torch.where(counted, high + low, 1), 1)
        return (_modulus(ratio, ratio) / ratio[0, 0].numel()).sum(1).float()
    if variant == "funie":
        low, high = _extremes(x, 10)
        low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        ratio = (high - low) / (high + low).clamp_min(1)
    else:
        red, green, blue = x.split(1, 1)
        low, high = _extremes(0.299 * red + 0.587 * green + 0.114 * blue, 10)
        # PLIP's difference over its sum, of the grey tones 1026 - low and 1026 - high
        ratio = (high - low) / high.clamp_min(1e-3) / (1 - high * low / 1026**2)
    return torch.special.entr(ratio).mean((1, 2, 3))  # -m log m


def uiqm(images: Tensor, variant: Variant) -> Tensor:
    """Underwater image quality measure (Panetta, Gao, Agaian 2016), higher is better, though noise scores high too.

    paper: what the paper defines, with the commonest reading where it is silent: whole blocks of 10 pixels, Sobel magnitude
    with repeated border, blocks that contain a zero edge count 0, intensity is BT.601 luma, PLIP with mu = gamma = k = 1026
    inside a block, the plain mean over blocks (PLIP's own product would shrink with the size of the image).

    funie: FUnIE-GAN's uqim_utils.py, which most Python repositories copy: weight 0.144 of blue, one pixel too many trimmed,
    variance of all pixels, no PLIP, contrast over the three channels jointly. Its rescaling of the edges cancels in the
    ratio. It is applied to images of 256 x 256 there: `resize_256` first.

    matlab: the UICM.m, UISM.m, UIConM.m that travel with Semi-UIR and others: blocks of 5, |vertical - horizontal| Sobel
    not multiplied by the image, so a mirrored image scores differently, no PLIP, contrast summed over the channels.
    """
    return 0.0282 * uicm(images, variant) + 0.2953 * uism(images, variant) + 3.5753 * uiconm(images, variant)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIELAB of sRGB images for the white D65: L in [0, 100]; a and b of a grey pixel are 0."""
    level = torch.arange(256, device=images.device) / 255
    linear = torch.where(level > 0.04045, ((level + 0.055) / 1.055) ** 2.4, level / 12.92)
    pixels = to_uint8(images)
    red, green, blue = linear.index_select(0, pixels.flatten().int()).view(pixels.shape).unbind(1)
    roots = []
    for r, g, b in ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227)):
        t = (r * red + g * green + b * blue) / (r + g + b)  # X, Y or Z over that of white
        roots.append(torch.where(t > (6 / 29) ** 3, t ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29))
    x, y, z = roots
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def uciqe(images: Tensor, variant: Variant) -> Tensor:
    """Underwater colour image quality evaluation (Yang, Sowmya 2015): spread of chroma, contrast of luminance and mean
    saturation, weighted.

    paper: CIELAB over 100, standard deviation of chroma C, distance of the 1 % and 99 % quantiles of L, saturation
    C / sqrt(C^2 + L^2), the commonest readings of what the paper leaves open.

    funie: what Python repositories with FUnIE-GAN's UIQM call UCIQE (GHSUIR, WWE-UIE), another metric: in HSV, standard
    deviation of the hue as a share of the circle, mean of the highest less mean of the lowest 1 % of V, mean of S. In
    floating point; OpenCV's 8 bits moved it by 1e-5.

    matlab: UCIQE.m, circulated as the authors': 8-bit Lab over 255 with a and b still offset by 128, sqrt(mean |1 -
    (mean C / C)^2|) for the spread, stretchlim's limits for the contrast, which is 1 for a flat image, so grey scores 0.48.
    For the white D65 as in its Python copies; MATLAB itself converts for D50.
    """
    x = _pixels(images, variant)
    pixels = x[0, 0].numel()
    if variant == "funie":
        hue, saturation, value = _hsv(x.float())
        levels, end = torch.arange(256, device=x.device), max(pixels // 100, 1)
        counts = _counts(value, 256)
        ends = _between(counts, pixels - end, pixels) - _between(counts, 0, end)
        spread, contrast = _deviation(hue.flatten(1)), (ends * levels).sum(1) / (255 * end)
    else:
        lightness, a, b = rgb_to_lab(x).flatten(2).unbind(1)
        if variant == "matlab":
            lightness, a, b = (lightness * 2.55).round(), (a + 128).round(), (b + 128).round()
            below = _counts(lightness, 256).cumsum(1)
            low, high = (100 * below > pixels).int().argmax(1), (100 * below >= 99 * pixels).int().argmax(1)
            contrast = torch.where(low == high, 1.0, (high - low) / 255)
        else:
            low, high = (lightness.kthvalue(k).values for k in (pixels // 100 + 1, pixels - pixels // 100))
            contrast = (high - low) / 100
        squares = a.square() + b.square()
        chroma = squares.sqrt()
        saturation = chroma / (squares + lightness.square()).sqrt().clamp_min(1e-6)
        if variant == "matlab":
            spread = (1 - chroma.mean(1, keepdim=True).square() / squares).abs().mean(1).sqrt()
        else:
            spread = _deviation(chroma) / 100
    return 0.4680 * spread + 0.2745 * contrast + 0.2576 * saturation.flatten(1).mean(1)


def _deviation(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()  # a fifth of the time of Tensor.std


def _hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue and saturation in [0, 1], value as given."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    range_ = value - x.amin(1)
    sixth = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * range_, red - green + 4 * range_)
    ) / range_.clamp_min(1)
    return sixth % 6 / 6, range_ / value.clamp_min(1), value
