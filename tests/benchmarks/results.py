"""The four demos and the further runs of the pages, from an empty folder, on one thread: what they reach, what they cost.

    python tests/benchmarks/results.py [quantumgrav] [student] [ultimate] [vqgan] [zoo] ... [--seeds 0 1 2] [--jobs 2]

Writes docs/results.json and the tables of README.md and scripts/README.md. The demos take 16 CPU minutes per seed; unnamed,
they are run and nothing else. The runs stand in tests/pages.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
import pages
import timing


def reported(text: str) -> dict[str, float]:
    """The lines "  0.930  boosting on all classical observables" of a report's first table."""
    found = re.findall(r"^ +(\d\.\d{3})  (\w.*)$", text, re.M)
    return {name: float(value) for value, name in reversed(found)}  # of a name that comes twice, the first


def measured(name: str, seed: int, *more: str) -> dict:
    """One run in a folder of its own. What a demo makes itself is in its minutes, and test phase and baselines in all."""
    run, commit = pages.RUNS[name], timing.commit()
    command = f"{run['command']} --seed {seed}"
    with tempfile.TemporaryDirectory() as folder:
        start = partial(subprocess.Popen, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        if "data" in run and start([sys.executable, *run["data"].split()[1:]]).wait():
            raise RuntimeError(f"{run['data']} failed")
        script, *flags = command.split()[1:]
        process = start([sys.executable, ROOT / script, *flags, *more, "--output-dir", f"{folder}/run"])
        _, status, usage = os.wait4(process.pid, 0)  # with the rank's own children, and of no other run
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}")
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        report = Path(folder, "run/report.txt").read_text()
    tested = {key: value for row in rows for key, value in row.items() if key.startswith("test/")}
    return {
        "run": name,
        "seed": seed,
        "command": command,
        "metrics": tested | reported(report),
        "cpu_minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "peak_mb": usage.ru_maxrss / 1024,
        "cpu": timing.processor(),
        "torch": version("torch"),
        "commit": commit,
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
    parser.add_argument("runs", nargs="*", metavar="run", help=", ".join(pages.RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    options = parser.parse_args()
    order = list(pages.RUNS)
    if unknown := set(options.runs) - set(order):
        parser.error(f"{', '.join(unknown)}: give some of {', '.join(order)}")
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(measured, *task) for task in product(options.runs or pages.DEMOS, options.seeds)]
        for done in as_completed(runs):
            if done.exception():
                continue  # the others have cost minutes: theirs are written
            record = done.result()
            others = [r for r in read() if (r["run"], r["seed"]) != (record["run"], record["seed"])]
            write(sorted([*others, record], key=lambda r: (order.index(r["run"]), r["seed"])))
    if failed := [str(done.exception()) for done in runs if done.exception()]:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
