"""What predict scripts share: which file becomes which, who does which, threads that read and write, and the ONNX export."""

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from common import data, launch
from common.cli import UserError, some
from common.images import SUFFIXES, find_images

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


@dataclass(frozen=True)
class Task:
    """One image on its way."""

    name: str  # below its --inputs, without suffix
    source: Path
    outputs: dict[str, Path]
    reference: Path | None


def check_model(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise UserError(f"--model {folder} holds no {name}: give the model/ folder of a run.")


def plan(
    inputs: Sequence[Path], output_dir: Path, outputs: Callable[[Path], dict[str, Path]], references: Path | None, flag: str
) -> list[Task]:
    """Every image with the files that its path below --inputs becomes, and what the folder of references, given with `flag`,
    has of that name; whatever would overwrite something is refused here."""
    found: dict[tuple[Path, Path], None] = {}  # source and relative path; a file given twice counts once
    for path in inputs:
        folder = path if path.is_dir() else path.parent
        if output_dir.resolve() == folder.resolve():
            raise UserError(f"--output-dir {output_dir} is where --inputs {path} are: choose another folder.")
        if path.is_dir():
            if output_dir.resolve().is_relative_to(path.resolve()):
                raise UserError(
                    f"--output-dir {output_dir} lies in --inputs {path}, where outputs would be taken for inputs the next"
                    " time: choose a folder outside."
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
    partners = _find_references(references, flag) if references else {}
    tasks = []
    for source, relative in found:
        name = relative.with_suffix("").as_posix()
        tasks.append(Task(name, source, outputs(relative), partners.get(name)))
    _refuse_overwriting(tasks, partners.values(), flag)
    if references:
        _report_partners(references, flag, tasks, partners)
    return tasks


def _find_references(folder: Path, flag: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder; check the path.")
    references: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if references.setdefault(name, path) is not path:
            raise UserError(f"{flag}: {references[name]} and {path} have one name; keep one of them.")
    return references


def _refuse_overwriting(tasks: Sequence[Task], references: Collection[Path], flag: str) -> None:
    originals = {path.resolve() for path in [*(task.source for task in tasks), *references]}
    owner: dict[Path, Path] = {}
    for task in tasks:
        for path in task.outputs.values():
            if path.resolve() in originals:
                raise UserError(f"{path} is one of --inputs or {flag} and would be overwritten: change --output-dir.")
            if path in owner:
                raise UserError(
                    f"{owner[path]} and {task.source} would both be written to {path}: give each its own --output-dir, or"
                    " rename one."
                )
            owner[path] = task.source


def _report_partners(folder: Path, flag: str, tasks: Sequence[Task], references: dict[str, Path]) -> None:
    alone = [task.name for task in tasks if not task.reference]
    unused = sorted(references.keys() - {task.name for task in tasks})
    if len(alone) == len(tasks):
        raise UserError(
            f"{flag} {folder}: no reference has the name of an input (inputs {some(alone, 3)}; references"
            f" {some(unused, 3) or 'none'}). Below both folders the paths must be alike; only the suffix may differ."
        )
    if alone:
        logger.info("%d inputs have no reference and are not measured: %s", len(alone), some(alone))
    if unused:
        logger.info("%d references belong to no input: %s", len(unused), some(unused))


# ---------------------------------------------------------------------------------------------------------------------
# Doing it

READERS, WRITERS = 2, 4  # threads, each with one image: a PNG of 1080 lines takes 0.14 s to read and 0.8 to write

Read = Callable[[Path], Any]
# (task, its image as read, its reference being read, call a function with these arguments in a thread) -> its metrics
Work = Callable[[Task, Any, Future | None, Callable[..., None]], dict[str, Tensor] | None]


def start(precision: str | None) -> Accelerator:
    on_cpu, precision = launch.choose_device(precision)  # as in training, so that test metrics repeat
    # The only collectives stand at the end: a process waits for another's last and perhaps very large image.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[patience])


def work_through(
    tasks: Sequence[Task], read: Read, read_reference: Read, work: Work, accelerator: Accelerator
) -> tuple[dict[str, np.ndarray] | None, list[Path]]:
    """Deals the tasks to the processes. The metrics of what has a reference, and the images for which something failed: each
    was named in a warning, and the others are done."""
    accelerator.wait_for_everyone()  # all have looked for their inputs before the first output is written
    order = sorted(range(len(tasks)), key=lambda index: -tasks[index].source.stat().st_size)  # none is alone at the end
    mine = {index: tasks[index] for index in order[accelerator.process_index :: accelerator.num_processes]}
    rows, failed = _do(mine, read, read_reference, work, accelerator)
    failed = set(gather_object(failed))
    measured = sum(task.reference is not None and index not in failed for index, task in enumerate(tasks))
    table = data.gather_samples(accelerator, rows, measured) if measured else None
    return table, [tasks[index].source for index in sorted(failed)]


@torch.no_grad()
def _do(
    tasks: dict[int, Task], read: Read, read_reference: Read, work: Work, accelerator: Accelerator
) -> tuple[list[dict[str, Tensor]], list[int]]:
    rows, failed = [], []
    writing: deque[Future] = deque()
    bar = tqdm(total=len(tasks), unit="images", disable=None if accelerator.is_main_process else True)
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers, bar:
        for index, task, loaded, reference in _in_order(readers, tasks, read, read_reference):
            try:
                row = work(task, loaded.result(), reference, lambda *call: writing.append(writers.submit(*call)))
                if row is not None:
                    rows.append({"id": torch.tensor([index]), **row})
            except UserError as error:
                logger.warning("%s", error)
                failed.append(index)
            while len(writing) > WRITERS:
                writing.popleft().result()
            bar.update()
        for future in writing:
            future.result()
    return rows, failed


def _in_order(
    pool: ThreadPoolExecutor, tasks: dict[int, Task], read: Read, read_reference: Read
) -> Iterator[tuple[int, Task, Future, Future | None]]:
    """Each task with its image and reference, which threads read while the network works on the images before."""
    pending: deque = deque()
    for index, task in tasks.items():
        image = pool.submit(read, task.source)
        pending.append((index, task, image, pool.submit(read_reference, task.reference) if task.reference else None))
        if len(pending) > READERS:
            yield pending.popleft()
    yield from pending


# ---------------------------------------------------------------------------------------------------------------------
# ONNX

PARITY = 1e-3  # a quarter of an 8-bit level; measured: 1e-6


def export_onnx(
    path: Path, graph: nn.Module, example: Tensor, images: Sequence[Tensor], truth: Callable[[Tensor], Tensor], output: str,
    sizes: dict[int, object] | None = None,
) -> None:  # fmt: skip
    """`graph`, traced with an example, as a file that is kept when it gives the truth of `images`; `sizes` may vary."""
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs `pip install {' '.join(missing)}`.")
    import onnxruntime

    program = torch.onnx.export(
        graph.eval(), (example,), dynamo=True, dynamic_shapes={"image": sizes} if sizes else None, input_names=["image"],
        output_names=[output], verbose=False,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.onnx")
    program.save(partial)
    session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
    worst = 0.0
    for image in images:
        with torch.no_grad():
            expected = truth(image).numpy()
        worst = max(worst, float(np.abs(session.run(None, {"image": image.numpy()})[0] - expected).max()))
    if not worst <= PARITY:
        partial.unlink()
        raise UserError(f"--onnx: the export differs from PyTorch by {worst:.2g}, so it was removed; try other versions.")
    os.replace(partial, path)
    shown = dict.fromkeys(f"{image.shape[3]} x {image.shape[2]}" for image in images)
    logger.info("%s: at most %.1e from PyTorch on images of %s", path, worst, " and ".join(shown))
