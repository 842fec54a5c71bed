"""Camouflaged object data sets on disk: layouts, masks, what is trained on, a fair validation set, overlap."""

import dataclasses
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from common.cli import UserError, some
from common.images import Inspection, find_images, read_image, share_work

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("run")

# Folders of images and of masks, the better choice first. Case does not matter.
IMAGES = ("image", "images", "imgs", "im")
MASKS = ("gt_object", "gt", "mask", "masks")
_TREES = (
    "Train/Image + Train/GT_Object (COD10K-v3), Images/Train + GT (CAMO), TrainDataset/Imgs + TrainDataset/GT, or a folder"
    f" of images ({', '.join(IMAGES)}) beside one of masks ({', '.join(MASKS)})"
)
_TRAIN = re.compile(r"(^|[-_ ])(tr|train\w*)($|[-_ ])", re.I)
_HELD_OUT = re.compile(r"(^|[-_ ])(te|test(s|set|ing|dataset)?|val(id|idation)?)($|[-_ ])|chameleon|nc4k", re.I)
_BENCHMARK = re.compile(r"(?<![a-z])(COD10K|CAMO|CHAMELEON|NC4K)(?![a-z])", re.I)
_COD10K = re.compile(r"COD10K-(CAM|NonCAM)-\d+-([^-]+)-", re.I)
_UNIQUE = re.compile(r"COD10K-|camourflage_", re.I)  # names that mean one picture wherever they stand; CAMO spells it so

# Pictures of COD10K's training part that its test part has as well: SINet-V2's README names the first two, which have the
# same name in both. People who compared pixels since list five more, whose test twins have other names.
DUPLICATES = (
    "COD10K-CAM-1-Aquatic-3-Crab-32",
    "COD10K-CAM-2-Terrestrial-23-Cat-1506",
    "COD10K-CAM-2-Terrestrial-26-Chameleon-1694",
    "COD10K-CAM-2-Terrestrial-28-Deer-1796",
    "COD10K-CAM-2-Terrestrial-31-Gecko-1928",
    "COD10K-CAM-2-Terrestrial-32-Giraffe-1930",
    "COD10K-CAM-3-Flying-53-Bird-3205",
)

SMALL, LARGE = 0.1, 0.5  # shares of the image up to and from which COD10K's own attributes call an object small or big


def size_class(mask_fraction: float) -> str:
    return "small" if mask_fraction <= SMALL else "large" if mask_fraction >= LARGE else "medium"


