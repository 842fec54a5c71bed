"""What a run says: rank-aware log lines, metrics.jsonl, curves.png, the tracker, the progress bar."""

import json
import logging
import math
import os
import secrets
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from common.checkpoints import write_atomically
from common.cli import RunConfig, UserError, rank
from common.pictures import save, subplots

logger = logging.getLogger("run")


class _AboveTheBar(logging.StreamHandler):
    """Log lines scroll above the progress bar instead of breaking it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record) + "\n", end="", file=sys.stderr)  # in one piece, or lines of two ranks may merge


def setup_logging() -> None:
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter(f"[RANK {rank()}] %(asctime)s %(levelname)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank() == 0 else logging.WARNING)


def check_tracker(config: RunConfig) -> None:
    if config.tracker == "none":
        return
    package = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}[config.tracker]
    if find_spec(package) is None:
        raise UserError(f"--tracker {config.tracker} needs `pip install {package}`; --tracker none works without it.")


def logged_in(wandb) -> bool:
    """Without asking for a login, and without asking the server."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # a wandb from before `prompt`
        return bool(wandb.api.api_key)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class RunLog:
    """metrics.jsonl is the record; progress bar and tracker show the same rows. Does nothing on ranks above 0.

    After a resume the rows past the checkpoint are dropped first, so that each step stands once."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        project: str,
        step: int,
        total_steps: int,
        unit: str = "samples",
    ):
        self.config, self.accelerator, self.unit = config, accelerator, unit
        self.total_steps = total_steps
        self.active = accelerator.is_main_process
        self.path = config.output_dir / "metrics.jsonl"
        self.start_tracker(project)
        if not self.active:
            return
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept_rows(self.path, step)))
        self.file = open(self.path, "a")
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.window = (time.perf_counter(), step, 0.0)

    def start_tracker(self, project: str) -> None:
        config = self.config
        if config.tracker == "none":
            return
        identity = config.output_dir / "tracker_id"  # kept across resumes, so that the tracker continues the same run
        options: dict[str, object] = {}
        if self.active:
            fresh = not (config.resume_from and identity.exists())
            if fresh:
                write_atomically(identity, secrets.token_hex(4))
            name = config.run_name or config.output_dir.name
            if config.tracker == "wandb":
                import wandb

                options = {"id": identity.read_text(), "resume": "allow", "name": name, "dir": str(config.output_dir)}
                if "WANDB_MODE" not in os.environ and not logged_in(wandb):
                    options["mode"] = "offline"  # not by the environment, which wandb has read by now
                    logger.info(
                        "No W&B login found: logging offline below %s; `wandb sync` uploads it later",
                        config.output_dir,
                    )
            elif config.tracker == "trackio":
                options = {"name": name, "resume": "never" if fresh else "allow"}  # it knows runs by their name alone
        flat = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(config).items()}
        self.accelerator.init_trackers(project, config=flat, init_kwargs={config.tracker: options} if options else {})

    def _write(self, row: dict[str, object]) -> None:
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
        self.file.write(json.dumps(strict) + "\n")
        self.file.flush()
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def train(self, step: int, epoch: int, values: dict, *, samples: int, waited: float, perf: dict | None = None) -> None:
        """A training row; `samples` is one step's count over all processes, `waited` the seconds spent on data so far."""
        if not self.active:
            return
        now = time.perf_counter()
        then, since, waited_then = self.window
        self.window = (now, step, waited)
        seconds = max(now - then, 1e-9)
        speed = samples * (step - since) / seconds
        share = (waited - waited_then) / seconds
        remaining = clock((self.total_steps - step) * seconds / max(step - since, 1))
        perf = {"perf/samples_per_s": speed, "perf/data_wait": share, **{f"perf/{k}": v for k, v in (perf or {}).items()}}
        self._write({"step": step, "epoch": epoch, **{f"train/{k}": v for k, v in values.items()}, **perf})
        line = f"loss={values['loss']:.4f} {speed:,.0f} {self.unit}/s, data wait {share:.0%}"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable:
            logger.info("Step %d/%d: %s, ETA %s", step, self.total_steps, line, remaining)

    def evaluation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """An evaluation row; keys are complete, e.g. val/<metric>. Its seconds do not count as training time."""
        if self.active:
            self._write({"step": step, "epoch": epoch, **values})

    def resume_clock(self, step: int, waited: float) -> None:
        """Call after anything that is not training (evaluation, saving), so that samples/s speak of training alone."""
        if self.active:
            self.window = (time.perf_counter(), step, waited)

    def image(self, name: str, path: Path, step: int) -> None:
        if not self.active:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name in ("wandb", "tensorboard"):
                import matplotlib.image

                picture = matplotlib.image.imread(path)[None, ..., :3]
                tracker.log_images(
                    {name: (picture * 255).astype("uint8")} if tracker.name == "wandb" else {name: picture},
                    step=step,
                    **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}),
                )

    def sync(self) -> None:
        """Before a checkpoint: the rows it stands on must survive what it survives."""
        if self.active:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            draw_curves(self.path, self.config.output_dir / "curves.png")
        self.accelerator.end_training()


def read_rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the last line of a killed process; what follows it is written again
    return rows


def kept_rows(path: Path, step: int) -> list[dict]:
    """Rows up to a step. Test rows go too: the test phase comes after the last checkpoint and is repeated."""
    return [
        row for row in read_rows(path) if row["step"] <= step and step > 0 and not any(k.startswith("test/") for k in row)
    ]


def draw_curves(metrics: Path, picture: Path) -> None:
    """One panel per quantity, training and evaluation of the same name together."""
    rows = read_rows(metrics)
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for key, value in row.items():
            part, _, name = key.rpartition("/")
            if part and not part.startswith("test") and isinstance(value, int | float):
                panel = f"perf/{name}" if part == "perf" else "accuracy" if name == "majority" else name
                part = part + " (majority)" if name == "majority" else part
                series.setdefault(panel, {}).setdefault(part, []).append((row["step"], value))
    if not series:
        return
    columns = min(4, len(series))
    lines = -(-len(series) // columns)
    figure, axes = subplots(lines, columns, 4 * columns, 2.8 * lines)
    for axis, (name, parts) in zip(axes.flat, series.items(), strict=False):
        for part, points in parts.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, marker="." if len(points) < 30 else None, label=part, linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in list(axes.flat)[len(series) :]:
        axis.set_visible(False)
    save(figure, picture, 110)
