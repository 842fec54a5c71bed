"""Underwater restoration datasets on disk: layouts and pairs, split protocol, overlap, pseudo-labels and their audit."""

import dataclasses
import hashlib
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import UserError, some
from common.images import SUFFIXES, Inspection, find_images, share_work

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("run")

# Folders of inputs and targets, as the data sets and their common trainers name them. Case does not matter.
LAYOUTS = (
    ("raw-890", "reference-890", "UIEB"),
    ("input", "GT", "LSUI"),
    ("trainA", "trainB", "EUVP"),
    ("Inp", "GTr", "EUVP test"),
    ("input", "target", "plain"),
    ("raw", "ref", "plain"),
)
_TREES = "; ".join(f"{a}/ and {b}/ ({name})" for a, b, name in LAYOUTS)


# ---------------------------------------------------------------------------------------------------------------------
# Sets of images


@dataclass
class ImageSet:
    """Images of one set. A stem is the path below the input folder without suffix, e.g. underwater_dark/n0123."""

    name: str
    layout: str
    stems: list[str]
    inputs: list[Path]
    targets: list[Path]  # empty when there is no reference
    left_out: list[str] = field(default_factory=list)  # sentences

    def __len__(self) -> int:
        return len(self.stems)

    def files(self) -> list[Path]:
        return self.inputs + self.targets

    def subset(self, stems: Collection[str], name: str | None = None) -> "ImageSet":
        wanted = set(stems)
        keep = [i for i, stem in enumerate(self.stems) if stem in wanted]
        parts = {key: [values[i] for i in keep] for key in ("stems", "inputs", "targets") if (values := getattr(self, key))}
        return dataclasses.replace(self, name=name or self.name, left_out=[], **parts)

    def describe(self) -> str:
        count = f"{len(self)} {'pairs' if self.targets else 'images'}"
        return "; ".join([f"{self.name}, {self.layout}: {count}", *self.left_out])


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _check_folder(root: Path, flag: str) -> None:
    if not root.is_dir():
        raise UserError(f"{flag} {root} is not a folder; check the path.")


def _layouts_below(folder: Path, levels: int) -> Iterator[tuple[Path, Path, Path, str]]:
    """Every (folder, its inputs, its targets, the layout's name) at `folder` or down to some levels below."""
    below = {p.name.lower(): p for p in _folders(folder)}
    for first, second, name in LAYOUTS:
        if first.lower() in below and second.lower() in below:
            yield folder, below[first.lower()], below[second.lower()], f"{name} layout {first}/{second}"
            return
    if levels:
        for sub in below.values():
            yield from _layouts_below(sub, levels - 1)


def _by_stem(folder: Path, prefix: Path) -> tuple[dict[str, Path], list[Path]]:
    """Files by relative path without suffix, and those whose name another file has already (a.png beside a.jpg)."""
    found: dict[str, Path] = {}
    files = find_images(folder)
    kept = [found.setdefault((prefix / p.relative_to(folder)).with_suffix("").as_posix(), p) is p for p in files]
    return found, [path for path, keep in zip(files, kept, strict=True) if not keep]


def find_pairs(root: Path, flag: str) -> ImageSet:
    """Inputs and targets of the same name. The layout stands at `root` or up to two levels below. Several, such as EUVP's
    three subsets, are joined, but without parts that are called test or validation."""
    _check_folder(root, flag)
    every = list(_layouts_below(root, 2))
    if not every:
        raise UserError(f"{flag} {root} holds no known layout: expected the folders {_TREES}, there or two levels below.")
    held_out = [part for part in every if any(re.match("test|val", n, re.I) for n in part[0].relative_to(root).parts)]
    found = [part for part in every if part not in held_out] or every
    common = os.path.commonpath([part[0] for part in found])
    pairs: dict[str, tuple[Path, Path]] = {}
    alone: list[Path] = []
    for folder, inputs, targets, _ in found:
        (left, more), (right, even_more) = (_by_stem(side, folder.relative_to(common)) for side in (inputs, targets))
        pairs |= {stem: (left[stem], right[stem]) for stem in left.keys() & right.keys()}
        alone += [path for stem, path in (left | right).items() if not (stem in left and stem in right)]
        alone += more + even_more
    alone = [path.relative_to(root) for path in alone]
    if not pairs:
        raise UserError(
            f"{flag} {root}: no input has a target of the same name ({found[0][3]}: {some(alone[:3])} beside"
            f" {some(alone[-3:])}). Name both sides alike; only the suffix may differ."
        )
    left_out = [f"{len(alone)} files without a partner left out ({some(alone)})"] if alone else []
    if len(found) < len(every):
        left_out.append(f"left out as test or validation sets: {some(part[0].relative_to(root) for part in held_out)}")
    stems = sorted(pairs)
    inputs, targets = ([pairs[stem][side] for stem in stems] for side in (0, 1))
    return ImageSet(root.absolute().name, " + ".join(sorted({part[3] for part in found})), stems, inputs, targets, left_out)


