"""Make pictures of camouflaged objects with their masks, in the layout of COD10K-v3.

    python -m common.demo_data.camouflage --out data/demo/COD10K-v3 --train 400 --test 80 --seed 0 --size 96

    Train/Image/<name>.jpg, Train/GT_Object/<name>.png, Train/GT_Edge/<name>.png     Test/ the same
    Info/CAM_train.txt, Info/CAM_test.txt, Info/NonCAM_train.txt, Info/NonCAM_test.txt   file names of the images
    Info/difficulty.csv                                                               name,level of every CAM picture

An object has the colours of the ground that it hides: the same palette, the same brightness around every place and the same
histogram of what deviates from that. Only its texture differs, in scale, direction, elongation and roughness, and by how
much is the picture's level: 0 is invisible, 1 plain to see. There is a little shading too, but NonCAM pictures (black masks)
and half of the others have bumps with shading where there is no object.

The five super-classes of COD10K are five kinds of ground: mottled, fibrous, striped, pebbly, cloudy. Picture i of a part is
a function of (seed, part, i). As in the wild, sizes differ from picture to picture, and of every ODD_MASK pictures of a
part one has a mask of twice its size.

Mean IoU of the 80 test pictures, all at one level, after learning on levels 0.5 to 1; the U-Net has 0.23 M parameters and
learnt for 3000 steps of 8 crops, 320 CPU seconds (of the default levels it gets .73, after a run of 1500 .63):

    level                     0     0.1   0.2   0.3   0.5   0.75  1
    colour threshold          .13   .14   .14   .14   .14   .14   .14   (all foreground: .14)
    boosted texture features  .02   .03   .10   .22   .42   .56   .60
    U-Net                     .13   .17   .28   .42   .63   .74   .78
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

from common.cli import UserError, sentences
from common.files import made_whole

# (number in COD10K, name, elongation, bumpiness of the outline)
SUPER_CLASSES: dict[str, tuple[tuple[int, str, float, float], ...]] = {
    "Aquatic": ((3, "Crab", 1.2, 0.6), (6, "Fish", 1.9, 0.3)),
    "Terrestrial": ((23, "Cat", 1.5, 0.4), (46, "StickInsect", 3.0, 0.2)),
    "Flying": ((55, "Butterfly", 1.2, 0.7), (65, "Owl", 1.5, 0.2)),
    "Amphibian": ((67, "Frog", 1.2, 0.5), (68, "Toad", 1.4, 0.3)),
    "Other": ((69, "Other", 1.6, 0.4),),
}
# Dark to light, sRGB. The ground of a super-class has one of its palettes, somewhat changed.
PALETTES: dict[str, tuple[tuple[str, ...], ...]] = {
    "Aquatic": (
        ("#2f3a33", "#6f6f55", "#a89a74", "#d9cfae"),  # gravel under shallow water
        ("#1f3338", "#3f6162", "#7f978a", "#c3c9ad"),  # algae
        ("#4a3430", "#8a6250", "#b99677", "#e2d0b2"),  # broken coral
    ),
    "Terrestrial": (
        ("#2a1d14", "#5d4128", "#94714a", "#c9ab7c"),  # dry leaves
        ("#2b2a17", "#5c5a2d", "#938c50", "#cfc58c"),  # dead grass
        ("#241a12", "#4b3a2b", "#7c6852", "#b3a58e"),  # roots
    ),
    "Flying": (
        ("#25231f", "#55504a", "#8b857b", "#c4bfb3"),  # bark of beech
        ("#2a1f18", "#664a38", "#9a7a60", "#cdb79d"),  # bark of pine
        ("#1d2a17", "#42592e", "#78894f", "#b6bd86"),  # reed
    ),
    "Amphibian": (
        ("#161f10", "#344a1f", "#667b36", "#a5ad6a"),  # moss
        ("#262a26", "#555c50", "#8a8f7d", "#c2c4b0"),  # wet pebbles
        ("#20180f", "#4c3d22", "#7d6d3f", "#b5a873"),  # mud
    ),
    "Other": (
        ("#2d2b2a", "#625e59", "#98928a", "#cfc9bf"),  # granite
        ("#3a2c22", "#7d5f47", "#b08f6c", "#dfc8a6"),  # sandstone
        ("#2a3030", "#5d6a64", "#97a091", "#d3d6bf"),  # lichen
    ),
}
# Mean scale and stretch of its textures, see Texture: mottled, fibrous, striped, pebbly, cloudy.
GROUNDS = {"Aquatic": (9, 1.3), "Terrestrial": (7, 3.0), "Flying": (9, 3.5), "Amphibian": (15, 1.3), "Other": (8, 1.8)}
PARTS = ("train", "test")
ODD_MASK = 40  # pictures 5, 45, 85, ... of a part
JPEG_QUALITY = 95
SHARE = (0.06, 0.3)  # of the picture that an object covers, log-uniform
SHADING = 0.12  # how much brighter and darker the sides of a bump are
DIFFICULTY = (0.5, 1.0)


def noise(rng: np.random.Generator, shape: tuple[int, int], envelope: np.ndarray) -> np.ndarray:
    """A field of mean 0 and deviation 1 with random phases and this amplitude per frequency."""
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * envelope, shape)
    return (field - field.mean()) / field.std()


@dataclass(frozen=True)
class Texture:
    """A kind of ground. Lengths are shares of the picture's nominal side, so `scale` counts features along it."""

    kind: str  # the super-class
    scale: float
    angle: float  # of the long side of its features
    stretch: float  # how much longer than wide they are
    roughness: float  # the slope of the spectrum; rough is small

    def changed(self, level: float, rng: np.random.Generator) -> Texture:
        """The texture of an object on this ground: as different as `level`, in a direction that is drawn."""
        finer = rng.choice([-1, 1], p=[0.25, 0.75])  # an animal is mostly smaller than what it lies on
        longer, rougher = rng.choice([-1, 1], 2)
        return replace(
            self,
            scale=self.scale * math.exp(finer * 0.7 * level),
            angle=self.angle + rng.choice([-1, 1]) * rng.uniform(0.6, 1.4) * level,
            stretch=self.stretch * math.exp(longer * 0.35 * level),
            roughness=self.roughness + rougher * 0.5 * level,
        )

    def field(self, rng: np.random.Generator, shape: tuple[int, int], side: int) -> np.ndarray:
        """(H, W) of deviation 1."""
        down, right = np.fft.fftfreq(shape[0])[:, None] * side, np.fft.rfftfreq(shape[1]) * side
        along = right * math.cos(self.angle) + down * math.sin(self.angle)
        across = down * math.cos(self.angle) - right * math.sin(self.angle)
        frequency = np.hypot(along * self.stretch**0.5, across / self.stretch**0.5) + 1e-3  # 0 has no logarithm
        grain = noise(rng, shape, (frequency**2 + self.scale**2) ** (-self.roughness / 2))
        if self.kind == "Other":  # a power law only
            return grain
        if self.kind == "Amphibian":
            field = self._cells(rng, shape, side) + 0.35 * grain
        else:
            width = {"Aquatic": 0.4, "Terrestrial": 0.55, "Flying": 0.3}[self.kind]  # of the band, in e-foldings
            band = noise(rng, shape, np.exp(-0.5 * (np.log(frequency / self.scale) / width) ** 2))
            field = (-np.abs(band) if self.kind == "Terrestrial" else np.tanh(1.8 * band)) + 0.35 * grain
        return (field - field.mean()) / field.std()

    def _cells(self, rng: np.random.Generator, shape: tuple[int, int], side: int) -> np.ndarray:
        """Pebbles: every point belongs to the nearest of random centres, seams are dark."""
        rows, columns = np.mgrid[: shape[0], : shape[1]].reshape(2, -1) / side
        c, s = math.cos(self.angle), math.sin(self.angle)
        places = np.stack([(columns * c + rows * s) / self.stretch**0.5, (rows * c - columns * s) * self.stretch**0.5], 1)
        low, high = places.min(0) - 1 / self.scale, places.max(0) + 1 / self.scale
        number = int(np.prod(high - low) * self.scale**2)
        near, which = cKDTree(rng.uniform(low, high, (number, 2))).query(places, k=2)
        seam = np.tanh(4 * self.scale * (near[:, 1] - near[:, 0]))
        return (seam * 1.6 + 0.5 * rng.standard_normal(number)[which[:, 0]]).reshape(shape)


