"""Launches that need not read torch again: `server.py` has read it and becomes the script under test by fork.

Reading torch, accelerate and matplotlib is most of a tiny run. The undisturbed run and the checks of the launchers start
Python as users do; the others are forked and must give the same to the bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import Launch, free_port

HOOK = Path(__file__).parent / "hook"


class Server:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))], env=environment, **pipes
        )

    def ask(self, request: dict) -> int | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Child:
    """What `Launch` asks of a process."""

    def __init__(self, server: Server, **request):
        self.server, self.pid, self.code = server, server.ask(request), None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def wait(self, timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.code


class WarmLaunch(Launch):
    def __init__(self, server: Server, args: list[str], *, processes: int, script: Path, env: dict[str, str], cwd: Path):
        self.args = args
        self.log = open(Path(json.loads(env["CONFORMANCE"])["ledger"]) / "output.log", "w+")
        base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        base |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **env}
        shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = free_port()
        self.children = []
        for rank in range(processes):
            mine = shared | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            request = {"args": args, "script": str(script), "env": base | {k: str(v) for k, v in mine.items()}}
            self.children.append(Child(server, **request, cwd=str(cwd), log=self.log.name))

    def members(self) -> dict[int, str]:
        """Ranks and their loader workers: a session each."""
        found, sessions = {}, {child.pid for child in self.children}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                except OSError:
                    continue  # it ended while we looked
                if int(session) in sessions and state != "Z":
                    found[int(entry.name)] = entry.name
        return found
