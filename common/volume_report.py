"""What a person looks at after a run on CT volumes: tables per scan and per set, three planes of some scans."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.pictures import save
from common.restoration_report import interval
from common.restoration_report import write_csv as write_csv  # one row per scan, for the scripts

METHODS = {"": "this run", "resize_": "resize"}
PLANES = {  # the axis across the plane, those to its right and up, the sides of the body at its left and right
    "axial": (2, 0, 1, "RL"),
    "coronal": (1, 0, 2, "RL"),
    "sagittal": (0, 1, 2, "AP"),
}
LUNG_LEVEL, LUNG_WIDTH = -600, 1500  # the window in which radiologists look at lungs


def summary(tables: dict[str, dict[str, np.ndarray]], bits_per_voxel: float) -> str:
    """Per set and tissue, this run beside the resize of equal compression, whose columns begin with `resize_`. NaN marks a
    scan without the tissue, which does not count."""
    lines = []
    for name, table in tables.items():
        columns = [column for column in table if column != "id" and not column.startswith("resize_")]
        tissues = list(dict.fromkeys(column.partition("psnr_")[2] for column in columns if column.startswith("psnr")))
        metrics = [column for column in columns if not any(t and column.endswith(f"_{t}") for t in tissues)]
        lines.append(
            f"{name}, {len(table['id'])} scans, {bits_per_voxel:.3g} bits per voxel (1:{16 / bits_per_voxel:.0f}),"
            " mean and 95 % interval"
        )
        lines.append(" " * 18 + "".join(f"{metric:>18}" for metric in metrics))
        for tissue in tissues:
            for prefix, title in METHODS.items():
                cells = [table[prefix + metric + (f"_{tissue}" if tissue else "")] for metric in metrics]
                shown = [_mean(cell, 4 if metric == "ssim" else 2) for cell, metric in zip(cells, metrics, strict=True)]
                lines.append(f"{tissue or 'volume':<8}{title:<10}" + "".join(f"{cell:>18}" for cell in shown))
        lines.append("")
    return "\n".join(lines).rstrip()


def _mean(values: np.ndarray, digits: int) -> str:
    values = values[~np.isnan(values)]
    if not len(values):
        return "-"
    spread = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


class ScanView(NamedTuple):
    name: str
    original: np.ndarray  # HU, RAS order, like the reconstruction
    reconstruction: np.ndarray
    spacing: tuple[float, float, float]  # mm
    scores: dict[str, float]


def plane(hu: np.ndarray, axis: int) -> np.ndarray:
    """The middle plane across an axis, as radiologists see it: seen from the feet, from the front, from the patient's left.
    So the patient's right, or in the sagittal plane the front, is on the left of the picture; anterior or superior is up."""
    return np.take(hu, hu.shape[axis] // 2, axis)[::-1, ::-1].T


def planes_sheet(path: Path, views: Sequence[ScanView], *, hu_min: float, hu_max: float) -> None:
    """Per scan three lines, the axial, coronal and sagittal plane, with original and reconstruction in the lung window and
    the error within the scored window. All errors of a sheet have one scale, which 0.5 % of the pixels shown exceed."""
    from matplotlib.figure import Figure

    sheets = []  # per scan, per plane: the three pictures
    for view in views:
        pairs = [[plane(hu, across).astype(float) for hu in view[1:3]] for across, *_ in PLANES.values()]
        sheets.append([(x, y, y.clip(hu_min, hu_max) - x.clip(hu_min, hu_max)) for x, y in pairs])
    errors = np.concatenate([np.abs(error).ravel() for sheet in sheets for *_, error in sheet])
    limit = max(np.quantile(errors, 0.995), 1)
    lung = {"cmap": "gray", "vmin": LUNG_LEVEL - LUNG_WIDTH / 2, "vmax": LUNG_LEVEL + LUNG_WIDTH / 2}
    styles = (lung, lung, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit})
    titles = ("original, lung window, radiological view", "reconstruction", "reconstruction - original")

    sizes = [np.multiply(view.original.shape, view.spacing) for view in views]  # mm
    ratios = [[mm[up] / max(mm[0], mm[1]) for _, _, up, _ in PLANES.values()] for mm in sizes]
    heights = [3.2 * sum(ratio) + 0.9 for ratio in ratios]
    figure = Figure(figsize=(10.8, sum(heights)), layout="constrained")
    blocks = figure.subfigures(len(views), 1, height_ratios=heights, squeeze=False)[:, 0]
    for block, view, sheet, mm, ratio in zip(blocks, views, sheets, sizes, ratios, strict=True):
        block.suptitle(f"{view.name}: PSNR {view.scores['psnr']:.2f} dB, SSIM {view.scores['ssim']:.4f}", fontsize=11)
        axes = block.subplots(3, 3, height_ratios=ratio)
        for line, pictures, (name, (_, right, up, sides)) in zip(axes, sheet, PLANES.items(), strict=True):
            for axis, picture, style in zip(line, pictures, styles, strict=True):
                shown = axis.imshow(picture, extent=(0, mm[right], 0, mm[up]), interpolation="nearest", **style)
                axis.set_xticks([])
                axis.set_yticks([])
            line[0].set_ylabel(name, fontsize=9)
            for place, side in zip((0.04, 0.96), sides, strict=True):
                line[0].text(place, 0.9, side, transform=line[0].transAxes, color="yellow", ha="center")
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
        block.colorbar(shown, ax=axes[:, 2], label="error, HU", shrink=0.6, panchor=False, extend="both")
    save(figure, path, 130)
