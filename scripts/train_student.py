"""Underwater image restoration: a small student that needs the image alone, distilled from a teacher's degradation maps.

Demo on a CPU (makes its own water, about four minutes):
    python scripts/train_student.py --demo

One GPU:
    accelerate launch --config_file accelerate_configs/1xgpu.yaml scripts/train_student.py --train-root data/UIEB

Eight GPUs, with pseudo-labels and further test sets:
    accelerate launch --config_file accelerate_configs/8xa100.yaml scripts/train_student.py --train-root data/UIEB \
        --pseudo-root data/pseudo --val-ref-root data/testset_ref --val-nonref-root data/testset_nonref
"""

import json
import logging
import math
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import RunConfig, UserError, parse, sentences

# ---------------------------------------------------------------------------------------------------------------------
# Config

DEMO = Path("data/demo/underwater")


@dataclass
class Config(RunConfig):
    """Train a restoration student. Pseudo-labels are optional: without them it is trained by the references alone."""

    DEMO: ClassVar[dict[str, object]] = {
        "train_root": DEMO / "UIEB",
        "val_ref_root": DEMO / "testset_ref",
        "val_nonref_root": DEMO / "testset_nonref",
        "pseudo_root": DEMO / "pseudo",
        "output_dir": "runs/student-demo",
        "val_images": 16,
        "img_size": 96,
        "width": 24,
        "blocks": (1, 1, 2),
        "epochs": 40,
        "batch_size": 8,
        "lr": 4e-3,
        "eval_every": 150,
        "num_workers": 0,
        "perceptual_weight": 0.0,
        "tracker": "none",
    }

    # shared flags with other defaults
    output_dir: Path = Path("runs/student")
    epochs: int = 200
    batch_size: int = 8
    lr: float = 1e-3

    # data
    train_root: Path = Path("data/UIEB")
    """Pairs in the layout of UIEB (raw-890, reference-890), LSUI (input, GT), EUVP (trainA, trainB) or input, target."""
    val_ref_root: Path | None = None
    """Test sets with references, one folder per set; used once, at the end, and never to choose a checkpoint."""
    val_nonref_root: Path | None = None
    """Test sets without references, one folder per set."""
    split: str | None = None
    """Test part of --train-root: seed:N, or a file with one name per line. Unset: seed:0, or none with --val-ref-root."""
    test_images: int = 90
    """Size of the test part that seed:N draws."""
    val_images: int = 40
    """Images of the training part on which checkpoints are compared."""
    overlap_check: Literal["names", "content"] = "names"
    """Refuse test images whose name or pixels are in the training part; content: only the pixels count."""
    pseudo_root: Path | None = None
    """The teacher's labels of the training images: <stem>.npz, <stem>.pt, or <stem>_{masks,probs,features}.npy."""
    img_size: int = 256
    """Side of the training crops, in pixels."""
    progressive_sizes: tuple[int, ...] = ()
    """Instead of --img-size: crop sides in pixels, over equal parts of the epochs, e.g. 128 192 256."""
    tile_size: int = 1536
    """Larger images are evaluated in overlapping tiles of this side, in pixels."""

    # model
    width: int = 56
    """Channels at half the image's size; twice and four times as many below."""
    blocks: tuple[int, int, int] = (4, 6, 4)
    """Blocks per level; on the last one attention follows every second block."""
    heads: int = 8
    """Attention heads at an eighth of the image's size."""
    attn_chunk_size: int = 0
    """Queries per chunk of the attention, each recomputed in the backward pass; 0: PyTorch's fused kernel."""
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile the network."""

    # losses
    rec_weight: float = 1.0
    """Weight of the difference of the pixels (Charbonnier)."""
    dssim_weight: float = 0.2
    """Weight of 1 - SSIM."""
    perceptual_weight: float = 0.05
    """Weight of the difference of VGG19's features; 0 needs no VGG19."""
    perceptual_layers: tuple[str, ...] = ("relu2_2", "relu3_4")
    """Layers of VGG19 whose features are compared."""
    perceptual_weights: str = "imagenet"
    """File with torchvision's vgg19 weights, or imagenet, which torchvision downloads."""
    hf_weight: float = 0.1
    """Weight of the difference of the Haar bands LH, HL, HH."""
    lf_weight: float = 0.1
    """Weight of the difference of the Haar band LL and of its spectrum."""
    hf_mask: int | None = None
    """Number of the teacher's map, from 0, that weights the high bands, e.g. of blur; unset: all places alike."""
    lf_mask: int | None = None
    """Number of the teacher's map that weights the low band, e.g. of backscatter; unset: all places alike."""
    region_weight: float = 0.1
    """Weight of the L1 within each of the teacher's maps."""
    mask_weight: float = 0.1
    """Weight of the student's own maps against the teacher's."""
    code_weight: float = 0.05
    """Weight of the student's own degradation code against the teacher's."""
    kd_weight: float = 0.1
    """Weight of the degradation probabilities against the teacher's (Kullback-Leibler)."""
    feature_weight: float = 0.02
    """Weight of the spatial affinity of the gates against that of the teacher's maps."""
    tv_weight: float = 0.0
    """Weight of the total variation of the output."""
    mask_dropout: float = 0.7
    """Share of the labelled samples that must do without the teacher's maps and code, as at inference."""

    # optimization
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up before the cosine."""
    clip: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are what is evaluated and exported."""

    # evaluation
    select: Literal["psnr", "ssim"] = "psnr"
    """Validation metric that chooses the best checkpoint and stops early. No-reference metrics never do."""
    nr_metric_impl: Literal["paper", "funie", "matlab"] = "paper"
    """Which circulated UIQM and UCIQE to print: they disagree even on the sign of a change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in (self.img_size, *self.progressive_sizes):
            if size < 32:
                raise ValueError(f"--img-size and --progressive-sizes: {size} is too small, give 32 or more.")
        if self.tile_size < 128 or self.tile_size % 8:
            raise ValueError(f"--tile-size {self.tile_size}: give a multiple of 8 from 128 on.")
        if min(self.width, self.heads) < 1 or 4 * self.width % self.heads:
            raise ValueError(f"4 x --width {self.width} channels must be a positive multiple of --heads {self.heads}.")
        if min(*self.blocks, self.attn_chunk_size) < 0:
            raise ValueError("--blocks and --attn-chunk-size: give 0 or more.")
        if not 0 <= self.mask_dropout <= 1:
            raise ValueError(f"--mask-dropout is {self.mask_dropout}: give a share between 0 and 1.")
        for layer in self.perceptual_layers:
            if not re.fullmatch(r"relu([12]_[12]|[345]_[1-4])", layer):
                raise ValueError(f"--perceptual-layers {layer}: give layers of VGG19, relu1_1 to relu5_4.")
        if self.val_images < 1 or self.test_images < 1:
            raise ValueError("--val-images and --test-images: give 1 or more.")


if __name__ == "__main__":
    CONFIG = parse(Config)  # before torch is imported: --help and typos are answered at once

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common import data, launch, losses, metrics, training, underwater
from common.checkpoints import RunFolder
from common.images import as_float, find_images, inspect, read_image
from common.logs import RunLog
from common.restoration_report import picture_sheet, summary, write_csv
from common.wavelets import haar, inverse_haar

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# Data

LABEL_SIZE = 32  # side of a crop's teacher maps: no teacher's are finer
THUMBNAIL = 64  # side of the whole image as the global condition sees it


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(as_float(pixels).transpose(2, 0, 1)))


def thumbnail(images: Tensor) -> Tensor:
    """The whole image in small: of the crop's image in training, of the tile's image at inference."""
    return F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True, align_corners=False)


class Crops(torch.utils.data.Dataset):
    """Random crops of training pairs and of their labels, a function of (seed, epoch, index)."""

    def __init__(self, pairs: underwater.ImageSet, audit: underwater.Audit | None, config: Config):
        self.pairs, self.config, self.audit = pairs, config, audit
        self.labels = [audit.usable.get(stem) if audit else None for stem in pairs.stems]
        labelled = np.array([path is not None for path in self.labels])
        with_probs = np.array([audit is not None and stem in audit.with_probs for stem in pairs.stems])
        with_code = audit is not None and audit.code_size is not None
        self.known = {"masks": labelled, "probs": labelled & with_probs, "code": labelled & with_code}

    def __len__(self) -> int:
        return len(self.pairs)

    def counts(self, indices: np.ndarray) -> dict[str | None, int]:
        """How many of these samples have each kind of label, at least 1; None: all samples."""
        return {None: len(indices), **{kind: max(int(flags[indices].sum()), 1) for kind, flags in self.known.items()}}

    def size(self, epoch: int) -> int:
        sizes = self.config.progressive_sizes or (self.config.img_size,)
        return sizes[min(epoch * len(sizes) // self.config.epochs, len(sizes) - 1)]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        size = self.size(epoch)
        rng = np.random.default_rng([self.config.seed, index, epoch])
        pair = [read_image(self.pairs.inputs[index]), read_image(self.pairs.targets[index])]
        height, width = pair[0].shape[:2]
        if min(height, width) < size:
            scale = size / min(height, width)
            height, width = max(size, round(height * scale)), max(size, round(width * scale))
            pair = [cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC) for pixels in pair]
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        small = thumbnail(torch.from_numpy(pair[0].astype(np.float32)).permute(2, 0, 1)[None])[0]
        small = small / (65535 if pair[0].dtype == np.uint16 else 255)
        flips = [axis for axis in (1, 2) if rng.random() < 0.5]
        given = rng.random() >= self.config.mask_dropout
        image, target = (to_tensor(pixels[top : top + size, left : left + size]).flip(flips) for pixels in pair)
        sample = {"image": image, "target": target, "thumbnail": small.flip(flips), "id": index}
        if self.audit:
            box = (left / width, top / height, (left + size) / width, (top + size) / height)
            sample |= self.label(index, box, flips)
            sample["given"] = given and sample["has_masks"] and (sample["has_code"] or not self.audit.code_size)
        return sample

    def label(self, index: int, box: tuple[float, float, float, float], flips: list[int]) -> dict:
        """The label of a window of an image; zeros and False where there is none."""
        classes, size = self.audit.classes, self.audit.code_size
        label = underwater.read_label(self.labels[index]) if self.labels[index] else None
        known = {f"has_{kind}": bool(flags[index]) for kind, flags in self.known.items()}
        masks = torch.zeros(classes, LABEL_SIZE, LABEL_SIZE)
        if known["has_masks"]:
            masks = torch.from_numpy(underwater.crop_masks(label.masks, box, LABEL_SIZE)).flip(flips)
        probs = torch.from_numpy(label.probs) if known["has_probs"] else torch.full((classes,), 1 / classes)
        code = torch.from_numpy(label.code) if known["has_code"] else torch.zeros(size or 0)
        confidence = np.float32(label.confidence if label else 0)  # Python's float would become a double
        return {"masks": masks, "probs": probs, "code": code, "confidence": confidence, **known}


class WholeImages(torch.utils.data.Dataset):
    """Images at their own size, with references where the set has them."""

    def __init__(self, images: underwater.ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        sample = {"id": index, "image": to_tensor(read_image(self.images.inputs[index]))}
        if self.images.targets:
            sample["target"] = to_tensor(read_image(self.images.targets[index]))
        return sample


# ---------------------------------------------------------------------------------------------------------------------
# Model


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.float().softmax(-1).to(v.dtype) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Softmax attention, (B, heads, N, d). With a chunk size the peak is chunk x N scores instead of N x N: each chunk is
    recomputed in the backward pass, else all their softmaxes would be kept for it and nothing would be saved."""
    if not chunk:
        return F.scaled_dot_product_attention(q, k, v)
    if not torch.is_grad_enabled():
        return torch.cat([attend(part, k, v) for part in q.split(chunk, 2)], 2)
    again = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part, k, v) for part in q.split(chunk, 2)], 2)


