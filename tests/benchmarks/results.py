"""The four demos as a user runs them, from an empty folder, on one thread: what they reach and what they cost.

    python tests/benchmarks/demos.py [--seeds 0 1 2] [quantumgrav] [student] [ultimate] [vqgan]

Writes docs/results.json and the tables of README.md and scripts/README.md. All four take about 16 CPU minutes per seed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import pages
import timing


def reported(text: str) -> dict[str, float]:
    """The lines "  0.930  boosting on all classical observables" of a report's first table."""
    found = re.findall(r"^ +(\d\.\d{3})  (\w.*)$", text, re.M)
    return {name: float(value) for value, name in reversed(found)}  # of a name that comes twice, the first


def measured(job: str, seed: int, *more: str) -> dict:
    """One run in a folder of its own; data, training, test phase and baselines are all in its minutes."""
    command = ["python", f"scripts/train_{job}.py", "--demo", "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, ROOT / command[1], *command[2:], *more, "--output-dir", f"{folder}/run"]
        process = subprocess.Popen(arguments, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)  # with the rank's own children, and of no other run
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        report = Path(folder, "run/report.txt").read_text()
    tested = {key: value for row in rows for key, value in row.items() if key.startswith("test/")}
    return {
        "script": job,
        "seed": seed,
        "command": " ".join(command),
        "metrics": tested | reported(report),
        "cpu_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak_mb": usage.ru_maxrss / 1024,
        "cpu": timing.processor(),
        "torch": version("torch"),
        "commit": timing.commit(),
        "date": date.today().isoformat(),
    }


def read() -> list[dict]:
    return json.loads(pages.RESULTS.read_text()) if pages.RESULTS.exists() else []


def write(records: list[dict]) -> None:
    pages.RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    for page, name, text in pages.blocks(records):
        page.write_text(pages.filled(page.read_text(), name, text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(pages.SHOWN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for job in options.scripts or pages.SHOWN:
        for seed in options.seeds:
            record = measured(job, seed)
            others = [r for r in read() if (r["script"], r["seed"]) != (job, seed)]
            write(sorted([*others, record], key=lambda r: (r["script"], r["seed"])))


if __name__ == "__main__":
    main()
