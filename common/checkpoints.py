"""The run folder: who may write it, what a checkpoint is, how it is written so that no kill can tear it, how it is read.

    <output-dir>/checkpoints/step-00001200/   <module>.safetensors, <optimizer>.pt, state.json, manifest.json
    <output-dir>/checkpoints/names.json       {"last": ..., "best": ..., "top": [[score, name], ...]}

A checkpoint is written under another name, synced, and renamed: the rename is the commit. Nothing is ever unpickled
(weights are safetensors, optimizers load with `weights_only=True`, the rest is JSON): a foreign checkpoint runs no code.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn

from common.cli import RunConfig, UserError

logger = logging.getLogger("run")

KEEP_LAST = 2  # never fewer: the newest may be the one that a failing disk has damaged


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Canonical names: neither DDP's `module.` nor the compiler's `_orig_mod.`. Copied: safetensors refuses ties."""
    state = module.state_dict()
    return {
        k.replace("module.", "", k.startswith("module.")).replace("_orig_mod.", ""): v.cpu().clone().contiguous()
        for k, v in state.items()
    }


def damage(directory: Path) -> str | None:
    """Why this directory is not an intact checkpoint; None when it is."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        files = {directory / name: entry for name, entry in manifest["files"].items()}
        for path, entry in files.items():
            if not path.is_file():
                return f"{path.name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{path.name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
        with ThreadPoolExecutor() as pool:  # hashing does not hold Python's lock
            for path, found in zip(files, pool.map(_sha256, files), strict=True):
                if found != files[path]["sha256"]:
                    return f"{path.name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def read_checkpoint(directory: Path) -> dict:
    """Everything in a verified checkpoint: {"modules": {...}, "optimizers": {...}, "state": {...}}. Raises ValueError."""
    if why := damage(directory):
        raise ValueError(why)
    content: dict = {"modules": {}, "optimizers": {}, "state": json.loads((directory / "state.json").read_text())}
    for path in sorted(directory.iterdir()):
        try:
            if path.suffix == ".safetensors":
                content["modules"][path.stem] = load_file(path)
            elif path.suffix == ".pt":
                content["optimizers"][path.stem] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle that is more than tensors, or a file that is not what its name says
            raise ValueError(f"{path.name} holds something else than tensors ({type(error).__name__})") from None
    return content


def _directories(root: Path) -> list[Path]:
    return sorted(d for d in root.glob("step-*") if re.fullmatch(r"step-\d{8}", d.name))


class RunFolder:
    """One run's folder. Rank 0 alone writes; every decision about it is made by rank 0 and shared."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, identity: dict[str, object]):
        """`identity` is what must be equal for a checkpoint to continue this run, e.g. the data split's hash."""
        self.config, self.accelerator = config, accelerator
        self.path = config.output_dir
        self.root = config.output_dir / "checkpoints"
        self.identity = identity
        self.agree(self._open)

    # -- who may write here ---------------------------------------------------------------------------------------------

    def agree(self, decide):
        """Run `decide` on rank 0; its result, or its UserError, reaches every rank."""
        box: list = [None, None]
        if self.accelerator.is_main_process:
            try:
                box[0] = decide()
            except UserError as error:
                box[1] = str(error)
        broadcast_object_list(box)
        if box[1]:
            raise UserError(box[1])
        return box[0]

    def _open(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # held until this process ends, however it ends
        except OSError as error:
            raise UserError(f"--output-dir {self.path} cannot be written ({error.strerror}): choose another one.") from None
        for attempt in range(60):  # the ranks of a killed attempt may need a moment to die
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 0:
                    logger.info("waiting for another process to leave %s", self.path)
                time.sleep(0.5)
        else:
            raise UserError(f"--output-dir {self.path} is in use by another running process: stop it or choose another one.")
        if self.config.resume_from is None and (_directories(self.root) or (self.path / "DONE").exists()):
            raise UserError(
                f"--output-dir {self.path} already holds a run: continue with --resume-from latest, or choose another one."
            )
        for leftover in self.root.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def describe(self) -> None:
        """config.yaml: the resolved flags, so that `--config <output-dir>/config.yaml` repeats the run."""
        if not self.accelerator.is_main_process:
            return
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        head = (
            f"# {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n"
            f"# commit {git.stdout.strip() or 'unknown'}, python {sys.version.split()[0]}, torch {torch.__version__},"
            f" {self.accelerator.num_processes} processes on {self.accelerator.device.type}\n"
        )
        flat = {
            k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self.config).items()
        }
        for key in ("config", "resume_from"):
            del flat[key]
        write_atomically(self.path / "config.yaml", head + yaml.safe_dump(flat, sort_keys=False))

    # -- done -----------------------------------------------------------------------------------------------------------

    def finished(self, total_steps: int) -> bool:
        """True when an earlier launch already reached the end, so that a requeued job has nothing to do."""

        def read() -> bool:
            done = self.path / "DONE"
            return done.exists() and json.loads(done.read_text())["total_steps"] >= total_steps

        return self.agree(read)

    def finish(self, step: int, total_steps: int) -> None:
        """The end, after the last thing that a killed run would have to do again."""
        if self.accelerator.is_main_process:
            write_atomically(self.path / "DONE", json.dumps({"step": step, "total_steps": total_steps}))

    # -- saving ---------------------------------------------------------------------------------------------------------

    def wants(self, state: dict, score: float | None) -> bool:
        """Would this score (higher is better) enter the best --keep-top-k?"""
        top = state.get("top", [])
        return score is not None and (len(top) < self.config.keep_top_k or any(score > s for s, _ in top))

    def save(
        self,
        state: dict,
        modules: dict[str, nn.Module],
        optimizers: dict,
        *,
        score: float | None = None,
        best: bool = False,
    ) -> None:
        """Call on every rank. `state` is plain JSON with "step"; the names of the best checkpoints are added to it."""
        name = f"step-{state['step']:08d}"
        if self.wants(state, score):
            ranked = sorted(
                [*state.get("top", []), [score, name]], key=lambda entry: -entry[0]
            )  # stable: first comer wins ties
            state["top"] = ranked[: self.config.keep_top_k]
        if best:
            state["best"] = name
        scaler = self.accelerator.scaler
        content = {**state, "identity": self.identity, "scaler": scaler.state_dict() if scaler else None}
        if self.accelerator.is_main_process:
            try:
                self._write(name, content, modules, optimizers)
                self._rotate(state)
            except Exception as error:
                if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
                    raise
                for leftover in self.root.glob(".*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                raise UserError(
                    f"The disk of --output-dir {self.path} is full, so {name} was not saved; the checkpoints before it are"
                    " intact. Free space, then continue with --resume-from latest."
                ) from None
        self.accelerator.wait_for_everyone()

    def _write(self, name: str, state: dict, modules: dict[str, nn.Module], optimizers: dict) -> None:
        final, temporary = self.root / name, self.root / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for key, module in modules.items():
            save_file(tensors_of(module), temporary / f"{key}.safetensors")
        for key, optimizer in optimizers.items():
            torch.save(optimizer.state_dict(), temporary / f"{key}.pt")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        files = sorted(temporary.iterdir())
        for path in files:
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        with ThreadPoolExecutor() as pool:  # neither the disk nor the hash holds Python's lock
            hashes = pool.map(_sha256, files)
            list(pool.map(_sync, files))
        entries = {p.name: {"bytes": p.stat().st_size, "sha256": h} for p, h in zip(files, hashes, strict=True)}
        (temporary / "manifest.json").write_text(json.dumps({"step": state["step"], "files": entries}, indent=1))
        _sync(temporary / "manifest.json")
        _sync(temporary)
        if final.exists():  # saved when a signal came, and again after the evaluation that was due
            self._remove(final)
        os.rename(temporary, final)  # the commit
        _sync(self.root)

    def _rotate(self, state: dict) -> None:
        directories = _directories(self.root)
        names = {"last": directories[-1].name, "best": state.get("best"), "top": state.get("top", [])}
        write_atomically(self.root / "names.json", json.dumps(names, indent=1))
        keep = {d.name for d in directories[-KEEP_LAST:]} | {names["best"]} | {name for _, name in names["top"]}
        for directory in directories:
            if directory.name not in keep:
                self._remove(directory)

    def _remove(self, directory: Path) -> None:
        doomed = directory.with_name(f".{directory.name}.old")  # a half-deleted directory must not look like a checkpoint
        os.rename(directory, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def export(self, module: nn.Module, settings: dict[str, object]) -> None:
        """model/: what predict scripts load. Each file is replaced atomically."""
        if self.accelerator.is_main_process:
            target = self.path / "model"
            target.mkdir(exist_ok=True)
            write_atomically(target / "config.json", json.dumps(settings, indent=1))
            temporary = target / ".model.safetensors.tmp"
            save_file(tensors_of(module), temporary)
            temporary.chmod(0o644)
            os.replace(temporary, target / "model.safetensors")
        self.accelerator.wait_for_everyone()

    def exported(self) -> dict[str, torch.Tensor]:
        """The exported weights, on every rank."""
        return self.agree(lambda: load_file(self.path / "model" / "model.safetensors"))

    # -- resuming -------------------------------------------------------------------------------------------------------

    def resume(self, modules: dict[str, nn.Module], optimizers: dict) -> dict | None:
        """Load what --resume-from names into modules and optimizers; the saved state, or None for a fresh start.

        Rank 0 chooses, verifies and reads; the others receive the bytes, so no shared file system is needed."""
        content = self.agree(self._choose)
        if content is None:
            return None
        state = content["state"]
        for kind, targets in (("modules", modules), ("optimizers", optimizers)):
            if set(content[kind]) != set(targets):
                raise UserError(
                    f"The checkpoint holds {sorted(content[kind])}, this script needs {sorted(targets)}: resume it with the"
                    " script that wrote it."
                )
            for name, target in targets.items():
                try:
                    target.load_state_dict(content[kind][name])
                except (RuntimeError, ValueError, KeyError) as error:
                    first = " ".join(str(error).split())[:300]
                    raise UserError(
                        f"The checkpoint's {name} does not fit this model (were model flags changed?): {first}"
                    ) from None
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        logger.info("Resumed from step %d", state["step"])
        return {k: v for k, v in state.items() if k not in ("identity", "scaler")}

    def _choose(self) -> dict | None:
        wish = self.config.resume_from
        if wish is None:
            return None
        if wish not in ("latest", "auto"):
            chosen = Path(wish)
            if not (chosen / "manifest.json").exists() and (chosen / "checkpoints").is_dir():
                raise UserError(
                    f"--resume-from {wish} is a run folder: give one of {wish}/checkpoints/step-..., or --output-dir {wish}"
                    " --resume-from latest."
                )
            try:
                content = read_checkpoint(chosen)
            except ValueError as error:
                raise UserError(f"--resume-from {wish} is not an intact checkpoint: {error}.") from None
            self._check_identity(content["state"], chosen)
            if chosen.resolve().parent == self.root.resolve():  # going back: what came after is no longer this run's future
                for later in _directories(self.root):
                    if later.name > chosen.name:
                        os.rename(later, later.with_name(f"abandoned-{later.name}"))
            return content
        directories = _directories(self.root)
        for directory in reversed(directories):
            try:
                content = read_checkpoint(directory)
            except ValueError as error:
                logger.warning("Skipping %s: %s", directory, str(error))
                continue
            self._check_identity(content["state"], directory)
            return content
        if directories:
            raise UserError(f"Every checkpoint in {self.root} is damaged: choose another --output-dir to start again.")
        if wish == "latest":
            raise UserError(f"--resume-from latest: {self.root} holds no checkpoint; --resume-from auto would start afresh.")
        return None

    def _check_identity(self, state: dict, directory: Path) -> None:
        for key, mine in self.identity.items():
            theirs = state["identity"].get(key)
            if theirs != mine:
                raise UserError(
                    f"{directory} was trained with {key} = {theirs}, this launch has {mine}: the order of the data would"
                    f" change.{self._remedy(key, theirs)}"
                )

    def _remedy(self, key: str, theirs: object) -> str:
        processes = self.accelerator.num_processes
        named = {"samples per step": "--batch-size", "samples per step of stage 2": "--stage2-batch-size"}.get(key)
        if not named or not isinstance(theirs, int):
            return f" Restore {key}, or choose another --output-dir."
        if theirs % processes:
            return f" {theirs} cannot be divided among {processes} processes; launch a number that divides it."
        share = theirs // processes
        batch = max(b for b in range(1, share + 1) if share % b == 0 and b <= max(self.config.batch_size, 1))
        plural = "es" if processes > 1 else ""
        return f" With {processes} process{plural} pass {named} {batch} --accumulation-steps {share // batch}."
