"""3D VQ-GAN for CT: whole chest volumes to discrete codes and back, trained on random patches.

Demo on a CPU (makes its own patients, about five minutes):
    python scripts/train_vqgan.py --demo

One GPU:
    accelerate launch --config_file accelerate_configs/1xgpu.yaml scripts/train_vqgan.py --dataset-path data/ct

Four GPUs, with a local file for the perceptual loss:
    accelerate launch --config_file accelerate_configs/4xh200.yaml scripts/train_vqgan.py --dataset-path data/ct \
        --perceptual timm:vgg19@vgg19.safetensors --batch-size 4
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import RunConfig, UserError, parse, sentences

# ---------------------------------------------------------------------------------------------------------------------
# Config

DEMO = Path("data/demo/ct")


@dataclass
class Config(RunConfig):
    """Train a 3D VQ-GAN on a folder of CT scans (.nii, .nii.gz) of any shape, spacing and orientation."""

    DEMO: ClassVar[dict[str, object]] = {
        "dataset_path": DEMO / "scans",
        "output_dir": "runs/vqgan-demo",
        "val_patients": 3,
        "test_patients": 4,
        "patch_size": (32, 32, 32),
        "crops_per_scan": 32,
        "width": 8,
        "blocks": 1,
        "n_codes": 512,
        "codebook_decay": 0.9,
        "restart_below": 0.1,
        "disc_width": 8,
        "epochs": 10,
        "batch_size": 8,
        "lr": 2e-3,
        "disc_lr": 1e-3,
        "eval_every": 100,
        "num_workers": 0,
        "perceptual_weight": 0.0,
        "tracker": "none",
    }

    # shared flags with other defaults
    output_dir: Path = Path("runs/vqgan")
    epochs: int = 100
    batch_size: int = 2
    lr: float = 1e-4
    keep_top_k: int = 3

    # data
    dataset_path: Path = Path("data/ct")
    """Folder of .nii and .nii.gz scans, searched with its subfolders."""
    cache_path: Path | None = None
    """Where the scans are kept as int16 arrays, made by the first run; unset: <dataset-path>/.cache."""
    patient_pattern: str | None = None
    """Regular expression on the file name; its group is the patient. Unset: up to the first number, train_1 of train_1_a."""
    max_patients: int | None = None
    """Use so many patients only, drawn by the seed."""
    val_patients: int = 8
    """Patients on which checkpoints are compared."""
    test_patients: int = 8
    """Patients evaluated once, at the end."""
    hu_min: int = -1000
    """Hounsfield value that becomes -1; what is below is clipped."""
    hu_max: int = 1000
    """Hounsfield value that becomes 1; what is above is clipped."""
    patch_size: tuple[int, int, int] = (128, 128, 128)
    """Sides of the training patches in voxels, right-left, back-front, down-up."""
    crops_per_scan: int = 16
    """Random patches of each scan in an epoch."""
    stride: tuple[int, int, int] | None = None
    """Instead of random patches the whole grid of patches at this stride in every epoch, as the original did."""
    body_share: float = 0.3
    """Part of a random patch that should be body and not air around it."""
    tile_size: int = 128
    """Side in voxels of the tiles in which whole volumes are evaluated; memory grows with its third power."""

    # model
    downsample: tuple[int, int, int] = (4, 4, 4)
    """Voxels per code along each axis, powers of two."""
    width: int = 32
    """Channels at full resolution; twice as many after each halving."""
    blocks: int = 2
    """Residual blocks per resolution in the encoder and in the decoder."""
    norm: Literal["rms", "batch", "group"] = "rms"
    """rms and batch norm make tiles equal to the whole volume; group norm, the original's, cannot."""
    sync_batchnorm: bool = False
    """Share batch norm's statistics among the GPUs."""
    quantizer: Literal["ema", "fsq"] = "ema"
    """ema: a learnt codebook; fsq: rounding of a few bounded numbers, which needs no codebook."""
    n_codes: int = 8192
    """Entries of the codebook."""
    embedding_dim: int = 8
    """Numbers in an entry."""
    codebook_decay: float = 0.99
    """Decay of the codebook's running means."""
    restart_below: float = 0.03
    """A code used less than this part of the mean use is moved to where data are; 0: never."""
    fsq_levels: tuple[int, ...] = (8, 8, 8, 6, 5)
    """Steps of each number of fsq; their product is the number of codes."""
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """torch.compile the networks."""
    init_from: Path | None = None
    """Begin with the weights of a finished run: its model/ folder."""
    freeze_encoder: bool = False
    """Train the decoder alone on codes that stay as they are, e.g. with larger patches and --init-from."""

    # losses
    l1_weight: float = 4.0
    """Weight of the mean absolute error."""
    commitment_weight: float = 0.25
    """Weight of the squared distance of latents to their codes."""
    perceptual: str = "timm:vgg19"
    """Network of the perceptual loss: timm:NAME, or timm:NAME@FILE with its weights."""
    perceptual_weight: float = 1.0
    """Weight of the difference of the features of slices along three axes; 0 needs no network."""
    slices: int = 2
    """Slices along each axis that the perceptual loss and the slice discriminator see of a patch."""
    image_gan_weight: float = 0.1
    """Weight of the adversarial loss of the slice discriminator."""
    video_gan_weight: float = 0.1
    """Weight of the adversarial loss of the volume discriminator."""
    gan_feat_weight: float = 1.0
    """Weight of feature matching: distance of the discriminators' features."""
    lecam_weight: float = 0.0
    """Weight of the LeCAM regularisation of the discriminators, e.g. 0.001; for few patients."""
    adaptive_weight: bool = False
    """Scale the adversarial losses so that at the decoder's last layer they pull as much as the others."""
    disc_width: int = 64
    """Channels of the discriminators' first layer."""
    disc_layers: int = 3
    """Halvings of the discriminators."""
    disc_lr: float = 1e-4
    """Peak learning rate of the discriminators."""
    discriminator_iter_start: int | None = None
    """Optimizer step from which the generator sees the discriminators; unset: 10,000, at most 40% of all; -1: never."""
    discriminator_warmup: int | None = None
    """Steps before that in which they train already; unset: a tenth of the start."""
    gan_ramp: int | None = None
    """Steps over which the adversarial losses grow to their weight; unset: a tenth of the start."""
    gan_psnr_tolerance: float = 1.0
    """Halve the adversarial losses when validation PSNR falls by so many dB below its best without them."""

    # optimization
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up before the cosine."""
    clip: float = 1.0
    """Gradients of a larger norm are scaled down to it, those of autoencoder and discriminators each by themselves."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is evaluated and exported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in self.downsample:
            if step not in (1, 2, 4, 8, 16):
                raise ValueError(f"--downsample {step}: give 1, 2, 4, 8 or 16 for each axis.")
        if max(self.downsample) == 1:
            raise ValueError("--downsample 1 1 1 keeps every voxel: give 2 or more along an axis.")
        for side, step in zip(self.patch_size, self.downsample, strict=True):
            if side % step or side < 4 * step:
                raise ValueError(f"--patch-size {side}: give a multiple of {step} (--downsample), at least {4 * step}.")
        if self.stride and min(self.stride) < 1:
            raise ValueError(f"--stride {' '.join(map(str, self.stride))}: give 1 or more for each axis.")
        if self.tile_size < max(self.downsample) or self.tile_size % max(self.downsample):
            raise ValueError(f"--tile-size {self.tile_size}: give a multiple of {max(self.downsample)} (--downsample).")
        if self.hu_min >= self.hu_max:
            raise ValueError(f"--hu-min {self.hu_min} must be below --hu-max {self.hu_max}.")
        for name in ("crops_per_scan", "width", "blocks", "n_codes", "embedding_dim", "slices", "disc_width", "disc_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 1 or more.")
        if self.val_patients < 1 or self.test_patients < 0:
            raise ValueError("--val-patients: give 1 or more; --test-patients: 0 or more.")
        if self.quantizer == "fsq" and (not self.fsq_levels or min(self.fsq_levels) < 2):
            raise ValueError("--fsq-levels: give numbers from 2 on.")
        if self.norm == "group" and self.width % 4:
            raise ValueError(f"--width {self.width}: group norm needs a multiple of 4.")
        if self.freeze_encoder and not (self.init_from or self.resume_from):
            raise ValueError("--freeze-encoder would freeze random weights: give the trained model by --init-from.")
        if self.sync_batchnorm and self.norm != "batch":
            raise ValueError(f"--sync-batchnorm has nothing to share with --norm {self.norm}: give --norm batch.")

    @property
    def adversarial(self) -> bool:
        return max(self.image_gan_weight, self.video_gan_weight, self.gan_feat_weight) > 0