def superclass(stem: str) -> str:
    """Aquatic, Terrestrial, Flying, Amphibian or Other, where the name is one of COD10K."""
    found = _COD10K.match(stem.rpartition("/")[2])
    return found[2].strip().capitalize() if found else "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def read_mask(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """bool (H, W), resized to `size` (nearest pixel) if given. The object is what is brighter than 128 of 255, the rule of
    the benchmarks; it cuts CAMO's smoothed borders, where "not zero" would widen the object. A mask without such a pixel has
    a scale of its own, as 0 and 1: with one value beside zero, that is the object; with several, nobody can tell. A
    colour counts by its brightest channel (red is an object), transparency does not count."""
    pixels = read_image(path)
    value = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    mask = value > 128 * (np.iinfo(value.dtype).max // 255)
    if not mask.any() and (values := np.unique(value[value > 0])).size:
        if values.size > 1:
            raise UserError(
                f"{path} is no mask of an object: no pixel is brighter than 128 of 255, but there are {values.size} values"
                " beside 0, so it is not one of 0 and 1 either. Store it with 0 and 255."
            )
        mask = value > 0
    if size is not None and mask.shape != size:
        # the exact kind looks at pixel centres; the other shifts the object by up to half a pixel of the larger grid
        mask = cv2.resize(mask.view(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
    return mask


def _look(path: Path) -> tuple[tuple[int, int], bool, str | None]:
    """Its size, whether it is black, and what is wrong with it."""
    try:
        mask = read_mask(path, None)
    except UserError as error:
        return (0, 0), False, str(error).rstrip(".")
    return mask.shape, not mask.any(), None


# ---------------------------------------------------------------------------------------------------------------------
# Sets of images with masks


@dataclass
class MaskedImages:
    """Images of one set. A stem is the path below the image folder without suffix; of files of COD10K and CAMO the name
    alone, so that the same pictures have the same stems in every layout."""

    name: str
    layout: str
    stems: list[str]
    images: list[Path]
    masks: list[Path | None]
    camouflaged: np.ndarray  # bool: by the name in COD10K, else by the mask; an unreadable mask counts until it is left out
    left_out: list[str] = field(default_factory=list)  # sentences

    def __len__(self) -> int:
        return len(self.stems)

    def subset(self, stems: Collection[str], name: str | None = None) -> "MaskedImages":
        wanted = set(stems)
        keep = [i for i, stem in enumerate(self.stems) if stem in wanted]
        parts = {key: [getattr(self, key)[i] for i in keep] for key in ("stems", "images", "masks")}
        return dataclasses.replace(self, name=name or self.name, camouflaged=self.camouflaged[keep], left_out=[], **parts)

    def but(self, dropped: Collection[str], *sentences: str) -> "MaskedImages":
        rest = self.subset(set(self.stems) - set(dropped)) if dropped else self
        return dataclasses.replace(rest, left_out=[*self.left_out, *sentences])

    def describe(self) -> str:
        return "; ".join([f"{self.name}, {self.layout}: {len(self):,} images", *self.left_out])


class _Part(NamedTuple):
    images: Path
    masks: Path
    kind: str  # what the folders below the root call it: train, test (also validation, CHAMELEON and NC4K) or nothing


def _folder_pairs(folder: Path, levels: int) -> Iterator[tuple[Path, Path]]:
    below = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    images, masks = ([below[name] for name in names if name in below] for names in (IMAGES, MASKS))
    if images and masks:
        splits = [p for p in sorted(images[0].iterdir()) if p.is_dir() and p.name.lower() in ("train", "test")]  # CAMO
        yield from ((each, masks[0]) for each in splits or images[:1] if find_images(each))
    elif levels:
        for sub in below.values():
            yield from _folder_pairs(sub, levels - 1)


def _parts(root: Path, flag: str) -> list[_Part]:
    if not root.is_dir():
        raise UserError(f"{flag} {root} is not a folder; check the path.")
    found = []
    for images, masks in _folder_pairs(root, 3):
        called = [any(map(pattern.search, images.relative_to(root).parts)) for pattern in (_TRAIN, _HELD_OUT)]
        found.append(_Part(images, masks, "train" if called[0] else "test" if called[1] else ""))
    return found


def _stem(path: Path, folder: Path, prefix: Path = Path()) -> str:
    stem = (prefix / path.relative_to(folder)).with_suffix("").as_posix()
    return path.stem if _UNIQUE.match(path.stem) else stem


def _read(name: str, root: Path, parts: list[_Part], flag: str, accelerator: "Accelerator | None") -> MaskedImages:
    files: dict[str, tuple[Path, Path | None]] = {}
    again = []
    common = os.path.commonpath([part.images.parent for part in parts])
    for part in parts:
        masks = {_stem(path, part.masks): path for path in reversed(find_images(part.masks))}
        for path in find_images(part.images):
            stem = _stem(path, part.images, part.images.parent.relative_to(common))
            if stem in files:
                again.append(path.relative_to(root))
            else:
                files[stem] = path, masks.get(_stem(path, part.images))
    if not any(mask for _, mask in files.values()):
        image = next(iter(files.values()))[0]
        raise UserError(
            f"{flag} {root}: no image has a mask of the same name (looked for the mask of {image.name} in {parts[0].masks})."
            " Name both sides alike; only the suffix may differ."
        )
    stems = sorted(files)
    images, masks = ([files[stem][side] for stem in stems] for side in (0, 1))
    names = [_COD10K.match(stem) for stem in stems]
    unnamed = {mask for mask, named in zip(masks, names, strict=True) if mask and not named}
    looks = share_work(sorted(unnamed), _look, accelerator, "Read %d masks to see which have an object")
    camouflaged = [
        named[1].lower() == "cam" if named else mask not in looks or not looks[mask][1]
        for mask, named in zip(masks, names, strict=True)
    ]
    sentences = [f"{len(again):,} files left out that are there already ({some(again, 3)})"] if again else []
    layout = some((f"{part.images.relative_to(root)} + {part.masks.relative_to(root)}" for part in parts), 4)
    return MaskedImages(name, layout, stems, images, masks, np.array(camouflaged), sentences)


def find_training(root: Path, flag: str = "--dataset-path", accelerator: "Accelerator | None" = None) -> MaskedImages:
    """The training images at `root` or up to three levels below. Several sets, such as COD10K and CAMO, are joined, but
    without parts that are called test or validation."""
    every = _parts(root, flag)
    if not every:
        raise UserError(f"{flag} {root} holds no known layout: expected {_TREES}, there or up to three levels below.")
    found = [part for part in every if part.kind != "test"]
    held_out = [part.images.relative_to(root) for part in every if part.kind == "test"]
    if not found:
        raise UserError(f"{flag} {root} holds test sets only ({some(held_out)}); give the folder of the training images.")
    images = _read(root.absolute().name, root, found, flag, accelerator)
    return images.but((), f"not trained on: {some(held_out)}") if held_out else images


def find_tests(root: Path, flag: str | None = None, accelerator: "Accelerator | None" = None) -> dict[str, MaskedImages]:
    """Test sets by name. Below a folder of training data (no flag) they are what is called test, below a folder that was
    given for tests whatever is not called training. All files of it: `select` leaves COD10K's NonCAM out."""
    shown = flag or "--dataset-path"
    sets: dict[str, MaskedImages] = {}
    for part in _parts(root, shown):
        if part.kind == "test" or (flag and not part.kind):
            name = _test_name(part.images)
            name = name if name not in sets else part.images.relative_to(root).as_posix()
            sets[name] = _read(name, root, [part], shown, accelerator)
    return sets


