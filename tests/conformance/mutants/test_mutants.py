"""The suite is tested by mutation: each planted bug must make its check fail. Minutes; only when asked for:

    python -m pytest tests/conformance/mutants [-k resume] [--matrix]

With --matrix each mutant goes through all checks, and a table says which of them catch it."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from helpers import ROOT
from mutants import MUTANTS, SCRIPT, Mutant

CHECKS = (ROOT / "tests" / "conformance" / "test_conformance.py").read_text()


def plant(mutant: Mutant | None, folder: Path) -> Path:
    """A copy of the repository's code with the bug in it."""
    for name in ("scripts", "common"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    for name, old, new in mutant.edits if mutant else ():
        path = folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
        compile(path.read_text(), name, "exec")
    return folder / SCRIPT


def failures(script: Path, folder: Path, *selection: str) -> dict[str, str]:
    """Check -> its message, of those that fail on this script."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/conformance/test_conformance.py", "--script", script, *selection]
    command += ["--patience", "60", f"--junitxml={report}", f"--basetemp={folder / 'runs'}", "-p", "no:cacheprovider"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        for failed in [*case.iter("failure"), *case.iter("error")]:  # an error: in what several checks share
            found[case.get("name").removeprefix("test_")] = failed.get("message")
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "-"))
def test_the_bug_can_be_planted_and_its_check_exists(mutant, tmp_path):
    plant(mutant, tmp_path)
    assert f"def test_{mutant.caught_by}(" in CHECKS


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug.replace(" ", "-"))
def test_the_mutant_is_caught(mutant, tmp_path, pytestconfig, asked):
    script = plant(mutant, tmp_path)
    selection = () if pytestconfig.getoption("--matrix") else ("-k", mutant.caught_by)
    found = failures(script, tmp_path, *selection)
    asked.append((mutant, found))
    assert any(name.startswith(mutant.caught_by) for name in found), f"{mutant.bug}: only {sorted(found)} failed"


@pytest.mark.slow
def test_nothing_fails_without_a_mutation(tmp_path, asked):
    assert failures(plant(None, tmp_path), tmp_path) == {}
