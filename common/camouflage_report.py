"""What a person looks at after a segmentation run: scores by kind of animal and object size, what the experts do, the best
and worst masks."""

import csv
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.camouflage import MaskedImages, read_mask, size_class, superclass
from common.images import read_image
from common.logs import RunLog, setup_logging
from common.pictures import save, subplots
from common.restoration_report import write_csv
from common.segmentation_metrics import score_folders, summarize

logger = logging.getLogger("run")

SHOWN = ("sm", "wfm", "fm_mean", "em_mean", "mae", "iou", "dice")
KINDS = ("Aquatic", "Terrestrial", "Flying", "Amphibian", "Other", "unknown")
Table = dict[str, np.ndarray]  # a column per metric with a row per image, as `evaluate` gives them


class Seen(NamedTuple):
    image: np.ndarray  # (H, W, 3) in [0, 1]
    mask: np.ndarray  # (H, W) bool
    map: np.ndarray  # (H, W) in [0, 1]


def report(
    folder: Path, scored: dict[str, tuple[MaskedImages, Table]], lost: dict[str, tuple[float, float]], further: str | None,
    look: Callable[[str, int], Seen], log: RunLog, step: int,
) -> None:  # fmt: skip
    """report.txt, a CSV and a sheet of pictures per set, and what the experts do on the set "validation", where the IoU is
    `lost` without them. `look(set, index)` gives the pictures, `further` ends the text."""
    text = []
    for name, (images, table) in scored.items():
        text.append(breakdown(name, images, table))
        write_csv(folder / f"{name}.csv", images.stems, table)
        order = np.argsort(-table["iou"], kind="stable")
        chosen = dict.fromkeys([*order[:2], order[len(order) // 2], *order[-3:]])  # best, median and worst
        path = folder / "samples" / f"{name}.png"
        mask_sheet(path, [(f"{images.stems[i][-28:]}, IoU {table['iou'][i]:.2f}", look(name, int(i))) for i in chosen])
        log.image(name, path, step)
    images, table = scored["validation"]
    path = folder / "samples" / "routing.png"
    routing_picture(path, images, table, lost)
    log.image("routing", path, step)
    summary = "\n\n".join([*text, routing_report(table, lost), *([further] if further else [])])
    (folder / "report.txt").write_text(summary + "\n")
    logger.info("Testing phase completed, see %s and its samples:\n%s", folder / "report.txt", summary)


def demo_report(folder: Path, root: Path, seed: int, train: MaskedImages, tests: MaskedImages, table: Table) -> str:
    """The classical baselines on the same images, and IoU against the difficulty that the generator says."""
    from common.camouflage_baselines import fit_and_score  # here: scikit-learn takes its time at every start

    def samples(images: MaskedImages, limit: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = zip(images.images[:limit], images.masks[:limit], strict=True)
        pairs = ((read_image(image), mask) for image, mask in pairs)
        return [(pixels, read_mask(mask, pixels.shape[:2])) for pixels, mask in pairs]

    scores = {"this run": table["iou"], **fit_and_score(samples(train, 150), samples(tests), seed)}
    levels = read_levels(root)
    level = np.array([levels[stem] for stem in tests.stems])
    difficulty_picture(folder / "samples" / "difficulty.png", level, scores)
    title = f"IoU on {tests.name}, levels {level.min():.2f} to {level.max():.2f} (0 invisible, 1 plain), beside classical"
    return "\n".join([f"{title} baselines", *(f"  {values.mean():.3f}  {method}" for method, values in scores.items())])


def score_maps(predictions: Path, masks: Path) -> None:
    """Anybody's maps against masks: the benchmark's numbers, and every image in a table beside the maps."""
    setup_logging()
    table, names = score_folders(predictions, masks, os.cpu_count() or 1)
    path = predictions.with_name(f"{predictions.name}-scores.csv")
    write_csv(path, names, table)
    logger.info("%d maps: %s; every image: %s", len(names), line_of(summarize(table)), path)


def line_of(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4f}" for name in SHOWN)


def breakdown(title: str, images: MaskedImages, table: Table) -> str:
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


def mean_of(table: Table, key: str, mine: np.ndarray) -> float:
    if key.endswith("_mean"):
        return float(table[key.replace("_mean", "_curve")][mine].mean())
    return float(table[key][mine].mean())


def loads(table: Table) -> dict[str, np.ndarray]:
    """Stride to (images, experts), how an image's choices are shared out."""
    found = {key.removeprefix("route/"): values for key, values in table.items() if key.startswith("route/")}
    return {key: values / values.sum(1, keepdims=True) for key, values in found.items()}


def routing_report(table: Table, lost: dict[str, tuple[float, float]]) -> str:
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


def routing_picture(path: Path, images: MaskedImages, table: Table, lost: dict[str, tuple[float, float]]) -> None:
    """Expert by super-class, one panel per level, and the ablation."""
    shares = loads(table)
    kinds = np.array([superclass(images.stems[int(i)]) for i in table["id"]])
    present = [kind for kind in KINDS if (kinds == kind).any()]
    figure, axes = subplots(1, len(shares) + 1, 4.2 * (len(shares) + 1), 3.6)
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
    save(figure, path, 120)


def mask_sheet(path: Path, rows: Sequence[tuple[str, Seen]]) -> None:
    """A row per image: image, mask, map, and the map's outline (red) beside the mask's (green)."""
    titles = ("image", "mask", "map", "outlines: mask green, map red")
    figure, axes = subplots(len(rows), 4, 10, 2.7 * len(rows))
    for line, (name, (image, mask, answer)) in zip(axes, rows, strict=True):
        for axis, picture, title in zip(line, (image, mask, answer, image), titles, strict=True):
            axis.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title, fontsize=8)
        for shape, colour in ((mask.astype(float), "lime"), (answer, "red")):
            if shape.min() < 0.5 < shape.max():
                line[3].contour(shape, levels=[0.5], colors=colour, linewidths=1.2)
        line[0].set_title(name, fontsize=8)
    save(figure, path, 120)


def read_levels(root: Path) -> dict[str, float]:
    """How different the generator made each object's texture from its surroundings."""
    with open(root / "Info" / "difficulty.csv", newline="") as file:
        return {row["name"]: float(row["level"]) for row in csv.DictReader(file)}


def difficulty_picture(path: Path, levels: np.ndarray, scores: dict[str, np.ndarray], bins: int = 5) -> None:
    """Mean IoU against how much the object's texture differs from its surroundings."""
    figure, [[axis]] = subplots(1, 1, 5.5, 3.6)
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
    save(figure, path, 120)