def find_sets(root: Path, flag: str, *, reference: bool) -> dict[str, ImageSet]:
    """One set per folder below `root`, or `root` itself. Without reference a set is the images below it, or below its
    folder input/ where it has one."""
    _check_folder(root, flag)
    if reference:
        single = any(_layouts_below(root, 0))
    else:
        single = _input(root) != root or any(path.parent == root for path in find_images(root))
    folders = [folder for folder in ([root] if single else _folders(root)) if find_images(folder)]
    if not folders:
        raise UserError(f"{flag} {root} holds no images: expected one folder per set, with images below it.")
    read = find_pairs if reference else _find_unpaired
    return {folder.absolute().name: read(folder, flag) for folder in folders}


def _find_unpaired(root: Path, flag: str) -> ImageSet:
    found, again = _by_stem(_input(root), Path())
    if not found:
        raise UserError(f"{flag} {_input(root)} holds no images: fill the folder or remove it.")
    left_out = [f"{len(again)} files of a name that another has left out ({some(again)})"] if again else []
    return ImageSet(root.absolute().name, "no reference", list(found), list(found.values()), [], left_out)


def _input(folder: Path) -> Path:
    return next((sub for sub in _folders(folder) if sub.name.lower() == "input"), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Which images train, which are kept for the end


def _draw(pairs: ImageSet, count: int, seed: list[int], names: tuple[str, str], what: str) -> tuple[ImageSet, ImageSet]:
    if not 1 <= count < len(pairs):
        raise UserError(
            f"{what} takes {count} of the {len(pairs)} pairs of {pairs.name}: take fewer, so that some are left."
        )
    stems = sorted(pairs.stems)
    drawn = {stems[i] for i in np.random.default_rng(seed).permutation(len(stems))[:count]}
    return pairs.subset(set(stems) - drawn, names[0]), pairs.subset(drawn, names[1])


def take_split(pairs: ImageSet, split: str, count: int) -> tuple[ImageSet, ImageSet]:
    """(rest, test). `split` is seed:N, which draws `count` test images from the sorted names, or a file that lists them, one
    per line, with or without folder and suffix; # starts a comment."""
    names = (pairs.name, f"{pairs.name}-test")
    if re.fullmatch(r"seed:\d+", split):
        return _draw(pairs, count, [int(split[5:]), 0x7E57], names, f"--split {split} with --test-images")
    try:
        lines = Path(split).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--split {split} is neither seed:N, e.g. seed:0, nor a text file of names; check it.") from None
    known = set(pairs.stems)
    by_last: dict[str, list[str]] = {}
    for stem in pairs.stems:
        by_last.setdefault(stem.rpartition("/")[2], []).append(stem)
    test, unknown = set(), []
    for line in lines:
        name = re.split(r"^#|\s#", line)[0].strip().replace("\\", "/")
        if not name:
            continue
        stem = str(Path(name).with_suffix("")) if name.lower().endswith(SUFFIXES) else name
        parts = stem.split("/")
        hits = next(
            ([tail] for i in range(len(parts)) if (tail := "/".join(parts[i:])) in known), by_last.get(parts[-1], [])
        )
        if len(hits) == 1:
            test.add(hits[0])
        else:
            unknown.append(name if not hits else f"{name} (which of {some(hits)}?)")
    if unknown:
        raise UserError(f"--split {split} names images that {pairs.name} does not have: {some(unknown)}.")
    if not test or len(test) == len(pairs):
        part = "no test image" if not test else "all images, so none is left to train on"
        raise UserError(f"--split {split} names {part}; {pairs.name} has {len(pairs)} pairs.")
    return pairs.subset(known - test, names[0]), pairs.subset(test, names[1])


def take_validation(pairs: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """(rest, validation): the best checkpoint is chosen on images that are neither trained on nor tested."""
    return _draw(pairs, count, [seed, 0x7A1], (pairs.name, f"{pairs.name}-val"), "--val-images")


def split_hash(images: ImageSet) -> str:
    """Of the sorted names: two papers with the same hash have the same images."""
    return hashlib.sha256("\n".join(sorted(images.stems)).encode()).hexdigest()[:12]


def check_readable(images: ImageSet, inspections: dict[Path, Inspection]) -> ImageSet:
    """Without the unreadable, the tiny, and pairs whose sizes differ. Each is named with its reason in one warning."""
    bad: dict[str, str] = {}
    for i, stem in enumerate(images.stems):
        files = [images.inputs[i], *images.targets[i : i + 1]]
        broken = [f"{path}: {found.problem}" for path in files if (found := inspections[path]).problem]
        sizes = [inspections[path].size for path in files]
        if broken:
            bad[stem] = "; ".join(broken)
        elif min(sizes[0]) < 11:
            bad[stem] = f"{files[0]} is smaller than 11 x 11 pixels, the window of SSIM"
        elif len(set(sizes)) > 1:
            (h, w), (target_h, target_w) = sizes
            bad[stem] = f"{files[0]} is {w}x{h}, its target {target_w}x{target_h}"
    if len(bad) == len(images):
        raise UserError(f"None of the {len(images)} images of {images.name} can be used: {some(bad.values(), 3)}.")
    if bad:
        logger.warning("%s: %d of %d left out: %s", images.name, len(bad), len(images), some(bad.values(), 20))
        images = dataclasses.replace(images.subset(set(images.stems) - bad.keys()), left_out=images.left_out)
    return images


def check_overlap(train: ImageSet, tests: dict[str, ImageSet], inspections: dict[Path, Inspection], *, names: bool) -> None:
    """Refuses test images whose pixels (input or target) are trained on, or with `names` whose name is."""
    pixels = {inspections[path].digest: path for path in train.files()}
    stems = {stem.rpartition("/")[2]: stem for stem in train.stems}
    for name, test in tests.items():
        same = [f"{path} = {pixels[d]}" for path in test.files() if (d := inspections[path].digest) in pixels]
        if same:
            raise UserError(
                f"{len(same)} files of the test set {name} are also trained on, to the pixel: {some(same, 3)}. Keep them out"
                " of the training folder, or list them in a --split file."
            )
        named = [stem for stem in test.stems if stem.rpartition("/")[2] in stems] if names else []
        if named:
            raise UserError(
                f"{len(named)} images of the test set {name} have the name of a training image: {some(named)}. Keep them out"
                " of the training folder; if the names are mere numbers, --overlap-check content compares pixels alone."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Pseudo-labels


@dataclass
class Label:
    """A teacher's opinion of one image: maps of K degradations, their probabilities, a code of the whole image."""

    masks: np.ndarray  # float32 (K, h, w) in [0, 1]
    probs: np.ndarray | None  # float32 (K,)
    code: np.ndarray | None  # float32 (D,)
    confidence: float


_SUFFIXES_OF_LABELS = (".npz", ".pt", "_masks.npy")


def find_labels(root: Path, images: ImageSet, flag: str = "--pseudo-root") -> dict[str, Path]:
    """Labels by stem: <stem>.npz, <stem>.pt, or <stem>_masks.npy beside _probs and _features, below root or root/train."""
    _check_folder(root, flag)
    base = root / "train" if (root / "train").is_dir() else root
    wanted, found = set(images.stems), {}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base).as_posix()
        for suffix in _SUFFIXES_OF_LABELS:
            if name.endswith(suffix) and (stem := name.removesuffix(suffix)) in wanted:
                if stem in found:
                    raise UserError(f"{flag} {root} has two labels for one image: {found[stem]} and {path}; keep one.")
                found[stem] = path
    if not found:
        raise UserError(
            f"{flag} {base} holds no label of {images.name}: expected <stem>.npz, <stem>.pt or <stem>_masks.npy, e.g."
            f" {base / images.stems[0]}.npz."
        )
    return {stem: found[stem] for stem in images.stems if stem in found}


def _values(path: Path, name: str, value: object, dimensions: int, *, unit: bool = True) -> np.ndarray | None:
    """float32; whole numbers are shares of their type's maximum. Never scaled by their own maximum or by a batch's: what a
    value means must not depend on the others."""
    if value is None:
        return None
    value = np.asarray(value)
    if value.ndim != dimensions or value.size == 0:
        raise ValueError(f"{name} has the shape {value.shape} instead of {dimensions} dimensions")
    if unit and value.dtype.kind in "iu":
        value = value / np.iinfo(value.dtype).max
    value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if unit and not (-1e-3 <= value.min() and value.max() <= 1 + 1e-3):
        raise ValueError(f"{name} goes from {value.min():.3g} to {value.max():.3g} and not within 0 and 1")
    return value.clip(0, 1) if unit else value


def _load(path: Path) -> dict[str, object]:
    if path.suffix == ".pt":
        import torch

        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's own words say how to execute the file anyway
            raise ValueError("it is damaged, or holds code and not only tensors and numbers") from None
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} and no dict")
        found = {
            k: v.float().numpy() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in found.items()
        }
        # `probs` of the original exporter are maps; its probabilities of the image are called global_prob
        probs = found.get("global_prob", found.get("probs"))
        return {**found, "probs": probs, "code": found.get("z_d"), "confidence": found.get("confidence_scale", 1.0)}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("masks", "probs", "code", "confidence") if name in archive}
    stem = path.name.removesuffix("_masks.npy")
    parts = {"masks": path, "probs": path.with_name(f"{stem}_probs.npy"), "code": path.with_name(f"{stem}_features.npy")}
    return {name: np.load(part, allow_pickle=False) for name, part in parts.items() if name == "masks" or part.exists()}


