"""Find camouflaged objects with a trained segmenter: files and folders in, maps of the same size out.

    python scripts/predict_ultimate.py --model runs/ultimate-demo/model --inputs photos moth.jpg --output-dir maps --overlay

With --masks also maps/metrics.csv, a row per image. Several GPUs: `accelerate launch` in front, as for training.
"""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import UserError, parse_only, sentences, some


@dataclass
class Config:
    """Find camouflaged objects with a trained segmenter, or export it."""

    model: Path
    """The model/ folder of a run."""
    inputs: tuple[Path, ...] = ()
    """Images, and folders of them; sub-folders are kept."""
    output_dir: Path = Path("maps")
    """Where the maps go: PNG, 8-bit grey, 255 where an object is certain."""
    masks: Path | None = None
    """References with the inputs' relative names, whatever their suffix: the benchmark's metrics go to metrics.csv."""
    overlay: bool = False
    """Also write <name>_overlay.jpg, the image with the object tinted and outlined."""
    binary: bool = False
    """Also write <name>_mask.png, 255 in the object and 0 elsewhere."""
    threshold: float | None = None
    """Probability from which on --overlay and --binary see the object; unset: the one found on validation images."""
    flip: bool = False
    """Average with the answer to the mirrored image."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on the model's image size; the answers are averaged."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Overrides the accelerate YAML."""
    onnx: Path | None = None
    """Export the network to this file, for one image of the model's size at a time, and compare it with PyTorch."""

    def __post_init__(self) -> None:
        if not self.inputs and not self.onnx:
            raise ValueError("--inputs is missing: give images or folders, or --onnx to export the network.")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"--threshold {self.threshold}: give a probability between 0 and 1.")
        if self.threshold is not None and not self.overlay and not self.binary:
            raise ValueError("--threshold changes no map, only what --overlay and --binary write: add one of them.")
        if not self.scales or not all(0.25 <= scale <= 4 for scale in self.scales):
            raise ValueError(f"--scales {' '.join(map(str, self.scales))}: give factors from 0.25 to 4, e.g. 0.75 1 1.25.")


if __name__ == "__main__":
    CONFIG = parse_only(Config)

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import predict
from common.camouflage import read_mask
from common.camouflage_report import line_of
from common.images import read_image, write_image
from common.logs import setup_logging
from common.metrics import to_uint8
from common.predict import Task
from common.restoration_report import write_csv
from common.segmentation_metrics import score, summarize
from scripts import train_ultimate as job

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


def plan(config: Config) -> list[Task]:
    def outputs(relative: Path) -> dict[str, Path]:
        output = config.output_dir / relative.with_suffix(".png")
        overlay = {"overlay": output.with_name(f"{output.stem}_overlay.jpg")} if config.overlay else {}
        binary = {"binary": output.with_name(f"{output.stem}_mask.png")} if config.binary else {}
        return {"map": output} | overlay | binary

    return predict.plan(config.inputs, config.output_dir, outputs, config.masks, "--masks")


# ---------------------------------------------------------------------------------------------------------------------
# Reading, segmenting, writing


def load(path: Path, sides: tuple[int, ...]) -> tuple[np.ndarray, list[Tensor]]:
    """The image in 8 bits, and what the network sees of it."""
    pixels = read_image(path)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return pixels, [job.to_tensor(job.resize(pixels, side)) for side in sides]


def probabilities(
    model: nn.Module, images: list[Tensor], size: tuple[int, int], task: Task, config: Config, accelerator: Accelerator
) -> Tensor:  # fmt: skip
    """(H, W), the mean over scales and both directions."""
    maps = []
    try:
        for image in images:
            views = torch.stack([image, image.flip(2)] if config.flip else [image]).to(accelerator.device)
            with accelerator.autocast():
                seen, _ = job.predict_maps(model, views, [size] * len(views))
            maps += [seen[0], *(mirrored.flip(1) for mirrored in seen[1:])]
        result = torch.stack(maps).mean(0)
    except torch.OutOfMemoryError:
        raise UserError(f"{task.source}: out of memory; take fewer --scales, or make the image smaller.") from None
    if not result.isfinite().all():
        raise UserError(f"{task.source} gave values that are not finite: try --mixed-precision no.")
    return result


