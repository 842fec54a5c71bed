"""--script and its flags, the four scripts' small arguments, the lab that all checks share, the table at the end."""

import shlex
from pathlib import Path

import pytest
from lab import Job, Lab

SMALL = {  # script: (flags, batch flags with their value for one process, other settings)
    "quantumgrav": (
        "--dataset-path {sets} --split 0.7 0.19 0.11 --tasks manifold_like class curvature --width 16 --layers 1"
        " --coarse-grain 0.3 --baseline-sets 0 --lr 1e-3 --epochs 9 --max-steps 30 --eval-every 10 --save-every 5",
        {"--batch-size": 12},
        {"rtol": 2e-5, "atol": 1e-6, "early": ("--lr", 0.1)},
    ),
    "student": (
        "--train-root {water}/UIEB --pseudo-root {water}/pseudo --val-ref-root {water}/testset_ref"
        " --val-nonref-root {water}/testset_nonref --img-size 32 --width 8 --blocks 1 1 2 --heads 4 --perceptual-weight 0"
        " --val-images 3 --warmup-steps 2 --epochs 9 --max-steps 16 --eval-every 7 --save-every 4",
        {"--batch-size": 4},
        {"rtol": 2e-5, "atol": 1e-6},
    ),
    "ultimate": (
        "--dataset-path {camouflaged} --backbone test_convnext --backbone-weights none --img-size 64 --width 16 --top-k 2"
        " --stage1-epochs 2 --epochs 6 --warmup-epochs 1 --progressive-unfreeze --multi-scale 1 1.5"
        " --eval-every 3 --save-every 5",
        {"--batch-size": 8, "--stage2-batch-size": 4},
        {"rtol": 2e-5, "atol": 1e-3, "early": ("--lr", 1e-9, "--stage2-lr", 1e-9, "--min-lr", 0)},
    ),
    "vqgan": (
        "--dataset-path {chests}/scans --patch-size 16 16 16 --tile-size 32 --width 4 --blocks 1 --n-codes 32 --disc-width 4"
        " --disc-layers 2 --perceptual-weight 0 --val-patients 2 --test-patients 3 --crops-per-scan 3 --warmup-steps 2"
        " --discriminator-iter-start 4 --discriminator-warmup 2 --gan-ramp 3 --epochs 9 --max-steps 10 --eval-every 5"
        " --save-every 4",
        {"--batch-size": 4},
        {"rtol": 2e-4, "atol": 2e-6, "idle": ("image.head.bias", "video.head.bias")},  # the hinge's halves cancel exactly
    ),
}
ANY = "--epochs 99 --max-steps 16 --eval-every 7 --save-every 4"  # what a script gets before --script-args
DATA = ("sets", "water", "camouflaged", "chests")  # fixtures of tests/conftest.py that {name} in the flags stands for


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
    given, (small, batches, settings) = option("--script-args"), SMALL.get(name, ("", {"--batch-size": 4}, {}))
    if name in SMALL:
        flags, cwd = f"{small} {given or ''}", Path.cwd()
    elif given:
        flags, cwd = f"{ANY} {given}", Path.cwd()
    else:  # its demo data go to a folder of their own
        flags, cwd = f"--demo {ANY}", tmp_path_factory.mktemp("demo")
    args = [a.format_map({d: request.getfixturevalue(d) for d in DATA if f"{{{d}}}" in a}) for a in shlex.split(flags)]
    return Job(script, tuple(args), batches, cwd, **settings)


@pytest.fixture(scope="session")
def lab(job, request, tmp_path_factory):
    lab = Lab(job, tmp_path_factory.mktemp("lab"), request.config.getoption("--patience"))
    yield lab
    for launch in lab.launches:
        launch.kill()
    lab.server.close()


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