def draw_texture(kind: str, rng: np.random.Generator) -> Texture:
    scale, stretch = GROUNDS[kind]
    scale *= math.exp(rng.normal(0, 0.12))
    stretch = 1 + (stretch - 1) * rng.uniform(0.6, 1.4)
    return Texture(kind, scale, rng.uniform(0, math.pi), stretch, rng.uniform(1.8, 2.6))


def draw_body(
    rng: np.random.Generator, size: tuple[int, int], share: float, elongation: float, bumpiness: float
) -> tuple[np.ndarray, np.ndarray]:
    """A body seen from above that covers this share of the picture: how opaque it is and how high, both (H, W) in [0, 1].

    Its outline is an ellipse with waves, that is, one closed curve around one point.
    """
    height, width = size
    margin = 0.5 * math.sqrt(share * height * width * elongation / math.pi)
    row, column = (rng.uniform(min(margin, side / 2), max(side - margin, side / 2)) for side in size)
    turn = rng.uniform(0, 2 * math.pi)
    down, right = np.arange(height)[:, None] - row, np.arange(width) - column
    u = (right * math.cos(turn) + down * math.sin(turn)) / elongation**0.5
    v = (down * math.cos(turn) - right * math.sin(turn)) * elongation**0.5
    around, waves = np.arctan2(v, u), np.arange(2, 7)[:, None, None]
    bumps = rng.normal(0, bumpiness / waves) * np.cos(waves * around - rng.uniform(0, 2 * math.pi, waves.shape))
    distance = np.hypot(u, v) / np.exp(bumps.sum(0))
    radius = np.quantile(distance, share)
    alpha = 1 / (1 + np.exp(np.clip(2.5 * (distance - radius), -50, 50)))
    return alpha, np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))


