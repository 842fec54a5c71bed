"""Restore underwater images with a trained student: files and folders in, images of the same size out.

    python scripts/predict_student.py --model runs/student-demo/model --inputs photos dive.jpg --output-dir restored

With --targets also restored/metrics.csv, a row per image. Several GPUs: `accelerate launch` in front, as for training.
"""

import copy
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import UserError, parse_only, sentences


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
from accelerate.utils import InitProcessGroupKwargs, gather_object, str_to_bool
from torch import Tensor, nn
from tqdm import tqdm

from common import data, launch, metrics
from common.images import SIXTEEN_BIT, SUFFIXES, find_images, read_image, write_image
from common.logs import setup_logging
from common.restoration_report import write_csv
from common.underwater import some
from scripts import train_student as job

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


@dataclass(frozen=True)
class Task:
    """One image on its way."""

    name: str  # below its --inputs, without suffix
    source: Path
    output: Path
    side: Path | None
    reference: Path | None


def plan(config: Config) -> list[Task]:
    """Every image with the files that it becomes; whatever would overwrite something is refused here."""
    found: dict[tuple[Path, Path], None] = {}  # source and relative path; a file given twice counts once
    for path in config.inputs:
        folder = path if path.is_dir() else path.parent
        if config.output_dir.resolve() == folder.resolve():
            raise UserError(f"--output-dir {config.output_dir} is where --inputs {path} are: choose another folder.")
        if path.is_dir():
            if config.output_dir.resolve().is_relative_to(path.resolve()):
                raise UserError(
                    f"--output-dir {config.output_dir} lies in --inputs {path}, where outputs would be taken for inputs the"
                    " next time: choose a folder outside."
                )
            files = find_images(path)
            if not files:
                raise UserError(f"--inputs {path} holds no images ({' '.join(SUFFIXES)}).")
            found |= {(file, file.relative_to(path)): None for file in files}
        elif not path.exists():
            raise UserError(f"--inputs {path} does not exist.")
        elif path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--inputs {path} is none of {' '.join(SUFFIXES)}: convert it, or leave it out.")
        else:
            found[path, Path(path.name)] = None
    references = find_references(config.targets) if config.targets else {}
    tasks = []
    for source, relative in found:
        output = config.output_dir / (relative.with_suffix(f".{config.suffix}") if config.suffix else relative)
        side = output.with_name(f"{output.stem}_side.png") if config.side_by_side else None
        name = relative.with_suffix("").as_posix()
        tasks.append(Task(name, source, output, side, references.get(name)))
    refuse_overwriting(tasks, references.values())
    if config.targets:
        report_partners(config.targets, tasks, references)
    return tasks


def find_references(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"--targets {folder} is not a folder; check the path.")
    references: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if references.setdefault(name, path) is not path:
            raise UserError(f"--targets: {references[name]} and {path} have one name; keep one of them.")
    return references


def refuse_overwriting(tasks: Sequence[Task], references: Sequence[Path]) -> None:
    originals = {path.resolve() for path in [*(task.source for task in tasks), *references]}
    owner: dict[Path, Path] = {}
    for task in tasks:
        for path in filter(None, (task.output, task.side)):
            if path.resolve() in originals:
                raise UserError(f"{path} is one of --inputs or --targets and would be overwritten: change --output-dir.")
            if path in owner:
                raise UserError(
                    f"{owner[path]} and {task.source} would both be written to {path}: give each its own --output-dir, or"
                    " rename one."
                )
            owner[path] = task.source


def report_partners(folder: Path, tasks: Sequence[Task], references: dict[str, Path]) -> None:
    alone = [task.name for task in tasks if not task.reference]
    unused = sorted(references.keys() - {task.name for task in tasks})
    if len(alone) == len(tasks):
        raise UserError(
            f"--targets {folder}: no reference has the name of an input (inputs {some(alone, 3)}; references"
            f" {some(unused, 3) or 'none'}). Below both folders the paths must be alike; only the suffix may differ."
        )
    if alone:
        logger.info("%d inputs have no reference and are not measured: %s", len(alone), some(alone))
    if unused:
        logger.info("%d references belong to no input: %s", len(unused), some(unused))


# ---------------------------------------------------------------------------------------------------------------------
# Reading, restoring, writing

READERS, WRITERS = 2, 4  # threads, each with one image: a PNG of 1080 lines takes 0.14 s to read and 0.8 to write


def load(path: Path) -> tuple[Tensor, np.dtype]:
    pixels = read_image(path)
    return job.to_tensor(pixels)[None], pixels.dtype


def in_order(pool: ThreadPoolExecutor, tasks: dict[int, Task]) -> Iterator[tuple[int, Task, Future, Future | None]]:
    """Each task with its image and reference, which threads read while the network works on the images before."""
    pending: deque = deque()
    for index, task in tasks.items():
        image = pool.submit(load, task.source)
        pending.append((index, task, image, pool.submit(load, task.reference) if task.reference else None))
        if len(pending) > READERS:
            yield pending.popleft()
    yield from pending


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