def _test_name(folder: Path) -> str:
    for name in reversed(folder.absolute().parts):
        if known := _BENCHMARK.search(name):
            return known[1].upper()
        if name.lower() not in IMAGES and not _HELD_OUT.search(name):
            return name
    return "test"


# ---------------------------------------------------------------------------------------------------------------------
# Which images are used


def _order(stems: list[str], seed: int, purpose: int) -> list[str]:
    """Shuffled by one number per name, so that a file more or less does not change the order of the others."""
    return sorted(stems, key=lambda stem: (np.random.default_rng([seed, purpose, zlib.crc32(stem.encode())]).random(), stem))


def select(images: MaskedImages, noncam_ratio: float, seed: int) -> MaskedImages:
    """The camouflaged ones, and the given share of those without an object: COD10K-v3 has as many black masks as others, and
    who trains or tests on all of them measures something else than the benchmark."""
    if not 0 <= noncam_ratio <= 1:
        raise UserError(f"--noncam-ratio is {noncam_ratio}: give the share of images without an object to keep, 0 to 1.")
    if not images.camouflaged.any():
        raise UserError(
            f"None of the {len(images):,} images of {images.name} has a camouflaged object (NonCAM in the name, or a black"
            " mask): give a folder that has some."
        )
    others = [stem for stem, wanted in zip(images.stems, images.camouflaged, strict=True) if not wanted]
    dropped = _order(others, seed, 0x0CA)[round(noncam_ratio * len(others)) :]
    kept = f" and {len(others) - len(dropped):,} without object" if len(dropped) < len(others) else ""
    used = f"{len(images):,} files: {len(images) - len(others):,} camouflaged{kept} used"
    return images.but(dropped, used + (f", {len(dropped):,} without object left out" if dropped else ""))


