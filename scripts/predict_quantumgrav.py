"""Apply a trained network to causal sets: matrices (.npy), QuantumGrav's zarr stores, or a packed store.

    python scripts/predict_quantumgrav.py --model runs/quantumgrav-demo/model --inputs my_sets.npy --output-dir predictions

An .npy file holds one causal matrix (N, N) or several (B, N, N), entry i, j true when i precedes j. The answers go to
predictions/predictions.csv; where labels are known, the test phase's metrics and pictures come with them.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import UserError, parse_only, sentences


@dataclass
class Config:
    """Predict with a trained network on causal sets."""

    model: Path
    """The model/ folder of a run."""
    inputs: tuple[Path, ...]
    """Matrices (.npy), QuantumGrav stores (.zarr) or packed stores (folders with relations.bin)."""
    output_dir: Path = Path("predictions")
    """Where predictions.csv and the pictures go."""
    batch_size: int = 64
    """Sets per process and forward pass."""


if __name__ == "__main__":
    CONFIG = parse_only(Config)

import numpy as np
from accelerate import Accelerator

from common import data
from common.causal_report import describe
from common.causal_sets import Store, StoreWriter, convert_zarr, problem
from common.logs import setup_logging
from scripts import train_quantumgrav as job


def read_matrices(path: Path) -> np.ndarray:
    try:
        matrices = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--inputs {path} cannot be read as an array ({error}).") from None
    matrices = matrices[None] if matrices.ndim == 2 else matrices
    if matrices.ndim != 3:
        raise UserError(f"--inputs {path} has shape {matrices.shape}: give one matrix (N, N) or several (B, N, N).")
    for number, matrix in enumerate(matrices):
        if why := problem(matrix):
            raise UserError(f"--inputs {path}: set {number} is not a causal set, {why}.")
    return matrices.astype(bool)


def as_store(inputs: tuple[Path, ...], folder: Path) -> Store:
    """All inputs as one packed store; a packed store is used as it is."""
    if len(inputs) == 1 and (inputs[0] / "relations.bin").exists():
        return Store(inputs[0])
    for path in inputs:
        if not path.exists():
            raise UserError(f"--inputs {path} does not exist.")
    stores = [path for path in inputs if path.suffix == ".zarr"]
    arrays = [path for path in inputs if path.suffix == ".npy"]
    if len(stores) + len(arrays) < len(inputs) or (stores and arrays):
        raise UserError("--inputs takes .npy files, or .zarr stores, or one packed store, not a mixture.")
    if stores:
        convert_zarr(stores, folder / "sets")
    else:
        with StoreWriter(folder / "sets") as writer:
            for path in arrays:
                for matrix in read_matrices(path):
                    writer.append(matrix)
    return Store(folder / "sets")


def main(config: Config) -> None:
    setup_logging()
    if not (config.model / "config.json").exists():
        raise UserError(
            f"--model {config.model} holds no config.json and model.safetensors: give the model/ folder of a run."
        )
    accelerator = Accelerator()
    model, tasks, saved = job.load_model(config.model)
    flags = job.Config(**saved["config"], batch_size=config.batch_size, num_workers=0)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            store = as_store(config.inputs, Path(scratch))
        except ValueError as error:
            raise UserError(f"--inputs: {error}") from None
        if "class" in store.labels and store.classes != tasks.classes:  # codes follow the names of the model
            codes = np.array([tasks.classes.index(name) if name in tasks.classes else -1 for name in store.classes] + [-1])
            store.labels["class"], store.classes = codes[store.labels["class"]], tasks.classes
        sets = job.CausalSets(store, np.arange(len(store)), flags)
        sampler = data.EvalSampler(len(sets), config.batch_size, accelerator, costs=sets.sizes)
        loader = data.make_loader(sets, sampler, flags, job.collate)
        metrics, table = job.evaluate(model.to(accelerator.device), tasks, loader, accelerator)
        if accelerator.is_main_process:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            describe(tasks, table, store, config.output_dir, "predictions")
            print(f"{len(sets):,} causal sets: {config.output_dir / 'predictions.csv'}")
            for key, value in metrics.items():
                if "/" in key:
                    print(f"  {value:6.3f}  {key}")
    accelerator.end_training()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