@torch.no_grad()
def restore_all(
    model: nn.Module, tasks: dict[int, Task], config: Config, accelerator: Accelerator
) -> tuple[list[dict[str, Tensor]], list[tuple[int, str]]]:
    """The metrics of what has a reference, and a sentence for what could not be done."""
    rows, failures = [], []
    writing: deque[Future] = deque()
    bar = tqdm(total=len(tasks), unit="images", disable=None if accelerator.is_main_process else True)
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers, bar:
        for index, task, loaded, reference in in_order(readers, tasks):
            try:
                image, dtype = loaded.result()
                image = image.to(accelerator.device)
                result = restored(model, image, task, config, accelerator)
                if task.output.suffix.lower() not in SIXTEEN_BIT:
                    dtype = np.dtype(np.uint8)
                writing.append(writers.submit(write_image, task.output, to_pixels(result, dtype), task.source))
                if task.side:
                    both = to_pixels(torch.cat([image, result], 3), np.dtype(np.uint8))
                    writing.append(writers.submit(write_image, task.side, both))
                if reference:
                    target = reference.result()[0].to(accelerator.device)
                    rows.append({"id": torch.tensor([index]), **measure(task, image, result, target)})
            except UserError as error:
                logger.warning("%s", error)
                failures.append((index, str(error)))
            while len(writing) > WRITERS:
                writing.popleft().result()
            bar.update()
        for future in writing:
            future.result()
    return rows, failures


# ---------------------------------------------------------------------------------------------------------------------
# ONNX

PARITY = 1e-3  # a quarter of an 8-bit level; measured: 1e-6


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
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs `pip install {' '.join(missing)}`.")
    import onnxruntime

    whole = Whole(model).eval()
    sizes = {2: torch.export.Dim("height", min=16, max=2**15), 3: torch.export.Dim("width", min=16, max=2**15)}
    example = torch.rand(1, 3, 71, 101, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        whole, (example,), dynamo=True, dynamic_shapes={"image": sizes}, input_names=["image"], output_names=["restored"],
        verbose=False,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.onnx")
    program.save(partial)
    session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
    worst = 0.0
    for height, width in ((96, 160), (203, 150)):
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = whole(image).numpy()
        worst = max(worst, float(np.abs(session.run(None, {"image": image.numpy()})[0] - expected).max()))
    if not worst <= PARITY:
        partial.unlink()
        raise UserError(f"--onnx: the export differs from PyTorch by {worst:.2g}, so it was removed; try other versions.")
    os.replace(partial, path)
    logger.info("%s: at most %.1e from PyTorch on images of 160 x 96 and 150 x 203", path, worst)


# ---------------------------------------------------------------------------------------------------------------------
# Main


def start(precision: str | None) -> Accelerator:
    on_cpu = not torch.accelerator.is_available() or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "no"))
    launch.check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 0 if on_cpu else torch.accelerator.device_count())
    if on_cpu and (precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        if precision:
            raise UserError("--mixed-precision fp16 needs a GPU; on a CPU leave the flag out or use bf16.")
        precision = "no"
    torch.set_float32_matmul_precision("high")  # as in training, so that test metrics repeat
    # The only collectives stand at the end: a process waits for another's last and perhaps very large image.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[patience])


def main(config: Config) -> None:
    setup_logging()
    for name in ("config.json", "model.safetensors"):
        if not (config.model / name).exists():
            raise UserError(f"--model {config.model} holds no {name}: give the model/ folder of a run.")
    tasks = plan(config) if config.inputs else []
    accelerator = start(config.mixed_precision)
    model, _ = job.load_model(config.model)
    if config.onnx and accelerator.is_main_process:
        export_onnx(model, config.onnx)
    model.to(accelerator.device, memory_format=torch.channels_last)
    accelerator.wait_for_everyone()  # all have looked for their inputs before the first output is written
    order = sorted(range(len(tasks)), key=lambda index: -tasks[index].source.stat().st_size)  # none is alone at the end
    mine = {index: tasks[index] for index in order[accelerator.process_index :: accelerator.num_processes]}
    rows, failures = restore_all(model, mine, config, accelerator)

    failures = sorted(gather_object(failures))
    failed = {index for index, _ in failures}
    measured = sum(task.reference is not None and index not in failed for index, task in enumerate(tasks))
    if measured:
        table = data.gather_samples(accelerator, rows, measured)
        if accelerator.is_main_process:
            write_csv(config.output_dir / "metrics.csv", [task.name for task in tasks], table)
            means = {name: float(values.mean()) for name, values in table.items()}
            job.announce("inputs", means, "paper")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(tasks)} images could not be restored or measured:"
            f" {some(tasks[index].source for index in sorted(failed))}; the warnings above say why."
        )
    if tasks and accelerator.is_main_process:
        logger.info("%d images restored: %s", len(tasks), config.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
