"""Losses of image restoration and of its distillation: one value per sample, which depends on no other sample of the batch.

All but the VGG itself are computed in float32, under autocast too: bfloat16's 8 bits swallow small differences.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.cli import UserError
from common.metrics import ssim
from common.wavelets import full_precision, haar


def in_float32(loss: Callable) -> Callable:
    """Autocast off, half types and integers widened; float64 stays, for tests."""

    def widen(value: object) -> object:
        return full_precision(value) if isinstance(value, Tensor) else value

    @functools.wraps(loss)
    def run(first: Tensor, *others, **options):
        with torch.autocast(first.device.type, enabled=False):
            return loss(widen(first), *map(widen, others), **{name: widen(value) for name, value in options.items()})

    return run


def per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K, h, w) at `size`: averaged where larger, so that nothing is skipped, interpolated where smaller."""
    lower = [min(pair) for pair in zip(masks.shape[2:], size, strict=True)]
    masks = F.adaptive_avg_pool2d(full_precision(masks), lower)
    return masks if lower == list(size) else F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# image against reference


@in_float32
def charbonnier(output: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    return per_sample(((output - target).square() + eps**2).sqrt())


@in_float32
def ssim_loss(output: Tensor, target: Tensor) -> Tensor:
    return 1 - ssim(output, target)


@in_float32
def region(output: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """L1 within each mask, averaged over the masks that are not empty: small regions count as much as large ones. Plain L1
    for a sample without any, and for constant masks."""
    error = (output - target).abs().mean(1, keepdim=True)
    masks = resize_masks(masks, error.shape[2:])
    area = masks.flatten(2).sum(2)
    present = area > 0
    inside = (masks * error).flatten(2).sum(2) / torch.where(present, area, 1)
    return torch.where(present.any(1), (inside * present).sum(1) / present.sum(1).clamp(min=1), per_sample(error))


@in_float32
def frequency(
    output: Tensor, target: Tensor, hf_weight: Tensor | None = None, lf_weight: Tensor | None = None
) -> dict[str, Tensor]:
    """L1 of the Haar bands: `hf` of the three high ones, `lf` of the low one and of its Fourier amplitude.

    The maps (B, 1, h, w) weigh places by 1 + map. Frequencies have no place, so the amplitude is never weighed."""
    (low, high), (low_target, high_target) = (haar(pad_to_even(x)) for x in (output, target))
    amplitude, amplitude_target = (torch.fft.rfft2(x, norm="ortho").abs() for x in (low, low_target))
    return {
        "hf": weighted((high - high_target).abs(), hf_weight),
        "lf": weighted((low - low_target).abs(), lf_weight) + per_sample((amplitude - amplitude_target).abs()),
    }


def pad_to_even(x: Tensor) -> Tensor:
    bottom, right = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (0, right, 0, bottom), mode="reflect") if bottom or right else x


def weighted(x: Tensor, extra: Tensor | None) -> Tensor:
    """The mean per sample under weights 1 + extra; a constant map changes nothing, be it 0 or 1."""
    if extra is None:
        return per_sample(x)
    weight = 1 + resize_masks(extra, x.shape[2:])
    return per_sample(x * weight) / per_sample(weight)


@in_float32
def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, down plus across."""
    return per_sample(x.diff(dim=2).abs()) + per_sample(x.diff(dim=3).abs())


# ---------------------------------------------------------------------------------------------------------------------
# perceptual

VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels and convolutions of each block


class Perceptual(nn.Module):
    """Mean over `layers` ("relu2_2", "relu3_4") of the L1 distance of VGG19's features. Runs no further than the last one.

    The network runs in autocast's type, in half the time: at an error of 30 dB the bfloat16 loss is off by 0.1 % and its
    gradient's cosine is 0.97, at 40 dB 1.3 % and 0.94."""

    def __init__(self, layers: Sequence[str], weights: str | Path = "imagenet"):
        super().__init__()
        with torch.device("meta"):  # neither memory nor random numbers are spent on what the weights replace
            names, modules = zip(*vgg19(), strict=True)
        unknown = [name for name in layers if name not in names or not name.startswith("relu")]
        if unknown or not layers:
            known = " ".join(name for name in names if name.startswith("relu"))
            raise UserError(f"--perceptual-layers {' '.join(unknown)}: choose from {known}.")
        self.wanted = {names.index(name) for name in layers}
        self.features = nn.Sequential(*modules[: max(self.wanted) + 1])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        state, own = read_vgg19(weights), self.state_dict()
        if not isinstance(state, dict) or any(getattr(state.get(k), "shape", None) != v.shape for k, v in own.items()):
            raise UserError(
                f"--perceptual-weights {weights} holds no VGG19 with torchvision's names (features.0.weight ...)."
            )
        self.load_state_dict({k: state[k].float() for k in own}, assign=True)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def extract(self, images: Tensor) -> list[Tensor]:
        x, found = (images.float() - self.mean) / self.std, []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.wanted:
                found.append(x.float())
        return found

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = self.extract(target)
        distances = [per_sample((a - b).abs()) for a, b in zip(self.extract(output), theirs, strict=True)]
        return torch.stack(distances).mean(0)


def vgg19() -> list[tuple[str, nn.Module]]:
    """Named layers in torchvision's order: the i-th is its `features.i`."""
    layers, above = [], 3
    for block, (channels, count) in enumerate(VGG19, 1):
        for number in range(1, count + 1):
            layers.append((f"conv{block}_{number}", nn.Conv2d(above, channels, 3, padding=1)))
            layers.append((f"relu{block}_{number}", nn.ReLU(inplace=True)))
            above = channels
        layers.append((f"pool{block}", nn.MaxPool2d(2)))
    return layers


def read_vgg19(weights: str | Path) -> dict[str, Tensor]:
    if weights == "imagenet":
        from torchvision.models import VGG19_Weights

        try:
            return VGG19_Weights.DEFAULT.get_state_dict(
                progress=False, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:  # RuntimeError: what was downloaded does not match its hash
            raise UserError(
                f"VGG19's weights cannot be downloaded ({error}): give torchvision's vgg19 file with --perceptual-weights"
                " PATH, or leave this loss out with --perceptual-weight 0."
            ) from None
    return read_weights(weights, f"--perceptual-weights {weights}", "torchvision's vgg19 weights")


def read_weights(path: str | Path, what: str, wanted: str) -> dict[str, Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise anything, even IndexError
        raise UserError(f"{what} cannot be read ({type(error).__name__}): give {wanted} as .pth or .safetensors.") from None


def fill(extractor: nn.Module, state: object, what: str, network: str) -> None:
    """Load the file of a whole timm network into one for feature maps. timm itself would leave random what the file lacks,
    with a message in its own log."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # as timm's own training saves it
    own = extractor.state_dict()
    named = {key.replace(".", "_"): value for key, value in state.items()} if isinstance(state, dict) else {}
    # timm joins some names of an extractor by _ and puts model. before those of others
    found = {key: named.get(key.removeprefix("model.").replace(".", "_")) for key in own}
    wrong = [key for key, value in own.items() if getattr(found[key], "shape", None) != value.shape]
    if wrong:
        raise UserError(
            f"{what} does not hold the weights of {network} ({len(wrong)} of {len(own)} are missing or of another shape, the"
            f" first is {wrong[0]})."
        )
    extractor.load_state_dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# perceptual, of volumes


def take_slices(volume: Tensor, slices: Tensor) -> list[Tensor]:
    """Slices of (B, C, X, Y, Z) across x, across y and across z, each (B * n, C, H, W). `slices` (B, 3, n) in [0, 1) are
    places along the axes: samples of all sizes can be drawn alike."""
    found = []
    for axis in range(3):
        layers = volume.movedim(2 + axis, 1)
        size = layers.shape[1]
        index = (slices[:, axis] * size).long().clamp(max=size - 1)  # numpy's float64 below 1 may be 1 in float32
        found.append(layers[torch.arange(len(layers), device=layers.device)[:, None], index].flatten(0, 1))
    return found


class SlicePerceptual(nn.Module):
    """LPIPS without its learnt weights (Zhang et al. 2018) on slices of volumes in [-1, 1]: features scaled to length 1 at
    each place, their squared distance averaged over places, then over slices, axes and the network's levels.

    `network` is timm:NAME, whose weights timm downloads, or timm:NAME@FILE. It runs in autocast's type."""

    def __init__(self, network: str, levels: Sequence[int] = (0, 1, 2, 3)):
        super().__init__()
        from timm.data import resolve_data_config

        self.backbone = make_extractor(network, levels)
        pretrained = resolve_data_config({}, model=self.backbone)
        self.register_buffer("mean", torch.tensor(pretrained["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pretrained["std"]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).to(memory_format=torch.channels_last).eval()

    def train(self, mode: bool = True) -> "SlicePerceptual":
        return super().train(False)  # as a part of a model in training, too: a loss must not change while it is used

    def extract(self, images: Tensor) -> list[Tensor]:
        return self.backbone(((images.float() + 1) / 2 - self.mean) / self.std)  # three channels by broadcasting

    def forward(self, output: Tensor, target: Tensor, slices: Tensor) -> Tensor:
        distances = []
        for mine, theirs in zip(take_slices(output, slices), take_slices(target, slices), strict=True):
            with torch.no_grad():
                wanted = self.extract(theirs)
            distances += [unit_distance(a, b) for a, b in zip(self.extract(mine), wanted, strict=True)]
        return torch.stack(distances).mean(0).view(len(output), -1).mean(1)


@in_float32
def unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 - 2 cosine of the channels. Features far below length 1e-3 do not count, and give no huge gradient: in air, VGG's
    may all be zero."""
    a, b = (x * (x.square().sum(1, keepdim=True) + 1e-6).rsqrt() for x in (a, b))
    return per_sample((a - b).square().sum(1))


def make_extractor(network: str, levels: Sequence[int]) -> nn.Module:
    """A timm network's feature maps at some of its levels."""
    import timm

    kind, _, rest = network.partition(":")
    name, _, path = rest.partition("@")
    if kind != "timm" or not name or network.endswith("@"):
        raise UserError(f"--perceptual {network}: give timm:NAME or timm:NAME@FILE, e.g. timm:vgg19.")
    state = read_weights(path, f"--perceptual {network}: {path}", f"timm's weights of {name}") if path else None
    try:
        with torch.random.fork_rng(devices=[]):  # what the weights replace shall not use up the run's random numbers
            model = timm.create_model(name, features_only=True, out_indices=tuple(levels), pretrained=not path)
    except Exception as error:  # a download may end in anything
        raise UserError(
            f"--perceptual {network} cannot be had ({type(error).__name__}: {' '.join(str(error).split())[:200]}): give its"
            " weights as timm:NAME@FILE, choose another network, or leave this loss out with --perceptual-weight 0."
        ) from None
    if len(set(model.feature_info.reduction())) < len(levels):
        raise UserError(f"--perceptual {network} has not {len(levels)} sizes of feature maps: give a convolutional network.")
    if path:
        fill(model, state, f"--perceptual {network}: {path}", f"timm's {name}")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# student against teacher

UINT8_STEP = 1 / 255  # of stored masks: what varies less does not vary


@in_float32
def feature_alignment(gates: Tensor, masks: Tensor) -> Tensor:
    """Places that are alike to the teacher shall be alike to the student: similarity-preserving distillation (Tung and
    Mori 2019) with places of one image instead of images, on a grid of at most 8 x 8.

    1 - cosine of the two affinity matrices, that is 1 - linear CKA (Kornblith et al. 2019): any numbers of channels without
    a projection, no notice of scale and offset, and no gradient where either side is constant."""
    size = [min(8, *pair) for pair in zip(gates.shape[2:], masks.shape[2:], strict=True)]
    return 1 - F.cosine_similarity(affinity(gates, size), affinity(masks, size), dim=1, eps=UINT8_STEP**2)


def affinity(x: Tensor, size: Sequence[int]) -> Tensor:
    x = resize_masks(x, size).flatten(2)
    x = x - x.mean(2, keepdim=True)
    return (x.mT @ x).flatten(1) / (x.shape[1] * x.shape[2])  # the Frobenius norm is a variance


@in_float32
def degradation_kl(logits: Tensor, probs: Tensor, confidence: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) x confidence (B,), both softened by the temperature; its square keeps the gradient's size."""
    teacher = ((probs + 1e-6).log() / temperature).log_softmax(1)  # 1e-6: probabilities stored as float16 may be 0
    loss = (teacher.exp() * (teacher - (logits / temperature).log_softmax(1))).sum(1) * temperature**2
    return loss if confidence is None else loss * confidence


@in_float32
def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of the predicted masks minus the entropy of the teacher's soft ones: 0 for a perfect answer."""
    masks = resize_masks(masks, logits.shape[2:]).clamp(0, 1)  # rounding may leave 1 + 1e-7
    entropy = -torch.special.xlogy(masks, masks) - torch.special.xlogy(1 - masks, 1 - masks)
    return per_sample(F.binary_cross_entropy_with_logits(logits, masks, reduction="none") - entropy)


@in_float32
def code_loss(prediction: Tensor, code: Tensor) -> Tensor:
    """1 - cosine. Norms below 0.01 count as 0.01: a head that starts at zero gets a gradient of 100, not of 1e8."""
    return 1 - F.cosine_similarity(prediction, code, dim=1, eps=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# segmentation: logits and masks (B, H, W)


@in_float32
def structure_weight(mask: Tensor) -> Tensor:
    """How much a pixel differs from its surroundings, so that outlines and thin parts count (F3Net, Wei et al. 2020)."""
    rows = F.avg_pool2d(mask[:, None], (31, 1), 1, (15, 0))  # one axis after the other: a twelfth of the time
    return 1 + 5 * (F.avg_pool2d(rows, (1, 31), 1, (0, 15))[:, 0] - mask).abs()


@in_float32
def structure_loss(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """F3Net's loss: cross-entropy and 1 - IoU, both weighted by `structure_weight`."""
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    answer = logits.sigmoid()
    inside, either = ((weight * part).flatten(1).sum(1) for part in (answer * mask, answer + mask - answer * mask))
    return per_sample(weight * entropy) / per_sample(weight) + 1 - (inside + 1) / (either + 1)


@in_float32
def edge_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy and 1 - Dice against the mask's outline, three pixels wide."""
    padded = mask[:, None]
    outline = (F.max_pool2d(padded, 3, 1, 1) + F.max_pool2d(-padded, 3, 1, 1))[:, 0]
    entropy = F.binary_cross_entropy_with_logits(logits, outline, reduction="none")
    answer = logits.sigmoid()
    both, total = (answer * outline).flatten(1).sum(1), (answer + outline).flatten(1).sum(1)
    return per_sample(entropy) + 1 - (2 * both + 1) / (total + 1)
