"""The command line: one flat dataclass per script, YAML files and presets with the same typed errors, errors as sentences.

Nothing here imports torch, so `--help` and a misspelt flag are answered before the seconds that torch takes to load.
"""

import atexit
import ctypes
import dataclasses
import difflib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import tyro
import yaml


class UserError(Exception):
    """Something the user can put right: what is wrong, which flag or file, what to do. Printed once, without a traceback."""


@dataclass
class RunConfig:
    """The flags that every script has. A script inherits them and may give a field another default."""

    DEMO: ClassVar[dict[str, object]] = {}  # what --demo sets; later files and flags override it

    config: Path | None = None
    """YAML file with flat keys named like the flags; may be given several times, later files and flags win."""
    demo: bool = False
    """Make a small dataset and train on it within minutes on a CPU (a preset; any other flag overrides it)."""
    output_dir: Path = Path("runs/run")
    """Folder of this run: config, metrics, pictures, checkpoints, exported model."""
    run_name: str | None = None
    """Name shown by the tracker (default: the name of the output folder)."""
    resume_from: str | None = None
    """latest: newest intact checkpoint, which must exist; auto: the same, or a fresh start; else a checkpoint's path."""
    seed: int = 0
    """Everything random is a function of this seed and of the step, epoch and sample."""
    epochs: int = 10
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever --epochs says."""
    batch_size: int = 32
    """Samples per process and micro-batch; the run prints processes x batch x accumulation."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    find_batch_size: bool = False
    """Use the largest batch that fits in memory and raise the accumulation so that the samples per step stay the same."""
    num_workers: int = 2
    """Data loader workers per process; 0 loads in the training process. The results do not depend on it."""
    lr: float = 1e-3
    """Peak learning rate."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Overrides the accelerate YAML, which decides when this is unset."""
    log_every: int = 10
    """Optimizer steps between logged training rows."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0: once an epoch."""
    save_every: int = 0
    """Optimizer steps between checkpoints; 0: once an epoch. The best ones and the last are saved in any case."""
    keep_top_k: int = 1
    """Best checkpoints to keep besides the last two."""
    early_stop_patience: int = 0
    """Evaluations without improvement after which the run ends; 0: never."""
    max_skipped_steps: int = 10
    """Steps in a row whose loss or gradient is not finite (they are skipped) after which the run ends."""
    tracker: Literal["wandb", "tensorboard", "trackio", "none"] = "wandb"
    """Where metrics go besides metrics.jsonl. W&B writes offline when no login is found."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "epochs", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: give 1 or more.")
        for name in ("eval_every", "save_every", "num_workers", "keep_top_k", "early_stop_patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: give 0 or more.")
        if self.lr <= 0:
            raise ValueError(f"--lr is {self.lr}: give a positive number.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max-steps is {self.max_steps}: give 1 or more, or leave it out.")


ConfigT = TypeVar("ConfigT", bound=RunConfig)
AnyT = TypeVar("AnyT")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def some(names: Iterable[object], most: int = 5) -> str:
    """The first of a list for a sentence."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _tokens(values: dict[str, object], source: str, cls: type[RunConfig]) -> list[str]:
    """`{"lr": 1e-4, "demo": True}` as `--lr 1e-4 --demo`: a file goes through the same typed parser as the command line."""
    fields = {f.name for f in dataclasses.fields(cls)} - {"config"}
    tokens: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f' (did you mean "{near[0]}"?)' if near else "; `--help` lists the names"
            raise UserError(f'{source}: unknown key "{key}"{hint}.')
        if isinstance(value, dict):
            raise UserError(f'{source}: "{key}" holds nested keys; write flat keys named like the flags.')
        if isinstance(value, bool):
            tokens.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif isinstance(value, list | tuple):
            tokens += [flag(name), *map(str, value)]
        else:
            tokens += [flag(name), str(value)]
    return tokens


def _read_yaml(path: str) -> dict[str, object]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}); check the path.") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"--config {path} holds no `key: value` lines.")
    return values or {}


