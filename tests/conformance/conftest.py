"""--script and its flags, the lab that all checks share, the table at the end."""

from pathlib import Path

import pytest
from jobs import SMALL, Job
from lab import Lab


def pytest_addoption(parser):
    group = parser.getgroup("conformance")
    group.addoption("--script", help="the training script to be tested")
    group.addoption("--script-args", help="flags that make it small; {sets} {water} {camouflaged} {chests}: tiny demo data")
    group.addoption("--like", choices=sorted(SMALL), help="it is a fork of this script: use that one's small flags")
    group.addoption("--quick", action="store_true", help="only the checks that fit into two minutes")
    group.addoption("--patience", type=float, default=120.0, help="seconds after which a launch counts as hanging")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: left out by --quick")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--script", default=None):
        for item in items:
            if item.path.name == "test_conformance.py":
                item.add_marker(pytest.mark.skip(reason="no --script"))
    else:
        quick = config.getoption("--quick")
        left_out = [i for i in items if i.path.name != "test_conformance.py" or (quick and i.get_closest_marker("full"))]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def job(request, tmp_path_factory) -> Job:
    option = request.config.getoption
    script = Path(option("--script")).resolve()
    assert script.is_file(), f"--script {script} does not exist"
    name = option("--like") or script.stem.removeprefix("train_")
    return Job.of(script, name, option("--script-args"), request.getfixturevalue, lambda: tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def lab(job, request, tmp_path_factory):
    lab = Lab(job, tmp_path_factory.mktemp("lab"), request.config.getoption("--patience"))
    yield lab
    for launch in lab.launches:
        launch.kill()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--script", default=None):
        return
    results, seconds = {}, {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if "test_conformance.py" in getattr(report, "nodeid", "") and hasattr(report, "when"):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration  # of its fixtures too
                if outcome:
                    why = report.longrepr[2].removeprefix("Skipped: ") if outcome == "skipped" else ""
                    results[report.nodeid] = outcome.replace("error", "failed"), why and f"  ({why})"
    terminalreporter.section(f"conformance of {config.getoption('--script')}")
    for nodeid, (outcome, why) in results.items():
        name = nodeid.partition("::")[2].removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"{outcome:8}{seconds[nodeid]:6.1f} s  {name}{why}"[:160])