if __name__ == "__main__":
    CONFIG = parse(Config)  # before torch is imported: --help and typos are answered at once

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import ct, data, launch, training
from common.adversarial import AdaptiveWeight, GanSchedule, LeCAM, feature_matching, hinge_d, hinge_g
from common.checkpoints import RunFolder
from common.logs import RunLog
from common.losses import SlicePerceptual, take_slices
from common.quantizers import FSQ, CodeUse, EMACodebook, Quantized
from common.tiling import pad_to_cells, reach, tiled
from common.volume_metrics import anatomy, resize_baseline, scores
from common.volume_report import ScanView, planes_sheet, summary, write_csv

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# Data

PICKS = 64  # tokens of a patch that may become the new place of an unused code


class Patches(torch.utils.data.Dataset):
    """Patches of training scans, a function of (seed, epoch, index): random ones, mostly of the body, or the whole grid."""

    def __init__(self, scans: Sequence[ct.Scan], config: Config):
        self.scans, self.config = scans, config
        self.corners: list[tuple[int, tuple[int, int, int] | None]] = []  # None: drawn for each epoch
        for number, scan in enumerate(scans):
            if config.stride:
                self.corners += [(number, c) for c in ct.grid_corners(scan.shape, config.patch_size, config.stride)]
            else:
                self.corners += [(number, None)] * config.crops_per_scan

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        config = self.config
        rng = np.random.default_rng([config.seed, index, epoch])
        number, corner = self.corners[index]
        scan = self.scans[number]
        if corner is None:
            corner = ct.random_corner(scan, config.patch_size, rng, config.body_share)
        hu = ct.crop(scan, corner, config.patch_size, config.hu_min)
        slices = (rng.random((3, config.slices)) + range(config.slices)) / config.slices  # no slice twice
        return {
            "volume": torch.from_numpy(ct.to_unit(hu, config.hu_min, config.hu_max))[None],
            # what the losses look at is the sample's own draw: the same on any number of processes
            "slices": torch.from_numpy(slices.astype(np.float32)),
            "picks": torch.from_numpy(rng.random(PICKS)),
            "id": index,
        }


