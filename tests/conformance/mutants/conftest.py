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


CAUGHT: list = []


@pytest.fixture(scope="session")
def asked() -> list:
    """(mutant, {check: message}) of this session."""
    return CAUGHT


def pytest_terminal_summary(terminalreporter):
    for mutant, found in CAUGHT:
        terminalreporter.write_line(f"{mutant.bug}: {', '.join(sorted(found)) or 'nothing'}")
        for name, message in sorted(found.items()):
            if name.startswith(mutant.caught_by):
                terminalreporter.write_line(f"    {message[:400]}")