def read_label(path: Path) -> Label:
    try:
        found = _load(path)
        if "masks" not in found:
            raise ValueError(f"it has no masks, only {some(found)}")
        masks = _values(path, "masks", found["masks"], 3)
        probs = _values(path, "probs", found.get("probs"), 1)
        code = _values(path, "the code", found.get("code"), 1, unit=False)
        confidence = float(np.asarray(found.get("confidence", 1.0)).item())
        if probs is not None and len(probs) != len(masks):
            raise ValueError(f"{len(masks)} masks but {len(probs)} probabilities")
        if not 0 <= confidence <= 1:
            raise ValueError(f"its confidence is {confidence} and not within 0 and 1")
    except Exception as error:  # unpicklers and archives raise anything on damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is no pseudo-label ({reason}): export it again or remove it.") from None
    return Label(masks, probs, code, confidence)


EQUAL = 1e-3  # below the step of an 8-bit map; exporters whose channels were all one map differed by 1e-4 (measured)

# What can be wrong with a label, and whether it is left out for it.
FINDINGS = {
    "missing": ("have no label", True),
    "malformed": ("have a label that cannot be used", True),
    "odd": ("have another number of classes or another code than most", True),
    "zero": ("have masks that are zero everywhere (whole numbers are shares of their type's maximum)", True),
    "constant": ("have masks without any place in them, each is one number", True),
    "identical": ("have one and the same map for all classes", True),
    "twins": ("have equal maps for some of the classes", False),
    "flat_mean": ("have masks whose mean over the classes is the same everywhere, so that this mean teaches nothing", False),
}