class Scans(torch.utils.data.Dataset):
    """Whole scans in HU."""

    def __init__(self, scans: Sequence[ct.Scan]):
        self.scans = scans

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> dict:
        return {"id": index, "hu": torch.from_numpy(np.load(self.scans[index].array))}


# ---------------------------------------------------------------------------------------------------------------------
# Model


class RMSNorm(nn.Module):
    """Over the channels of each place alone: nothing of the rest of the tile or of the batch."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6)
        return x * (scale * self.weight.view(-1, 1, 1, 1)).to(x.dtype)


def make_norm(kind: str, channels: int) -> nn.Module:
    if kind == "rms":
        return RMSNorm(channels)
    return nn.BatchNorm3d(channels) if kind == "batch" else nn.GroupNorm(min(32, channels // 4), channels)


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="replicate")


class Residual(nn.Module):
    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.recompute = config.gradient_checkpointing
        self.norm1, self.conv1 = make_norm(config.norm, channels), conv(channels, channels)
        self.norm2, self.conv2 = make_norm(config.norm, channels), conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # each block begins as the identity
        nn.init.zeros_(self.conv2.bias)

    def inner(self, x: Tensor) -> Tensor:
        x = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return x + checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)
        return x + self.inner(x)


def levels(downsample: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Stride and kernel of each halving: 4 4 2 is 2 2 2 and then 2 2 1. An axis that is not halved has a kernel of 3."""
    count = int(math.log2(max(downsample)))
    strides = [[2 if step >= 2 ** (level + 1) else 1 for step in downsample] for level in range(count)]
    return [(stride, [4 if s == 2 else 3 for s in stride]) for stride in strides]


class Encoder(nn.Sequential):
    def __init__(self, config: Config, dim: int):
        layers, channels = [], 1
        for level, (stride, kernel) in enumerate(levels(config.downsample)):
            wider = config.width * 2 ** (level + 1)
            # no layer of full width at full resolution, where it would cost half of everything
            layers.append(nn.Conv3d(channels, wider, kernel, stride, 1, padding_mode="replicate"))
            layers += [Residual(wider, config) for _ in range(config.blocks)]
            channels = wider
        super().__init__(*layers, make_norm(config.norm, channels), nn.SiLU(), conv(channels, dim, 1))


class Decoder(nn.Sequential):
    def __init__(self, config: Config, dim: int):
        halvings = levels(config.downsample)
        channels = config.width * 2 ** len(halvings)
        layers: list[nn.Module] = [conv(dim, channels)]
        for level, (stride, kernel) in reversed(list(enumerate(halvings))):
            layers += [Residual(channels, config) for _ in range(config.blocks)]
            narrower = config.width * 2**level
            layers += [make_norm(config.norm, channels), nn.SiLU()]
            layers.append(nn.ConvTranspose3d(channels, narrower, kernel, stride, 1))
            channels = narrower
        super().__init__(*layers, nn.SiLU(), conv(channels, 1))


class Output(NamedTuple):
    reconstruction: Tensor
    quantized: Quantized


class VQGAN(nn.Module):
    """(B, 1, X, Y, Z) in [-1, 1] to codes (B, x, y, z) and back."""

    def __init__(self, config: Config):
        super().__init__()
        if config.quantizer == "fsq":
            self.quantizer = FSQ(config.fsq_levels)
        else:
            self.quantizer = EMACodebook(
                config.n_codes, config.embedding_dim, decay=config.codebook_decay, restart_below=config.restart_below
            )
        self.factor, self.frozen = config.downsample, config.freeze_encoder
        self.encoder, self.decoder = Encoder(config, self.quantizer.dim), Decoder(config, self.quantizer.dim)
        if self.frozen:
            self.encoder.requires_grad_(False)

    def forward(self, volume: Tensor, picks: Tensor | None = None) -> Output:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            latents = self.encoder(volume)
        quantized = self.quantizer(latents, picks)
        return Output(self.decoder(quantized.quantized.to(latents.dtype)).float(), quantized)

    def train(self, mode: bool = True) -> "VQGAN":
        super().train(mode)
        if self.frozen:  # neither batch statistics nor the codebook may move
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def encode(self, volume: Tensor) -> Tensor:
        return self.quantizer(self.encoder(volume)).indices

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(self.quantizer.decode(codes)).float()

    @property
    def bits_per_voxel(self) -> float:
        return self.quantizer.bits_per_token / math.prod(self.factor)


