"""Metrics over whole sets of samples, each the published definition and tested against a reference."""

import numpy as np


def confusion(target: np.ndarray, answer: np.ndarray, classes: int) -> np.ndarray:
    """Counts, rows are the truth, columns the answer."""
    return np.bincount(target.astype(int) * classes + answer.astype(int), minlength=classes * classes).reshape(
        classes, classes
    )


def weighted_f1(counts: np.ndarray) -> float:
    """F1 per class, weighted by how often the class occurs; a class that is neither true nor answered scores 0."""
    hit, true, answered = np.diag(counts), counts.sum(1), counts.sum(0)
    f1 = 2 * hit / np.maximum(true + answered, 1)
    return float((f1 * true).sum() / max(true.sum(), 1))


def auc(target: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half. NaN for one class."""
    positive = int((target > 0).sum())
    negative = len(target) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank of equal scores
    return float((rank[inverse][target > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration(correct: np.ndarray, confidence: np.ndarray, bins: int = 10) -> tuple[float, np.ndarray]:
    """Expected calibration error (Guo et al. 2017) and, per bin, mean confidence, accuracy and share of the samples."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    safe = np.maximum(count, 1)
    mean = np.bincount(index, confidence, minlength=bins) / safe
    accuracy = np.bincount(index, correct.astype(float), minlength=bins) / safe
    share = count / max(len(correct), 1)
    return float((share * np.abs(mean - accuracy)).sum()), np.stack([mean, accuracy, share], 1)
