"""Figures of matplotlib, which is imported when the first is drawn: only rank 0 has to wait for it."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def subplots(rows: int, columns: int, width: float, height: float) -> tuple["Figure", np.ndarray]:
    """A figure of so many inches and its axes (rows, columns). Not pyplot's: those want a screen and must be closed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: "Figure", path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
