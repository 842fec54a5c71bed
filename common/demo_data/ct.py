"""Make chest CT pulmonary angiograms in Hounsfield units, with the truth about every voxel.

    python -m common.demo_data.ct --out data/demo/ct --patients 24 --seed 0 --size 96 96 96

    scans/patient001_scan1.nii.gz      int16; every 7th patient has a second scan, as a split by patient must know
    truth/patient001_scan1.npz         labels (x, y, z) in RAS, names (LABELS)
    info.json                          what was drawn for every scan: build, contrast, noise, spacing, orientation, ...
    sheet.png                          three planes of the first scans, in a lung window and a mediastinal window

A scan shows the whole chest whatever its size, so voxels of the default are 3 to 4 mm wide. That gives a codec all of what
real scans have to learn from, edges, ribs, vessels down to less than a voxel and noise, in few enough voxels for minutes on
a CPU. Patient i is a function of (seed, i). Patient 1 has exactly the nominal size, the others odd sizes near it. Two scans
of three are stored as RAS, the others as LPS or with their axes permuted.

The arteries, veins and airways of a lung share out its volume: a branch that supplies some of it goes towards the middle of
that part, which then is cut in two across its longest direction. With equal flow to equal volumes Murray's law sets the
radii, r^3 = r1^3 + r2^3. Everything is drawn with the share of the voxel that it fills, so vessels that are thinner than
a voxel fade instead of breaking up.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel import orientations
from PIL import Image, ImageDraw
from scipy import fft
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from common.cli import UserError, sentences
from common.files import made_whole

LABELS = ("outside", "body", "lung", "airway", "bone", "vessel", "embolus")
OUTSIDE, BODY, LUNG, AIRWAY, BONE, VESSEL, EMBOLUS = range(7)
SIZE = (96, 96, 96)
SMALLEST = 24
SECOND_SCAN = 7  # patients 7, 14, 21, ...
ORIENTATIONS = ("RAS", "LPS", "RAS", "PSR", "RAS", "RAS")  # of patients 6, 1, 2, 3, 4, 5, 12, ...
KINDS = ("artery", "vein", "airway")
LEVEL = -42.0  # mm below the carina: the middle of a scan
WALL = 21  # mm of muscle and ribs beside the lungs
SLAB = 1 << 21  # voxels that are made at a time
LEAVES = 3000  # of each tree in each lung
SHEET_ROWS, SHEET_MM = 6, 400
WINDOWS = {"lung": (-1350, 150), "mediastinum": (-160, 440)}

# HU
AIR, FAT, SKIN, MUSCLE, CLOT, CORD, DISC, CARTILAGE, MARROW, CORTEX = -1000, -100, 30, 52, 55, 28, 95, 120, 190, 620
BEYOND = -1024  # outside the scanner's field of view


@dataclass(frozen=True)
class Patient:
    """Lengths in mm, those of the build before `scale`."""

    scale: float
    half_width: float  # of the rib cage, inside
    half_depth: float
    fat: float  # under the skin
    breasts: float  # 0 none, 1 large
    kyphosis: float  # how far the spine bends backwards
    heart: float  # its size, 1 is usual
    lung_hu: float  # of its middle; it lies on itself and is denser at the back
    nodules: int

    @property
    def width(self) -> float:
        """Half of the body's, at the heart."""
        return self.half_width + WALL + self.fat

    @property
    def depth(self) -> float:
        return 114 + 0.75 * self.fat


@dataclass(frozen=True)
class Protocol:
    """What differs from one scan of a patient to the next."""

    contrast: float  # HU of the pulmonary arteries
    phase: float  # HU of the left heart and the aorta, over `contrast`
    cava: float  # the same of the superior vena cava, where the injection comes in
    noise: float  # HU, deviation inside the body at voxels of 0.9 mm
    overlap: float  # what a slice takes of each of its neighbours
    breath: float  # mm that the diaphragm is lower
    emboli: int
    fov: float  # mm
    length: float  # mm from the first to the last slice


def draw_patient(seed: int) -> Patient:
    rng = np.random.default_rng([seed, 0])
    return Patient(
        scale=rng.uniform(0.92, 1.08),
        half_width=rng.uniform(118, 134),
        half_depth=rng.uniform(78, 90),
        fat=rng.gamma(3, 4.5) + 4,
        breasts=rng.choice([0, 1]) * rng.uniform(0.4, 1),
        kyphosis=rng.uniform(6, 18),
        heart=rng.uniform(0.92, 1.12),
        lung_hu=rng.uniform(-890, -845),
        nodules=int(rng.choice([0, 0, 0, 1, 2, 3])),
    )


