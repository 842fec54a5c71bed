"""Camouflaged object segmentation: a timm backbone, a mixture of experts that is really trained, the benchmark's metrics.

Demo on a CPU (makes its own camouflage, about eight minutes):
    python scripts/train_ultimate.py --demo

One GPU:
    accelerate launch --config_file accelerate_configs/1xgpu.yaml scripts/train_ultimate.py --dataset-path data/COD10K-v3

Two T4, in two stages, the backbone thawed step by step:
    accelerate launch --config_file accelerate_configs/2xt4.yaml scripts/train_ultimate.py --dataset-path data/COD10K-v3 \
        --batch-size 24 --stage2-batch-size 20 --img-size 320 --progressive-unfreeze
"""

import dataclasses
import json
import logging
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import RunConfig, UserError, parse, sentences

# ---------------------------------------------------------------------------------------------------------------------
# Config


@dataclass
class Config(RunConfig):
    """Train on masks of camouflaged objects, or score anybody's maps with --evaluate-maps."""

    DEMO: ClassVar[dict[str, object]] = {
        "dataset_path": "data/demo/camouflage",
        "output_dir": "runs/ultimate-demo",
        "backbone": "test_resnet",
        "backbone_weights": "none",
        "img_size": 96,
        "multi_scale": (1.0,),
        "width": 48,
        "epochs": 44,
        "stage1_epochs": 1,
        "warmup_epochs": 1,
        "batch_size": 8,
        "lr": 2e-3,
        "stage2_lr": 2e-3,
        "backbone_lr_scale": 1.0,
        "layer_decay": 1.0,
        "ema_decay": 0.995,
        "num_workers": 0,
        "tracker": "none",
    }

    # shared flags with other defaults
    output_dir: Path = Path("runs/ultimate")
    epochs: int = 100
    batch_size: int = 12
    lr: float = 5e-4

    # data
    dataset_path: Path = Path("data/COD10K-v3")
    """COD10K-v3, CAMO, TrainDataset and TestDataset, or plain folders of images and masks; found out and announced."""
    test_path: Path | None = None
    """Further test sets, one folder each; those inside --dataset-path are found by themselves."""
    checkpoint_dir: Path | None = None
    """The original's name of --output-dir."""
    noncam_ratio: float = 0.0
    """Share of the images without an object (NonCAM) to train on."""
    val_share: float = 0.1
    """Part of the training images, stratified by super-class, on which checkpoints are compared."""
    img_size: int = 352
    """Side in pixels of the square that the network sees; maps are scored at the masks' own size."""
    multi_scale: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Factors on --img-size, one per training step."""
    evaluate_maps: tuple[Path, Path] | None = None
    """Only score a folder of maps against a folder of masks: PREDICTIONS MASKS."""

    # model
    backbone: str = "edgenext_base"
    """Any timm model with feature maps."""
    backbone_weights: str = "timm"
    """timm: its pretrained weights; a file with weights; none: from scratch."""
    num_experts: int = 7
    """Experts per level: texture, attention, hybrid, frequency, edge, context, contrast; then again."""
    top_k: int = 3
    """Experts that each image is sent to."""
    width: int = 128
    """Channels of experts and decoder."""
    deep_supervision: bool = True
    """Loss on the coarser maps too."""

    # two stages
    stage1_epochs: int = 20
    """Epochs with the backbone frozen."""
    skip_stage1: bool = False
    """Begin with the second stage, at epoch --stage1-epochs."""
    stage2_lr: float = 2e-4
    """Peak learning rate of the second stage."""
    stage2_batch_size: int | None = None
    """Batch per process in the second stage; unset: --batch-size."""
    progressive_unfreeze: bool = False
    """Thaw the backbone's last part, the last two, all, in thirds of the second stage."""
    backbone_lr_scale: float = 0.1
    """Learning rate of the backbone's last part, relative to the rest."""
    layer_decay: float = 0.8
    """Factor from each part of the backbone to the one before it."""

    # optimization
    scheduler: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    min_lr: float = 1e-6
    """Where the cosine ends."""
    warmup_epochs: int = 2
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is evaluated and exported."""
    deep_weight: float = 0.4
    """Weight of the coarser maps' losses."""
    edge_weight: float = 0.5
    """Weight of the edge head's loss."""
    balance_weight: float = 0.01
    """Weight of the routers' balance loss (Switch)."""
    z_weight: float = 0.001
    """Weight of the routers' z-loss (ST-MoE)."""
    select: Literal["sm", "wfm", "iou", "mae"] = "sm"
    """Validation metric that chooses the best checkpoint and stops early."""
    max_hours: float = 0.0
    """Save and leave after so many hours, e.g. 11.5 for a session of 12; --resume-from auto continues. 0: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_dir:
            self.output_dir, self.checkpoint_dir = self.checkpoint_dir, None
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"--top-k {self.top_k}: give 1 to --num-experts {self.num_experts}.")
        if self.stage1_epochs >= self.epochs:
            raise ValueError(
                f"--stage1-epochs {self.stage1_epochs} leaves nothing of --epochs {self.epochs} to the second stage."
            )
        if not 0 < self.val_share < 1 or not 0 <= self.noncam_ratio <= 1:
            raise ValueError("--val-share and --noncam-ratio: give shares between 0 and 1.")
        if self.img_size % 32 or self.img_size < 64:
            raise ValueError(f"--img-size {self.img_size}: give a multiple of 32 from 64 on.")
        if not self.multi_scale or min(self.multi_scale) <= 0:
            raise ValueError("--multi-scale: give one or more positive factors, 1 to leave it out.")
        if self.min_lr > min(self.lr, self.stage2_lr):
            raise ValueError(f"--min-lr {self.min_lr} is above --lr or --stage2-lr: the rate would rise to it.")
        first = self.epochs - self.stage1_epochs if self.skip_stage1 or not self.stage1_epochs else self.stage1_epochs
        if self.warmup_epochs > first:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs} is longer than the first stage, {first} epochs.")
        if self.find_batch_size and self.stage2_batch_size:
            raise ValueError("--find-batch-size chooses the batch of both stages: leave --stage2-batch-size out.")


def round_to(size: float, multiple: int = 32) -> int:
    return max(multiple, round(size / multiple) * multiple)


if __name__ == "__main__":
    CONFIG = parse(Config)  # before torch is imported: --help and typos are answered at once

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor, nn

from common import camouflage, data, launch, losses, training
from common.backbones import make_backbone, norm, parts_of, thaw
from common.camouflage_report import SHOWN, Seen, demo_report, report, score_maps
from common.checkpoints import RunFolder
from common.images import inspect, read_image
from common.logs import RunLog
from common.segmentation_metrics import best_threshold, score, summarize

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# Data


class Masked(torch.utils.data.Dataset):
    """Images and masks at the network's size. Keys are (epoch, index) in training, when they are augmented, else index, and
    then the mask keeps its own size."""

    def __init__(self, images: camouflage.MaskedImages, config: Config):
        self.images, self.config = images, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        size = self.config.img_size
        pixels = read_image(self.images.images[index])
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if epoch is None:
            mask = camouflage.read_mask(self.images.masks[index], None)
            return {"id": index, "image": to_tensor(resize(pixels, size)), "mask": torch.from_numpy(mask)}
        mask = camouflage.read_mask(self.images.masks[index], pixels.shape[:2])
        rng = np.random.default_rng([self.config.seed, index, epoch])
        image, mask = augment(resize(pixels, size), cv2.resize(mask.astype(np.float32), (size, size)), rng)
        return {"id": index, "image": to_tensor(image), "mask": torch.from_numpy(mask > 0.5)}


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    shrinks = min(pixels.shape[:2]) > size  # INTER_AREA looks at every pixel when shrinking and repeats them when enlarging
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def augment(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Flip, rotation up to 15 degrees, zoom and shift in one interpolation; then brightness, contrast and saturation."""
    size = len(image)
    angle, zoom = rng.uniform(-15, 15), math.exp(rng.uniform(math.log(0.8), math.log(1.25)))
    turn = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), angle, zoom)
    turn[:, 2] += rng.uniform(-0.1, 0.1, 2) * size
    if rng.random() < 0.5:
        turn[:, 0], turn[:, 2] = -turn[:, 0], turn[:, 2] + turn[:, 0] * (size - 1)
    options = {"dsize": (size, size), "flags": cv2.INTER_LINEAR}
    image = cv2.warpAffine(image, turn, borderMode=cv2.BORDER_REFLECT_101, **options)
    mask = cv2.warpAffine(mask, turn, borderMode=cv2.BORDER_REFLECT_101, **options)
    bright, contrast, saturation = 1 + rng.uniform(-0.2, 0.2, 3)
    image = image.astype(np.float32) * bright
    image = (image - image.mean()) * contrast + image.mean()
    grey = image.mean(2, keepdims=True)
    return np.clip((image - grey) * saturation + grey, 0, 255), mask