@dataclass
class Audit:
    """What the pseudo-labels of a set are worth. `findings` has the stems by kind, `usable` what training should read."""

    images: int
    classes: int
    code_size: int | None
    findings: dict[str, list[str]]
    reasons: list[str]
    usable: dict[str, Path]
    with_probs: set[str]

    def lines(self) -> list[str]:
        code = "no code" if self.code_size is None else f"a code of {self.code_size} numbers"
        lines = [f"Pseudo-labels: {len(self.usable)} of {self.images} images, {self.classes} classes, {code}"]
        for kind, stems in self.findings.items():
            text, left_out = FINDINGS[kind]
            names = some(self.reasons if kind == "malformed" else stems, 3)
            lines.append(f"{len(stems)} of {self.images} images {text}{', left out' if left_out else ''}: {names}")
        return lines


def _faults(masks: np.ndarray) -> list[str]:
    flat = masks.reshape(len(masks), -1)
    varied = flat[np.ptp(flat, axis=1) > EQUAL]
    if flat.max() <= 1.001 / 255:  # also masks of 0 and 1 that were stored as uint8
        return ["zero"]
    if len(varied) == 0:
        return ["constant"]
    twins = sum(np.abs(a - b).max() <= EQUAL for a, b in combinations(varied, 2))
    if len(masks) > 1 and twins == len(masks) * (len(masks) - 1) // 2:
        return ["identical"]
    return ["twins"] * bool(twins) + ["flat_mean"] * bool(np.ptp(flat.mean(0)) <= EQUAL)


