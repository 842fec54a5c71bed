"""Metrics against scikit-learn, and calibration against its definition."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from common.metrics import auc, calibration, confusion, weighted_f1


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    target, answer = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    counts = confusion(target, answer, 6)
    assert np.array_equal(counts, confusion_matrix(target, answer, labels=range(6)))
    assert weighted_f1(counts) == pytest.approx(
        f1_score(target, answer, average="weighted", labels=range(6), zero_division=0), abs=1e-12
    )
    binary, score = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9  # many ties
    assert auc(binary, score) == pytest.approx(roc_auc_score(binary, score), abs=1e-12)


def test_auc_of_one_class_is_not_a_number():
    assert np.isnan(auc(np.ones(3), np.arange(3)))


def test_calibration():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    error, table = calibration(np.array([1, 1, 1, 0]), confidence)
    assert error == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert table[9].tolist() == pytest.approx([0.95, 1.0, 0.5]) and table[5].tolist() == pytest.approx([0.55, 0.5, 0.5])
    assert calibration(np.ones(4), np.ones(4))[0] == 0