def transplant(texture: np.ndarray, ground: np.ndarray, where: np.ndarray, side: int) -> np.ndarray:
    """`texture` with the local means of `ground`, and with its histogram of deviations from them over `where`.

    No threshold on a colour tells the two apart: what is left is how the same values are arranged.
    """
    sigma = side / 16
    means = gaussian_filter(ground, sigma)
    own, hidden = texture - gaussian_filter(texture, sigma), ground - means
    return means + np.interp(own, np.sort(own[where]), np.sort(hidden[where]))


def draw_palette(kind: str, rng: np.random.Generator) -> np.ndarray:
    """(4, 3) sRGB in [0, 1], dark to light."""
    colours = PALETTES[kind][rng.integers(len(PALETTES[kind]))]
    palette = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in colours]) / 255
    return palette * rng.uniform(0.9, 1.1, 3) * rng.uniform(0.85, 1.15)


class Picture(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray  # (H, W) bool
    level: float
    label: str  # super-class and sub-class as names of COD10K have them: 1-Aquatic-3-Crab


def make_picture(
    part: str, index: int, *, camouflaged: bool, seed: int, size: int = 96, difficulty: tuple[float, float] = DIFFICULTY
) -> Picture:
    """Picture `index` of a part. One that is not camouflaged has no object, an empty mask, and a level without meaning."""
    rng = np.random.default_rng([seed, PARTS.index(part), int(camouflaged), index])
    kind = list(SUPER_CLASSES)[rng.integers(len(SUPER_CLASSES))]
    number, name, elongation, bumpiness = SUPER_CLASSES[kind][rng.integers(len(SUPER_CLASSES[kind]))]
    shape = round(size * rng.uniform(0.92, 1.17)), round(size * rng.uniform(1.0, 1.33))
    level = rng.uniform(*difficulty)
    (alpha, height), decoy = (
        draw_body(rng, shape, math.exp(rng.uniform(*np.log(SHARE))), elongation, bumpiness) for _ in range(2)
    )
    body = alpha > 0.5
    if rng.random() < 0.3:  # a little of the ground lies on the object, in flat pieces
        litter = draw_texture(kind, rng)
        litter = replace(litter, scale=litter.scale / 2, roughness=4.0).field(rng, shape, size)
        alpha = alpha / (1 + np.exp(6 * (litter - np.quantile(litter[body], rng.uniform(0.75, 0.95)))))

    ground = draw_texture(kind, rng)
    own = rng.spawn(1)[0]  # so that the level changes nothing but the object
    skin = ground.changed(level, own)
    fields = []
    for _ in range(2):
        field = ground.field(rng, shape, size)
        if camouflaged:
            field = field + alpha * (transplant(skin.field(own, shape, size), field, body, size) - field)
        fields.append(field)
    # The first field is brightness, the second how two palettes of this ground mix.
    first, second = (_colours(1.5 + 0.75 * fields[0], draw_palette(kind, rng)) for _ in range(2))
    image = first + 0.7 / (1 + np.exp(-fields[1]))[..., None] * (second - first)

    down, right = np.fft.fftfreq(shape[0])[:, None] * size, np.fft.rfftfreq(shape[1]) * size
    light = 1 + 0.1 * noise(rng, shape, (np.hypot(down, right) + 1) ** -3)
    bumps = [height] * camouflaged + [decoy[1]] * int(rng.integers(2))
    direction = rng.uniform(0, 2 * math.pi)
    for bump in bumps:
        across, along = np.gradient(gaussian_filter(bump, size / 48))
        slope = across * math.sin(direction) + along * math.cos(direction)
        light += SHADING * slope / np.abs(slope).max()
    image = image * light[..., None] + rng.normal(0, 0.012, image.shape)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    mask = alpha > 0.5 if camouflaged else np.zeros(shape, bool)
    return Picture(pixels, mask, level, f"{1 + list(SUPER_CLASSES).index(kind)}-{kind}-{number}-{name}")


def _colours(place: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W, 3): the colour at this place in a palette, 0 the first, 3 the last."""
    return np.stack([np.interp(place, np.arange(len(palette)), channel) for channel in palette.T], -1)


def write(
    folder: str | Path,
    train: int = 400,
    *,
    test: int = 80,
    noncam: float = 0.25,
    seed: int = 0,
    size: int = 96,
    difficulty: tuple[float, float] = DIFFICULTY,
    progress: bool = True,
) -> None:
    """Make the folder: `train` and `test` pictures with an object, and that share of them again without one.

    It appears when it is complete: a run that was killed leaves nothing that looks like a data set.
    """
    folder = Path(folder).absolute()
    low, high = difficulty
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another --out or delete it first.")
    if not 0 <= low <= high <= 1:
        raise UserError(f"--difficulty is {low:g} {high:g}: give the lowest and the highest level, between 0 and 1.")
    counts = {"train": train, "test": test}
    numbers = {True: 0, False: 0}  # as in COD10K, no number occurs in both parts
    levels = []
    total = sum(count + round(count * noncam) for count in counts.values())
    bar = tqdm(total=total, desc="camouflage", unit=" pictures", disable=not progress)
    with made_whole(folder) as partial, bar:
        (partial / "Info").mkdir()
        for part, count in counts.items():
            for kind in ("Image", "GT_Object", "GT_Edge"):
                (partial / part.title() / kind).mkdir(parents=True)
            for camouflaged, group in ((True, "CAM"), (False, "NonCAM")):
                names = []
                for index in range(count if camouflaged else round(count * noncam)):
                    settings = dict(seed=seed, size=size, difficulty=difficulty)
                    picture = make_picture(part, index, camouflaged=camouflaged, **settings)
                    numbers[camouflaged] += 1
                    names.append(f"COD10K-{group}-{picture.label}-{numbers[camouflaged]}")
                    _save(partial / part.title(), names[-1], picture, twice=index % ODD_MASK == 5)
                    if camouflaged:
                        levels.append((names[-1], f"{picture.level:.4f}"))
                    bar.update()
                (partial / "Info" / f"{group}_{part}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
        with open(partial / "Info" / "difficulty.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("name", "level"), *levels])


def _save(folder: Path, name: str, picture: Picture, twice: bool) -> None:
    mask = np.kron(picture.mask, np.ones((2, 2), bool)) if twice else picture.mask
    Image.fromarray(picture.image).save(folder / "Image" / f"{name}.jpg", quality=JPEG_QUALITY)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "GT_Object" / f"{name}.png")
    edge = mask & ~binary_erosion(mask, np.ones((3, 3), bool), border_value=1)
    Image.fromarray(edge.astype(np.uint8) * 255).save(folder / "GT_Edge" / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=400, help="camouflaged pictures to train on")
    parser.add_argument("--test", type=int, default=80, help="camouflaged pictures held out")
    parser.add_argument("--noncam", type=float, default=0.25, help="pictures without object, as a share of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="nominal side; pictures are 0.92 to 1.33 times as large")
    parser.add_argument(
        "--difficulty",
        type=float,
        nargs=2,
        default=DIFFICULTY,
        metavar=("LOW", "HIGH"),
        help="range of levels, drawn evenly: how much the texture of an object differs, 0 invisible, 1 plain to see",
    )
    flags = vars(parser.parse_args())
    folder = flags.pop("out")
    with sentences(last=False):
        write(folder, flags.pop("train"), difficulty=tuple(flags.pop("difficulty")), **flags)
    print(f"{folder}: made")


if __name__ == "__main__":
    main()