class Attention(nn.Module):
    """Every place of the image at an eighth of its size looks at every other."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        self.heads, self.chunk = config.heads, config.attn_chunk_size
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.out(attention(q, k, v, self.chunk).transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """Depthwise convolution and channel mixing with gates for activations (NAFNet), scaled and shifted by the code (FiLM).

    NAFNet's channel attention is left out: it averages over the image, so that tiles of one image would not agree. The code
    knows the whole image."""

    def __init__(self, width: int, code: int):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.film = nn.Linear(code, 2 * width)
        self.spread = nn.Conv2d(width, 2 * width, 1)
        self.local = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.join = nn.Conv2d(width, width, 1)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(width, width, 1)
        for layer in (self.film, self.join, self.narrow):  # every block starts as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.film(code)[..., None, None].chunk(2, 1)
        h = over_channels(self.norm, x) * (1 + scale) + shift
        a, b = self.local(self.spread(h)).chunk(2, 1)
        x = x + self.join(a * b)
        a, b = self.widen(over_channels(self.norm2, x)).chunk(2, 1)
        return x + self.narrow(a * b)


def over_channels(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # no copy for channels-last tensors


class Condition(nn.Module):
    """The whole image's thumbnail to a degradation code, degradation logits and a colour correction.

    The teacher's code, where given, takes the place of the student's own answer."""

    SIZE = 64

    def __init__(self, classes: int, teacher: int):
        super().__init__()
        sizes = (3, 32, 64, 96)
        layers = [(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GELU()) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.look = nn.Sequential(*(layer for pair in layers for layer in pair))
        self.summarize = nn.Sequential(nn.Linear(2 * sizes[-1], 128), nn.GELU(), nn.Linear(128, self.SIZE))
        self.classify = nn.Linear(self.SIZE, classes)
        self.from_classes = nn.Linear(classes, self.SIZE)
        self.describe = nn.Linear(self.SIZE, teacher) if teacher else None
        self.from_teacher = nn.Linear(teacher, self.SIZE) if teacher else None
        self.colour = nn.Linear(self.SIZE, 30)
        nn.init.zeros_(self.colour.weight)
        nn.init.zeros_(self.colour.bias)

    def forward(self, small: Tensor, z_d: Tensor | None, given: Tensor | None) -> dict[str, Tensor]:
        seen = self.look(small)
        code = self.summarize(torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1))
        logits = self.classify(code)
        answer = self.describe(code) if self.describe else None
        code = code + self.from_classes(logits.softmax(1))
        if self.describe:
            used = answer if z_d is None else z_d if given is None else torch.where(given[:, None], z_d, answer)
            code = code + self.from_teacher(used)
        return {
            "code": code,
            "deg_logits": logits,
            "teacher_code": answer,
            "colour": self.colour(code).unflatten(1, (3, 10)),
        }


def correct_colour(images: Tensor, coefficients: Tensor) -> Tensor:
    """A second-degree polynomial of (R, G, B) added to the image: what one curve for the whole image can repair."""
    with torch.autocast(images.device.type, enabled=False):
        r, g, b = images.float().unbind(1)
        monomials = torch.stack([torch.ones_like(r), r, g, b, r * r, g * g, b * b, r * g, r * b, g * b], 1)
        return images.float() + torch.einsum("bkn,bnhw->bkhw", coefficients.float(), monomials)


class Level(nn.Module):
    """One scale: the encoder's blocks on the low band, the high bands kept for the decoder, which lets through what its
    gates trust and invents the rest."""

    def __init__(self, above: int, width: int, classes: int, config: Config, count: int, last: bool):
        super().__init__()
        self.low = nn.Conv2d(above, width, 3, padding=1)
        self.high = nn.Conv2d(3 * above, width, 1)
        self.encoder = nn.ModuleList(Block(width, Condition.SIZE) for _ in range(count))
        self.attention = nn.ModuleList(Attention(width, config) for _ in range(count // 2 if last else 0))
        self.decoder = nn.ModuleList(Block(width, Condition.SIZE) for _ in range(0 if last else count))
        self.gate = nn.Conv2d(width + classes, width, 1)
        self.invent = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up_low = nn.Conv2d(width, above, 1)
        self.up_high = nn.Conv2d(width, 3 * above, 1)


class Student(nn.Module):
    """`output, alpha_maps, deg_logits = student(images)`: the image alone suffices.

    Haar transforms take the image down to an eighth of its size: the low band is worked on and passed on, the high bands
    wait for the way up. The student predicts the teacher's maps from the deepest features and uses them to gate the high
    bands; where the teacher's own are given (`masks`, `z_d`, per sample if `given` says so), it uses those. Sizes may be
    anything. The output is not clamped: a clamped pixel would have no gradient."""

    def __init__(self, config: Config, classes: int, teacher: int):
        super().__init__()
        self.recompute = config.gradient_checkpointing
        self.condition = Condition(classes, teacher)
        widths = (3, config.width, 2 * config.width, 4 * config.width)
        self.levels = nn.ModuleList(
            Level(above, width, classes, config, count, last=number == 3)
            for number, above, width, count in zip((1, 2, 3), widths, widths[1:], config.blocks, strict=False)
        )
        self.masks = nn.Sequential(nn.Conv2d(widths[3], widths[1], 1), nn.GELU(), nn.Conv2d(widths[1], classes, 1))
        self.from_masks = nn.Conv2d(classes, widths[3], 1)
        self.gain = nn.Conv2d(widths[1], 3, 3, padding=1)
        for layer in (self.gain, self.levels[0].up_low, self.levels[0].up_high):  # the first output is the input
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def forward(
        self,
        images: Tensor,
        z_d: Tensor | None = None,
        masks: Tensor | None = None,
        given: Tensor | None = None,
        small: Tensor | None = None,
        details: bool = False,
    ) -> tuple[Tensor, list[Tensor], Tensor] | dict[str, Tensor | list[Tensor]]:
        """`small` is the thumbnail of the image that `images` are crops or tiles of; by default of `images` themselves."""
        height, width = images.shape[2:]
        told = self.condition(thumbnail(images) if small is None else small, z_d, given)
        code = told["code"]
        padded = pad_to_multiple(images, 8).contiguous(memory_format=torch.channels_last)
        corrected = correct_colour(padded, told["colour"])

        x, highs, lows = corrected, [], []
        for level in self.levels:
            low, high = haar(x)
            x = level.low(low)
            highs.append(level.high(high))
            for number, block in enumerate(level.encoder):
                x = self.run(block, x, code)
                if level.attention and number % 2:
                    x = self.run(level.attention[number // 2], x)
            lows.append(x)

        mask_logits = self.masks(x)
        used = mask_logits.sigmoid()
        if masks is not None:
            taught = losses.resize_masks(masks, used.shape[2:])
            used = taught.to(used) if given is None else torch.where(given[:, None, None, None], taught.to(used), used)
        x = x + self.from_masks(used)

        alpha_maps = []
        for number, level in reversed(list(enumerate(self.levels))):
            if level.decoder:
                x = x + lows[number]
                for block in level.decoder:
                    x = self.run(block, x, code)
            wide = F.interpolate(used, x.shape[2:], mode="bilinear", align_corners=False)
            alpha = level.gate(torch.cat([x, wide], 1)).sigmoid()
            high = alpha * highs[number] + (1 - alpha) * level.invent(x)
            alpha_maps.append(alpha)
            gain = self.gain(x) if number == 0 else None
            x = inverse_haar(level.up_low(x), level.up_high(high))
        gain = F.interpolate(gain.float(), corrected.shape[2:], mode="bilinear", align_corners=False)
        output = (corrected * (1 + gain) + x)[..., :height, :width]
        if not details:
            return output, alpha_maps, told["deg_logits"]
        return {
            "output": output,
            "alpha_maps": alpha_maps,
            "deg_logits": told["deg_logits"],
            "mask_logits": mask_logits,
            "code": told["teacher_code"],
        }


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    bottom, right = -images.shape[2] % multiple, -images.shape[3] % multiple
    mode = "reflect" if bottom < images.shape[2] and right < images.shape[3] else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode) if bottom or right else images


@torch.no_grad()
def restore(model: nn.Module, images: Tensor, tile: int = 0, overlap: int = 64) -> Tensor:
    """Whole images, or overlapping tiles under one global condition, blended linearly: no seams and bounded memory."""
    height, width = images.shape[2:]
    if not tile or max(height, width) <= tile:
        return model(images)[0]
    small = thumbnail(images)
    total, weight = torch.zeros_like(images), torch.zeros_like(images[:1, :1])
    for top, tall in tiles(height, tile, overlap):
        for left, wide in tiles(width, tile, overlap):
            window = (..., slice(top, top + tall), slice(left, left + wide))
            ramp = blend(tall, overlap, images.device)[:, None] * blend(wide, overlap, images.device)
            total[window] += model(images[window], small=small)[0] * ramp
            weight[window] += ramp
    return total / weight


def tiles(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, length) of the fewest tiles that overlap at least so much, evenly spread. All start at multiples of 8: off the
    whole image's grid the Haar bands are others (up to 8 levels of 255 on average, measured)."""
    if length <= tile:
        return [(0, length)]
    last, stride = math.ceil((length - tile) / 8), (tile - overlap) // 8
    count = math.ceil(last / stride)
    starts = [8 * (i * last // count) for i in range(count + 1)]
    return [(start, min(tile, length - start)) for start in starts]


def blend(length: int, overlap: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device) + 0.5
    return torch.minimum(place, length - place).clamp(max=overlap) / overlap


# ---------------------------------------------------------------------------------------------------------------------
# Losses

NEEDS = {"region": "masks", "mask": "masks", "feature": "masks", "kd": "probs", "code": "code"}  # else every sample counts


def loss_terms(config: Config, answer: dict, batch: dict[str, Tensor], perceptual: nn.Module | None) -> dict[str, Tensor]:
    """One value per sample and term, 0 for samples without the label that the term needs. Terms of weight 0 are left out."""
    output, target = answer["output"], batch["target"]
    on = {name for name in WEIGHTS if getattr(config, f"{name}_weight")}
    if "masks" not in batch:
        on -= NEEDS.keys()
    terms: dict[str, Tensor] = {}
    if "rec" in on:
        terms["rec"] = losses.charbonnier(output, target)
    if "dssim" in on:
        terms["dssim"] = losses.ssim_loss(output, target)
    if perceptual:
        terms["perceptual"] = perceptual(output, target)
    if on & {"hf", "lf"}:
        maps = {name: getattr(config, f"{name}_mask") if "masks" in batch else None for name in ("hf", "lf")}
        chosen = {f"{name}_weight": None if k is None else batch["masks"][:, k : k + 1] for name, k in maps.items()}
        terms |= {name: value for name, value in losses.frequency(output, target, **chosen).items() if name in on}
    if "region" in on:
        terms["region"] = losses.region(output, target, batch["masks"])
    if "mask" in on:
        terms["mask"] = losses.mask_loss(answer["mask_logits"], batch["masks"])
    if "code" in on and answer["code"] is not None:
        terms["code"] = losses.code_loss(answer["code"], batch["code"])
    if "kd" in on:
        terms["kd"] = losses.degradation_kl(answer["deg_logits"], batch["probs"], batch["confidence"])
    if "feature" in on:
        terms["feature"] = losses.feature_alignment(answer["alpha_maps"][-1], batch["masks"])
    if "tv" in on:
        terms["tv"] = losses.total_variation(output)
    return {name: value * batch[f"has_{NEEDS[name]}"] if name in NEEDS else value for name, value in terms.items()}


WEIGHTS = ("rec", "dssim", "perceptual", "hf", "lf", "region", "mask", "code", "kd", "feature", "tv")

# ---------------------------------------------------------------------------------------------------------------------
# Evaluate


@torch.no_grad()
def evaluate(
    model: nn.Module, loader, accelerator, config: Config, *, full: bool = False
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics over a whole set at the images' own size, equal on every rank, and the table behind them.

    `full` adds the other conventions of the literature and what doing nothing ("input") and grey-world would score."""
    rows = []
    for batch in loader:
        batch = send_to_device(batch, accelerator.device)
        image = batch["image"]
        with accelerator.autocast():
            output = restore(model, image, config.tile_size).float()
        row = {"id": batch["id"]}
        methods = {"": output, "input_": image, "grey_world_": metrics.grey_world(image)} if full else {"": output}
        for prefix, result in methods.items():
            values = scores(metrics.to_uint8(result), batch.get("target"), config.nr_metric_impl, full)
            row |= {prefix + name: value.double() for name, value in values.items()}
        rows.append(row)
    table = data.gather_samples(accelerator, rows, loader.batch_sampler.size)
    return {name: float(values.mean()) for name, values in table.items() if name != "id"}, table


def scores(image: Tensor, target: Tensor | None, variant: str, full: bool) -> dict[str, Tensor]:
    """Of an 8-bit image: what would be written to a file is what is measured."""
    if target is None:
        return {"uiqm": metrics.uiqm(image, variant), "uciqe": metrics.uciqe(image, variant)}
    target = metrics.to_uint8(target)
    if full:
        return metrics.fidelity(image, target)
    return {"psnr": metrics.psnr(image, target), "ssim": metrics.ssim(image, target)}


def announce(name: str, values: dict[str, float], variant: str) -> None:
    if "psnr" in values:
        text = "[Ref] %s: PSNR=%.2f dB, SSIM=%.4f (input %.2f, %.3f)"
        logger.info(text, name, values["psnr"], values["ssim"], values["input_psnr"], values["input_ssim"])
    else:
        text = "[Non-Ref] %s: UIQM[%s]=%.3f, UCIQE[%s]=%.3f (input %.3f, %.3f)"
        shown = (values["uiqm"], variant, values["uciqe"], values["input_uiqm"], values["input_uciqe"])
        logger.info(text, name, variant, *shown)


# ---------------------------------------------------------------------------------------------------------------------
# Data and model for main


@dataclass
class Parts:
    """What a run trains on, selects by and reports on."""

    train: Crops
    val: WholeImages
    tests: dict[str, WholeImages]
    audit: underwater.Audit | None
    hash: str


def prepare_data(config: Config, accelerator) -> Parts:
    """Find, check, split. Whatever is wrong with the files is said here, before training starts."""
    if config.demo:
        from common.demo_data.underwater import write  # here: scikit-learn and scipy take 0.8 s of every start

        data.made_by_main(accelerator, DEMO, partial(write, DEMO))
    pairs = underwater.find_pairs(config.train_root, "--train-root")
    challenging = config.train_root / "challenging-60"  # UIEB's own images without a reference
    roots = [(config.val_ref_root, "--val-ref-root", True), (config.val_nonref_root, "--val-nonref-root", False)]
    roots += [(challenging if find_images(challenging) else None, "--train-root", False)]
    found: dict[str, underwater.ImageSet] = {}
    for root, named, reference in roots:
        if root:
            for name, images in underwater.find_sets(root, named, reference=reference).items():
                found[name if name not in found else f"{name}-{len(found)}"] = images
    every = [pairs, *found.values()]
    inspections = inspect([path for images in every for path in images.files()], accelerator)
    pairs, *checked = (underwater.check_readable(images, inspections) for images in every)
    tests = dict(zip(found, checked, strict=True))
    for images in (pairs, *tests.values()):
        logger.info("%s", images.describe())
    split = config.split or (None if config.val_ref_root else "seed:0")
    if split:
        pairs, test = underwater.take_split(pairs, split, config.test_images)
        tests = {f"{config.train_root.name}-test": test, **tests}
        logger.info(
            "Test part of %s: %d images by --split %s, list %s",
            config.train_root,
            len(test),
            split,
            underwater.split_hash(test),
        )
    underwater.check_overlap(pairs, tests, inspections, names=config.overlap_check == "names")
    train, val = underwater.take_validation(pairs, config.val_images, config.seed)
    audit = None
    if config.pseudo_root:
        labels = underwater.find_labels(config.pseudo_root, train)
        audit = underwater.audit_labels(labels, train, accelerator)
        for line in audit.lines():
            logger.info("%s", line)
        for name in ("hf_mask", "lf_mask"):
            if (channel := getattr(config, name)) is not None and not 0 <= channel < audit.classes:
                raise UserError(f"--{name.replace('_', '-')} {channel}: the labels have maps 0 to {audit.classes - 1}.")
    elif config.hf_mask is not None or config.lf_mask is not None:
        raise UserError("--hf-mask and --lf-mask choose maps of the pseudo-labels: give --pseudo-root, or leave them out.")
    whole = {name: WholeImages(images) for name, images in tests.items()}
    content = data.content_hash(inspections[path].digest for path in train.files())
    return Parts(Crops(train, audit, config), WholeImages(val), whole, audit, content)


def try_batch(model: nn.Module, config: Config, perceptual: nn.Module | None, dataset: Crops, count: int) -> None:
    """Forward and backward on `count` crops of the largest size: what --find-batch-size asks whether it fits."""
    sample = dataset[config.epochs - 1, 0]
    batch = send_to_device(torch.utils.data.default_collate([sample] * count), next(model.parameters()).device)
    sum(term.sum() for term in loss_terms(config, forward(model, batch), batch, perceptual).values()).backward()
    model.zero_grad()


def forward(model: nn.Module, batch: dict[str, Tensor]) -> dict:
    taught = {"z_d": batch["code"], "masks": batch["masks"], "given": batch["given"]} if "masks" in batch else {}
    return model(batch["image"], **taught, small=batch["thumbnail"], details=True)


@torch.no_grad()
def gigaflops(model: nn.Module, size: int = 256) -> float:
    """Of one image, two per multiplication and addition."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 1e9


MODEL_FLAGS = ("width", "blocks", "heads", "attn_chunk_size")


def load_model(folder: Path) -> tuple[Student, dict]:
    """The exported model of a run: what `model/` holds. Used by predict_student.py."""
    saved = json.loads((folder / "config.json").read_text())
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["config"].items()}
    model = Student(Config(**flags), saved["classes"], saved["teacher"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), saved


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    accelerator = launch.start(config)
    parts = prepare_data(config, accelerator)
    classes, teacher = (parts.audit.classes, parts.audit.code_size or 0) if parts.audit else (10, 0)

    def build() -> Student:
        torch.manual_seed(config.seed)  # the same weights on every rank
        return Student(config, classes, teacher).to(memory_format=torch.channels_last)

    perceptual = None
    if config.perceptual_weight:
        with accelerator.local_main_process_first():  # it alone downloads the weights
            perceptual = losses.Perceptual(config.perceptual_layers, config.perceptual_weights).to(accelerator.device)
    if config.find_batch_size:
        attempt = partial(try_batch, build().to(accelerator.device), config, perceptual, parts.train)
        training.find_batch_size(accelerator, config, attempt)
    sampler = data.StepSampler(len(parts.train), config, accelerator)
    folder = RunFolder(
        config, accelerator, {"samples per step": sampler.size_of_step, "seed": config.seed, "training data": parts.hash}
    )
    if folder.finished(sampler.total_steps):
        logger.info("%s has reached its end already: nothing to do", config.output_dir)
        accelerator.end_training()
        return
    folder.describe()

    model = build()
    size = f"{sum(p.numel() for p in model.parameters()):,}"
    flops = gigaflops(model) if accelerator.is_main_process else math.nan  # which rank 0 alone logs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    raw = accelerator.unwrap_model(model)
    ema = training.EMA(raw, config.ema_decay)
    if config.compile:
        raw.compile()  # in place: names of weights stay, and the averaged copy evaluates images of any size uncompiled
    guard = training.FiniteGuard(raw, config.max_skipped_steps, accelerator.scaler)
    stopper = training.EarlyStopping([training.Rule(f"val/{config.select}", "max")], config.early_stop_patience)
    watch = training.TermWatch()
    modules, optimizers = {"model": raw, "ema": ema.module}, {"optimizer": optimizer}

    state = {"step": 0, "evaluated": 0, "ended": False}
    if found := folder.resume(modules, optimizers):
        state = found
        guard.load_state_dict(state["guard"])
        stopper.load_state_dict(state["stopper"])
    step = sampler.start = state["step"]
    saved = (step, state["evaluated"])
    log = RunLog(config, accelerator, project="underwater", step=step, total_steps=sampler.total_steps, unit="images")
    logger.info(
        "Training %d, validation %d pairs, content %s; test sets: %s", len(parts.train), len(parts.val), parts.hash,
        ", ".join(f"{name} {len(images)}" for name, images in parts.tests.items()) or "none",
    )  # fmt: skip
    logger.info(
        "%d processes x batch %d x accumulation %d = %d images per step, %d steps per epoch, %d in all; %s parameters,"
        " %.1f GFLOPs at 256 x 256",
        accelerator.num_processes, config.batch_size, config.accumulation_steps, sampler.size_of_step,
        sampler.steps_per_epoch, sampler.total_steps, size, flops,
    )  # fmt: skip

    def eval_loader(images: WholeImages, batches: int | None = None) -> torch.utils.data.DataLoader:
        return data.make_loader(images, data.EvalSampler(len(images), 1, accelerator, batches=batches), config)

    def export() -> None:
        flags = {name: getattr(config, name) for name in MODEL_FLAGS}
        folder.export(ema.module, {"config": flags, "classes": classes, "teacher": teacher, "step": step})

    val_loader = eval_loader(parts.val)
    first = list(parts.tests.values())[:1] or [parts.val]
    evaluate(ema.module, eval_loader(first[0], batches=2), accelerator, config, full=True)  # a wrong shape surfaces now
    steps = data.StepLoader(data.make_loader(parts.train, sampler, config), accelerator)
    eval_every = config.eval_every or sampler.steps_per_epoch
    save_every = config.save_every or sampler.steps_per_epoch
    stopping = False
    parameters = list(raw.parameters())  # once: the walk through the modules takes 0.1 to 0.4 ms

    while True:
        # ---- once in a while: evaluate, save, stop
        epoch = (step - 1) // sampler.steps_per_epoch
        last = step == sampler.total_steps
        better, score = False, None
        if step > state["evaluated"] and (step % eval_every == 0 or last) and not stopping:
            ema.share_buffers()
            values, _ = evaluate(ema.module, val_loader, accelerator, config)
            log.evaluation(step, epoch, {f"val/{name}": value for name, value in values.items()})
            logger.info("Validation: PSNR=%.2f dB, SSIM=%.4f", values["psnr"], values["ssim"])
            better, state["ended"] = stopper.update(accelerator, {f"val/{name}": value for name, value in values.items()})
            score = values[config.select]
            state["evaluated"] = step
            if better:
                export()
                if accelerator.is_main_process:
                    log.image("validation", draw(ema.module, parts.val, range(4), config, accelerator, "validation"), step)
            stopping = training.agree_to_stop(accelerator)
        due = step % save_every == 0 or last or stopping or better or state["ended"] or folder.wants(state, score)
        if due and saved != (step, state["evaluated"]):
            saved = (step, state["evaluated"])
            logger.info("Saving checkpoint at step %d.", step)
            log.sync()
            state |= {"step": step, "guard": guard.state_dict(), "stopper": stopper.state_dict()}
            folder.save(state, modules, optimizers, score=score, best=better)
            log.resume_clock(step, steps.waited)
        if stopping or last or state["ended"]:
            break

        # ---- one optimizer step
        if step % sampler.steps_per_epoch == 0:
            logger.info("Starting training epoch %d.", step // sampler.steps_per_epoch)
        training.set_lr(optimizer, config.lr * training.cosine(step, sampler.total_steps, warmup=config.warmup_steps))
        batches = next(steps)
        counts = parts.train.counts(sampler.global_batch(step))  # one denominator for the global batch
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            training.seed_step(config.seed, step, micro, accelerator.process_index)
            with accelerator.accumulate(model):
                terms = loss_terms(config, forward(model, batch), batch, perceptual)
                terms = {name: term.sum() / counts[NEEDS.get(name)] for name, term in terms.items()}
                loss = sum(term * getattr(config, f"{name}_weight") for name, term in terms.items())
                accelerator.backward(loss * sampler.parts)  # undoes DDP's mean and the division by accumulation
            training.add(totals, {"loss": loss, **terms})
        norm = accelerator.clip_grad_norm_(parameters, config.clip)
        verdict = training.agree(accelerator, totals, norm)
        finite = guard.passes(verdict, step + 1)
        if finite or accelerator.scaler:  # the fp16 scaler skips by itself, and must see the step to lower its scale
            optimizer.step()
        if finite:
            ema.update(step)
            watch.update(verdict.terms)
        optimizer.optimizer.zero_grad()  # accelerate's own inspects its signature in every step, 0.1 ms
        step += 1
        stopping = verdict.stop
        if step % config.log_every == 0 or step == sampler.total_steps:
            values = {
                **verdict.terms,
                "grad_norm": verdict.grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "skipped": guard.total,
            }
            log.train(step, (step - 1) // sampler.steps_per_epoch, values, samples=sampler.size_of_step, waited=steps.waited)
        if step % sampler.steps_per_epoch == 0:
            training.check_replicas(accelerator, raw, f"after step {step}")

    if stopping and not last:
        logger.info("Stopped by a signal at step %d; continue with --resume-from auto", step)
        log.close()
        return

    logger.info("Training process completed. Starting testing phase.")
    ema.module.load_state_dict(folder.exported())
    results = {
        name: evaluate(ema.module, eval_loader(images), accelerator, config, full=True)
        for name, images in parts.tests.items()
    }
    for name, (values, _) in results.items():
        log.evaluation(step, epoch, {f"test/{name}/{key}": value for key, value in values.items()})
        announce(name, values, config.nr_metric_impl)
    if accelerator.is_main_process:  # no collective from here on: the others may leave
        for name, (_, table) in results.items():
            images = parts.tests[name].images
            write_csv(config.output_dir / f"test_{name}.csv", images.stems, table)
            key = "psnr" if "psnr" in table else "uiqm"
            order = np.argsort(-table[key], kind="stable")
            chosen = dict.fromkeys([*order[:2], order[len(order) // 2], *order[-2:]])  # best, median and worst
            log.image(f"test_{name}", draw(ema.module, parts.tests[name], chosen, config, accelerator, f"test_{name}"), step)
        text = summary({name: table for name, (_, table) in results.items()}, config.nr_metric_impl)
        (config.output_dir / "report.txt").write_text(text + "\n")
        logger.info("Testing phase completed, see %s and its samples:\n%s", config.output_dir / "report.txt", text)
    folder.finish(step, sampler.total_steps)
    log.close()


def draw(model: nn.Module, images: WholeImages, indices, config: Config, accelerator, name: str) -> Path:
    """samples/<name>.png: input, output, reference and error of some images."""
    rows = []
    for index in indices:
        if index < len(images):
            sample = images[int(index)]
            with accelerator.autocast():
                output = restore(model, sample["image"][None].to(accelerator.device), config.tile_size)[0].float().cpu()
            rows.append((images.images.stems[int(index)], sample["image"], output, sample.get("target")))
    path = config.output_dir / "samples" / f"{name}.png"
    picture_sheet(path, rows)
    return path


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
