"""What a person looks at after a restoration run: a table with every image, a table of the sets, pictures."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from common.pictures import save, subplots

METHODS = {"": "this run", "input_": "the input itself", "grey_world_": "grey-world"}


def write_csv(path: Path, names: Sequence[str], table: dict[str, np.ndarray]) -> None:
    """One row per image, of what is one number per image: no curves."""
    columns = [column for column, values in table.items() if column != "id" and values.ndim == 1]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *columns])
        for position, index in enumerate(table["id"]):
            writer.writerow([names[int(index)], *(f"{table[column][position]:.6g}" for column in columns)])


def interval(values: np.ndarray, draws: int = 2000) -> float:
    """Half the width of the bootstrap's 95 % interval of the mean: what another draw of as many test images may change."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(high - low) / 2


def summary(tables: dict[str, dict[str, np.ndarray]], variant: str) -> str:
    """Per set, this run beside doing nothing and grey-world, in each convention of the literature."""
    lines = []
    for name, table in tables.items():
        columns = [column for column in table if column != "id" and not column.startswith(("input_", "grey_world_"))]
        lines.append(
            f"{name}, {len(table['id'])} images, mean and 95 % interval" + ("" if "psnr" in table else f" [{variant}]")
        )
        lines.append(" " * 18 + "".join(f"{column:>18}" for column in columns))
        for prefix, title in METHODS.items():
            cells = [table[prefix + column] for column in columns]
            digits = [2 if column.startswith("psnr") else 3 for column in columns]
            shown = [f"{v.mean():.{d}f} ± {interval(v):.{d}f}" for v, d in zip(cells, digits, strict=True)]
            lines.append(f"{title:<18}" + "".join(f"{cell:>18}" for cell in shown))
        lines.append("")
    return "\n".join(lines).rstrip()


def picture_sheet(path: Path, rows: Sequence[tuple[str, Tensor, Tensor, Tensor | None]]) -> None:
    """A row per image: input, output, and with a reference also this and three times the error."""
    titles = ["input", "output"] + (["reference", "error x 3"] if rows[0][3] is not None else [])
    aspect = sum(image.shape[1] / image.shape[2] for _, image, _, _ in rows)
    figure, axes = subplots(len(rows), len(titles), 2.6 * len(titles), 2.6 * aspect + 0.3 * len(rows))
    for line, (name, image, output, target) in zip(axes, rows, strict=True):
        shown = [image, output] + ([target, (output - target).abs() * 3] if target is not None else [])
        for axis, picture, title in zip(line, shown, titles, strict=True):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            error = "" if target is None or title not in ("input", "output") else f", {decibels(picture, target):.1f} dB"
            axis.set_title(title + error, fontsize=8)
        line[0].set_ylabel(name[-24:], fontsize=7)
    save(figure, path, 130)


def decibels(image: Tensor, target: Tensor) -> float:
    return float(-10 * (image.clamp(0, 1) - target).square().mean().clamp(min=1e-10).log10())
