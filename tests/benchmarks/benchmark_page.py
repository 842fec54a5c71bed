"""docs/benchmarks.md of docs/benchmarks.json, which `python tests/benchmarks --out docs/benchmarks.json` has measured.

python tests/benchmarks/benchmark_page.py
"""

import ast
import json
from pathlib import Path

import timing

HERE = Path(__file__).resolve().parent
REPORT = HERE.parents[1] / "docs" / "benchmarks.json"
PAGE = REPORT.with_suffix(".md")


def row(found: dict) -> str:
    result = timing.Result(**{name: value for name, value in found.items() if name != "benchmark"})
    what, *others = timing.cells(result)
    return f"| {' | '.join([what.replace('    ', '&nbsp; '), *others])} |"


def page(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        "# Benchmarks",
        "Made by `python tests/benchmarks --out docs/benchmarks.json && python tests/benchmarks/benchmark_page.py`\n"
        f"in {report['seconds'] / 60:.0f} minutes on {report['machine']}; {versions}, commit {report['commit']}.\n"
        "Libraries to compare with: `pip install --no-deps -r tests/benchmarks/requirements.txt`.",
        "Both sides are measured in turn, A B A B; the figures are medians. *Times better* is the median of the pairs'\n"
        "ratios with the smallest and largest: 2 is half the time or memory. What is below its goal says so.",
    ]
    for name in dict.fromkeys(found["benchmark"] for found in report["results"]):
        title = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())).split("\n\n")[0]
        table = ["| | here | there | times better | against |", "|---|---|---|---|---|"]
        table += [row(found) for found in report["results"] if found["benchmark"] == name]
        cost = report["costs"][name]
        run = f"`python tests/benchmarks/{name}.py`: {cost['seconds']} s, largest process {cost['peak_mb']:,} MB."
        parts += [f"## {name}", f"{title}\n{run}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(REPORT.read_text())))
