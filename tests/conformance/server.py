"""The process from which `warm.py` forks: it reads torch once, then answers one line of JSON with another.

{"script": ..., "args": ..., "env": ..., "cwd": ..., "log": ...}: a child becomes this script; answered by its pid.
{"poll": pid}: answered by its exit code, null while it runs."""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import sys
import threading
import traceback
import types
from pathlib import Path

HOOK = Path(__file__).parent / "hook" / "sitecustomize.py"
READ = (
    "torch",
    "torch._dynamo",
    "accelerate",
    "safetensors.torch",
    "matplotlib.figure",
    "tyro",
    "yaml",
    "tqdm",
    "torchvision",
)


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
    sys.path[0] = str(Path(script).parent)
    sys.path[1:1] = [p for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    code = 0
    try:
        runpy.run_path(str(HOOK))
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


if __name__ == "__main__":
    serve()
