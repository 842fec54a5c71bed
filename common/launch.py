"""Starting: process group, launch guards, signals. Each guard is one sentence with the fix."""

import gc
import logging
import os
import signal
from datetime import timedelta

import accelerate.optimizer
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs, str_to_bool

from common.cli import RunConfig, UserError
from common.logs import check_tracker, setup_logging

logger = logging.getLogger("run")

# How long a rank waits for the others in a collective. Not 10 minutes: accelerate drops a value equal to its default and
# gloo would then wait for 30 (measured).
PATIENCE = timedelta(minutes=5)

# AcceleratedOptimizer asks twice a step whether the package lomo is installed: 25 stat() calls each, half of accelerate's
# whole overhead (0.1 ms of 0.24 ms a step here, more on network storage).
accelerate.optimizer.is_lomo_available = lambda: False


def start(config: RunConfig) -> Accelerator:
    """Launch guards, process group, signals and logging. Each guard is one sentence with the fix."""
    gc.freeze()  # what imports made stays: each full collection walked through it, 0.06 to 0.18 s, 0.6 s of every start
    setup_logging()
    check_tracker(config)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu, precision = choose_device(config.mixed_precision)
    if precision != config.mixed_precision:
        logger.info("No GPU is visible: training on the CPU in float32 instead of fp16")
    _open_group_of_this_attempt(on_cpu)
    accelerator = Accelerator(
        cpu=on_cpu,  # without it N processes on a machine without a GPU each believe that they are alone
        mixed_precision=precision,
        # sync_with_dataloader=False: a step's micro-batches are fetched together, and the loader's end must not sync early
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.accumulation_steps, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # one copy of the gradients less
        ],
    )
    if accelerator.num_processes != world:
        raise UserError(
            f"The launcher started {world} processes but each of them sees {accelerator.num_processes}: they would train"
            " alone and write over each other. Use one of accelerate_configs/, or add --num_processes 1."
        )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _note)  # only now: while the rendezvous waits in C++ a handler could not run
    logger.info(
        "Process %d/%d started on %s%s", accelerator.process_index, world, accelerator.device,
        f" in {accelerator.mixed_precision}" if accelerator.mixed_precision != "no" else "",
    )  # fmt: skip
    return accelerator


def choose_device(precision: str | None) -> tuple[bool, str | None]:
    """Whether this is a run on the CPU, and its precision: no for an accelerate YAML that says fp16, which needs a GPU."""
    on_cpu = not torch.accelerator.is_available() or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "no"))
    check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 0 if on_cpu else torch.accelerator.device_count())
    if not on_cpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    elif precision == "fp16":
        raise UserError("--mixed-precision fp16 needs a GPU; on a CPU leave the flag out or use bf16.")
    elif precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        precision = "no"
    return on_cpu, precision


def check_devices(processes: int, devices: int) -> None:
    """accelerate would let two processes share a GPU without a word. No device at all: they train on the CPU over gloo."""
    if devices and processes > devices:
        raise UserError(
            f"{processes} processes were launched on this machine, which shows {devices} GPU{'s' * (devices > 1)}: add"
            f" --num_processes {devices} (or check CUDA_VISIBLE_DEVICES)."
        )
    if not devices and processes > 1:
        logger.info("No GPU is visible: %d processes train on the CPU", processes)


def _open_group_of_this_attempt(on_cpu: bool) -> None:
    """torchrun keeps one store for all of its --max_restarts attempts, so that new ranks read the addresses of dead ones:
    6 of 12 restarts failed or hung. With the store's keys prefixed by the attempt 12 of 12 worked."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and "RANK" in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False, PATIENCE)
        if not on_cpu:
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "gloo" if on_cpu else "nccl", store=dist.PrefixStore(f"attempt{attempt}", store),
            rank=int(os.environ["RANK"]), world_size=world, timeout=PATIENCE,
        )  # fmt: skip


_signals: list[int] = []


def _note(number: int, frame: object) -> None:
    if number == signal.SIGINT and signal.SIGINT in _signals:
        raise KeyboardInterrupt  # asked twice: leave at once, without a checkpoint
    _signals.append(number)


def stop_after(hours: float) -> None:
    """A time limit acts as a signal does: save and leave at the end of a step."""
    if hours:
        signal.signal(signal.SIGALRM, _note)
        signal.setitimer(signal.ITIMER_REAL, hours * 3600)


def stop_requested() -> bool:
    """Has this process been asked to stop? Act on it only through `agree`, so that all ranks stop at the same step."""
    return bool(_signals)
