"""CT scans to the codes of a trained VQ-GAN and back: files and folders in, the same shapes, places and orientations out.

    python scripts/predict_vqgan.py --model runs/vqgan-demo/model --inputs data/ct --output-dir out --reconstruct
    python scripts/predict_vqgan.py --model runs/vqgan-demo/model --inputs data/ct --output-dir codes --encode
    python scripts/predict_vqgan.py --model runs/vqgan-demo/model --inputs codes --output-dir out --decode

Several GPUs: `accelerate launch` in front, as for training. For a model that is trained on codes, --encode writes
    <name>.npz     `codes`, (x, y, z) in RAS order, int16, or int32 above 32,768 codes; `about`, JSON: what decoding needs
    codebook.npy   float32 (codes, dim), row i being the vector of code i
    model.json     hashes of the model, its flags, and where it was
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import UserError, parse_only, sentences, some


@dataclass
class Config:
    """Encode CT scans with a trained VQ-GAN, decode their codes, or both."""

    model: Path
    """The model/ folder of a run."""
    inputs: tuple[Path, ...] = ()
    """Scans (.nii, .nii.gz), with --decode code files, and folders of them; sub-folders are kept."""
    output_dir: Path | None = None
    """Folder for what is made."""
    encode: bool = False
    """Scans to code files."""
    decode: bool = False
    """Code files to scans (.nii.gz, int16 HU)."""
    reconstruct: bool = False
    """Scans to codes and back to scans; PSNR, RMSE, MAE and SSIM go to metrics.csv."""
    check_tiling: bool = False
    """Compare tiles with the whole volume on the first scan, for which it must fit in memory."""
    tile_size: int = 128
    """Side of the tiles in voxels. The default model sees 32 voxels around a tile and needs 480 bytes for each voxel in
    float32: 3.4 GB and 3.4 times the work of the whole volume; 256 needs 16 GB and twice the work."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Overrides the accelerate YAML."""
    overwrite: bool = False
    """Make outputs that exist already again; else they are kept, so that a run that was stopped can go on."""

    def __post_init__(self) -> None:
        modes = self.encode + self.decode + self.reconstruct
        if modes > 1 or (self.decode and self.check_tiling) or not (modes or self.check_tiling):
            raise ValueError("Give one of --encode, --decode and --reconstruct; --check-tiling alone or with scans.")
        if modes and not self.output_dir:
            raise ValueError("--output-dir is missing: give the folder for what is made.")
        if self.output_dir and not modes:
            raise ValueError("--output-dir: --check-tiling alone makes nothing; add --encode or --reconstruct.")
        if not self.inputs:
            raise ValueError("--inputs is missing: give files or folders.")
        if self.tile_size < 16:
            raise ValueError(f"--tile-size {self.tile_size}: give 16 or more.")


if __name__ == "__main__":
    CONFIG = parse_only(Config)

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from common import ct, data, predict
from common.checkpoints import write_atomically
from common.logs import setup_logging
from common.predict import Task
from common.tiling import pad_to_cells, tiled
from common.volume_metrics import scores
from common.volume_report import write_csv
from scripts import train_vqgan as job

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# What is to be done


def find_codes(root: Path) -> list[Path]:
    if root.is_file() and root.suffix == ".npz":
        return [root]
    if not root.exists():
        raise UserError(f"--inputs {root} does not exist.")
    hidden = (path for path in root.rglob("*.npz") if not any(p.startswith(".") for p in path.relative_to(root).parts))
    found = sorted(hidden)
    if not found:
        raise UserError(f"--inputs {root} holds no code files (.npz), which --decode needs: make some with --encode.")
    return found


def find_sources(config: Config) -> dict[tuple[Path, Path], None]:
    """Every file with its path below --inputs, once."""
    found: dict[tuple[Path, Path], None] = {}
    for path in config.inputs:
        sources = find_codes(path) if config.decode else ct.find_volumes(path, "--inputs")
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and config.output_dir.resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"--output-dir {config.output_dir} lies in --inputs {path}, among the originals: choose a folder outside."
            )
        found |= {(source, source.relative_to(folder)): None for source in sources}
    return found