def collate_whole(samples: list[dict]) -> dict:
    """Masks have their own sizes and stay a list."""
    return {
        "id": torch.tensor([s["id"] for s in samples]),
        "image": torch.stack([s["image"] for s in samples]),
        "mask": [s["mask"] for s in samples],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def conv(inputs: int, outputs: int, size: int = 3, *, dilation: int = 1, depthwise: bool = False) -> nn.Conv2d:
    padding, groups = dilation * (size // 2), inputs if depthwise else 1
    return nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, groups=groups, bias=False)


class Texture(nn.Module):
    """Neighbourhoods of four sizes."""

    def __init__(self, width: int):
        super().__init__()
        self.branches = nn.ModuleList(conv(width, width, dilation=d, depthwise=True) for d in (1, 2, 3, 4))
        self.join = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(F.gelu(torch.cat([branch(x) for branch in self.branches], 1)))


class Attention(nn.Module):
    """Every place looks at every other."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:]))


class Hybrid(nn.Module):
    """Local convolution, weighted by what the whole image shows."""

    def __init__(self, width: int):
        super().__init__()
        self.local = conv(width, width, 5, depthwise=True)
        self.squeeze = nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.GELU(), nn.Conv2d(width // 4, width, 1))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.local(x)) * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid())


class Frequency(nn.Module):
    """Fine, middle and coarse bands, each mixed by itself."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        smooth = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        smoother = F.avg_pool2d(smooth, 5, 1, 2, count_include_pad=False)
        bands = (x - smooth, smooth - smoother, smoother)
        return self.out(F.gelu(sum(mix(band) for mix, band in zip(self.mix, bands, strict=True))))


class Edge(nn.Module):
    """Magnitude of the gradient and of the Laplacian."""

    KERNELS = ((-1, 0, 1, -2, 0, 2, -1, 0, 1), (-1, -2, -1, 0, 0, 0, 1, 2, 1), (0, 1, 0, 1, -4, 1, 0, 1, 0))

    def __init__(self, width: int):
        super().__init__()
        kernels = torch.tensor(self.KERNELS, dtype=torch.float32).view(3, 1, 3, 3) / 4
        self.register_buffer("kernels", kernels.repeat(width, 1, 1, 1), persistent=False)
        self.out = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.kernels.to(x.dtype), groups=x.shape[1])
        across, down, laplacian = found.unflatten(1, (-1, 3)).unbind(2)
        return self.out(torch.cat([(across.square() + down.square() + 1e-6).sqrt(), laplacian.abs()], 1))