def parse_only(cls: type[AnyT], tokens: Sequence[str] | None = None) -> AnyT:
    """The typed command line alone, for predict scripts, which have neither files nor presets."""
    die_with_launcher()
    try:
        return tyro.cli(cls, args=tokens, console_outputs=rank() == 0, description=cls.__doc__)
    except SystemExit:
        if rank():  # rank 0 speaks; leaving before it would make the launcher end it in mid-sentence
            time.sleep(3)
        raise


def parse(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Flags > later --config > earlier --config > the --demo preset > defaults. Exits with 2 and a sentence when wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with sentences(last=False):
        files, rest = [], []
        while argv:
            token = argv.pop(0)
            if token == "--config" or token.startswith("--config="):
                path = token.partition("=")[2] or (argv.pop(0) if argv else "")
                if not path:
                    raise UserError("--config needs the path of a YAML file.")
                files.append(path)
            else:
                rest.append(token)
        loaded = [(path, _read_yaml(path)) for path in files]
        tokens = [token for path, values in loaded for token in _tokens(values, path, cls)] + rest
        switches = [t for t in tokens if t in ("--demo", "--no-demo")]
        if switches and switches[-1] == "--demo":
            tokens = _tokens(cls.DEMO, "the demo preset", cls) + tokens
        config = parse_only(cls, tokens)
    config.config = Path(files[-1]) if files else None
    return config


# ---------------------------------------------------------------------------------------------------------------------
# processes


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent process dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def die_with_launcher() -> None:
    """A launcher forwards neither SIGUSR1 nor its own SIGKILL, and a one-process `accelerate launch` not even SIGTERM: the
    training would go on as an orphan (measured, accelerate 1.15). From a shell it may go on: nohup and tmux rely on it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    die_with_parent()
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if os.getppid() == 1 and parent.exists() and not any(w in parent.read_bytes() for w in (b"accelerate", b"torch")):
        sys.exit("the launcher ended before this process had started")


def fail(message: str, code: int = 2) -> None:
    """Print one sentence and leave. When every rank has the same trouble only rank 0 is heard: its exit ends the others."""
    if rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler that only sets a flag would let us outlive the launcher
        time.sleep(3)
    print(f"[RANK {rank()}] ERROR: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # no atexit: a process group that lost a member hangs in its destructor


def _cause(error: BaseException) -> str | None:
    """The sentence for failures that have a known remedy and come from below the script."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            "Out of memory. Halve --batch-size and double --accumulation-steps (the same samples per step, the same run),"
            " or let --find-batch-size do it; then continue with --resume-from auto."
        )
    lost = (
        "Connection reset by peer",
        "Connection closed by peer",
        "Connection refused",
        "Broken pipe",
        "Socket closed",
    )
    timeout = ("Timed out waiting", "timed out", "Timeout", "remote process exited")
    collective = type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text or "store" in text.lower()
    if collective and any(sign in text for sign in (*lost, *timeout)):
        return (
            "Another process of this run died or stopped answering, so this one stops too. Its own message stands above"
            " (none: it was killed, often for memory); continue with --resume-from auto."
        )
    if isinstance(error, OSError) and error.errno == 28:
        return f"The disk is full ({error.filename or 'see --output-dir'}): free space, then --resume-from auto."
    return None


@contextmanager
def sentences(*, last: bool = True) -> Iterator[None]:
    """Turn every error that the user can put right into one sentence; anything else keeps its traceback. What it wraps is
    the last thing that a process does: one of several ranks leaves at its end."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Interrupted.", 130)
    except Exception as error:
        sentence = _cause(error)
        if sentence is None:
            raise
        fail(sentence, 1)
    else:
        if last and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Not through the interpreter's own end: a gloo thread that still lets go of a tensor would find the interpreter
            # gone and abort (torch 2.15: 1 launch in 12 ended with SIGABRT after its last step, in spite of
            # destroy_process_group).
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