def plan(config: Config) -> list[Task]:
    """Every input with the file that it becomes; whatever would overwrite something else is refused here."""
    found, owner, tasks = find_sources(config), {}, []
    originals = {source.resolve() for source, _ in found}
    for source, relative in found:
        name = re.sub(r"\.(nii(\.gz)?|npz)$", "", relative.as_posix(), flags=re.IGNORECASE)
        output = config.output_dir / f"{name}{'.npz' if config.encode else '.nii.gz'}"
        if output in owner:
            raise UserError(
                f"{owner[output]} and {source} would both be written to {output}: give each its own --output-dir, or rename"
                " one."
            )
        if output.resolve() in originals:
            raise UserError(f"{output} is one of --inputs and would be overwritten: change --output-dir.")
        owner[output] = source
        tasks.append(Task(name, source, {"made": output}, source if config.reconstruct else None))
    return tasks


def without_the_done(tasks: list[Task], config: Config) -> list[Task]:
    """A reconstruction that exists is not made again, but measured: metrics.csv has all."""
    done = [task for task in tasks if task.outputs["made"].exists() and not config.overwrite]
    if done:
        only = " and only measured" if config.reconstruct else ""
        logger.info("%d of %d outputs exist and are kept%s; --overwrite makes them again", len(done), len(tasks), only)
    return tasks if config.reconstruct else [task for task in tasks if task not in done]


# ---------------------------------------------------------------------------------------------------------------------
# The model, and how its files know it


def load_model(folder: Path) -> tuple[job.VQGAN, dict]:
    predict.check_model(folder)
    try:
        return job.load_model(folder)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--model {folder} is no intact model of train_vqgan.py ({reason}).") from None


def describe(model: job.VQGAN, saved: dict, folder: Path) -> dict:
    """model.json. `codes` is the hash of what gives codes their meaning: a decoder that was trained further on the same
    codes, by --freeze-encoder, reads them too."""

    def fingerprint(tensors: Iterable[Tensor]) -> str:
        flags = json.dumps(saved["config"], sort_keys=True).encode()
        parts = [tensor.contiguous().flatten().view(torch.uint8).numpy() for tensor in tensors]
        return data.fingerprint(np.concatenate([np.frombuffer(flags, np.uint8), *parts]))

    state = dict(sorted(model.state_dict().items()))
    meaning = [tensor for name, tensor in state.items() if not name.startswith("decoder.")]
    hashes = {"codes": fingerprint(meaning), "weights": fingerprint(state.values())}
    return {**hashes, "folder": str(folder), **saved}


def check_output(config: Config, about: dict) -> None:
    path = config.output_dir / "model.json"
    key = "codes" if config.encode else "weights"
    if path.exists() and not config.overwrite and json.loads(path.read_text())[key] != about[key]:
        raise UserError(
            f"--output-dir {config.output_dir} holds files of another model (its model.json says which): choose another"
            " folder, or replace them by --overwrite."
        )


