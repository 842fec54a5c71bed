"""Every benchmark, or the named ones, each in a process of its own, one after another.

    python tests/benchmarks [wavelets] [quantizers] ... [--out results.json]

A benchmark is a file here with a function measure(), which yields results; `python tests/benchmarks/wavelets.py` runs one
alone. Libraries to compare with: pip install --no-deps -r tests/benchmarks/requirements.txt. What lies below its goal is
marked, and is no failure: other programs disturb. Only a benchmark that breaks is one.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import timing

HERE = Path(__file__).resolve().parent


def benchmarks(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if re.search(r"^def measure\(", path.read_text(), re.M))


def run(name: str) -> tuple[list[timing.Result], dict] | None:
    """What it measured and what that cost; None if it broke, with its traceback in the terminal."""
    print(f"\n{name}", flush=True)
    with tempfile.NamedTemporaryFile("r") as record:
        process = multiprocessing.get_context("spawn").Process(target=timing.show_module, args=(name, Path(record.name)))
        process.start()
        process.join()
        lines = [json.loads(text) for text in record]
    return None if process.exitcode else ([timing.Result(**line) for line in lines[:-1]], lines[-1])


def main() -> None:
    known = benchmarks(HERE)
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", choices=[*known, []], help=", ".join(known))
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    flags = parser.parse_args()
    if flags.out and flags.names and flags.out.exists():
        parser.error(f"{flags.out} holds other results: name another file, or run all benchmarks")
    if flags.out:
        flags.out.touch()  # what cannot be written is said now, not in a quarter of an hour
    os.environ["OMP_NUM_THREADS"] = "1"
    began, found = time.perf_counter(), {name: run(name) for name in flags.names or known}
    broken = [name for name, answer in found.items() if answer is None]
    whole = {name: answer for name, answer in found.items() if answer}
    pairs = [(name, result) for name, (results, _) in whole.items() for result in results]
    report = {
        "machine": f"{timing.processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "accelerate", "timm")},
        "commit": timing.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began),
        "costs": {name: cost for name, (_, cost) in whole.items()},
        "results": [{"benchmark": name} | asdict(result) for name, result in pairs],
    }
    if flags.out:
        flags.out.write_text(json.dumps(report, indent=1) + "\n")
    missed = sum(result.missed for _, result in pairs)
    print(f"\n{len(pairs)} results in {report['seconds']} s, {missed} below their goal. {report['machine']}")
    if broken:
        sys.exit(f"broken: {', '.join(broken)}")


if __name__ == "__main__":
    main()
