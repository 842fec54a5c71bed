"""Small data made once for the whole suite."""

import pytest

from common.demo_data import causal_sets


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """203 causal sets of 8 to 16 atoms: prime-ish sizes, so that nothing divides evenly."""
    path = tmp_path_factory.mktemp("data") / "sets"
    causal_sets.write(path, 203, seed=1, preset="zoo", n_min=8, n_max=16, progress=False)
    return path
