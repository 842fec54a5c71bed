"""Launch a script as users do, with real processes; interrupt it; read its run folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import forks
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train_quantumgrav.py"
MARK = "TEST_LAUNCH_ID"  # in the environment of every process of a launch, so that none can be left over unseen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Launch:
    """A running launch. `processes` ranks, forked (see forks.py) or started by `via`: python, accelerate, torchrun."""

    def __init__(
        self, args, *, processes=1, via=None, script=SCRIPT, env=None, config="2xcpu.yaml", launcher_args=(), cwd=ROOT
    ):
        self.id = uuid.uuid4().hex
        self.args = [str(a) for a in args]
        base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        base |= {MARK: self.id, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
        base |= {"PYTHONFAULTHANDLER": "1", **(env or {})}
        base = {k: v for k, v in base.items() if v is not None}  # None takes a variable away
        launchers = {
            "python": [sys.executable],
            "accelerate": [
                sys.executable, "-m", "accelerate.commands.launch",
                "--config_file", str(ROOT / "accelerate_configs" / config),
                "--num_processes", str(processes), *launcher_args,
            ],
            "torchrun": [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={processes}", *launcher_args,
            ],
        }  # fmt: skip
        self.log = tempfile.NamedTemporaryFile(prefix="launch-", suffix=".log")
        shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = free_port()
        alone = via in ("accelerate", "torchrun") or processes == 1  # they tell the ranks who they are
        ranks = [{}] if alone else [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        self.children = []
        for rank in ranks:
            environment = base | {name: str(value) for name, value in rank.items()}
            if via is None:
                request = {"script": str(script), "args": self.args, "env": environment, "cwd": str(cwd)}
                self.children.append(forks.Child(**request, log=self.log.name))
            else:
                options = {"stdout": self.log, "stderr": subprocess.STDOUT, "cwd": cwd, "start_new_session": True}
                command = [*launchers[via], str(script), *self.args]
                self.children.append(subprocess.Popen(command, env=environment, **options))

    @property
    def pid(self) -> int:
        return self.children[0].pid

    def output(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def wait(self, timeout: float = 240) -> int:
        """The first exit code that is not 0. A launch that outlives the timeout is killed and fails the test."""
        end = time.monotonic() + timeout
        try:
            codes = [child.wait(max(0.1, end - time.monotonic())) for child in self.children]
        except subprocess.TimeoutExpired:
            self.tell_stacks()
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        return next((code for code in codes if code), 0)

    def members(self) -> dict[int, str]:
        """Every living process of this launch with its command line: launcher, ranks, workers."""
        found, sessions = {}, {child.pid for child in self.children}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    marked = f"{MARK}={self.id}".encode() in (entry / "environ").read_bytes()
                    if state != "Z" and (marked or int(session) in sessions):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended while we looked
        return found

    def ranks(self) -> list[int]:
        """Training processes, oldest first; neither launchers nor loader workers."""
        members = self.members()
        mine = [p for p, command in members.items() if ".py" in command and "-m " not in command]
        return sorted(p for p in mine if int(Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[1]) not in mine)

    def tell_stacks(self) -> None:
        """Before a launch that hangs is killed: each process writes where its threads are (faulthandler's SIGABRT)."""
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGABRT)
            except ProcessLookupError:
                pass
        time.sleep(2)

    def kill(self) -> None:
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for child in self.children:
            child.wait()

    def wait_gone(self, seconds: float = 20) -> dict[int, str]:
        """What is still alive after the given time: empty when all is well."""
        end = time.monotonic() + seconds
        while (left := self.members()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def wait_for(self, condition, timeout: float = 120) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end or all(child.poll() is not None for child in self.children):
                self.tell_stacks()
                raise AssertionError(f"waited in vain:\n{self.output()}")
            time.sleep(0.02)


def run(args, *, ok: bool = True, timeout: float = 240, **options) -> str:
    """Launch, wait, and return the output; the exit code must be 0 (or, with ok=False, must not)."""
    launch = Launch(args, **options)
    code = launch.wait(timeout)
    text = launch.output()
    assert (code == 0) == ok, f"exit code {code}:\n{text}"
    return text


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes by which this process grows while it works, at most."""

    def kilobytes(key: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


def kill_while_it_writes(module: str, folder: Path, files: str, *flags: str) -> None:
    """Run a generator with --out `folder` and end it by SIGKILL when its hidden folder holds three of `files`."""
    command = [sys.executable, "-m", module, "--out", str(folder), "--train", "100000", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.parent.glob(f".{folder.name}.partial-*/{files}"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def rows(folder: Path, part: str = "") -> list[dict]:
    """Rows of metrics.jsonl without wall-clock values; `part` keeps those that hold such keys (train, val, test)."""
    found = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        if not part or any(k.startswith(part + "/") for k in row):
            found.append(row)
    return found


def last_step(folder: Path) -> int:
    try:
        return max((row["step"] for row in rows(folder)), default=0)
    except (OSError, ValueError):
        return 0


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Model and EMA of the newest checkpoint."""
    from safetensors.numpy import load_file

    newest = sorted((Path(folder) / "checkpoints").glob("step-*"))[-1]
    return {f"{name}/{k}": v for name in ("model", "ema") for k, v in load_file(newest / f"{name}.safetensors").items()}


def assert_same_run(one: Path, other: Path, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal rows, weights and EMA: to the bit when no tolerance is given."""
    mine, theirs = rows(one), rows(other)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) <= atol + rtol * abs(b[key]), (
                f"step {a['step']} {key}: {a[key]} != {b[key]}"
            )
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for key in a:
        if rtol == atol == 0:
            assert np.array_equal(a[key], b[key]), key
        else:
            np.testing.assert_allclose(a[key], b[key], rtol=rtol * 100, atol=max(atol, 1e-6), err_msg=key)