def write_about(config: Config, about: dict, model: job.VQGAN) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    if config.encode:
        vectors = model.quantizer.decode(torch.arange(model.quantizer.count)[None])[0].T
        temporary = config.output_dir / ".codebook.partial.npy"
        np.save(temporary, vectors.numpy())
        os.replace(temporary, config.output_dir / "codebook.npy")
    write_atomically(config.output_dir / "model.json", json.dumps(about, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Code files


def write_codes(path: Path, codes: np.ndarray, about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.npz")
    np.savez_compressed(temporary, codes=codes, about=json.dumps(about))
    os.replace(temporary, path)


def read_codes(path: Path) -> tuple[np.ndarray, dict]:
    try:
        with np.load(path) as file:
            return file["codes"], json.loads(str(file["about"]))
    except Exception as error:  # damaged archives raise anything
        raise UserError(f"{path} cannot be read as a code file ({error}): encode its scan again.") from None


def check_codes(path: Path, codes: np.ndarray, about: dict, model: job.VQGAN, meaning: str) -> None:
    """They may come from elsewhere, from a model that invents codes for example."""
    if about["model"] != meaning:
        raise UserError(f"{path} holds codes of another model ({about['model']}, --model is {meaning}): give the right one.")
    cells = tuple(-(-side // step) for side, step in zip(about["geometry"]["shape"], model.factor, strict=True))
    if codes.shape != cells:
        raise UserError(f"{path} holds codes of the shape {codes.shape}; its geometry needs {cells}.")
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= model.quantizer.count:
        raise UserError(f"{path} holds codes that are not integers from 0 to {model.quantizer.count - 1}.")


# ---------------------------------------------------------------------------------------------------------------------
# One file


Later = Callable[..., None]  # does in a thread what it is given


class NotFinite(ArithmeticError):
    """Would become arbitrary codes and HU, without a word."""


def refuse_infinite(network: nn.Module, inputs: tuple, output: Tensor) -> None:
    if not output.isfinite().all():
        raise NotFinite


def encode(coder: job.Coder, config: Config, meaning: str, task: Task, scan: tuple, later: Later) -> None:
    hu, geometry = scan
    count = coder.model.quantizer.count
    codes = coder.encode(torch.from_numpy(hu)).numpy().astype(np.int16 if count <= 2**15 else np.int32)
    about = {
        "model": meaning,
        "hu_min": coder.window[0],
        "hu_max": coder.window[1],
        "downsample": coder.model.factor,
        "codes": count,
        "geometry": geometry.to_dict(),
    }
    later(write_codes, task.outputs["made"], codes, about)


def decode(coder: job.Coder, config: Config, meaning: str, task: Task, loaded: tuple, later: Later) -> None:
    codes, about = loaded
    check_codes(task.source, codes, about, coder.model, meaning)
    geometry = ct.Geometry.from_dict(about["geometry"])
    hu = coder.decode(torch.from_numpy(codes.astype(np.int64)), geometry.shape)
    later(ct.write_scan, task.outputs["made"], hu.numpy(), geometry)


def reconstruct(coder: job.Coder, config: Config, meaning: str, task: Task, scan: tuple, later: Later) -> dict[str, Tensor]:
    hu, geometry = scan
    path, volume = task.outputs["made"], torch.from_numpy(hu)
    if path.exists() and not config.overwrite:
        result = torch.from_numpy(ct.read_scan(path)[0])
        if result.shape != volume.shape:
            raise UserError(f"{path} exists and has another shape than {task.source}: give --overwrite.")
    else:
        result = coder.decode(coder.encode(volume), hu.shape)
        later(ct.write_scan, path, result.numpy(), geometry)
    hu_min, hu_max = coder.window
    found = scores(result.to(coder.device), volume.to(coder.device), hu_min=hu_min, hu_max=hu_max, masks={})
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()}


def attempt(
    coder: job.Coder, config: Config, meaning: str, accelerator: Accelerator,
    task: Task, loaded: tuple, reference: Future | None, later: Later,
) -> dict[str, Tensor] | None:  # fmt: skip
    act = encode if config.encode else decode if config.decode else reconstruct
    try:
        with accelerator.autocast():
            return act(coder, config, meaning, task, loaded, later)
    except torch.OutOfMemoryError:
        raise UserError(f"{task.source}: out of memory with --tile-size {config.tile_size}; give less.") from None
    except NotFinite:
        raise UserError(f"{task.source} gave values that are not finite: try --mixed-precision no.") from None


@torch.no_grad()
def check_tiling(coder: job.Coder, path: Path, tile_size: int) -> None:
    """In true float32, so that what is left is the tiles' own: bf16 and TF32 round differently in another shape."""
    logger.info("Computing all of %s at once to check the tiles, which takes the memory for it", path)
    model, (hu_min, hu_max), hu = coder.model, coder.window, torch.from_numpy(ct.read_scan(path)[0])
    if max(hu.shape) <= tile_size:
        half = max(hu.shape) // 2 // max(model.factor) * max(model.factor)
        raise UserError(
            f"--check-tiling: {path} of {'x'.join(map(str, hu.shape))} voxels is one tile, there is nothing to compare: give"
            f" --tile-size {half}, or a larger scan."
        )
    volume = pad_to_cells(hu[None, None], model.factor).to(coder.device)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        codes = model.encode(ct.to_unit(volume, hu_min, hu_max))
        whole = model.decode(codes).cpu()
        codes = codes.cpu()
        equal = (coder.encode(hu) == codes[0]).double().mean()
        parts = tiled(model.decode, codes, tile=coder.tile, halo=coder.halo_out, writes=model.factor, device=coder.device)
    except torch.OutOfMemoryError:
        raise UserError(f"--check-tiling: all of {path} at once is too much for the memory; give a smaller scan.") from None
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    furthest = float((parts - whole).abs().max())
    logger.info(
        "Tiles of %d voxels, halos of %s and %s cells, against the whole volume: at most %.2g HU apart before rounding,"
        " %.4f%% of the codes equal",
        tile_size, coder.halo_in, coder.halo_out, furthest * (hu_max - hu_min) / 2, 100 * equal,
    )  # fmt: skip
    if not coder.exact:
        logger.warning("The model has --norm group, which looks at the whole volume: tiles cannot be equal to it")
    elif not furthest < 1e-4:  # measured: 3e-7
        logger.warning("That is more than rounding: there are seams. Please report it")


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    setup_logging()
    model, saved = load_model(config.model)
    about = describe(model, saved, config.model)
    tasks = []
    if config.output_dir:
        tasks = plan(config)
        check_output(config, about)
    accelerator = predict.start(config.mixed_precision)
    accelerator.wait_for_everyone()  # all have looked at the output folder
    if tasks and accelerator.is_main_process:
        write_about(config, about, model)
    model.to(accelerator.device)
    window = saved["config"]["hu_min"], saved["config"]["hu_max"]
    coder = job.Coder(model, *window, config.tile_size, accelerator.device)
    for network in (model.encoder, model.decoder):
        network.register_forward_hook(refuse_infinite)  # not before: the coder has measured their reach with NaN
    if config.check_tiling and accelerator.is_main_process:
        check_tiling(coder, ct.find_volumes(config.inputs[0], "--inputs")[0], config.tile_size)
    if tasks:
        tasks = without_the_done(tasks, config)
        read = read_codes if config.decode else ct.read_scan
        work = partial(attempt, coder, config, about["codes"], accelerator)
        # a scan is its own reference, and has been read
        table, failed = predict.work_through(tasks, read, lambda path: None, work, accelerator)
        if table and accelerator.is_main_process:
            report(table, tasks, config.output_dir)
        if failed:
            raise UserError(f"{len(failed)} of {len(tasks)} files failed: {some(failed)}; the warnings above say why.")
        logger.info("%d files: %s", len(tasks), config.output_dir)
    accelerator.end_training()


def report(table: dict[str, np.ndarray], tasks: list[Task], output: Path) -> None:
    write_csv(output / "metrics.csv", [task.name for task in tasks], table)
    columns = [table[name] for name in ("psnr", "hu_rmse", "ssim")]
    for index, *values in zip(table["id"], *columns, strict=True):
        logger.info("%s: PSNR=%.2f dB, RMSE %.1f HU, SSIM=%.4f", tasks[index].source, *values)
    means = (column.mean() for column in columns)
    logger.info("[CT] %d scans: PSNR=%.2f dB, RMSE %.1f HU, SSIM=%.4f", len(table["id"]), *means)


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
