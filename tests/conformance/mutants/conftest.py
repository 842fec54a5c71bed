import pytest


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="run all checks on every mutant")


def pytest_collection_modifyitems(config, items):
    """The long ones only by name: not in the plain run of the repository's tests, nor with --script."""
    if any("mutants" in str(argument) for argument in config.invocation_params.args):
        return
    left_out = [i for i in items if "mutants" in i.path.parts and i.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter):
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    for report in reports:
        for bug, found in report.user_properties if report.when == "call" else ():
            terminalreporter.write_line(f"{report.duration:5.1f} s  {bug}: {', '.join(sorted(found)) or 'nothing'}")
            for message in found.values():
                terminalreporter.write_line(f"           {' '.join(message.split())[:250]}")
