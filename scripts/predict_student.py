"""Restore underwater images with a trained student: files and folders in, images of the same size out.

    python scripts/predict_student.py --model runs/student-demo/model --inputs photos dive.jpg --output-dir restored

With --targets also restored/metrics.csv, a row per image. Several GPUs: `accelerate launch` in front, as for training.
"""

import copy
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
    """Restore images with a trained student, or export it."""

    model: Path
    """The model/ folder of a run."""
    inputs: tuple[Path, ...] = ()
    """Images, and folders of them; sub-folders are kept."""
    output_dir: Path = Path("restored")
    """Where the restored images go."""
    targets: Path | None = None
    """References with the inputs' relative names, whatever their suffix: PSNR and SSIM go to metrics.csv."""
    tile_size: int = 1536
    """Larger images are restored in overlapping tiles of this side."""
    tile_overlap: int = 64
    """Pixels that neighbouring tiles share at least; there one fades into the other."""
    side_by_side: bool = False
    """Also write <name>_side.png, input and output in one picture."""
    suffix: Literal["png", "jpg", "tif", "webp", "bmp"] | None = None
    """Format of the outputs; unset: that of each input. 16 bits stay 16 bits in png and tif."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Overrides the accelerate YAML."""
    onnx: Path | None = None
    """Export the network to this file, for whole images of any size from 16 x 16 on, and compare it with PyTorch."""

    def __post_init__(self) -> None:
        if not self.inputs and not self.onnx:
            raise ValueError("--inputs is missing: give images or folders, or --onnx to export the network.")
        if self.tile_size < 128 or self.tile_size % 8:
            raise ValueError(f"--tile-size {self.tile_size}: give a multiple of 8 from 128 on.")
        if not 8 <= self.tile_overlap <= self.tile_size // 2:
            raise ValueError(f"--tile-overlap {self.tile_overlap}: give 8 to {self.tile_size // 2}, half a tile.")


if __name__ == "__main__":
    CONFIG = parse_only(Config)

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import metrics, predict
from common.images import SIXTEEN_BIT, read_image, write_image
from common.logs import setup_logging
from common.predict import Task
from common.restoration_report import write_csv
from scripts import train_student as job

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


def plan(config: Config) -> list[Task]:
    def outputs(relative: Path) -> dict[str, Path]:
        output = config.output_dir / (relative.with_suffix(f".{config.suffix}") if config.suffix else relative)
        side = {"side": output.with_name(f"{output.stem}_side.png")} if config.side_by_side else {}
        return {"restored": output} | side

    return predict.plan(config.inputs, config.output_dir, outputs, config.targets, "--targets")


# ---------------------------------------------------------------------------------------------------------------------
# Reading, restoring, writing


def load(path: Path) -> tuple[Tensor, np.dtype]:
    pixels = read_image(path)
    return job.to_tensor(pixels)[None], pixels.dtype


def restored(model: nn.Module, image: Tensor, task: Task, config: Config, accelerator: Accelerator) -> Tensor:
    try:
        with accelerator.autocast():
            result = job.restore(model, image, config.tile_size, config.tile_overlap).float()
    except torch.OutOfMemoryError:
        raise UserError(f"{task.source}: out of memory with --tile-size {config.tile_size}; halve it.") from None
    if not result.isfinite().all():
        raise UserError(f"{task.source} gave values that are not finite: try --mixed-precision no.")
    return result.clamp(0, 1)


def to_pixels(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] to (H, W, 3)."""
    levels = (image[0] * np.iinfo(dtype).max).round()
    return levels.permute(1, 2, 0).contiguous().cpu().numpy().astype(dtype)


def measure(task: Task, image: Tensor, result: Tensor, target: Tensor) -> dict[str, Tensor]:
    """PSNR and SSIM of the output and, as input_psnr and so on, of doing nothing."""
    if target.shape != image.shape:
        sizes = f"{target.shape[3]} x {target.shape[2]}, not {image.shape[3]} x {image.shape[2]}"
        raise UserError(f"{task.reference} is {sizes} as {task.source}: it cannot be measured.")
    if min(image.shape[2:]) < 11:
        raise UserError(f"{task.source} is too small for SSIM, which looks at 11 x 11 pixels: it cannot be measured.")
    pairs = {"": result, "input_": image}
    return {prefix + name: v.double() for prefix, x in pairs.items() for name, v in metrics.fidelity(x, target).items()}


def restore(
    model: nn.Module, config: Config, accelerator: Accelerator, task: Task, loaded: tuple[Tensor, np.dtype],
    reference: Future | None, later: Callable[..., None],
) -> dict[str, Tensor] | None:  # fmt: skip
    image, dtype = loaded
    image = image.to(accelerator.device)
    result = restored(model, image, task, config, accelerator)
    output = task.outputs["restored"]
    if output.suffix.lower() not in SIXTEEN_BIT:
        dtype = np.dtype(np.uint8)
    later(write_image, output, to_pixels(result, dtype), task.source)
    if "side" in task.outputs:
        later(write_image, task.outputs["side"], to_pixels(torch.cat([image, result], 3), np.dtype(np.uint8)))
    if reference:
        return measure(task, image, result, reference.result()[0].to(accelerator.device))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


class Whole(nn.Module):
    def __init__(self, model: job.Student):
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if isinstance(module, job.Attention):
                module.chunk = 0  # the number of chunks would be fixed by the example's size

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)[0].clamp(0, 1)


def export_onnx(model: job.Student, path: Path) -> None:
    """The graph takes one image, (1, 3, H, W) in [0, 1], whole. Attention takes memory with the square of its
    area: 1.5 GB at 512 x 512 and 7 GB at 768 x 768 in onnxruntime on a CPU, with the default model."""
    whole = Whole(model)
    sizes = {2: torch.export.Dim("height", min=16, max=2**15), 3: torch.export.Dim("width", min=16, max=2**15)}
    example, *images = (
        torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        for height, width in ((71, 101), (96, 160), (203, 150))
    )
    predict.export_onnx(path, whole, example, images, whole, "restored", sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    setup_logging()
    predict.check_model(config.model)
    tasks = plan(config) if config.inputs else []
    accelerator = predict.start(config.mixed_precision)
    model, _ = job.load_model(config.model)
    if config.onnx and accelerator.is_main_process:
        export_onnx(model, config.onnx)
    model.to(accelerator.device, memory_format=torch.channels_last)
    work = partial(restore, model, config, accelerator)
    table, failed = predict.work_through(tasks, load, load, work, accelerator)
    if table and accelerator.is_main_process:
        write_csv(config.output_dir / "metrics.csv", [task.name for task in tasks], table)
        job.announce("inputs", {name: float(values.mean()) for name, values in table.items()}, "paper")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(tasks)} images could not be restored or measured: {some(failed)}; the warnings above say"
            " why."
        )
    if tasks and accelerator.is_main_process:
        logger.info("%d images restored: %s", len(tasks), config.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