class Context(nn.Module):
    """What larger and larger parts of the image show."""

    SIZES = (1, 2, 4, 8)

    def __init__(self, width: int):
        super().__init__()
        self.reduce = nn.ModuleList(nn.Conv2d(width, width // 4, 1) for _ in self.SIZES)
        self.out = nn.Conv2d(width + len(self.SIZES) * (width // 4), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [reduce(F.adaptive_avg_pool2d(x, n)) for n, reduce in zip(self.SIZES, self.reduce, strict=True)]
        return self.out(F.gelu(torch.cat([x, *(upsample(p, x.shape[2:]) for p in pooled)], 1)))


class Contrast(nn.Module):
    """A place against its surroundings."""

    def __init__(self, width: int):
        super().__init__()
        self.centre = conv(width, width, depthwise=True)
        self.surround = conv(width, width, 5, dilation=2, depthwise=True)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.centre(x) - self.surround(x)))


EXPERTS = (Texture, Attention, Hybrid, Frequency, Edge, Context, Contrast)


def upsample(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


FOLLOW = 0.5  # share of the newest step in the routers' running means


class Mixture(nn.Module):
    """Experts on one level; each image is sent whole to the `top_k` that its router prefers.

    The router works in float32. Its losses have a gradient: the balance loss is that of the Switch Transformer (Fedus et al.
    2021), experts x sum of load x mean probability, the z-loss that of ST-MoE (Zoph et al. 2022). The load is a running mean
    over steps and all processes, so that the loss is a sum over images, whichever process and micro-batch has them.

    Logits are centred by their running mean over images: what all images have in common would otherwise decide, all of them
    went to the same three experts, and the load swung between none and all of the choices for 1,500 steps (measured)."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        self.top_k = config.top_k
        self.norm = norm(width)
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(EXPERTS[i % len(EXPERTS)](width) for i in range(config.num_experts))
        nn.init.normal_(self.router.weight, std=width**-0.5)
        self.register_buffer("centre", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.full((config.num_experts,), 1 / config.num_experts))

    def route(self, x: Tensor, without: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, chosen experts, their weights) per image; `without` silences an expert, to see what it is worth."""
        with torch.autocast(x.device.type, enabled=False):
            seen = x.float().mean((2, 3))
            seen = F.layer_norm(seen, seen.shape[1:])
            logits = F.linear(seen, self.router.weight.float()) - self.centre
            top, chosen = logits.topk(self.top_k, 1)
            weights = top.softmax(1)
            return logits, chosen, weights if without is None else weights.masked_fill(chosen == without, 0)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, counts: list[int] | None) -> Tensor:
        """With `counts`, images per expert, each expert computes its own images alone; without, all of them, for export."""
        h = self.norm(x)
        if counts is None:
            share = torch.zeros(len(x), len(self.experts), device=x.device).scatter(1, chosen, weights)
            return x + sum(expert(h) * share[:, i, None, None, None].to(h.dtype) for i, expert in enumerate(self.experts))
        order = chosen.flatten().argsort(stable=True)
        images, shares = order // chosen.shape[1], weights.flatten()[order]
        mixed, start = torch.zeros_like(x), 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                mine = slice(start, start + count)
                answer = expert(h[images[mine]]) * shares[mine, None, None, None]
                mixed = mixed.index_add(0, images[mine], answer.to(mixed.dtype))
            else:  # DDP waits for every parameter's gradient: that of an idle expert is zero
                mixed = mixed + 0 * sum(p.sum() for p in expert.parameters()).to(mixed.dtype)
            start += count
        return x + mixed

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Balance and z, one value per image. A balance of 1 is perfect."""
        balance = len(self.experts) * logits.softmax(1) @ self.load.clone()
        return balance, (logits + self.centre.clone()).logsumexp(1).square()

    @torch.no_grad()
    def follow(self, load: list[float], logits: list[float]) -> None:
        """After a step: its choices and mean logits over all processes."""
        self.load.lerp_(torch.tensor(load).to(self.load), FOLLOW)
        self.centre.lerp_(torch.tensor(logits).to(self.centre) + self.centre, FOLLOW)


# ---------------------------------------------------------------------------------------------------------------------
# Model


class Fuse(nn.Module):
    """A coarser map and a finer one."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.body = nn.Sequential(conv(inputs, width), norm(width), nn.GELU(), conv(width, width), norm(width), nn.GELU())

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.body(torch.cat([upsample(coarse, fine.shape[2:]), fine], 1))


class Segmenter(nn.Module):
    """Backbone, a mixture of experts at each stride from 8 on, a decoder with a map per level and an edge map.

    `maps` are logits at the image's size, the finest first. A frozen part of the backbone computes no gradients; batch
    normalization, where a backbone has it, keeps the statistics that it came with."""

    def __init__(self, config: Config, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
        self.channels = tuple(channels)
        pretrained = timm.data.resolve_data_config({}, model=backbone)
        self.register_buffer("mean", torch.tensor(pretrained["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pretrained["std"]).view(3, 1, 1), persistent=False)
        width = config.width
        self.used = [i for i, stride in enumerate(strides) if stride >= 4]
        self.project = nn.ModuleList(nn.Sequential(nn.Conv2d(channels[i], width, 1), norm(width)) for i in self.used)
        self.mixtures = nn.ModuleDict({str(strides[i]): Mixture(width, config) for i in self.used if strides[i] >= 8})
        self.fuse = nn.ModuleList(Fuse(2 * width, width) for _ in self.used[1:])
        self.detail = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1), nn.GELU(), conv(width // 4, width // 4)
        )
        self.sharpen = Fuse(width + width // 4, width // 2)
        self.head, self.edge = nn.Conv2d(width // 2, 1, 1), nn.Conv2d(width // 2, 1, 1)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in self.used) if config.deep_supervision else []
        self.strides = tuple(strides)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor, *, dense: bool = False, without: int | None = None) -> dict:
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.backbone((images - self.mean) / self.std)
        features = [f if f.shape[1] == c else f.permute(0, 3, 1, 2) for f, c in zip(features, self.channels, strict=True)]
        levels = [project(features[i]) for i, project in zip(self.used, self.project, strict=True)]
        routed = {str(self.strides[i]): level for i, level in zip(self.used, levels, strict=True)}
        routes = {key: mixture.route(routed[key], without) for key, mixture in self.mixtures.items()}
        picked, counts = {}, [None] * len(routes)
        if not dense:
            experts = next(iter(self.mixtures.values())).router.out_features
            picked = {key: F.one_hot(chosen, experts).sum((0, 1)) for key, (_, chosen, _) in routes.items()}
            counts = torch.stack(list(picked.values())).tolist()  # one transfer for all levels
        for (key, (_, chosen, weights)), count in zip(routes.items(), counts, strict=True):
            routed[key] = self.mixtures[key](routed[key], chosen, weights, count)
        levels = list(routed.values())

        maps, x = [], levels[-1]
        if self.heads:
            maps.append(self.heads[-1](x))
        for number, fuse in reversed(list(enumerate(self.fuse))):
            x = fuse(x, levels[number])
            if self.heads:
                maps.append(self.heads[number](x))
        x = self.sharpen(x, self.detail(images))
        maps.append(self.head(x))
        return {
            "maps": [upsample(m.float(), images.shape[2:])[:, 0] for m in reversed(maps)],
            "edge": upsample(self.edge(x).float(), images.shape[2:])[:, 0],
            "logits": {key: logits for key, (logits, _, _) in routes.items()},
            "chosen": {key: chosen for key, (_, chosen, _) in routes.items()},
            "picked": picked,
        }


ROUTER_LR = 0.2  # of the learning rate


def parameter_groups(model: Segmenter, config: Config) -> list[dict]:
    """One group per part of the backbone with its own factor on the learning rate, then the rest. Built once, whatever is
    frozen: AdamW passes over parameters without a gradient."""
    parts = parts_of(model.backbone)
    scales = [config.backbone_lr_scale * config.layer_decay ** (len(parts) - 1 - i) for i in range(len(parts))]
    groups = [
        {"name": f"backbone.{name}", "params": parameters, "scale": scale}
        for (name, parameters), scale in zip(parts, scales, strict=True)
    ]
    inside = {id(p) for group in groups for p in group["params"]}
    routers = [mixture.router.weight for mixture in model.mixtures.values()]
    inside |= {id(p) for p in routers}
    rest = [p for p in model.parameters() if id(p) not in inside]
    plain = [p for p in rest if p.ndim < 2]  # biases and norms
    weights = [p for p in rest if p.ndim >= 2]
    return [
        *groups,
        {"name": "experts and decoder", "params": weights, "scale": 1.0},
        {"name": "routers", "params": routers, "scale": ROUTER_LR, "weight_decay": 0.0},
        {"name": "their biases and norms", "params": plain, "scale": 1.0, "weight_decay": 0.0},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Phase:
    """Steps during which the same part of the backbone trains."""

    stage: int
    start: int
    end: int
    thawed: int  # parts of the backbone that train, counted from its end


class Plan:
    """Which step is in which stage, epoch and phase, and what its learning rate is: functions of the step alone."""

    def __init__(self, config: Config, size: int, parts: int, accelerator):
        self.config = config
        shared = {"seed": config.seed, "accumulation_steps": config.accumulation_steps}
        second = config.stage2_batch_size or config.batch_size
        one = RunConfig(**shared, batch_size=config.batch_size, epochs=config.stage1_epochs or 1)
        two = RunConfig(**shared, batch_size=second, epochs=config.epochs - config.stage1_epochs)
        self.samplers = {
            1: data.StepSampler(size, one, accelerator),
            2: data.StepSampler(size, two, accelerator, first_epoch=config.stage1_epochs),
        }
        runs_first = config.stage1_epochs and not config.skip_stage1
        self.boundary = self.samplers[1].total_steps if runs_first else 0
        self.total_steps = min(self.boundary + self.samplers[2].total_steps, config.max_steps or math.inf)
        thirds = (1, 2, parts) if config.progressive_unfreeze and parts > 2 else (parts,)
        length = self.samplers[2].total_steps
        ends = [self.boundary + round(length * (i + 1) / len(thirds)) for i in range(len(thirds))]
        starts = [self.boundary, *ends[:-1]]
        self.phases = [Phase(1, 0, self.boundary, 0)] if self.boundary else []
        self.phases += [Phase(2, *ends) for ends in zip(starts, ends, thirds, strict=True)]

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.end)

    def first(self, stage: int) -> int:
        return self.boundary if stage == 2 else 0

    def sampler(self, step: int) -> tuple[data.StepSampler, int]:
        """The stage's sampler, and the step counted from the stage's beginning."""
        stage = self.phase(step).stage
        return self.samplers[stage], step - self.first(stage)

    def epoch(self, step: int) -> int:
        sampler, local = self.sampler(step)
        return sampler.first_epoch + local // sampler.steps_per_epoch

    def epoch_ends(self, step: int) -> bool:
        """After `step` steps."""
        sampler, local = self.sampler(max(step - 1, 0))
        return step > 0 and (local + 1) % sampler.steps_per_epoch == 0

    def learning_rate(self, step: int) -> float:
        config, stage = self.config, self.phase(step).stage
        sampler, local = self.sampler(step)
        peak, floor = (config.lr, min(config.stage2_lr, config.lr)) if stage == 1 else (config.stage2_lr, config.min_lr)
        warmup = config.warmup_epochs * sampler.steps_per_epoch if self.first(stage) == 0 else 0
        if config.scheduler == "constant":
            return peak * min(1.0, (local + 1) / max(warmup, 1))
        return peak * training.cosine(local, sampler.total_steps, warmup=warmup, floor=floor / peak)

    def scale(self, step: int) -> float:
        """The factor of --multi-scale, the same for all processes."""
        factors = self.config.multi_scale
        return factors[training.hashed(self.config.seed, 0x5CA1E, step) % len(factors)]


def log_groups(optimizer: torch.optim.Optimizer, phase: Phase, plan: Plan) -> None:
    lr = plan.learning_rate(phase.start if phase.start else min(plan.phases[0].end, plan.total_steps) - 1)
    logger.info("Stage %d from step %d: %d of the backbone's parts train", phase.stage, phase.start, phase.thawed)
    for group in optimizer.param_groups:
        live = sum(p.numel() for p in group["params"] if p.requires_grad)
        count = sum(p.numel() for p in group["params"])
        rate = f"factor {group['scale']:.3f}, e.g. {lr * group['scale']:.1e}" if live else "frozen"
        logger.info("  %-28s %11s parameters, %s", group["name"], f"{count:,}", rate)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def loss_terms(config: Config, model: Segmenter, answer: dict, mask: Tensor) -> dict[str, Tensor]:
    """One value per image and term."""
    weight = losses.structure_weight(mask)
    final, *coarser = (losses.structure_loss(logits, mask, weight) for logits in answer["maps"])
    routed = [model.mixtures[key].losses(logits) for key, logits in answer["logits"].items()]
    balance, z = (torch.stack(parts).mean(0) for parts in zip(*routed, strict=True))
    terms = {"structure": final, "edge": losses.edge_loss(answer["edge"], mask), "balance": balance, "z": z}
    if coarser:
        terms["deep"] = torch.stack(coarser).mean(0)
    return terms


def routing(answer: dict, top_k: int, count: int) -> dict[str, Tensor]:
    """Sums over images by the count of the whole step, per level and expert: the share of the choices, and the logit."""
    sums: dict[str, Tensor] = {}
    for key, logits in answer["logits"].items():
        sums |= {f"load/{key}/{i}": value for i, value in enumerate((answer["picked"][key] / (top_k * count)).unbind())}
        sums |= {f"logit/{key}/{i}": value for i, value in enumerate((logits.detach().sum(0) / count).unbind())}
    return sums


def rescale(batch: dict, size: int) -> tuple[Tensor, Tensor]:
    """Images and masks at this side; the masks as float."""
    image, mask = batch["image"], batch["mask"].float()
    if image.shape[-1] == size:
        return image, mask
    image = F.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return image, (upsample(mask[:, None], (size, size))[:, 0] > 0.5).float()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate

EVAL_BATCH = 8  # not --batch-size, which differs with the number of processes: rounding depends on what else is in a batch


@torch.no_grad()
def predict_maps(model: Segmenter, images: Tensor, sizes: list[tuple[int, int]], **how) -> tuple[list[Tensor], dict]:
    """Probabilities (H, W) at each image's own size, and the model's whole answer."""
    answer = model(images, **how)
    probabilities = answer["maps"][0].float().sigmoid()[:, None]
    return [upsample(p[None], size)[0, 0] for p, size in zip(probabilities, sizes, strict=True)], answer


@torch.no_grad()
def evaluate(model: Segmenter, loader, accelerator, **how) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The benchmark's metrics at the masks' own size, equal on every rank, and the table behind them."""
    rows = []
    for batch in loader:
        images = batch["image"].to(accelerator.device)
        with accelerator.autocast():
            maps, answer = predict_maps(model, images, [tuple(mask.shape) for mask in batch["mask"]], **how)
        scored = [score(m.cpu()[None], mask[None]) for m, mask in zip(maps, batch["mask"], strict=True)]
        row = {"id": batch["id"], "area": torch.stack([mask.float().mean() for mask in batch["mask"]])}
        row |= {name: torch.cat([values[name] for values in scored]) for name in scored[0]}
        for key, logits in answer["logits"].items():
            share = torch.zeros_like(logits, dtype=torch.float32)
            row[f"route/{key}"] = share.scatter(1, answer["chosen"][key], 1.0)
            row[f"stride_{key}/entropy"] = torch.special.entr(logits.float().softmax(1)).sum(1)
        rows.append(row)
    table = data.gather_samples(accelerator, rows, loader.batch_sampler.size)
    scored = {name: values for name, values in table.items() if name != "area" and not name.startswith("route/")}
    return summarize(scored), table


def ablate(model: Segmenter, loader, accelerator, config: Config, whole: np.ndarray) -> dict[str, tuple[float, float]]:
    """Per expert, what the mean IoU loses when it is silent, and by how much the IoU of an image moves either way."""
    lost = {}
    for number in range(config.num_experts):
        _, table = evaluate(model, loader, accelerator, without=number)
        change = whole - table["iou"]
        lost[expert_name(number)] = (float(change.mean()), float(np.abs(change).mean()))
    return lost


def expert_name(number: int) -> str:
    turn, kind = divmod(number, len(EXPERTS))
    return EXPERTS[kind].__name__.lower() + (str(turn + 1) if turn else "")


class RouterWatch:
    """Warns of an expert that has had less than a tenth of its share for `patience` logged steps: it learns nothing more."""

    def __init__(self, patience: int = 20):
        self.patience = patience
        self.starved: dict[tuple[str, int], int] = {}

    def update(self, model: Segmenter) -> None:
        for key, mixture in model.mixtures.items():
            for number, load in enumerate(mixture.load.tolist()):
                starved = load < 0.1 / len(mixture.experts)
                times = self.starved[key, number] = self.starved.get((key, number), 0) + 1 if starved else 0
                if times == self.patience:
                    text = "Router at stride %s: %s gets almost no images; raise --balance-weight"
                    logger.warning(text, key, expert_name(number))


def look(model: Segmenter, sets: dict[str, Masked], accelerator, name: str, index: int) -> Seen:
    """For the pictures of the report, all at the mask's size."""
    sample = sets[name][index]
    images, mask = sample["image"][None], sample["mask"]
    with accelerator.autocast():
        maps, _ = predict_maps(model, images.to(accelerator.device), [tuple(mask.shape)])
    image = upsample(images, mask.shape)[0].permute(1, 2, 0)
    return Seen(image.numpy(), mask.numpy(), maps[0].float().cpu().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Data and model for main


@dataclass
class Parts:
    """What a run trains on, selects by and reports on."""

    train: Masked
    val: Masked
    tests: dict[str, Masked]
    hash: str


def prepare_data(config: Config, accelerator) -> Parts:
    """Find, check, split. Whatever is wrong with the files is said here, before training starts."""
    if config.demo:
        from common.demo_data.camouflage import write  # here: scipy takes its time at every start

        data.made_by_main(accelerator, config.dataset_path, partial(write, config.dataset_path))
    found = camouflage.find_training(config.dataset_path, "--dataset-path", accelerator)
    tests = camouflage.find_tests(config.dataset_path, accelerator=accelerator)
    if config.test_path:
        further = camouflage.find_tests(config.test_path, "--test-path", accelerator)
        if not further:
            raise UserError(f"--test-path {config.test_path} holds no set of images and masks.")
        tests |= {name if name not in tests else f"{name}-2": images for name, images in further.items()}
    images = camouflage.drop_known_duplicates(camouflage.select(found, config.noncam_ratio, config.seed))
    every = [images, *(camouflage.select(part, 0, config.seed) for part in tests.values())]
    inspections = inspect([path for part in every for path in part.images], accelerator)
    images, *checked = (camouflage.check_readable(part, inspections, accelerator) for part in every)
    tests = dict(zip(tests, checked, strict=True))
    for part in (images, *checked):
        logger.info("%s", part.describe())
    camouflage.check_overlap(images, tests, inspections)
    train, val = camouflage.take_validation(images, config.val_share, config.seed)
    content = data.content_hash(inspections[path].digest for path in train.images)
    return Parts(Masked(train, config), Masked(val, config), {k: Masked(v, config) for k, v in tests.items()}, content)


def try_batch(model: Segmenter, config: Config, dataset: Masked, count: int) -> None:
    """Forward and backward on `count` images of the largest size: what --find-batch-size asks whether it fits."""
    batch = torch.utils.data.default_collate([dataset[0, 0]] * count)
    batch = send_to_device(batch, next(model.parameters()).device)
    image, mask = rescale(batch, round_to(config.img_size * max(config.multi_scale)))
    sum(term.sum() for term in loss_terms(config, model, model(image), mask).values()).backward()
    model.zero_grad()


MODEL_FLAGS = ("backbone", "num_experts", "top_k", "width", "deep_supervision", "img_size")


def load_model(folder: Path) -> tuple[Segmenter, Config, dict]:
    """The exported model of a run: what `model/` holds. Used by predict_ultimate.py."""
    saved = json.loads((folder / "config.json").read_text())
    config = Config(**saved["config"])
    model = Segmenter(config, make_backbone(config.backbone, "none", scratch=saved["scratch"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), config, saved


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    if config.evaluate_maps:
        score_maps(*config.evaluate_maps)
        return
    accelerator = launch.start(config)
    launch.stop_after(config.max_hours)
    parts = prepare_data(config, accelerator)

    def build(weights: str) -> Segmenter:
        torch.manual_seed(config.seed)  # the same weights on every rank
        backbone = make_backbone(config.backbone, weights, scratch=config.backbone_weights == "none")
        return Segmenter(config, backbone).to(memory_format=torch.channels_last)

    if config.find_batch_size:
        bare = build("none").to(accelerator.device)
        training.find_batch_size(accelerator, config, partial(try_batch, bare, config, parts.train))
    with accelerator.local_main_process_first():  # it alone downloads the backbone's weights
        resumes = config.resume_from is not None and any((config.output_dir / "checkpoints").glob("step-*"))
        model = build("none" if resumes else config.backbone_weights)  # the checkpoint holds them
    plan = Plan(config, len(parts.train), len(parts_of(model.backbone)), accelerator)
    sizes = {stage: sampler.size_of_step for stage, sampler in plan.samplers.items()}
    folder = RunFolder(
        config, accelerator,
        {
            "samples per step": sizes[1], "samples per step of stage 2": sizes[2], "seed": config.seed,
            "training data": parts.hash, "stages": [list(dataclasses.astuple(phase)) for phase in plan.phases],
        },
    )  # fmt: skip
    if folder.finished(plan.total_steps):
        logger.info("%s has reached its end already: nothing to do", config.output_dir)
        accelerator.end_training()
        return
    folder.describe()

    raw = model.to(accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(raw, config), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    optimizer = accelerator.prepare(optimizer)  # the model is wrapped anew in each phase
    ema = training.EMA(raw, config.ema_decay)
    guard = training.FiniteGuard(raw, config.max_skipped_steps, accelerator.scaler)
    mode = "min" if config.select == "mae" else "max"
    stopper = training.EarlyStopping([training.Rule(f"val/{config.select}", mode)], config.early_stop_patience)
    watch, router_watch = training.TermWatch(), RouterWatch()
    modules, optimizers = {"model": raw, "ema": ema.module}, {"optimizer": optimizer}

    state = {"step": 0, "evaluated": 0, "ended": False}
    if found := folder.resume(modules, optimizers):
        state = found
        guard.load_state_dict(state["guard"])
        stopper.load_state_dict(state["stopper"])
    step = state["step"]
    saved = (step, state["evaluated"])
    log = RunLog(config, accelerator, project="camouflage", step=step, total_steps=plan.total_steps, unit="images")
    logger.info(
        "Training %s, validation %s images, content %s; test sets: %s", f"{len(parts.train):,}", f"{len(parts.val):,}",
        parts.hash, ", ".join(f"{name} {len(images):,}" for name, images in parts.tests.items()) or "none",
    )  # fmt: skip
    logger.info(
        "%d processes x accumulation %d: %s images per step; %d steps of stage 1, %d in all; %s parameters",
        accelerator.num_processes, config.accumulation_steps,
        " then ".join(str(size) for size in dict.fromkeys(sizes.values())),
        plan.boundary, plan.total_steps, f"{sum(p.numel() for p in raw.parameters()):,}",
    )  # fmt: skip

    def eval_loader(images: Masked, batches: int | None = None) -> torch.utils.data.DataLoader:
        dealt = data.EvalSampler(len(images), EVAL_BATCH, accelerator, batches=batches)
        return data.make_loader(images, dealt, config, collate_whole)

    def export(threshold: float) -> None:
        flags = {name: getattr(config, name) for name in MODEL_FLAGS}
        folder.export(
            ema.module, {"config": flags, "scratch": config.backbone_weights == "none", "threshold": threshold, "step": step}
        )

    val_loader = eval_loader(parts.val)
    evaluate(ema.module, eval_loader(parts.val, batches=2), accelerator)  # a wrong shape or metric surfaces now
    steps, phase, stopping = None, None, False
    parameters = list(raw.parameters())  # once: the walk through the modules takes 0.1 to 0.4 ms
    experts = config.num_experts
    weights = {
        "structure": 1.0, "deep": config.deep_weight, "edge": config.edge_weight,
        "balance": config.balance_weight, "z": config.z_weight,
    }  # fmt: skip

    while True:
        # ---- once in a while: evaluate, save, stop
        epoch = plan.epoch(max(step - 1, 0))
        epoch_ended = plan.epoch_ends(step)
        last = step == plan.total_steps
        better, score = False, None
        due = step % config.eval_every == 0 if config.eval_every else epoch_ended
        if step > state["evaluated"] and (due or last) and not stopping:
            ema.share_buffers()
            values, table = evaluate(ema.module, val_loader, accelerator)
            shown = {name: value for name, value in values.items() if name in SHOWN or name.endswith("/entropy")}
            log.evaluation(step, epoch, {f"val/{name}": value for name, value in shown.items()})
            logger.info(
                "Validation: Sm=%.3f wF=%.3f Em=%.3f MAE=%.3f IoU=%.3f",
                *(values[name] for name in ("sm", "wfm", "em_mean", "mae", "iou")),
            )
            better, state["ended"] = stopper.update(accelerator, {f"val/{name}": value for name, value in values.items()})
            score = values[config.select] * (1 if mode == "max" else -1)
            state["evaluated"] = step
            if better:
                export(best_threshold(table))
            stopping = training.agree_to_stop(accelerator)
        due = step % config.save_every == 0 if config.save_every else epoch_ended
        due = due or last or stopping or better or state["ended"] or folder.wants(state, score)
        if due and saved != (step, state["evaluated"]):
            saved = (step, state["evaluated"])
            logger.info("Saving checkpoint at step %d.", step)
            log.sync()
            state |= {"step": step, "guard": guard.state_dict(), "stopper": stopper.state_dict()}
            folder.save(state, modules, optimizers, score=score, best=better)
            log.resume_clock(step, steps.waited if steps else 0.0)
        if stopping or last or state["ended"]:
            break

        # ---- a new phase: another part of the backbone trains, perhaps with another batch
        if plan.phase(step) is not phase:
            new_stage = phase is None or plan.phase(step).stage != phase.stage
            phase = plan.phase(step)
            thaw(raw.backbone, phase.thawed)
            model = training.rewrap(accelerator, model)
            training.check_replicas(accelerator, raw, f"at step {step}, stage {phase.stage}")
            log_groups(optimizer, phase, plan)
            if new_stage:
                sampler, local = plan.sampler(step)
                sampler.start = local
                steps = data.StepLoader(data.make_loader(parts.train, sampler, config), accelerator)
                log.resume_clock(step, 0.0)

        # ---- one optimizer step
        lr = plan.learning_rate(step)
        training.set_lr(optimizer, lr)
        side = round_to(config.img_size * plan.scale(step))
        batches = next(steps)
        count = sampler.size_of_step  # one denominator for the global batch
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            training.seed_step(config.seed, step, micro, accelerator.process_index)
            image, mask = rescale(batch, side)
            with accelerator.accumulate(model):
                answer = model(image)
                terms = {name: term.sum() / count for name, term in loss_terms(config, raw, answer, mask).items()}
                loss = sum(term * weights[name] for name, term in terms.items())
                accelerator.backward(loss * sampler.parts)  # undoes DDP's mean and the division by accumulation
            routed = routing(answer, config.top_k, count)
            training.add(totals, {"loss": loss, **terms, **routed})
        norm = accelerator.clip_grad_norm_(parameters, config.clip)
        verdict = training.agree(accelerator, totals, norm)
        finite = guard.passes(verdict, step + 1)
        if finite or accelerator.scaler:  # the fp16 scaler skips by itself, and must see the step to lower its scale
            optimizer.step()
        if finite:
            for key, mixture in raw.mixtures.items():
                means = ([verdict.terms[f"{kind}/{key}/{i}"] for i in range(experts)] for kind in ("load", "logit"))
                mixture.follow(*means)
            guard.remember()
            ema.update(step)
            watch.update({name: value for name, value in verdict.terms.items() if name in weights})
        optimizer.optimizer.zero_grad()  # accelerate's own inspects its signature in every step, 0.1 ms
        step += 1
        stopping = verdict.stop
        if step % config.log_every == 0 or step == plan.total_steps:
            named = {name: value for name, value in verdict.terms.items() if name in ("loss", *weights)}
            for key, mixture in raw.mixtures.items():
                named |= {f"{expert_name(i)}/load_{key}": value for i, value in enumerate(mixture.load.tolist())}
            values = {**named, "grad_norm": verdict.grad_norm, "lr": lr, "side": side, "skipped": guard.total}
            log.train(step, plan.epoch(step - 1), values, samples=count, waited=steps.waited)
            router_watch.update(raw)
        if plan.epoch_ends(step):
            training.check_replicas(accelerator, raw, f"after step {step}")

    if stopping and not last:
        logger.info("Stopped by a signal or --max-hours at step %d; continue with --resume-from auto", step)
        log.close()
        return

    logger.info("Training process completed. Starting testing phase.")
    ema.module.load_state_dict(folder.exported())
    results = {name: evaluate(ema.module, eval_loader(images), accelerator) for name, images in parts.tests.items()}
    for name, (values, _) in results.items():
        log.evaluation(step, epoch, {f"test/{name}/{key}": value for key, value in values.items()})
    _, val_table = evaluate(ema.module, val_loader, accelerator)
    lost = ablate(ema.module, val_loader, accelerator, config, val_table["iou"])
    if accelerator.is_main_process:  # no collective from here on: the others may leave
        sets = parts.tests | {"validation": parts.val}
        tables = {name: table for name, (_, table) in results.items()} | {"validation": val_table}
        scored = {name: (sets[name].images, table) for name, table in tables.items()}
        further = None
        if config.demo:
            test = next(iter(scored.values()))
            further = demo_report(config.output_dir, config.dataset_path, config.seed, parts.train.images, *test)
        report(config.output_dir, scored, lost, further, partial(look, ema.module, sets, accelerator), log, step)
    folder.finish(step, plan.total_steps)
    log.close()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
