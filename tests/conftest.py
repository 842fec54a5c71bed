"""Small data made once for the whole suite."""

import logging
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads; where there is no network its retries take a minute

from common.demo_data import camouflage, causal_sets, ct, underwater


@pytest.fixture(autouse=True)
def the_log_reaches_caplog(monkeypatch):
    """Whatever test set the log up before. Here, since inside a test pytest has chosen its loggers already."""
    monkeypatch.setattr(logging.getLogger("run"), "propagate", True)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """203 causal sets of 8 to 16 atoms: prime-ish sizes, so that nothing divides evenly."""
    path = tmp_path_factory.mktemp("data") / "sets"
    causal_sets.write(path, 203, seed=1, preset="zoo", n_min=8, n_max=16, progress=False)
    return path


@pytest.fixture(scope="session")
def water(tmp_path_factory):
    """23 pairs with labels and test sets of 5, 3 and 1 pictures: fewer than processes, too."""
    path = tmp_path_factory.mktemp("data") / "water"
    underwater.write(path, 23, test=5, nonref=3, seed=1, size=(48, 56), label_size=8, progress=False)
    return path


@pytest.fixture(scope="session")
def camouflaged(tmp_path_factory):
    """26 pictures with masks, 10 to test on, and a fifth more of each without an object."""
    path = tmp_path_factory.mktemp("data") / "camouflage"
    camouflage.write(path, 26, test=10, noncam=0.2, seed=1, size=64, progress=False)
    return path


@pytest.fixture(scope="session")
def chests(tmp_path_factory):
    """8 patients with 10 scans or so, each of another odd shape of about 40 x 36 x 44 voxels."""
    path = tmp_path_factory.mktemp("data") / "chests"
    ct.write(path, 8, seed=1, size=(40, 36, 44), progress=False)
    return path
