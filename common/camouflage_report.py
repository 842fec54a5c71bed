"""What a person looks at after a segmentation run: scores by kind of animal and object size, what the experts do, the best
and worst masks."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.camouflage import MaskedImages, size_class, superclass

SHOWN = ("sm", "wfm", "fm_mean", "em_mean", "mae", "iou", "dice")
KINDS = ("Aquatic", "Terrestrial", "Flying", "Amphibian", "Other", "unknown")


def columns(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One number per image and column: no curves."""
    return {name: values for name, values in table.items() if values.ndim == 1}


def line_of(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4f}" for name in SHOWN)


def breakdown(title: str, table: dict[str, np.ndarray], images: MaskedImages) -> str:
    """Per super-class and per size of the object."""
    kinds = np.array([superclass(images.stems[int(i)]) for i in table["id"]])
    sizes = np.array([size_class(float(area)) for area in table["area"]])
    groups = [("all", np.ones(len(kinds), bool))]
    groups += [(kind, kinds == kind) for kind in KINDS if (kinds == kind).any() and not (kinds == kind).all()]
    groups += [(f"{size} objects", sizes == size) for size in ("small", "medium", "large") if (sizes == size).any()]
    lines = [f"{title}: {len(kinds):,} images; iou and dice at 0.5 of the map as saved, per image"]
    lines.append(f"  {'':<16}{'images':>8}" + "".join(f"{name:>9}" for name in SHOWN))
    for name, mine in groups:
        values = {key: mean_of(table, key, mine) for key in SHOWN}
        lines.append(f"  {name:<16}{mine.sum():>8,}" + "".join(f"{values[key]:>9.3f}" for key in SHOWN))
    return "\n".join(lines)


def mean_of(table: dict[str, np.ndarray], key: str, mine: np.ndarray) -> float:
    if key.endswith("_mean"):
        return float(table[key.replace("_mean", "_curve")][mine].mean())
    return float(table[key][mine].mean())


def loads(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stride to (images, experts), how an image's choices are shared out."""
    found = {key.removeprefix("route/"): values for key, values in table.items() if key.startswith("route/")}
    return {key: values / values.sum(1, keepdims=True) for key, values in found.items()}


def routing_report(table: dict[str, np.ndarray], images: MaskedImages, lost: dict[str, tuple[float, float]]) -> str:
    """Load per expert and level, the routers' entropy, and what the IoU loses when an expert is silent."""
    names = list(lost)
    lines = ["Experts on the validation images: share of the choices per stride; when silent, the mean IoU"]
    lines[0] += " lost, and how far an image's IoU moves"
    lines.append(f"  {'':<14}" + "".join(f"{name[:10]:>11}" for name in names) + f"{'entropy':>11}")
    for key, share in loads(table).items():
        entropy = table[f"stride_{key}/entropy"].mean() / np.log(share.shape[1])
        lines.append(f"  stride {key:<7}" + "".join(f"{value:>11.2f}" for value in share.mean(0)) + f"{entropy:>11.2f}")
    for row, title in enumerate(("IoU lost", "IoU moves")):
        lines.append(f"  {title:<14}" + "".join(f"{values[row]:>11.4f}" for values in lost.values()))
    return "\n".join(lines)


def _figure(*size, **options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, *plt.subplots(*size, layout="constrained", **options)


def _save(plt, figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def routing_picture(
    path: Path, table: dict[str, np.ndarray], images: MaskedImages, lost: dict[str, tuple[float, float]]
) -> None:
    """Expert by super-class, one panel per level, and the ablation."""
    shares = loads(table)
    kinds = np.array([superclass(images.stems[int(i)]) for i in table["id"]])
    present = [kind for kind in KINDS if (kinds == kind).any()]
    plt, figure, axes = _figure(1, len(shares) + 1, figsize=(4.2 * (len(shares) + 1), 3.6), squeeze=False)
    names = list(lost) or [str(i) for i in range(next(iter(shares.values())).shape[1])]
    for axis, (key, share) in zip(axes[0], shares.items(), strict=False):
        matrix = np.stack([share[kinds == kind].mean(0) for kind in present])
        axis.imshow(matrix, vmin=0, vmax=max(0.34, matrix.max()), cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(matrix):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.22 else "k")
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(present)), present, fontsize=8)
        axis.set_title(f"choices at stride {key}", fontsize=10)
    axis = axes[0][-1]
    for row, label in enumerate(("mean lost", "moves per image")):
        axis.bar(np.arange(len(lost)) + 0.4 * row - 0.2, [values[row] for values in lost.values()], 0.4, label=label)
    axis.legend(fontsize=8)
    axis.axhline(0, color="k", linewidth=0.8)
    axis.set_xticks(range(len(lost)), list(lost), rotation=45, ha="right", fontsize=8)
    axis.set_title("IoU when the expert is silent", fontsize=10)
    _save(plt, figure, path)


def mask_sheet(path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """A row per image: image, mask, map, and the map's outline (red) beside the mask's (green)."""
    titles = ("image", "mask", "map", "outlines: mask green, map red")
    plt, figure, axes = _figure(len(rows), 4, figsize=(10, 2.7 * len(rows)), squeeze=False)
    for line, (name, image, mask, answer) in zip(axes, rows, strict=True):
        for axis, picture, title in zip(line, (image, mask, answer, image), titles, strict=True):
            axis.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title, fontsize=8)
        for shape, colour in ((mask.astype(float), "lime"), (answer, "red")):
            if shape.min() < 0.5 < shape.max():
                line[3].contour(shape, levels=[0.5], colors=colour, linewidths=1.2)
        line[0].set_title(name, fontsize=8)
    _save(plt, figure, path)


def read_levels(root: Path) -> dict[str, float]:
    """How different the generator made each object's texture from its surroundings."""
    with open(root / "Info" / "difficulty.csv", newline="") as file:
        return {row["name"]: float(row["level"]) for row in csv.DictReader(file)}


def difficulty_picture(path: Path, levels: np.ndarray, scores: dict[str, np.ndarray], bins: int = 5) -> None:
    """Mean IoU against how much the object's texture differs from its surroundings."""
    plt, figure, axis = _figure(figsize=(5.5, 3.6))
    edges = np.quantile(levels, np.linspace(0, 1, bins + 1))
    place = np.clip(np.searchsorted(edges, levels, side="right") - 1, 0, bins - 1)
    used = np.unique(place)
    middle = [levels[place == b].mean() for b in used]
    for name, values in scores.items():
        axis.plot(middle, [values[place == b].mean() for b in used], marker="o", label=name)
    axis.set_xlabel("level: how different the object's texture is (left: hardest)")
    axis.set_ylabel("IoU, mean per image")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(plt, figure, path)
