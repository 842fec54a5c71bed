"""The suite is tested by mutation: each planted bug must make its check fail. Minutes; only when asked for:

    python -m pytest tests/conformance/mutants [-k resume] [--matrix]

With --matrix each mutant goes through all quick checks, and a table says which of them catch it."""

from collections.abc import Iterator
from inspect import getmembers, isfunction
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import test_conformance
from helpers import ROOT
from jobs import Job
from lab import Lab
from mutants import FORK, MUTANTS, Mutant

CHECKS = {name.removeprefix("test_"): check for name, check in getmembers(test_conformance, isfunction) if "test_" in name}
named = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.job}-{mutant.bug.replace(' ', '-')}")


def plant(mutant: Mutant | None, folder: Path, job: str = "quantumgrav") -> Path:
    """A copy of the repository's code with the bug in it."""
    for name in ("scripts", "common"):
        copytree(ROOT / name, folder / name, ignore=ignore_patterns("__pycache__"))
    for name, old, new in mutant.edits if mutant else ():
        path = folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
        path.write_text(text.replace(old, new))
        compile(path.read_text(), name, "exec")
    return folder / f"scripts/train_{mutant.job if mutant else job}.py"


def marks(function: object, name: str) -> list:
    return [mark for mark in getattr(function, "pytestmark", []) if mark.name == name]


def cases(name: str, full: bool) -> Iterator[dict]:
    """What a check is called with besides the lab."""
    check = CHECKS[name]
    if not marks(check, "parametrize"):
        yield {}
    for mark in marks(check, "parametrize"):
        names = [mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0]
        for case in mark.args[1]:
            if not isinstance(case, type(pytest.param())):
                case = pytest.param(*(case if len(names) > 1 else [case]))
            if full or not case.marks:
                yield dict(zip(names, case.values, strict=True))


def message(name: str, lab: Lab, full: bool = False) -> str | None:
    """What the check says of this script; None when it has nothing to say."""
    for case in cases(name, full):
        try:
            CHECKS[name](lab, **case)
        except (pytest.fail.Exception, AssertionError) as failure:
            return str(failure)
        except pytest.skip.Exception:
            pass
    return None


QUICK = [name for name, check in CHECKS.items() if not marks(check, "full")]


@pytest.fixture
def lab_of(request, tmp_path):
    """A lab for the script that is planted in the test's folder."""

    def make(script: Path, patience: float) -> Lab:
        name = script.stem.removeprefix("train_")
        job = Job.of(script, name, None, request.getfixturevalue, lambda: tmp_path)
        labs.append(Lab(job, tmp_path / "lab", patience, via=None))
        return labs[-1]

    labs: list[Lab] = []
    yield make
    for launch in [launch for lab in labs for launch in lab.launches]:
        launch.kill()


@named
def test_the_bug_can_be_planted_and_its_check_exists(mutant, tmp_path):
    plant(mutant, tmp_path)
    assert mutant.caught_by in CHECKS


def test_no_check_catches_nothing():
    assert CHECKS.keys() == {mutant.caught_by for mutant in MUTANTS}


@pytest.mark.slow
@named
def test_the_mutant_is_caught(mutant, tmp_path, lab_of, pytestconfig, record_property):
    lab = lab_of(plant(mutant, tmp_path), 30)
    found = {}
    if pytestconfig.getoption("--matrix"):
        found = {name: text for name in QUICK if (text := message(name, lab))}
    if mutant.caught_by not in found and (text := message(mutant.caught_by, lab, full=True)):
        found[mutant.caught_by] = text
    record_property(mutant.bug, found)
    assert mutant.caught_by in found, f"{mutant.bug}: only {sorted(found)} failed"


@pytest.mark.slow
def test_a_fork_of_quantumgrav_passes(tmp_path, lab_of):
    lab = lab_of(plant(FORK, tmp_path), 120)
    assert {name: text for name in QUICK if (text := message(name, lab))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("job", sorted({mutant.job for mutant in MUTANTS}))
def test_nothing_fails_without_a_mutation(job, tmp_path, lab_of):
    lab = lab_of(plant(None, tmp_path, job), 120)
    assert {name: text for name in CHECKS if (text := message(name, lab))} == {}