def drop_known_duplicates(images: MaskedImages) -> MaskedImages:
    """For training images. The test sets stay whole, so that results are of the same images as everyone's."""
    found = sorted(set(images.stems) & set(DUPLICATES))
    return images.but(found, f"{len(found)} left out that COD10K's test set has too ({some(found, 2)})") if found else images


def take_validation(images: MaskedImages, share: float, seed: int) -> tuple[MaskedImages, MaskedImages]:
    """(rest, validation): the share of every super-class, with and without an object, at least 1 where 2 are there. The best
    checkpoint is chosen on images that are neither trained on nor tested."""
    if not 0 < share < 1:
        raise UserError(f"--val-share is {share}: give the share of the training images, between 0 and 1.")
    groups: dict[tuple[str, bool], list[str]] = {}
    for stem, camouflaged in zip(images.stems, images.camouflaged, strict=True):
        groups.setdefault((superclass(stem), bool(camouflaged)), []).append(stem)
    drawn: set[str] = set()
    for stems in groups.values():
        drawn.update(_order(stems, seed, 0x7A1)[: min(max(1, round(share * len(stems))), len(stems) - 1)])
    if not drawn:
        raise UserError(
            f"{images.name} has {len(images)} images, too few to keep some for validation: 2 of a kind are needed."
        )
    counts = Counter(superclass(stem) for stem in sorted(drawn))
    val = images.subset(drawn, f"{images.name}-val")
    return images.but(drawn), val.but((), ", ".join(f"{name} {count}" for name, count in counts.most_common()))


# ---------------------------------------------------------------------------------------------------------------------
# Checks before training


def check_readable(
    images: MaskedImages, inspections: dict[Path, Inspection], accelerator: "Accelerator | None" = None
) -> MaskedImages:
    """Without what cannot be used; each is named with its reason in one warning. Needs inspections of the images; masks are
    read here, as masks."""
    looks = share_work([m for m in images.masks if m], _look, accelerator, "Read %d masks to check them")
    bad: dict[str, str] = {}
    resized = 0
    for stem, image, mask, camouflaged in zip(images.stems, images.images, images.masks, images.camouflaged, strict=True):
        size = inspections[image].size
        mask_size, black, problem = looks[mask] if mask else ((0, 0), False, "it has no mask")
        if problem := inspections[image].problem or problem:
            bad[stem] = f"{image}: {problem}"
        elif black == camouflaged:
            bad[stem] = f"{mask} is {'black, but the name says CAM' if black else 'not black, but the name says NonCAM'}"
        elif size != mask_size and size == mask_size[::-1]:
            bad[stem] = f"{mask} lies on its side (is the image turned by its EXIF?)"
        else:
            resized += size != mask_size
    if len(bad) == len(images):
        raise UserError(f"None of the {len(images)} images of {images.name} can be used: {some(bad.values(), 3)}.")
    sentences = [f"{resized:,} masks have another size than their image"] if resized else []
    if bad:
        logger.warning("%s: %d of %d left out: %s", images.name, len(bad), len(images), some(bad.values(), 20))
        sentences.append(f"{len(bad):,} that cannot be used left out")
    return images.but(bad, *sentences)


def check_overlap(train: MaskedImages, tests: dict[str, MaskedImages], inspections: dict[Path, Inspection]) -> None:
    """Refuses test images that are trained on: by pixels, and by the names of COD10K and CAMO. Masks may be equal."""
    pixels = {inspections[path].digest: path for path in train.images}
    names = {stem for stem in train.stems if _UNIQUE.match(stem)}
    for name, test in tests.items():
        same = {stem: f"{stem} by its name" for stem in test.stems if stem in names}
        for stem, path in zip(test.stems, test.images, strict=True):
            if twin := pixels.get(inspections[path].digest):
                same[stem] = f"{path} = {twin}"
        if same:
            raise UserError(
                f"{len(same)} images of the test set {name} are also trained on: {some(same.values(), 3)}. Take them out of"
                " the training folder, or give another test set."
            )