RED = (255, 40, 40)


def write_overlay(path: Path, pixels: np.ndarray, mask: np.ndarray, like: Path) -> None:
    write_image(path, overlay(pixels, mask), like)


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object tinted, so that its texture is still seen, with an outline as thick as the picture is large."""
    picture = pixels.copy()
    picture[mask] = (0.65 * pixels[mask] + 0.35 * np.array(RED)).round()
    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture, outlines, -1, RED, max(1, round(min(mask.shape) / 200)))


def measure(task: Task, result: Tensor, mask: np.ndarray) -> dict[str, Tensor]:
    """The benchmark's metrics of the map as it is saved, and the object's share of the image."""
    target = torch.from_numpy(mask)
    if target.shape != result.shape:
        if target.shape == result.shape[::-1]:
            raise UserError(f"{task.reference} lies on its side, beside {task.source}: it cannot be measured.")
        result = job.upsample(result[None, None], target.shape)[0, 0]  # some benchmarks' masks are smaller than the images
    return {"area": target.double().mean()[None], **score(result.cpu()[None], target[None])}


def segment(
    model: nn.Module, config: Config, threshold: float, accelerator: Accelerator,
    task: Task, loaded: tuple[np.ndarray, list[Tensor]], reference: Future | None, later: Callable[..., None],
) -> dict[str, Tensor] | None:  # fmt: skip
    pixels, images = loaded
    result = probabilities(model, images, pixels.shape[:2], task, config, accelerator)
    levels = to_uint8(result).cpu().numpy()
    mask = levels >= threshold * 255
    later(write_image, task.outputs["map"], levels)
    if "overlay" in task.outputs:
        later(write_overlay, task.outputs["overlay"], pixels, mask, task.source)
    if "binary" in task.outputs:
        later(write_image, task.outputs["binary"], mask.astype(np.uint8) * 255)
    if reference:
        return measure(task, result, reference.result())
    return None


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


class Whole(nn.Module):
    """Without the choice of experts at run time, which a graph cannot make: all compute, those not chosen count nothing."""

    def __init__(self, model: job.Segmenter):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, dense=True)["maps"][0].sigmoid()


def export_onnx(model: job.Segmenter, side: int, path: Path) -> None:
    """The graph takes one image, (1, 3, side, side) in [0, 1], and gives (1, side, side)."""
    rng = torch.Generator().manual_seed(0)
    grains = (side, 4, 16, 64)  # of the example and of images from smooth to noisy, which are sent to different experts
    example, *images = (job.upsample(torch.rand(1, 3, grain, grain, generator=rng), (side, side)) for grain in grains)
    predict.export_onnx(path, Whole(model), example, images, lambda image: model(image)["maps"][0].sigmoid(), "probability")


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    setup_logging()
    predict.check_model(config.model)
    tasks = plan(config) if config.inputs else []
    accelerator = predict.start(config.mixed_precision)
    model, trained, saved = job.load_model(config.model)
    if config.onnx and accelerator.is_main_process:
        export_onnx(model, trained.img_size, config.onnx)
    model.to(accelerator.device, memory_format=torch.channels_last)
    threshold = saved["threshold"] if config.threshold is None else config.threshold
    sides = tuple(trained.img_size if scale == 1 else job.round_to(trained.img_size * scale) for scale in config.scales)
    work = partial(segment, model, config, threshold, accelerator)
    table, failed = predict.work_through(tasks, partial(load, sides=sides), partial(read_mask, size=None), work, accelerator)
    if table and accelerator.is_main_process:
        write_csv(config.output_dir / "metrics.csv", [task.name for task in tasks], table)
        logger.info("%d masks: %s", len(table["id"]), line_of(summarize(table)))
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} images could not be segmented or measured: {some(failed)}; the warnings above"
            " say why."
        )
    if tasks and accelerator.is_main_process:
        logger.info("%d maps, threshold %.3f: %s", len(tasks), threshold, config.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
