"""The benchmarks import without the libraries that they compare with, and one command runs all of them. What they measure is
no test's business."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDER = ROOT / "tests" / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef measure(" in path.read_text())
COMPARED = ("monai", "ptwt", "pytorch_msssim", "torch_geometric", "vector_quantize_pytorch")
GOOD = """
from timing import Result, optional, paired

def with_library():
    import no_such_library
    yield

def measure():
    yield Result("faster", "theirs", unit="ms", goal=1, **paired(lambda: None, lambda: sum(range(100_000)), times=5))
    yield Result("too slow", "theirs", 4.0, 2.0, "ms", 0.5, 0.4, 0.6, goal=0.9)
    yield Result("alone", "", 1234.5, None, "s")
    yield from optional("no_such_library", with_library())
"""
BROKEN = """
from timing import Result, optional

def with_library():
    import no_such_dependency
    yield

def measure():
    yield Result("before", "", 1.0, None, "s")
    yield from optional("no_such_library", with_library())
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_without_libraries_and_says_how_it_runs(name, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(FOLDER)
    for library in COMPARED:
        monkeypatch.setitem(sys.modules, library, None)
    module = importlib.import_module(name)
    assert callable(module.measure) and f"python tests/benchmarks/{name}.py" in module.__doc__


@pytest.mark.parametrize("job", ["quantumgrav", "student", "ultimate", "vqgan"])
def test_what_the_profile_counts_is_in_the_script(job, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    profile = importlib.import_module("step_profile")
    for places in (profile.COMMON | profile.OWN[job]).values():
        for module, names in places:
            found = importlib.import_module(module or f"scripts.train_{job}")
            for name in names.split("."):
                found = getattr(found, name)
            assert callable(found)


def test_no_benchmark_hides_a_module_of_python():
    assert not {path.stem for path in FOLDER.glob("*.py")} & set(sys.stdlib_module_names)


def test_what_is_compared_with_is_in_the_requirements():
    wanted = (FOLDER / "requirements.txt").read_text().replace("-", "_")
    assert all(re.search(rf"^{library}>=", wanted, re.M) for library in COMPARED)


def run(folder, *words: str) -> subprocess.CompletedProcess:
    for name in ("__main__.py", "timing.py"):
        shutil.copy(FOLDER / name, folder)
    return subprocess.run([sys.executable, str(folder), *words], capture_output=True, text=True, timeout=60)


def test_one_command_prints_the_table_marks_what_misses_its_goal_and_writes_json(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "helper.py").write_text("no benchmark")
    done = run(tmp_path, "--out", f"{tmp_path}/results.json")
    assert done.returncode == 0, done.stderr
    faster, slow, alone, missing = done.stdout.splitlines()[3:7]
    assert "BELOW" not in faster and "0.50 [0.40, 0.60] BELOW 0.9  theirs" in slow
    assert alone.split() == ["alone", "1,234", "s"]
    assert "no_such_library is not installed: pip install" in missing
    assert "4 results" in done.stdout and "1 below their goal" in done.stdout
    report = json.loads((tmp_path / "results.json").read_text())
    assert {"machine", "versions", "commit", "date", "seconds", "costs", "results"} == set(report)
    assert 5 < report["costs"]["good"]["peak_mb"] < 4000 and 0 <= report["costs"]["good"]["seconds"] < 60
    assert report["results"][1] == {
        **{"benchmark": "good", "what": "too slow", "against": "theirs", "unit": "ms"},
        **{"ours": 4.0, "theirs": 2.0, "ratio": 0.5, "least": 0.4, "most": 0.6, "goal": 0.9},
    }
    first = report["results"][0]
    assert 1 < first["least"] <= first["ratio"] <= first["most"]


def test_a_broken_benchmark_stops_no_other_and_is_named(tmp_path):
    (tmp_path / "a_broken.py").write_text(BROKEN)
    (tmp_path / "good.py").write_text(GOOD)
    done = run(tmp_path, "--out", f"{tmp_path}/results.json")
    assert done.returncode != 0 and "broken: a_broken" in done.stderr and "no_such_dependency" in done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["what"] for row in rows if row["benchmark"] == "good"][:2] == ["faster", "too slow"]


def test_named_benchmarks_run_alone(tmp_path):
    (tmp_path / "a_broken.py").write_text(BROKEN)
    (tmp_path / "good.py").write_text(GOOD)
    assert run(tmp_path, "good").returncode == 0
    done = run(tmp_path, "better")
    assert done.returncode != 0 and "better" in done.stderr and "good" in done.stderr