class PatchDiscriminator(nn.Module):
    """Real or not, for every place; norms per sample, so that a batch's other samples do not matter."""

    def __init__(self, config: Config, dimensions: Literal[2, 3]):
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        stages, channels = [], 1
        for layer in range(config.disc_layers):
            wider = config.disc_width * 2 ** min(layer, 3)
            norm = nn.GroupNorm(1, wider) if layer else nn.Identity()
            stages.append(nn.Sequential(convolution(channels, wider, 4, 2, 1), norm, nn.LeakyReLU(0.2)))
            channels = wider
        self.stages, self.head = nn.ModuleList(stages), convolution(channels, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return self.head(x), features


class Discriminators(nn.Module):
    """One on slices of all three axes, one on the volume: their logits and features per sample, by the losses' names."""

    def __init__(self, config: Config):
        super().__init__()
        self.image, self.video = PatchDiscriminator(config, 2), PatchDiscriminator(config, 3)

    def forward(self, volume: Tensor, slices: Tensor) -> dict[str, tuple[Tensor, list[Tensor]]]:
        count = len(volume)
        logits, features = [], []
        for planes in take_slices(volume, slices):  # three shapes, when the patch is no cube
            judged, seen = self.image(planes)
            logits.append(judged.reshape(count, -1))
            features += [part.reshape(count, -1) for part in seen]
        return {"image": (torch.cat(logits, 1), features), "video": self.video(volume)}


class Coder:
    """A model at work on volumes of any size, in HU: tile by tile, with a halo that leaves no seam."""

    def __init__(self, model: VQGAN, hu_min: int, hu_max: int, tile: int, device: torch.device):
        self.model, self.window, self.device = model, (hu_min, hu_max), device
        self.tile = tuple(max(tile // step, 1) for step in model.factor)
        self.exact = True
        halos = []
        for network, channels, upward in ((model.encoder, 1, False), (model.decoder, model.quantizer.dim, True)):
            halo = reach(network, channels, model.factor, upward=upward)
            self.exact &= halo is not None
            halos.append(halo or tuple(min(8, side) for side in self.tile))
        self.halo_in, self.halo_out = halos

    @torch.no_grad()
    def encode(self, hu: Tensor) -> Tensor:
        """Codes (x, y, z) of a volume (X, Y, Z) in HU; the last cells are filled up with its last planes."""

        def encode(tile: Tensor) -> Tensor:
            return self.model.encode(ct.to_unit(tile, *self.window))

        volume = pad_to_cells(hu[None, None], self.model.factor)
        sizes = {"tile": self.tile, "halo": self.halo_in, "reads": self.model.factor}
        return tiled(encode, volume, **sizes, device=self.device)[0]

    @torch.no_grad()
    def decode(self, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """HU of the volume (X, Y, Z) that the codes stand for."""

        def decode(tile: Tensor) -> Tensor:
            return ct.to_hu(self.model.decode(tile), *self.window)

        sizes = {"tile": self.tile, "halo": self.halo_out, "writes": self.model.factor}
        return tiled(decode, codes[None], **sizes, device=self.device)[0, 0][tuple(map(slice, shape))]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


LOSSES = ("l1", "commitment", "perceptual", "_gan", "gan_feat", "_disc")  # ends of the names of what trains something


def share(terms: dict[str, Tensor], sampler: data.StepSampler) -> dict[str, Tensor]:
    """Of the global batch's mean: summed over micro-batches and processes it is the same on any number of them."""
    return {name: term.sum() / sampler.size_of_step for name, term in terms.items()}


def weighted(terms: dict[str, Tensor], config: Config) -> Tensor:
    return sum(term * getattr(config, f"{name}_weight") for name, term in terms.items())


def reconstruction_terms(output: Output, batch: dict[str, Tensor], perceptual: nn.Module | None) -> dict[str, Tensor]:
    """Per sample, without their weights."""
    target = batch["volume"]
    terms = {"l1": (output.reconstruction - target).abs().flatten(1).mean(1)}
    if output.quantized.commitment.requires_grad:  # there is none with fsq, nor with a frozen encoder
        terms["commitment"] = output.quantized.commitment
    if perceptual:
        terms["perceptual"] = perceptual(output.reconstruction, target, batch["slices"])
    return terms


def generator_terms(disc: Discriminators, output: Output, batch: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    fake = disc(output.reconstruction, batch["slices"])
    terms = {f"{name}_gan": hinge_g(logits) for name, (logits, _) in fake.items()}
    if config.gan_feat_weight:
        with torch.no_grad():
            real = disc(batch["volume"], batch["slices"])
        terms["gan_feat"] = sum(feature_matching(fake[name][1], real[name][1]) for name in fake)
    return {name: value for name, value in terms.items() if getattr(config, f"{name}_weight")}


def discriminator_terms(
    disc: nn.Module, output: Output, batch: dict[str, Tensor], lecam: dict[str, LeCAM]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per sample: the losses, and what the discriminators say of real and of reconstructed patches."""
    count = len(batch["volume"])
    volumes = torch.cat([batch["volume"], output.reconstruction.detach()])  # one forward pass: DDP allows no second
    terms, answers = {}, {}
    for name, (logits, _) in disc(volumes, batch["slices"].repeat(2, 1, 1)).items():
        real, fake = logits[:count], logits[count:]
        terms[f"{name}_disc"] = hinge_d(real, fake)
        if name in lecam:
            terms[f"{name}_lecam"] = lecam[name](real, fake)
        answers |= {f"{name}_real": real.detach().flatten(1).mean(1), f"{name}_fake": fake.detach().flatten(1).mean(1)}
    return terms, answers


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate

REGIONS = ("", "_body", "_lung")


@torch.no_grad()
def evaluate(
    coder: Coder, loader, accelerator, config: Config, *, full: bool = False
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of whole volumes as int16 HU, as they would be written, equal on every rank, and the table behind them.

    `full` adds body and lungs alone, and the resize that keeps as many bits ("resize_")."""
    bits = coder.model.bits_per_voxel
    use, rows = CodeUse(coder.model.quantizer.count), []
    for batch in loader:
        hu = batch["hu"][0]
        with accelerator.autocast():
            codes = coder.encode(hu)
            output = coder.decode(codes, hu.shape)
        use.add(codes)
        results = {"": output}
        masks = {}
        if full:
            results["resize_"] = torch.from_numpy(resize_baseline(hu.clamp(config.hu_min, config.hu_max).numpy(), bits))
            masks = {name: torch.from_numpy(mask).to(accelerator.device) for name, mask in anatomy(hu.numpy()).items()}
        row = {"id": batch["id"]}
        for prefix, result in results.items():
            pair = (volume.to(accelerator.device) for volume in (result, hu))
            found = scores(*pair, hu_min=config.hu_min, hu_max=config.hu_max, masks=masks)
            for region in REGIONS if full else REGIONS[:1]:
                for name in ("psnr", "hu_rmse", "hu_mae", "ssim"):  # a scan without lungs has no values for them
                    row[prefix + name + region] = torch.tensor([found.get(name + region, math.nan)], dtype=torch.float64)
        rows.append(row)
    table = data.gather_samples(accelerator, rows, loader.batch_sampler.size)
    use.merge(accelerator)
    values = {name: float(np.nanmean(v)) for name, v in table.items() if name != "id" and not np.isnan(v).all()}
    return values | {"codes_used": use.used, "code_perplexity": use.perplexity}, table


def draw(coder: Coder, scans: Scans, indices, config: Config, accelerator, name: str) -> Path:
    """samples/<name>.png: three planes of some scans, what is made of them, and the error."""
    window = {"hu_min": config.hu_min, "hu_max": config.hu_max}
    views = []
    for index in indices:
        if index < len(scans):
            scan, hu = scans.scans[int(index)], scans[int(index)]["hu"]
            with accelerator.autocast():
                output = coder.decode(coder.encode(hu), hu.shape)
            values = scores(output, hu, **window, masks={})
            views.append(ScanView(scan.path.name, hu.numpy(), output.numpy(), scan.spacing, values))
    path = config.output_dir / "samples" / f"{name}.png"
    planes_sheet(path, views, **window)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Data and model for main


@dataclass
class Parts:
    """What a run trains on, selects by and reports on."""

    train: Patches
    val: Scans
    test: Scans
    hash: str


def prepare_data(config: Config, accelerator) -> Parts:
    """Find, read once into the cache, split by patient. Whatever is wrong with the files is said here, before training."""
    if config.demo:
        from common.demo_data.ct import write

        data.made_by_main(accelerator, DEMO, partial(write, DEMO))
    paths = ct.find_volumes(config.dataset_path, "--dataset-path")
    pattern = config.patient_pattern or ct.PATIENT
    if config.max_patients:
        patients = sorted({ct.patient_of(path, pattern) for path in paths})
        order = np.random.default_rng([config.seed, len(patients)]).permutation(len(patients))
        kept = {patients[i] for i in order[: config.max_patients]}
        paths = [path for path in paths if ct.patient_of(path, pattern) in kept]
    scans = ct.prepare_scans(paths, config.cache_path or config.dataset_path / ".cache", pattern, accelerator)
    logger.info("%s", ct.describe(scans, config.hu_min, config.hu_max))
    train, val, test = ct.split_patients(scans, config.val_patients, config.test_patients, config.seed)
    ct.check_leak(train, val, test)
    logger.info(
        "Split by patient: training %d scans of %d patients, validation %d of %d, test %d of %d",
        *(n for part in (train, val, test) for n in (len(part), len({scan.patient for scan in part}))),
    )
    content = data.content_hash(scan.digest for scan in train)
    return Parts(Patches(train, config), Scans(val), Scans(test), content)


MODEL_FLAGS = (
    "downsample", "width", "blocks", "norm", "quantizer", "n_codes", "embedding_dim", "fsq_levels", "hu_min", "hu_max",
)  # fmt: skip


def load_model(folder: Path) -> tuple[VQGAN, dict]:
    """The exported model of a run: what `model/` holds. Used by predict_vqgan.py and --init-from."""
    saved = json.loads((folder / "config.json").read_text())
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in saved["config"].items()}
    flags["patch_size"] = tuple(16 * step for step in flags["downsample"])
    flags["tile_size"] = 16 * max(flags["downsample"])
    model = VQGAN(Config(**flags))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), saved


def starting_weights(model: VQGAN, config: Config) -> None:
    """--init-from: the weights and the codebook of a finished run."""
    try:
        other, _ = load_model(config.init_from)
        model.load_state_dict(other.state_dict())
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--init-from {config.init_from} does not fit: give a model/ folder, same model flags. {reason}"
        ) from None


def start_codebook(model: VQGAN, dataset: Patches, sampler: data.StepSampler, accelerator) -> None:
    """The codes begin as the cluster centres of the first step's latents, the same on any number of processes."""
    latents = []
    with torch.no_grad():
        for part in sampler.micro_batches(0)[accelerator.process_index :: accelerator.num_processes]:
            volumes = torch.stack([dataset[0, int(index)]["volume"] for index in part])
            latents.append(model.encoder(volumes.to(accelerator.device)))
    model.quantizer.start(accelerator, latents, seed=dataset.config.seed)


def gan_schedule(config: Config, total_steps: int) -> GanSchedule:
    start = config.discriminator_iter_start
    start = min(10_000, int(0.4 * total_steps)) if start is None else start
    if not config.adversarial or start < 0:
        return GanSchedule(None)
    rest = {"warmup": config.discriminator_warmup, "ramp": config.gan_ramp}
    rest = {name: start // 10 if value is None else value for name, value in rest.items()}
    return GanSchedule(start, **rest, tolerance=config.gan_psnr_tolerance)


def try_batch(config: Config, device: torch.device, perceptual: nn.Module | None, dataset: Patches, count: int) -> None:
    """All forward and backward passes on `count` patches: what --find-batch-size asks whether it fits."""
    model, disc = VQGAN(config).to(device), Discriminators(config).to(device)
    batch = send_to_device(torch.utils.data.default_collate([dataset[0, 0]] * count), device)
    output = model(batch["volume"], batch["picks"])
    terms = reconstruction_terms(output, batch, perceptual)
    if config.adversarial:
        terms |= generator_terms(disc, output, batch, config) | discriminator_terms(disc, output, batch, {})[0]
    sum(term.sum() for term in terms.values()).backward()


def last_gradient(loss: Tensor, model: VQGAN, scaler) -> Tensor:
    """Of a loss on the decoder's last layer, without the fp16 scale that keeps it from vanishing on its way."""
    scale = scaler.get_scale() if scaler else 1.0
    (gradient,) = torch.autograd.grad(loss * scale, model.decoder[-1].weight, retain_graph=True)
    return gradient.float() / scale


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    accelerator = launch.start(config)
    if config.sync_batchnorm and accelerator.device.type == "cpu":
        raise UserError("--sync-batchnorm needs GPUs; on a CPU leave it out.")
    parts = prepare_data(config, accelerator)
    perceptual = None
    if config.perceptual_weight:
        with accelerator.local_main_process_first():  # it alone downloads the weights
            perceptual = SlicePerceptual(config.perceptual).to(accelerator.device)
    if config.find_batch_size:
        attempt = partial(try_batch, config, accelerator.device, perceptual, parts.train)
        training.find_batch_size(accelerator, config, attempt)
    sampler = data.StepSampler(len(parts.train), config, accelerator)
    schedule = gan_schedule(config, sampler.total_steps)
    schedule.check(sampler.total_steps)
    folder = RunFolder(
        config, accelerator, {"samples per step": sampler.size_of_step, "seed": config.seed, "training data": parts.hash}
    )
    if folder.finished(sampler.total_steps):
        logger.info("%s has reached its end already: nothing to do", config.output_dir)
        accelerator.end_training()
        return
    folder.describe()

    torch.manual_seed(config.seed)  # the same weights on every rank
    model = VQGAN(config).to(memory_format=torch.channels_last_3d)
    disc = Discriminators(config)
    if config.init_from:
        starting_weights(model, config)
    sizes = [f"{sum(p.numel() for p in network.parameters()):,}" for network in (model, disc)]
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # accelerate does not
    # One optimizer holds both networks, each with its own rate: Adam knows no others than a parameter's own numbers, and two
    # optimizers on one fp16 scale spoil it, since the first one's step changes the scale of the second one's gradients.
    optimizer = torch.optim.Adam(
        [
            {"params": [p for p in model.parameters() if p.requires_grad], "scale": 1.0},
            {"params": list(disc.parameters()), "scale": config.disc_lr / config.lr},
        ],
        lr=config.lr, betas=(0.5, 0.9), eps=1e-6 if accelerator.mixed_precision == "fp16" else 1e-8, fused=True,
    )  # fmt: skip
    model, disc, optimizer = accelerator.prepare(model, disc, optimizer)
    training.own_buffers(model)
    raw, raw_disc = accelerator.unwrap_model(model), accelerator.unwrap_model(disc)
    ema = training.EMA(raw, config.ema_decay)
    if config.compile:
        for network in (raw.encoder, raw.decoder, raw_disc):
            network.compile()  # in place: names of weights stay
    guard = training.FiniteGuard(raw, config.max_skipped_steps, accelerator.scaler)
    stopper = training.EarlyStopping([training.Rule("val/psnr", "max")], config.early_stop_patience)
    watch = training.TermWatch()
    adaptive = AdaptiveWeight() if config.adaptive_weight else None
    lecam = {name: LeCAM() for name in ("image", "video") if config.lecam_weight}
    modules, optimizers = {"model": raw, "ema": ema.module, "disc": raw_disc}, {"optimizer": optimizer}
    stateful = {"guard": guard, "stopper": stopper, "schedule": schedule, **lecam}
    if adaptive:
        stateful["adaptive"] = adaptive

    state = {"step": 0, "evaluated": 0, "ended": False, "perplexity": 0.0}
    if found := folder.resume(modules, optimizers):
        state = found
        for name, part in stateful.items():
            part.load_state_dict(state[name])
    elif not config.init_from:
        start_codebook(raw, parts.train, sampler, accelerator)
        guard.remember()  # else a first step that is skipped would bring back the codes of before
        ema.module.load_state_dict(raw.state_dict())
    step = sampler.start = state["step"]
    saved = (step, state["evaluated"])
    log = RunLog(config, accelerator, project="vqgan", step=step, total_steps=sampler.total_steps, unit="patches")
    coder = Coder(ema.module, config.hu_min, config.hu_max, config.tile_size, accelerator.device)
    logger.info(
        "%d processes x batch %d x accumulation %d = %d patches per step, %d steps per epoch, %d in all; autoencoder %s,"
        " discriminators %s parameters",
        accelerator.num_processes, config.batch_size, config.accumulation_steps, sampler.size_of_step,
        sampler.steps_per_epoch, sampler.total_steps, *sizes,
    )  # fmt: skip
    logger.info(
        "%d codes, one for %s voxels: %.3f bits per voxel, %.0f times less than int16; tiles %s",
        raw.quantizer.count, "x".join(map(str, config.downsample)), raw.bits_per_voxel, 16 / raw.bits_per_voxel,
        f"see {coder.halo_in} and {coder.halo_out} cells around them and leave no seam"
        if coder.exact
        else "differ from the whole volume, as --norm group looks at all of it",
    )  # fmt: skip

    def eval_loader(scans: Scans, batches: int | None = None) -> torch.utils.data.DataLoader:
        return data.make_loader(scans, data.EvalSampler(len(scans), 1, accelerator, batches=batches), config)

    def export() -> None:
        flags = {name: getattr(config, name) for name in MODEL_FLAGS}
        folder.export(ema.module, {"config": flags, "step": step})

    val_loader = eval_loader(parts.val)
    evaluate(coder, eval_loader(parts.val, batches=2), accelerator, config, full=True)  # what does not fit surfaces now
    steps = data.StepLoader(data.make_loader(parts.train, sampler, config), accelerator)
    eval_every = config.eval_every or sampler.steps_per_epoch
    save_every = config.save_every or sampler.steps_per_epoch
    stopping = False
    parameters, disc_parameters = list(raw.parameters()), list(raw_disc.parameters())

    while True:
        # ---- once in a while: evaluate, save, stop
        epoch = (step - 1) // sampler.steps_per_epoch
        last = step == sampler.total_steps
        better, score = False, None
        if step > state["evaluated"] and (step % eval_every == 0 or last) and not stopping:
            ema.share_buffers()
            values, _ = evaluate(coder, val_loader, accelerator, config)
            log.evaluation(step, epoch, {f"val/{name}": value for name, value in values.items()})
            logger.info(
                "Validation: PSNR=%.2f dB, RMSE %.1f HU, SSIM=%.4f, %.0f%% of the codes used",
                values["psnr"], values["hu_rmse"], values["ssim"], 100 * values["codes_used"],
            )  # fmt: skip
            if values["code_perplexity"] < 0.5 * state["perplexity"]:
                logger.warning(
                    "The codebook is collapsing: a perplexity of %.0f after %.0f; raise --restart-below, lower --lr or"
                    " --n-codes, or use --quantizer fsq",
                    values["code_perplexity"], state["perplexity"],
                )  # fmt: skip
            state["perplexity"] = max(state["perplexity"], values["code_perplexity"])
            schedule.update(step, values["psnr"])
            better, state["ended"] = stopper.update(accelerator, {"val/psnr": values["psnr"]})
            score = values["psnr"]
            state["evaluated"] = step
            if better:
                export()
                if accelerator.is_main_process:
                    log.image("validation", draw(coder, parts.val, range(3), config, accelerator, "validation"), step)
            stopping = training.agree_to_stop(accelerator)
        due = step % save_every == 0 or last or stopping or better or state["ended"] or folder.wants(state, score)
        if due and saved != (step, state["evaluated"]):
            saved = (step, state["evaluated"])
            logger.info("Saving checkpoint at step %d.", step)
            log.sync()
            state |= {"step": step, **{name: part.state_dict() for name, part in stateful.items()}}
            folder.save(state, modules, optimizers, score=score, best=better)
            log.resume_clock(step, steps.waited)
        if stopping or last or state["ended"]:
            break

        # ---- one optimizer step of both networks
        if step % sampler.steps_per_epoch == 0:
            logger.info("Starting training epoch %d.", step // sampler.steps_per_epoch)
        training.set_lr(optimizer, config.lr * training.cosine(step, sampler.total_steps, warmup=config.warmup_steps))
        gan, judging = schedule.generator_weight(step), schedule.trains_discriminator(step)
        batches = next(steps)
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            training.seed_step(config.seed, step, micro, accelerator.process_index)
            with accelerator.accumulate(model, disc):  # one for both: each call counts a micro-batch
                output = model(batch["volume"], batch["picks"])
                with accelerator.autocast():  # for the networks in them; the losses themselves are in float32
                    terms = share(reconstruction_terms(output, batch, perceptual), sampler)
                loss = weighted(terms, config)
                if gan:
                    raw_disc.requires_grad_(False)  # it judges here and learns below; not through DDP, nor its gradients
                    with accelerator.autocast():
                        added = share(generator_terms(raw_disc, output, batch, config), sampler)
                    factor = gan
                    if adaptive:
                        factor *= adaptive.value
                        pulls = (loss, weighted(added, config))
                        adaptive.add(*(last_gradient(pull, raw, accelerator.scaler) for pull in pulls))
                    loss = loss + factor * weighted(added, config)
                    terms |= added
                accelerator.backward(loss * sampler.parts)  # undoes DDP's mean and the division by accumulation
                raw_disc.requires_grad_(True)
                terms["loss"] = loss
                if judging:
                    judged, answers = (share(part, sampler) for part in discriminator_terms(disc, output, batch, lecam))
                    disc_loss = sum(v * (config.lecam_weight if "lecam" in name else 1) for name, v in judged.items())
                    accelerator.backward(disc_loss * sampler.parts)
                    terms |= judged | answers
            training.add(totals, terms)
        accelerator.unscale_gradients()  # of both networks, once
        norm = nn.utils.clip_grad_norm_(parameters, config.clip)
        disc_norm = nn.utils.clip_grad_norm_(disc_parameters, config.clip) if judging else torch.zeros_like(norm)
        totals["disc_grad_norm"] = disc_norm / accelerator.num_processes
        verdict = training.agree(accelerator, totals, norm)
        if not verdict.finite:
            raw.quantizer.discard()
        elif not raw.frozen:
            raw.quantizer.update(accelerator)  # before the guard remembers the buffers
        finite = guard.passes(verdict, step + 1)
        if finite or accelerator.scaler:  # the fp16 scaler skips by itself, and must see the step to lower its scale
            optimizer.step()
        if finite:
            ema.update(step)
            watch.update({name: value for name, value in verdict.terms.items() if name.endswith(LOSSES)})
            for name, part in lecam.items():
                if judging:
                    part.update(verdict.terms[f"{name}_real"], verdict.terms[f"{name}_fake"])
        if adaptive:
            adaptive.update(accelerator)
        optimizer.optimizer.zero_grad()  # accelerate's own inspects its signature in every step, 0.1 ms
        step += 1
        stopping = verdict.stop
        if step % config.log_every == 0 or step == sampler.total_steps:
            values = {
                **verdict.terms,
                "grad_norm": verdict.grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "gan_factor": gan * (adaptive.value if adaptive else 1.0),
                "skipped": guard.total,
            }
            log.train(step, (step - 1) // sampler.steps_per_epoch, values, samples=sampler.size_of_step, waited=steps.waited)
        if step % sampler.steps_per_epoch == 0:
            for network in (raw, raw_disc):
                training.check_replicas(accelerator, network, f"after step {step}")

    if stopping and not last:
        logger.info("Stopped by a signal at step %d; continue with --resume-from auto", step)
        log.close()
        return

    logger.info("Training process completed. Starting testing phase.")
    ema.module.load_state_dict(folder.exported())
    if len(parts.test):
        values, table = evaluate(coder, eval_loader(parts.test), accelerator, config, full=True)
        log.evaluation(step, epoch, {f"test/{name}": value for name, value in values.items()})
        logger.info(
            "[CT] test: PSNR=%.2f dB, RMSE %.1f HU, SSIM=%.4f at %.3f bits per voxel (resize to as many: %.2f, %.1f, %.4f);"
            " %.0f%% of the codes used",
            values["psnr"], values["hu_rmse"], values["ssim"], raw.bits_per_voxel,
            *(values[f"resize_{name}"] for name in ("psnr", "hu_rmse", "ssim")), 100 * values["codes_used"],
        )  # fmt: skip
        if accelerator.is_main_process:  # no collective from here on: the others may leave
            names = [scan.path.relative_to(config.dataset_path).as_posix() for scan in parts.test.scans]
            write_csv(config.output_dir / "test.csv", names, table)
            order = np.argsort(-table["psnr"], kind="stable")
            chosen = dict.fromkeys([order[0], order[len(order) // 2], order[-1]])  # best, median and worst
            log.image("test", draw(coder, parts.test, chosen, config, accelerator, "test"), step)
            text = summary({"test": table}, raw.bits_per_voxel)
            (config.output_dir / "report.txt").write_text(text + "\n")
            logger.info("Testing phase completed, see %s and its samples:\n%s", config.output_dir / "report.txt", text)
    folder.finish(step, sampler.total_steps)
    log.close()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