def _audit_one(path: Path) -> tuple[tuple[int, int | None] | None, list[str], str, bool]:
    """(K, D), the kinds of findings, the reason where it cannot be read, and whether it has probabilities."""
    try:
        label = read_label(path)
    except UserError as error:
        return None, ["malformed"], str(error), False
    shape = (len(label.masks), None if label.code is None else len(label.code))
    return shape, _faults(label.masks), "", label.probs is not None


def audit_labels(labels: dict[str, Path], images: ImageSet, accelerator: "Accelerator | None" = None) -> Audit:
    """Reads every label once. Refuses when no mask of any of them can teach anything."""
    audited = share_work(list(labels.values()), _audit_one, accelerator, "Read %d pseudo-labels to check them")
    shapes = Counter(audited[path][0] for path in labels.values() if audited[path][0])
    (classes, code_size), _ = shapes.most_common(1)[0] if shapes else ((0, None), 0)
    findings: dict[str, list[str]] = {kind: [] for kind in FINDINGS}
    for stem in images.stems:
        shape, kinds, *_ = audited[labels[stem]] if stem in labels else (None, ["missing"])
        for kind in kinds + ["odd"] * (shape not in (None, (classes, code_size))):
            findings[kind].append(stem)
    left_out = {stem for kind, stems in findings.items() if FINDINGS[kind][1] for stem in stems}
    usable = {stem: labels[stem] for stem in images.stems if stem not in left_out}
    reasons = [audited[labels[stem]][2] for stem in findings["malformed"]]
    with_probs = {stem for stem, path in usable.items() if audited[path][3]}
    kept = {kind: stems for kind, stems in findings.items() if stems}
    audit = Audit(len(images), classes, code_size, kept, reasons, usable, with_probs)
    if not usable:
        raise UserError(
            f"No pseudo-label of {images.name} can teach anything. {'. '.join(audit.lines()[1:])}. Export them again, or"
            " train without them."
        )
    return audit


def _window(length: int, low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    """Triangle filter weights (size, n) that look at `n` pixels of an axis: as wide as an output pixel, at least as an input
    one, so that shrinking averages and enlarging interpolates."""
    scale = (high - low) * length / size
    centers = low * length + (np.arange(size) + 0.5) * scale
    width = max(scale, 1.0)
    weights = np.clip(1 - np.abs(np.arange(length) + 0.5 - centers[:, None]) / width, 0, None)
    used = np.flatnonzero(weights.any(0))
    part = slice(int(used[0]), int(used[-1]) + 1)
    return part, (weights / weights.sum(1, keepdims=True)).astype(np.float32)[:, part]


def crop_masks(masks: np.ndarray, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """(K, size, size): the part of the maps below an image crop, antialiased. `box` is left, top, right, bottom as fractions
    of the image, whatever the size of the maps."""
    left, top, right, bottom = box
    rows, down = _window(masks.shape[1], top, bottom, size)
    columns, across = _window(masks.shape[2], left, right, size)
    return down @ masks[:, rows, columns] @ across.T
