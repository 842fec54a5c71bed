"""Processes that need not read torch again: one has read it and becomes the script by fork.

Reading torch, accelerate and matplotlib, and drawing, take four fifths of the time of a tiny run. What is forked trains,
saves and logs as ever, and draws pictures of one pixel. What draws all or uses W&B, which knows no forks, starts Python
(`via="python"`).

The server answers one line of JSON with another. {"script", "args", "env", "cwd", "log"}: a child becomes this script;
answered by its pid. {"poll": pid}: answered by its exit code, null while it runs."""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from functools import cache
from pathlib import Path

READ = (
    *("torch", "torch._dynamo", "torch.utils.data", "accelerate", "safetensors.torch", "tyro", "yaml", "tqdm"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "timm", "torchvision", "nibabel", "cv2"),
    *("scipy.ndimage", "scipy.stats", "sklearn.ensemble"),
)


class Child:
    """A forked process, as far as subprocess.Popen is asked for."""

    def __init__(self, **request):
        self.pid, self.code = server().ask(request), None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = server().ask({"poll": self.pid})
        return self.code

    def wait(self, timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # Ctrl-C is pytest's
        atexit.register(self.close)

    def ask(self, request: dict) -> int | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@cache
def server() -> Server:
    return Server()


# ---------------------------------------------------------------------------------------------------------------------
# the server's side


def draw_one_pixel(figure, target, *, format: str | None = None, **options) -> None:
    from PIL import Image

    Image.new("RGB", (1, 1)).save(target, format)


def become(request: dict) -> None:
    """Never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    script = request["script"]
    sys.argv = [script, *request["args"]]
    sys.orig_argv = [sys.executable, *sys.argv]
    added = [p for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:1] = [str(Path(script).parent), *added]
    sys.modules["matplotlib.figure"].Figure.savefig = draw_one_pixel
    sys.modules["numpy"].random.seed()  # else all children draw the same, and what is not seeded looks as if it were
    code = 0
    try:
        for hook in [Path(p) / "sitecustomize.py" for p in added]:
            if hook.exists():  # Python would have read it when it starts
                runpy.run_path(str(hook))
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        module.__file__ = script
        exec(compile(Path(script).read_text(), script, "exec"), module.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    for name in READ:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # the script reads what it needs
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answers.write(json.dumps(os.waitstatus_to_exitcode(status) if pid else None) + "\n")
            continue
        pid = os.fork()
        if pid == 0:
            answers.detach()
            become(request)
        answers.write(json.dumps(pid) + "\n")
    os._exit(0)  # nothing to tidy up, and torch's bindings complain of each other when they are


if __name__ == "__main__":
    serve()