def draw_protocol(seed: int, scan: int = 1) -> Protocol:
    rng, patient = np.random.default_rng([seed, 1, scan]), draw_patient(seed)
    return Protocol(
        contrast=rng.uniform(260, 480),
        phase=rng.uniform(0.55, 1.0),
        cava=rng.uniform(1.0, 2.2),
        noise=18 * rng.uniform(0.65, 1.12),
        overlap=rng.uniform(0, 0.22),
        breath=rng.uniform(-6, 14),
        emboli=int(rng.choice([0, 0, 2, 3, 5, 8])),
        # A large body may touch the edge of the field, as it does in practice.
        fov=min(2 * patient.scale * patient.width * rng.uniform(1.0, 1.1), 480),
        length=patient.scale * rng.uniform(296, 330),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tubes


class Tubes(NamedTuple):
    """Round cones with spheres for ends. (n, 3) points x, y, z and (n,) radii in mm."""

    start: np.ndarray
    end: np.ndarray
    first: np.ndarray  # radius at the start
    last: np.ndarray

    def only(self, which: np.ndarray) -> Tubes:
        return Tubes(*(field[which] for field in self))

    def grown(self, by: float) -> Tubes:
        return self._replace(first=self.first + by, last=self.last + by)


class Tree(NamedTuple):
    """Tubes of constant radius and the segment that each one leaves, -1 for the first."""

    start: np.ndarray
    end: np.ndarray
    radius: np.ndarray
    parent: np.ndarray

    def stretched(self, breath: float) -> Tree:
        """The same tree when the diaphragm is lower by so many mm."""
        start, end = (p - np.outer(_step(0, -110, p[:, 2]), [0, 0, breath]) for p in (self.start, self.end))
        return self._replace(start=start, end=end)

    def tubes(self) -> Tubes:
        return Tubes(self.start, self.end, self.radius, self.radius)


def joined(parts: Sequence[Tubes]) -> Tubes:
    return Tubes(*map(np.concatenate, zip(*parts, strict=True)))


def curve(*points: tuple[float, float, float, float], piece: float = 7.0) -> Tubes:
    """A smooth tube through (x, y, z, radius), in pieces of that length so that the boxes around them stay small."""
    points = np.asarray(points, np.float64)
    lengths = np.linalg.norm(np.diff(points[:, :3], axis=0), axis=1)
    along = np.concatenate([[0], np.cumsum(lengths)])
    path = CubicSpline(along, points)(np.linspace(0, along[-1], 1 + math.ceil(along[-1] / piece)))
    return Tubes(path[:-1, :3], path[1:, :3], path[:-1, 3], path[1:, 3])


def grow(points: np.ndarray, root: Sequence[float], radius: float, rng: np.random.Generator) -> Tree:
    """The tree that supplies these points (n, 3), one leaf each, from a root of this radius. All branches of a generation
    grow at once."""
    total, segments = len(points), 0
    group, start, parent = np.zeros(total, int), np.array([root], float), np.array([-1])
    made: list[tuple[np.ndarray, ...]] = []
    while True:
        count = np.bincount(group)
        centre = np.stack([np.bincount(group, x) for x in points.T], 1) / count[:, None]
        share = np.where(count == 1, 1.0, rng.uniform(0.35, 0.55, len(count)))
        end = start + share[:, None] * (centre - start)
        made.append((start, end, radius * np.cbrt(count / total), parent))
        forks = (count > 1)[group]
        group, points = group[forks], points[forks]
        if not len(points):
            return Tree(*map(np.concatenate, zip(*made, strict=True)))
        offset = points - centre[group]
        ahead = (centre - start) / np.maximum(np.linalg.norm(centre - start, axis=1, keepdims=True), 1e-9)
        beside = offset - 0.8 * (offset * ahead[group]).sum(1, keepdims=True) * ahead[group]  # forks open to the sides
        spread = [np.bincount(group, beside[:, i] * beside[:, j], len(count)) for i in range(3) for j in range(3)]
        longest = np.linalg.eigh(np.stack(spread, 1).reshape(-1, 3, 3))[1][:, :, 2]
        place = (offset * longest[group]).sum(1)
        low, high = np.zeros(len(count)), np.zeros(len(count))
        np.minimum.at(low, group, place)
        np.maximum.at(high, group, place)
        # Real branches share unevenly, so the cut is off the middle; some points stay on each of its sides.
        cut = np.clip(rng.normal(0, 0.2, len(count)) * (high - low), 0.6 * low, 0.6 * high)
        halves, group = np.unique(2 * group + (place > cut[group]), return_inverse=True)
        start, parent = end[halves // 2], segments + halves // 2
        segments += len(count)


@dataclass(frozen=True)
class Grid:
    """Voxel centres, in the mm of the anatomy. Arrays over it are (z, y, x): slices lie in one piece."""

    origin: np.ndarray  # (3,) x, y, z of the first
    step: np.ndarray  # (3,)
    shape: tuple[int, int, int]  # x, y, z

    def axis(self, i: int) -> np.ndarray:
        return (self.origin[i] + self.step[i] * np.arange(self.shape[i])).astype(np.float32)

    def mesh(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z, to be broadcast."""
        return self.axis(0), self.axis(1)[:, None], self.axis(2)[:, None, None]

    def part(self, low: Sequence[int], high: Sequence[int]) -> Grid:
        """The voxels from one index (x, y, z) to before another."""
        return Grid(self.origin + self.step * low, self.step, tuple(int(b - a) for a, b in zip(low, high, strict=True)))

    @property
    def width(self) -> float:
        return float(np.prod(self.step) ** (1 / 3))


Stretch = tuple[float, float, float]
ROUND, TALL, TALLER, WIDE = (1, 1, 1), (1, 1, 1.5), (1, 1, 3.5), (2.8, 1, 1)


def _boxes(tubes: Tubes, grid: Grid, margin: float, stretch: Stretch) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) and (n, 3): from which index to before which one each tube reaches, with a margin in mm."""
    reach = (np.maximum(tubes.first, tubes.last) + margin)[:, None] * stretch
    low = np.ceil((np.minimum(tubes.start, tubes.end) - reach - grid.origin) / grid.step)
    high = np.floor((np.maximum(tubes.start, tubes.end) + reach - grid.origin) / grid.step) + 1
    return np.clip(low, 0, grid.shape).astype(int), np.clip(high, 0, grid.shape).astype(int)


def distance(tubes: Tubes, grid: Grid, limit: float, stretch: Stretch = ROUND) -> np.ndarray:
    """Distance to the nearest tube, negative inside, at most `limit`. `stretch` makes cross-sections elliptic."""
    field = np.full(grid.shape[::-1], limit, np.float32)
    low, high = _boxes(tubes, grid, limit, stretch)
    x, y, z = grid.mesh()
    wide, _, tall = np.float32(stretch)
    towards, start = np.float32((tubes.end - tubes.start) / stretch), np.float32(tubes.start)
    for i in np.flatnonzero((low < high).all(1)):
        (x0, y0, z0), (x1, y1, z1) = low[i], high[i]
        ax, ay, az = towards[i]
        px, py, pz = (x[x0:x1] - start[i, 0]) / wide, y[y0:y1] - start[i, 1], (z[z0:z1] - start[i, 2]) / tall
        length = max(ax * ax + ay * ay + az * az, np.float32(1e-6))
        along = px * ax + (py * ay + pz * az)
        share = np.clip(along / length, 0, 1)
        square = px * px + (py * py + pz * pz) - share * (2 * along - share * length)
        away = np.sqrt(np.maximum(square, 0))
        away -= np.float32(tubes.first[i]) + share * np.float32(tubes.last[i] - tubes.first[i])
        part = field[z0:z1, y0:y1, x0:x1]
        np.minimum(part, away, out=part)
    return field


def splat(tubes: Tubes, grid: Grid) -> np.ndarray:
    """The share of each voxel that thin tubes fill: their volume, put down along their axes."""
    field = np.zeros(grid.shape[::-1], np.float32)
    low, high = _boxes(tubes, grid, grid.step.max(), ROUND)
    tubes = tubes.only((low < high).all(1))
    lengths = np.linalg.norm(tubes.end - tubes.start, axis=1)
    pieces = np.ceil(lengths / (0.5 * grid.step.min())).astype(int).clip(1)
    which = np.repeat(np.arange(len(pieces)), pieces)
    place = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 0.5) / pieces[which]
    points = tubes.start[which] + place[:, None] * (tubes.end - tubes.start)[which]
    radius = tubes.first[which] + place * (tubes.last - tubes.first)[which]
    volume = (math.pi * radius**2 * (lengths / pieces)[which] / np.prod(grid.step)).astype(np.float32)
    position = (points - grid.origin) / grid.step
    cell = np.floor(position).astype(int)
    part = (position - cell).astype(np.float32)
    for corner in np.ndindex(2, 2, 2):
        at = cell + corner
        inside = ((at >= 0) & (at < grid.shape)).all(1)
        weight = np.where(corner, part, 1 - part).prod(1) * volume
        np.add.at(field, tuple(at[inside, ::-1].T), weight[inside])
    return np.minimum(field, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Anatomy: x to the patient's right, y to the front, z to the head; the carina is near the origin


class Anatomy(NamedTuple):
    grid: Grid  # of the fields, coarse
    fields: dict[str, np.ndarray]  # distances to surfaces in mm, negative inside, and textures
    tubes: dict[str, Tubes]
    trees: dict[str, Tree]  # artery right, artery left, ...
    spine: tuple[float, float, float]  # height of the first rib's vertebra, mm from one to the next, their size


def _smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h / (4 * k)


def _smooth_max(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    return -_smooth_min(-a, -b, k)


def _step(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _ellipsoid(p: Sequence[np.ndarray], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """About the distance to its surface; exact on the axes' ends."""
    q = [(x - c) / r for x, c, r in zip(p, centre, radii, strict=True)]
    level = np.sqrt(sum(u * u for u in q))
    slope = np.sqrt(sum((u / r) ** 2 for u, r in zip(q, radii, strict=True)))
    return level * (level - 1) / np.maximum(slope, 1e-4)


def _as_distance(level: np.ndarray, grid: Grid) -> np.ndarray:
    """A level function that is 0 on a surface, over its slope."""
    slope = np.sqrt(sum(g * g for g in np.gradient(level, *grid.step[::-1].tolist())))
    return level / np.maximum(slope, 0.004)


def spine_line(z: np.ndarray, patient: Patient) -> np.ndarray:
    """y of the middle of the vertebral bodies."""
    return -60 + patient.kyphosis * ((z + 50) / 120) ** 2


def cage(x: np.ndarray, y: np.ndarray, z: np.ndarray, patient: Patient) -> np.ndarray:
    """Level function of the inside of the rib cage: 0 on the pleura."""
    split = 33 * _step(-10, 105, z)  # two apexes
    across = np.maximum(np.abs(x) - split, 0) / (patient.half_width - split)
    deep = np.abs(y - 4) / patient.half_depth
    return (across**2.3 + deep**2.3 + (np.maximum(z + 60, 0) / 165) ** 2.5) ** (1 / 2.3) - 1


def central(patient: Patient) -> dict[str, Tubes]:
    """Great vessels, chambers of the heart and airways up to the hila."""

    def aorta(z: float) -> float:
        return spine_line(np.float64(z), patient) + 19

    h = patient.heart
    right = [
        curve((27, 8, -50, 21 * h), (27, 8, -82, 22 * h)),  # atrium
        curve((20, 26, -94, 18 * h), (-8, 44, -96, 17 * h), (-30, 50, -98, 12 * h)),  # ventricle
        curve((-8, 46, -92, 16 * h), (-14, 44, -62, 15), (-17, 36, -32, 14.5), (-17, 22, -12, 14), (-14, 8, -5, 12)),
        curve((-15, 12, -7, 12), (8, -2, -10, 11.5), (28, -6, -13, 10.5), (44, -10, -18, 9.5)),
        curve((-16, 14, -5, 12), (-30, -3, 1, 11), (-42, -17, -5, 10), (-49, -26, -19, 9.2)),
    ]
    left = [
        curve((-20, 4, -64, 21 * h), (-36, 19, -82, 19 * h), (-52, 33, -98, 11 * h)),  # ventricle
        curve((-19, -16, -52, 16 * h), (20, -18, -52, 16 * h)),  # atrium
        curve(
            *((-12, 8, -58, 14), (6, 20, -34, 15.5), (14, 24, -6, 15), (10, 18, 26, 14.5), (-8, 0, 41, 13.5)),
            *((-24, -24, 30, 13), (-27, aorta(0), 0, 12.5), (-26, aorta(-60), -60, 12), (-18, aorta(-130), -130, 11.5)),
            (-12, aorta(-260), -260, 11),
        ),
        curve((8, 16, 32, 6), (16, 14, 80, 6), (24, 12, 170, 5)),
        curve((-8, 2, 44, 4.5), (-14, 6, 90, 4.5), (-18, 8, 170, 4)),
        curve((-18, -12, 40, 5.5), (-26, -10, 90, 5), (-40, -6, 170, 5)),
        curve((18, -18, -50, 9), (34, -14, -49, 8.5), (46, -12, -50, 8.2)),  # pulmonary veins
        curve((-16, -16, -50, 9), (-32, -15, -50, 8.5), (-45, -16, -52, 8)),
    ]
    heart = [
        joined(right[:1]).grown(3),
        joined(right[1:2]).grown(4.5),
        joined(left[:1]).grown(10),
        joined(left[1:2]).grown(3),
    ]
    cava = curve((24, 24, 150, 6), (24, 18, 60, 8), (27, 11, 10, 9.5), (27, 9, -26, 9))
    innominate = curve((24, 24, 55, 7), (-4, 34, 58, 6.5), (-34, 30, 84, 6), (-60, 26, 110, 6))
    airway = [
        curve((0, 4, 170, 9), (0, 0, 90, 9), (1, -8, 40, 8.8), (1, -15, 2, 8.6)),
        curve((1, -15, 4, 7.5), (18, -19, -13, 7), (38, -21, -29, 6)),
        curve((1, -15, 4, 7.5), (-20, -20, -17, 6.5), (-42, -23, -32, 5.6)),
    ]
    low = [curve((22, -6, -95, 12), (23, -10, -140, 12), (22, -12, -260, 12))]  # inferior cava, not enhanced yet
    gullet = curve(*((-5, float(aorta(z)) + 6 - 0.04 * min(z + 40, 0), z, 6) for z in (170, 110, 50, -10, -70, -130)))
    return {
        "right": joined(right),
        "left": joined(left),
        "heart": joined(heart),
        "cava": joined([cava, innominate]),
        "airway": joined(airway),
        "soft": joined([*low, gullet]),
    }


def skeleton(patient: Patient, levels: np.ndarray, rng: np.random.Generator) -> dict[str, Tubes]:
    """Everything but the vertebral bodies. `levels` are the heights of the vertebrae, the first rib's at the top."""

    def on_cage(angle: np.ndarray, z: np.ndarray, outside: float) -> np.ndarray:
        """(..., 3): where a ray from the middle at this angle, 0 to the back, leaves the cage, plus a margin."""
        sine, cosine = np.sin(angle), np.cos(angle)
        low, high = np.zeros(angle.shape), np.full(angle.shape, 250.0)
        for _ in range(20):
            middle = (low + high) / 2
            inside = cage(middle * sine, 4 - middle * cosine, z, patient) < 0
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        return np.stack([(low + outside) * sine, 4 - (low + outside) * cosine, z + 0 * low], -1)

    def chain(points: np.ndarray, radius: float | np.ndarray) -> Tubes:
        radius = np.broadcast_to(radius, len(points)).astype(float)
        return Tubes(points[:-1], points[1:], radius[:-1], radius[1:])

    ribs, cartilage, plates, long = [], [], [], []
    for side in (-1, 1):
        mirror = np.array([side, 1, 1])
        for number in range(12):
            last = math.radians((158, 162, 164, 166, 167, 168, 166, 150, 140, 128, 100, 78)[number])
            bone = 0.8 if number < 10 else 1.0
            angle = np.linspace(math.radians(17), last, 26)
            share = (angle - angle[0]) / (math.radians(165) - angle[0])
            drop = (34, 46, 56, 64, 70, 74, 78, 80, 82, 82, 80, 70)[number] + rng.uniform(-4, 4)
            points = on_cage(angle, np.minimum(levels[number] + 2 - drop * share**1.1, 92), 6.0)
            points[0, 1] = max(points[0, 1], spine_line(levels[number], patient) - 16)
            points = points * mirror
            cut = round(bone * 25)
            thick = np.interp(share, [0, 0.1, 1], [3.2, 4.0, 3.7]) * (0.9 if number > 9 else 1)
            ribs.append(chain(points[: cut + 1], thick[: cut + 1]))
            if number < 10:
                cartilage.append(chain(points[cut:], 4.2))
        clavicle = np.array([(14, 74, 50, 7), (52, 74, 64, 5.5), (95, 45, 82, 5.5), (122, 20, 92, 7)])
        long.append(curve(*(clavicle * [side, 1, 1, 1])))
        for z in np.arange(74, -42, -9.0):
            reach = np.interp(z, [-42, 60, 80], [0.1, 1, 0.9])
            angle = np.linspace(math.radians(46), math.radians(46 + 38 * reach), 7)
            thin = np.interp(np.arange(7), [0, 1, 5, 6], [2.6, 1.6, 1.8, 3.2])
            plates.append(chain(on_cage(angle, np.full(7, min(z, 84.0)), 19.0) * mirror, thin))
        for z in levels:
            y = spine_line(z, patient) - 22
            long.append(chain(np.array([(12, y, z + 3), (34, y - 12, z + 6)]) * mirror, np.array([4.0, 4.5])))
    for z in levels:
        y = spine_line(z, patient) - 35
        long.append(chain(np.array([(0, y, z), (0, y - 21, z - 15)]), np.array([4.0, 3.2])))
    z = np.linspace(44, -92, 18)
    front = on_cage(np.full(18, math.pi), z, 9.0)
    sternum = [chain(front, 5.5 + 2 * _step(15, 35, z))]
    parts = dict(rib=ribs, cartilage=cartilage, plate=plates, bone=long, sternum=sternum)
    return {name: joined(part) for name, part in parts.items()}


def build(seed: int, patient: Patient, protocol: Protocol, scan: int) -> Anatomy:
    rng = np.random.default_rng([seed, 2])
    step = np.full(3, 6.0)
    grid = Grid(np.array([-234.0, -174.0, -252.0]), step, (79, 60, 72))
    x, y, z = grid.mesh()
    tubes = central(patient)
    top, pitch = rng.uniform(80, 90), rng.uniform(22, 24)
    levels = top - pitch * np.arange(12)
    tubes |= skeleton(patient, levels, rng)

    inner = _as_distance(cage(x, y, z, patient), grid)
    narrow = 1 - 0.1 * _step(40, 130, z)
    width, depth = patient.width * narrow, patient.depth * narrow
    body = (np.abs(x / width) ** 2.5 + np.abs((y + 3) / depth) ** 2.5) ** (1 / 2.5) - 1
    body = _as_distance(body, grid)
    large = [gaussian_filter(rng.standard_normal(grid.shape[::-1]), s, mode="nearest") for s in (0.8, 0.8, 2.5, 2.5)]
    grain, other, patchy, uneven = (field / field.std() for field in large)
    if patient.breasts:
        size = np.array([52, 34, 56]) * (0.7 + 0.4 * patient.breasts)
        for side in (-1, 1):
            breast = _ellipsoid((x, y, z), (72 * side, 84 + 0.5 * patient.fat, -42), size)
            body = _smooth_min(body, breast, 24)
    thin = 1 - 0.55 * np.exp(-((x / 28) ** 2)) - 0.25 * np.exp(-(((z - 40) / 50) ** 2))
    muscle = _smooth_max(body + patient.fat * thin + 2 + 1.6 * uneven, inner - 34 - 3 * patchy, 8)
    muscle = _smooth_max(_smooth_min(muscle, inner - 13, 6), body + 4, 2)

    spine = np.sqrt((x / 21) ** 2 + (np.maximum(y - spine_line(z, patient), 0) / 18) ** 2) - 1
    middle = _smooth_min(_ellipsoid((x, y, z * 0), (-2, -5, 0), (25, 96, 1e9)), _as_distance(spine, grid), 8)
    h = patient.heart
    heart = _ellipsoid((x, y, z), (-14, 22, -76), (56 * h, 47 * h, 45 * h))
    near = distance(joined([tubes[name] for name in ("right", "left", "heart", "cava")]), grid, 40.0) - 3
    middle = _smooth_min(_smooth_min(middle, heart - 4, 14), near, 8)

    dome = np.where(x > 0, -106.0, -116.0) + np.where(x > 0, 1, -1) * -5 * np.exp(-((x / 20) ** 2))
    dome = dome - 58 * (np.maximum(np.abs(x) - 60, 0) / 66) ** 2 - 10 * (np.maximum(60 - np.abs(x), 0) / 60) ** 2
    dome = dome - 72 * (np.maximum(12 - y, 0) / 92) ** 2 - 34 * (np.maximum(y - 12, 0) / 80) ** 2
    below = _as_distance(z - dome, grid)  # negative under the diaphragm
    chest = _smooth_max(inner + 1.5, -middle, 8)
    trees = plant(_smooth_max(chest, -below, 6), grid, np.random.default_rng([seed, 3]))
    trees = {name: tree.stretched(protocol.breath) for name, tree in trees.items()}
    below = _as_distance(z - dome + protocol.breath, grid)
    lung = _smooth_max(chest, -below, 6)

    def organ(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        shifted = (centre[0], centre[1], centre[2] - protocol.breath)
        return _smooth_max(_smooth_max(_ellipsoid((x, y, z), shifted, radii) + patchy, below + 2.5, 6), inner + 3.5, 6)

    stomach = organ((-58, 16, -158), (46, 52, 44))
    fields = {
        "body": body,
        "muscle": muscle,
        "inner": inner,
        "lung": lung,
        "heart": heart,
        "below": _smooth_max(below, inner, 3),
        "liver": organ((46, 0, -190), (92, 92, 88)),
        "spleen": organ((-84, -46, -160), (34, 40, 46)),
        "stomach": stomach,
        "gas": _smooth_max(stomach + 5, 36 - y + 0 * x, 3),
        "plane": _smooth_max(np.abs(inner - 17 - 4 * patchy) - 1.8 - 1.4 * uneven, body + 5, 2),
        "gland": np.maximum(np.maximum(np.abs(body + 14) - 7 + 5 * grain, body + 6), 40 - y),
        "grain": grain,
        "patchy": other + patchy,
    }
    fields = {name: np.ascontiguousarray(np.broadcast_to(f, grid.shape[::-1]), np.float32) for name, f in fields.items()}
    tubes["clot"] = emboli(trees, protocol.emboli, np.random.default_rng([seed, 4, scan]))
    tubes["nodule"] = _nodules(lung, grid, patient.nodules, np.random.default_rng([seed, 5]))
    return Anatomy(grid, fields, tubes, trees, (top, pitch, rng.uniform(0.9, 1.1)))


ROOTS = {
    "artery right": ((43, -10, -18), 9.4),
    "artery left": ((-48, -25, -18), 9.2),
    "vein right": ((45, -12, -50), 8.2),
    "vein left": ((-44, -16, -52), 8.0),
}
BRONCHI = {"right": (38, -21, -29), "left": (-42, -23, -32)}


def plant(lung: np.ndarray, grid: Grid, rng: np.random.Generator) -> dict[str, Tree]:
    """Trees from the hila into both lungs."""
    trees = {}
    x = np.broadcast_to(grid.axis(0), lung.shape)
    for side, here in (("right", x > 0), ("left", x < 0)):
        cells = np.argwhere((lung < -5) & here)
        for kind in ("artery", "vein"):
            chosen = cells[rng.integers(len(cells), size=LEAVES)][:, ::-1]
            points = grid.origin + grid.step * (chosen + rng.uniform(-0.5, 0.5, (LEAVES, 3)))
            trees[f"{kind} {side}"] = grow(points, *ROOTS[f"{kind} {side}"], rng)
        trees[f"airway {side}"] = companion(trees[f"artery {side}"], BRONCHI[side])
    return trees


def companion(artery: Tree, root: tuple[float, float, float]) -> Tree:
    """The airways: every artery has one beside it, two thirds as wide."""
    radius = 0.66 * artery.radius
    along = artery.end - artery.start
    along = along / np.linalg.norm(along, axis=1, keepdims=True)
    aside = np.array([0.0, -0.8, -0.6]) - (along @ [0.0, -0.8, -0.6])[:, None] * along
    aside *= (1.2 * (artery.radius + radius) / np.maximum(np.linalg.norm(aside, axis=1), 0.1))[:, None]
    end = artery.end + aside
    return Tree(np.where((artery.parent < 0)[:, None], root, end[artery.parent]), end, radius, artery.parent)


def emboli(trees: dict[str, Tree], count: int, rng: np.random.Generator) -> Tubes:
    """Clots where arteries fork: the end of one branch and the beginnings of those that leave it."""
    parts = [Tubes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0))]
    for _ in range(count):
        tree = trees[rng.choice(["artery right", "artery left"])]
        large = np.flatnonzero(tree.radius > 2.2)
        chosen = rng.choice(large, p=tree.radius[large] ** 2 / (tree.radius[large] ** 2).sum())
        fill = rng.uniform(0.6, 0.95)
        for i in (chosen, *np.flatnonzero(tree.parent == chosen)):
            low, high = (0.45, 1.0) if i == chosen else (0.0, rng.uniform(0.3, 0.75))
            ends = [tree.start[i] + share * (tree.end[i] - tree.start[i]) for share in (low, high)]
            parts.append(Tubes(ends[0][None], ends[1][None], *2 * [fill * tree.radius[[i]]]))
    return joined(parts)


def _nodules(lung: np.ndarray, grid: Grid, count: int, rng: np.random.Generator) -> Tubes:
    cells = np.argwhere(lung < -8)
    centre = grid.origin + grid.step * cells[rng.integers(len(cells), size=count)][:, ::-1]
    radius = rng.uniform(3, 11, count)
    return Tubes(centre, centre + rng.normal(0, 1.5, (count, 3)), radius, radius)


# ---------------------------------------------------------------------------------------------------------------------
# Scanner


def _spline(grid: Grid, i: int, at: np.ndarray) -> np.ndarray:
    """(len(at), n) weights of a cubic B-spline: surfaces come out smooth where linear ones would show facets."""
    n = grid.shape[i]
    u = np.clip((at - grid.origin[i]) / grid.step[i], 1, n - 2.001)
    cell = np.floor(u).astype(int)
    t = u - cell
    weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    basis = np.zeros((len(at), n), np.float32)
    for k, weight in enumerate(weights):
        basis[np.arange(len(at)), cell + k - 1] = weight / 6
    return basis


Box = tuple[slice, slice, slice]


class Part(NamedTuple):
    """Distances to a surface in some of the voxels, z, y, x."""

    box: Box
    away: np.ndarray


class Canvas:
    """Some slices, painted from the outside to the inside."""

    def __init__(self, grid: Grid, anatomy: Anatomy):
        self.grid, self.anatomy, self.width = grid, anatomy, grid.width
        self.hu = np.full(grid.shape[::-1], AIR, np.float32)
        self.labels = np.full(grid.shape[::-1], OUTSIDE, np.uint8)
        self.splines = [_spline(anatomy.grid, i, grid.axis(i)) for i in range(3)]
        self.grain = self.lift("grain", everywhere=True).away

    def lift(self, name: str, everywhere: bool = False) -> Part:
        """A field of the anatomy: the part that may matter to what is within its surface, or all."""
        rough, grid, (to_x, to_y, to_z) = self.anatomy.fields[name], self.anatomy.grid, self.splines
        rough = (to_z @ rough.reshape(len(rough), -1)).reshape(len(to_z), *rough.shape[1:])
        box = [slice(None)] * 3
        if not everywhere:
            close = rough.min(0) < 2 * self.width
            for i, cells in ((1, np.flatnonzero(close.any(1))), (0, np.flatnonzero(close.any(0)))):
                ends = np.array([cells[0] - 2, cells[-1] + 2] if len(cells) else [0, 0])
                box[2 - i] = slice(*np.searchsorted(self.grid.axis(i), grid.origin[i] + grid.step[i] * ends))
        return Part(tuple(box), to_y[box[1]] @ rough @ to_x[box[2]].T)

    def near(self, tubes: Tubes, stretch: Stretch = ROUND) -> Part:
        part, box = _around(tubes, self.grid, 2 * self.width, stretch)
        return Part(box, distance(tubes, part, 2 * self.width, stretch))

    def filled(self, away: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """The share of each voxel that lies within a surface, or at least `margin` within it."""
        share = away * np.float32(-1 / self.width)
        share += np.float32(0.5 - margin / self.width)
        return np.clip(share, 0, 1, out=share)

    def blend(self, box: Box, share: np.ndarray, value: float | np.ndarray, label: int | None = None) -> None:
        there = self.hu[box]
        there += share * (value - there)
        if label is not None:
            self.labels[box][share > 0.5] = label

    def paint(self, part: Part, value: float | np.ndarray, noisy: float = 0.0, label: int | None = None) -> None:
        if noisy:
            value = value + noisy * self.grain[part.box]
        self.blend(part.box, self.filled(part.away), value, label)

    def hollow(
        self, part: Part, wall: float, thick: float, value: float, noisy: float = 0.0, label: int | None = None
    ) -> None:
        """A wall of this thickness inside the surface, and a value inside of that."""
        self.paint(part, wall, label=label)
        core = self.filled(part.away, thick)
        core *= value - wall + noisy * self.grain[part.box]
        self.hu[part.box] += core


def _around(tubes: Tubes, grid: Grid, margin: float, stretch: Stretch = ROUND) -> tuple[Grid, Box]:
    """The voxels near any of the tubes, perhaps none."""
    low, high = _boxes(tubes, grid, margin, stretch)
    here = (low < high).all(1)
    low, high = (low[here].min(0), high[here].max(0)) if here.any() else (np.zeros(3, int), np.zeros(3, int))
    return grid.part(low, high), tuple(slice(a, b) for a, b in zip(low[::-1], high[::-1], strict=True))


def render(anatomy: Anatomy, patient: Patient, protocol: Protocol, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """HU without noise, and labels (z, y, x)."""
    canvas, tubes = Canvas(grid, anatomy), anatomy.tubes
    x, y, _ = grid.mesh()
    table = y + patient.depth + 7 - x**2 / 900  # its mattress
    for below, value in ((0, -890), (12, -150), (16, -960), (30, AIR)):
        canvas.blend((slice(None),) * 3, canvas.filled(table, -below), value)

    canvas.hollow(canvas.lift("body"), SKIN, 2.0, FAT, 6, label=BODY)
    if patient.breasts:
        canvas.paint(canvas.lift("gland"), 20)
    canvas.paint(canvas.lift("muscle"), MUSCLE, 5)
    canvas.paint(canvas.lift("plane"), FAT + 20)
    canvas.paint(canvas.lift("inner"), FAT, 6)
    canvas.hollow(canvas.lift("below"), MUSCLE, 3.5, FAT, 5)
    for name, value in (("liver", 78), ("spleen", 112), ("stomach", 34), ("gas", AIR + 20)):
        canvas.paint(canvas.lift(name), value, 4)
    canvas.paint(canvas.lift("heart"), -60, 8)
    canvas.paint(canvas.near(tubes["soft"]), 48)
    lung = canvas.lift("lung")
    texture = canvas.lift("patchy", everywhere=True).away[lung.box]
    canvas.paint(lung, patient.lung_hu - 0.42 * (y[lung.box[1]] + 10) + 14 * texture, label=LUNG)
    canvas.paint(canvas.near(tubes["nodule"]), 35, label=BODY)

    canvas.paint(canvas.near(tubes["heart"]), 0.22 * protocol.contrast + 30)
    trees = {kind: joined([anatomy.trees[f"{kind} {s}"].tubes() for s in ("right", "left")]) for kind in KINDS}
    for name, kind, phase in (("right", "artery", 1.0), ("left", "vein", protocol.phase)):
        thin = trees[kind].first < 0.5 * grid.width
        part, box = _around(trees[kind].only(thin), grid, grid.step.max())
        canvas.blend(box, splat(trees[kind].only(thin), part), phase * protocol.contrast, VESSEL)
        thick = canvas.near(joined([tubes[name], trees[kind].only(~thin)]))
        canvas.paint(thick, phase * protocol.contrast, label=VESSEL)
    canvas.paint(canvas.near(tubes["cava"]), protocol.cava * protocol.contrast, label=VESSEL)
    canvas.paint(canvas.near(tubes["clot"]), CLOT, label=EMBOLUS)
    bronchi = trees["airway"].only(trees["airway"].first > max(1.5, 0.6 * grid.width))
    airway = canvas.near(joined([tubes["airway"], bronchi]))
    canvas.hollow(airway._replace(away=airway.away - 0.8), 30, 0.8, AIR)
    canvas.labels[airway.box][airway.away < 0] = AIRWAY

    canvas.paint(canvas.near(tubes["cartilage"], TALL), CARTILAGE)
    bone = np.full(grid.shape[::-1], 2 * grid.width, np.float32)
    for name, stretch in (("rib", TALL), ("plate", TALLER), ("sternum", WIDE), ("bone", ROUND)):
        part = canvas.near(tubes[name], stretch)
        np.minimum(bone[part.box], part.away, out=bone[part.box])
    _vertebrae(canvas, bone, patient)
    canvas.hollow(Part((slice(None),) * 3, bone), CORTEX, 1.7, MARROW, 25, label=BONE)
    return canvas.hu, canvas.labels


def _vertebrae(canvas: Canvas, bone: np.ndarray, patient: Patient) -> None:
    """Add them to the distances to bone; paint discs and the canal."""
    x, y, z = canvas.grid.mesh()
    columns = np.flatnonzero(np.abs(x) < 34)
    if not len(columns):
        return
    box = (slice(None), slice(None), slice(columns[0], columns[-1] + 1))
    top, pitch, size = canvas.anatomy.spine
    x, y = x[columns], y - spine_line(z, patient)
    height = np.abs((z - top + pitch / 2) % pitch - pitch / 2)  # from the middle of the nearest vertebra
    waist = 1 - 0.07 * np.cos(np.minimum(height / (0.4 * pitch), 1) * math.pi / 2)
    column = (np.sqrt((x / (18 * size)) ** 2 + (y / (14.5 * size)) ** 2) / waist - 1) * 15.5 * size
    canal = (np.sqrt((x / 9.5) ** 2 + ((y + 24.5) / 8.5) ** 2) - 1) * 9
    canvas.paint(Part(box, column), DISC)
    vertebra = _smooth_max(column, height - 0.39 * pitch, 3)
    arch = _smooth_max(canal - 5, height - 0.36 * pitch, 2)
    bone[box] = np.maximum(np.minimum(np.minimum(bone[box], vertebra), arch), -canal)
    canvas.paint(Part(box, np.broadcast_to(canal, column.shape)), CORD)


def volume(
    seed: int,
    size: tuple[int, int, int] = SIZE,
    spacing: tuple[float, float, float] | None = None,
    *,
    scan: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and uint8 labels (x, y, z) in RAS of a patient's scan. Without `spacing` it shows the whole chest.

    Noise of 18 HU belongs to voxels of 0.9 mm. Averaging white noise would leave 2 HU of it in voxels of 3.5 mm; but thick
    slices are taken at a lower dose and CT noise is correlated, so here it falls with the width^0.45, to 6 to 11 HU.
    """
    patient, protocol = draw_patient(seed), draw_protocol(seed, scan)
    spacing = spacing or spacing_of(protocol, size)
    step = np.array(spacing) / patient.scale
    centre = np.array([0, 0, LEVEL])
    grid = Grid(centre - step * (np.array(size) - 1) / 2, step, size)
    anatomy = build(seed, patient, protocol, scan)

    nx, ny, nz = size
    across, along = fft.rfftfreq(nx), fft.fftfreq(ny)[:, None]
    frequency = np.hypot(across, along)
    ramp = frequency * np.exp(-((frequency / 0.28) ** 2))  # what filtered back-projection leaves of white noise
    ramp[0, 0] = 0
    weight = np.where((across == 0) | (across == 0.5), 1, 2)  # rfft2 has half of the plane
    ramp = (ramp / np.sqrt((weight * ramp**2).sum() / (nx * ny))).astype(np.float32)
    blur = np.exp(-2 * (math.pi * 0.5 * frequency) ** 2).astype(np.float32)  # deviation 0.5 voxels
    x, y, _ = grid.mesh()
    thick = np.exp(-((x / (0.8 * patient.half_width)) ** 2) - (y / (1.1 * patient.half_depth)) ** 2)  # fewest photons
    side = protocol.overlap
    noise = protocol.noise * min(1.0, (0.9 / (grid.width * patient.scale)) ** 0.45)
    deviation = noise * (0.7 + 0.55 * thick) / math.hypot(1 - 2 * side, side, side)  # neighbours will average some away
    radius = 0.5 * max(nx * spacing[0], ny * spacing[1]) / patient.scale
    beyond = np.hypot(x, y) > radius

    hu, labels = np.empty((nz, ny, nx), np.int16), np.empty((nz, ny, nx), np.uint8)
    some = max(2, SLAB // (nx * ny))
    noisy = np.empty((0, ny, nx), np.float32)  # slices of which something is still needed
    for first in range(-1, nz + 1, some):
        last = min(first + some, nz + 1)
        clean, marks = render(anatomy, patient, protocol, grid.part((0, 0, first), (nx, ny, last)))
        for k, one in enumerate(clean, first):
            white = np.random.default_rng([seed, 6, scan, k + 1]).standard_normal((ny, nx), np.float32)
            one[:] = fft.irfft2(fft.rfft2(one) * blur + fft.rfft2(white * deviation) * ramp, (ny, nx))
        inside = slice(max(first, 0), min(last, nz))
        labels[inside] = marks[inside.start - first : inside.stop - first]
        noisy = np.concatenate([noisy[-2:], clean])
        mean = (1 - 2 * side) * noisy[1:-1] + side * (noisy[:-2] + noisy[2:])
        mean[:, beyond] = BEYOND
        hu[last - 1 - len(mean) : last - 1] = np.rint(np.clip(mean, BEYOND, 3071))
    return hu.transpose(2, 1, 0), labels.transpose(2, 1, 0)


def spacing_of(protocol: Protocol, size: tuple[int, int, int]) -> tuple[float, float, float]:
    """mm: the field of view over the wider side of a slice, the length over the slices; rounded as scanners do."""
    pixel = round(protocol.fov / max(size[:2]), 4)
    return pixel, pixel, round(protocol.length / size[2], 3)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def identity(seed: int, patient: int) -> int:
    """The seed of a patient's volumes."""
    return int(np.random.SeedSequence([seed, patient]).generate_state(1)[0])


def near_size(seed: int, size: tuple[int, int, int], scan: int) -> tuple[int, int, int]:
    """Odd numbers, somewhat smaller or larger."""
    halves = np.random.default_rng([seed, 7, scan]).uniform(0.88, 1.05, 3) * size / 2
    return tuple(2 * int(half) + 1 for half in halves)


def as_image(hu: np.ndarray, spacing: Sequence[float], orientation: str, corner: np.ndarray) -> nibabel.Nifti1Image:
    """A NIfTI image of an array in RAS, stored in another orientation. `corner` is where its first voxel lies, in mm."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = corner
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(orientation))
    image = nibabel.Nifti1Image(hu, affine).as_reoriented(turn)
    image.header.set_xyzt_units("mm")
    return image


def write(
    path: str | Path,
    patients: int = 24,
    *,
    seed: int = 0,
    size: tuple[int, int, int] = SIZE,
    progress: bool = True,
) -> None:
    """Make the folder. It appears when it is complete: a run that was killed leaves nothing that looks like a data set."""
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out or delete it first.")
    if min(size) < SMALLEST:
        raise UserError(f"--size is {' '.join(map(str, size))}: a chest needs {SMALLEST} voxels or more along each axis.")
    if patients < 1:
        raise UserError(f"--patients is {patients}: give 1 or more.")
    plan = [(p, scan) for p in range(1, patients + 1) for scan in ((1, 2) if p % SECOND_SCAN == 0 else (1,))]
    scans, rows = [], []
    with made_whole(path) as partial, tqdm(plan, desc="CT", unit=" scans", disable=not progress) as bar:
        for folder in ("scans", "truth"):
            (partial / folder).mkdir()
        for number, scan in bar:
            own = identity(seed, number)
            patient, protocol = draw_patient(own), draw_protocol(own, scan)
            shape = size if number == 1 else near_size(own, size, scan)
            spacing = spacing_of(protocol, shape)
            hu, labels = volume(own, shape, spacing, scan=scan)
            name = f"patient{number:03d}_scan{scan}"
            orientation = ORIENTATIONS[(number + scan - 1) % len(ORIENTATIONS)]
            image = as_image(hu, spacing, orientation, np.random.default_rng([own, 8, scan]).uniform(-250, -100, 3))
            nibabel.save(image, partial / "scans" / f"{name}.nii.gz")
            np.savez_compressed(partial / "truth" / f"{name}.npz", labels=labels, names=np.array(LABELS))
            if scan == 1 and len(rows) < SHEET_ROWS:
                rows.append((name, spacing, planes(hu, labels)))
            drawn = {"patient": asdict(patient), "protocol": asdict(protocol)}
            geometry = {"shape": shape, "spacing": spacing, "orientation": orientation}
            scans.append({"name": name, "volume_seed": own, "scan": scan, **geometry, **drawn})
        source = {"generator": "common.demo_data.ct", "seed": seed, "size": size}
        (partial / "info.json").write_text(json.dumps({**source, "labels": LABELS, "scans": scans}, indent=1) + "\n")
        picture_sheet(partial / "sheet.png", rows)


# ---------------------------------------------------------------------------------------------------------------------
# Picture


def planes(hu: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Axial, coronal and sagittal plane through most of the emboli, or else near the hilum, as radiologists look at them:
    the patient's right is on the left."""
    clot = labels == EMBOLUS
    if clot.any():
        x, y, z = (int(clot.sum(tuple({0, 1, 2} - {i})).argmax()) for i in range(3))
    else:
        x, y, z = (int(n * share) for n, share in zip(hu.shape, (0.5, 0.47, 0.6), strict=True))
    return [hu[::-1, ::-1, z].T.copy(), hu[::-1, y, ::-1].T.copy(), hu[x, ::-1, ::-1].T.copy()]


def picture_sheet(path: Path, rows: Sequence[tuple[str, Sequence[float], list[np.ndarray]]]) -> None:
    """A row per scan: three planes in each window, all at the same scale."""
    side, scale = 320, 320 / SHEET_MM
    sheet = Image.new("L", (side * 3 * len(WINDOWS), side * len(rows)))
    for row, (name, (dx, dy, dz), images) in enumerate(rows):
        pixels = ((dx, dy), (dx, dz), (dy, dz))
        tiles = [(plane, pixel, window) for window in WINDOWS.values() for plane, pixel in zip(images, pixels, strict=True)]
        for column, (plane, pixel, (low, high)) in enumerate(tiles):
            grey = Image.fromarray(np.uint8(np.clip((plane - float(low)) / (high - low), 0, 1) * 255))
            width, height = (round(n * mm * scale) for n, mm in zip(grey.size, pixel, strict=True))
            grey = grey.resize((width, height), Image.Resampling.BICUBIC)
            # A crop from outside of the picture fills up with black.
            left, top = (width - side) // 2, (height - side) // 2
            sheet.paste(grey.crop((left, top, left + side, top + side)), (side * column, side * row))
        ImageDraw.Draw(sheet).text((4, side * row + 4), name, fill=255)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--patients", type=int, default=24, help=f"every {SECOND_SCAN}th has two scans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("X", "Y", "Z"), help="nominal, in voxels")
    flags = vars(parser.parse_args())
    folder = flags.pop("out")
    with sentences(last=False):
        write(folder, flags.pop("patients"), size=tuple(flags.pop("size")), **flags)
    print(f"{folder}: made")


if __name__ == "__main__":
    main()
