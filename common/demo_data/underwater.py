"""Make underwater photographs by physics, with their clean references and with the true maps of what degraded them.

    python -m common.demo_data.underwater --out data/demo/underwater --train 160 --test 24 --seed 0 --size 160 200

    UIEB/raw-890, UIEB/reference-890   pairs to train on, in UIEB's layout
    UIEB/challenging-60                hard pictures without a reference
    pseudo/train/<stem>.npz            labels of raw-890: masks (MAPS), probs, code (CODE), names, source
    testset_ref/held-out               input and target: pictures and waters that training never sees
    testset_nonref/turbid              coastal water 5C to 9C, without a reference

Half of the clean pictures are crops of photographs that scikit-image and scikit-learn carry in their wheels, the others
are rendered sea floors. The photographs of TRAIN_PHOTOS occur in raw-890 only and those of TEST_PHOTOS everywhere else;
picture i of a part is a function of (seed, part, i), so no sea floor and no water occurs in two parts either.

Degradation follows Akkaynak and Treibitz (CVPR 2018) in linear light, with separate coefficients for what is lost of the
scene and for what the water adds; attenuation is Jerlov's, per wavelength, as seen by a camera with three channels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from common.cli import UserError, sentences
from common.files import made_whole

MAPS = (
    "red_loss",  # 1 - T of the red channel: the share of the scene's red light that is lost on the way to the camera
    "green_loss",  # 1 - T, green
    "blue_loss",  # 1 - T, blue
    "veil",  # the share of backscatter in the light that arrives
    "colour_cast",  # 1 - weakest / strongest channel of a white sheet held at this place
    "contrast_loss",  # 1 - local contrast (deviation over mean) relative to that of the clean picture
    "blur",  # radius of forward scatter, as a share of BLUR_LIMIT
    "noise",  # deviation of the sensor's noise over the signal, as a share of NOISE_LIMIT
    "low_light",  # 1 - exposure: surface light fades downwards and towards the corners
    "marine_snow",  # the part of the neighbourhood that drifting particles hide, as a share of SNOW_LIMIT
)
CODE = (
    *("beta_d_red", "beta_d_green", "beta_d_blue"),  # attenuation of the scene at 3 m, 1/m
    *("beta_b_red", "beta_b_green", "beta_b_blue"),  # how fast the veil closes, 1/m
    *("veil_red", "veil_green", "veil_blue"),  # colour of endless water
    *("depth", "light", "scatter"),  # tens of metres below the surface, exposure, blur per metre
)

# Jerlov's diffuse attenuation in 1/m at 400, 450, ..., 700 nm.
JERLOV = {
    "I": (0.028, 0.019, 0.027, 0.063, 0.235, 0.360, 0.560),
    "IA": (0.038, 0.026, 0.032, 0.067, 0.240, 0.370, 0.570),
    "IB": (0.051, 0.036, 0.042, 0.072, 0.245, 0.376, 0.580),
    "II": (0.096, 0.068, 0.070, 0.089, 0.260, 0.400, 0.610),
    "III": (0.185, 0.136, 0.115, 0.120, 0.295, 0.445, 0.660),
    "1C": (0.510, 0.250, 0.140, 0.120, 0.300, 0.450, 0.650),
    "3C": (0.780, 0.390, 0.220, 0.190, 0.330, 0.460, 0.710),
    "5C": (1.10, 0.560, 0.360, 0.300, 0.400, 0.540, 0.800),
    "7C": (1.60, 0.890, 0.580, 0.460, 0.480, 0.630, 0.920),
    "9C": (2.40, 1.60, 0.990, 0.630, 0.600, 0.760, 1.10),
}
WATERS = tuple(JERLOV)
TURBID = ("5C", "7C", "9C")
WAVELENGTHS = np.arange(400, 701, 25.0)
# A camera as three Gaussians. Widths and centres are fitted: with them the wideband attenuation of the ten waters (5 m
# deep, 3 m away) is that of a Nikon D3X under daylight to 0.01 per metre on average, the ambient colour to 0.01.
RESPONSE = np.exp(-0.5 * ((WAVELENGTHS[:, None] - [605, 535, 475]) / [25, 30, 35]) ** 2)
RESPONSE /= RESPONSE.sum(0)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
BLUR_LIMIT, NOISE_LIMIT, SNOW_LIMIT = 0.01, 0.15, 0.1  # where those maps reach 1; blur in widths of the picture
NEAR, FAR = 0.5, 8.0  # metres from the camera
FARTHEST = 1.1  # in attenuation lengths of green light


def to_linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0.04045) + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def fractal(rng: np.random.Generator, shape: tuple[int, int], slope: float = 1.5) -> np.ndarray:
    """Periodic noise of mean 0 and deviation 1 whose amplitude falls as frequency^-slope: 1 is rough, 2.5 smooth."""
    rows, columns = np.fft.fftfreq(shape[0])[:, None] * shape[0], np.fft.rfftfreq(shape[1]) * shape[1]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = math.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * frequency**-slope, shape)
    return field / field.std()


# ---------------------------------------------------------------------------------------------------------------------
# Water


def jerlov(name: str) -> np.ndarray:
    """Attenuation of daylight per wavelength, 1/m."""
    return np.interp(WAVELENGTHS, np.arange(400, 701, 50), JERLOV[name])


@dataclass(frozen=True)
class Water:
    """One water at one dive. Colours are (3,) red, green, blue."""

    name: str
    spectrum: np.ndarray  # attenuation per wavelength, 1/m
    depth: float  # metres below the surface: what is left of daylight there tints the scene and the veil
    veil: np.ndarray  # B_inf: colour of endless water
    beta_b: np.ndarray  # how fast the veil closes with distance, 1/m
    scatter: float  # deviation of the forward scatter blur per metre, as a share of the picture's width
    light: float  # exposure at the brightest place, over what the camera's meter asks for
    shade: float  # how much exposure falls towards the bottom and the corners
    noise: float  # deviation of the noise at white, relative to the signal
    snow: float  # particles per thousand pixels of a picture 200 pixels wide

    def kept(self) -> np.ndarray:
        """(wavelengths,) The daylight that is left at this depth."""
        return np.exp(-jerlov(self.name) * self.depth)

    def daylight(self) -> np.ndarray:
        """What a white sheet looks like at this depth, its strongest channel exposed to 1."""
        colour = RESPONSE.T @ self.kept()
        return colour / colour.max()

    def transmission(self, distance: np.ndarray | float) -> np.ndarray:
        """(..., 3): the share of the scene's light that crosses `distance` metres of water.

        A camera sums over wavelengths. Those that water absorbs are gone already at depth, and go first along the way, so
        that its beta = -ln(T) / distance falls with both.
        """
        weights = RESPONSE * self.kept()[:, None]
        return np.exp(-np.asarray(distance)[..., None] * self.spectrum) @ (weights / weights.sum(0))

    def code(self) -> np.ndarray:
        beta_d = -np.log(self.transmission(3.0)) / 3
        rest = (self.depth / 10, self.light, self.scatter * 500)
        return np.array([*beta_d, *self.beta_b, *self.veil, *rest], np.float16)


def draw_water(name: str, rng: np.random.Generator) -> Water:
    """A dive in water of this Jerlov type."""
    coastal = name.endswith("C")
    # Jerlov measured light from above, which scattering hardly weakens. Along a line of sight it counts in full.
    spectrum = jerlov(name) * (rng.uniform(1.0, 1.5) if coastal else rng.uniform(0.8, 1.25))
    water = Water(
        name,
        spectrum,
        depth=rng.uniform(1, 5) if coastal else rng.uniform(1, 8),
        veil=np.zeros(3),
        beta_b=np.zeros(3),
        scatter=rng.uniform(0.0003, 0.0010) * (1.5 if coastal else 0.7),
        light=rng.uniform(0.65, 1.1),
        shade=rng.uniform(0.1, 0.5),
        noise=rng.uniform(0.005, 0.02),
        snow=math.exp(rng.uniform(math.log(0.1), math.log(4))),
    )
    # Light scattered towards the camera all the way to infinity, B_inf = b E / (a + b): more colourful than daylight.
    veil = RESPONSE.T @ (water.kept() / (spectrum + 0.1))
    veil *= rng.uniform(0.25, 0.6) * rng.uniform(0.9, 1.1, 3) / veil.max()
    beta_b = -np.log(water.transmission(3.0)) / 3 * rng.uniform(0.3, 1.0) * rng.uniform(0.9, 1.1, 3)
    return replace(water, veil=veil, beta_b=beta_b)


def degrade(clean: np.ndarray, depth: np.ndarray, water: Water, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What a camera sees of a clean picture (H, W, 3) at distances `depth` (H, W), and the MAPS (10, H, W).

    I = (J A T + B_inf (1 - exp(-beta_b z))) exposure, with A the colour of the daylight left at the dive's depth, the
    first term blurred by forward scatter; then particles and noise.
    """
    height, width = depth.shape
    transmission = water.transmission(depth)
    backscatter = water.veil * (1 - np.exp(-depth[..., None] * water.beta_b))
    sigma = np.minimum(water.scatter * depth, BLUR_LIMIT) * width
    scene = to_linear(clean)
    direct = _blur(scene * water.daylight() * transmission, sigma)

    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(-1, 1, width)
    dim = 0.7 * rows + 0.3 * ((2 * rows - 1) ** 2 + columns**2) / 2 + 0.08 * fractal(rng, depth.shape, 2.5)
    exposure = water.light * (1 - water.shade * np.clip(dim, 0, 1))
    flakes = _snow(water, depth.shape, rng)
    # The meter brings the mean to that of the clean picture, up to two stops.
    metered = np.clip((scene @ LUMINANCE).mean() / ((direct + backscatter) @ LUMINANCE).mean(), 0.5, 4)
    signal = (direct + backscatter) * metered * exposure[..., None]
    near = np.maximum(0.9 * water.daylight() * water.light, signal)  # particles are close and lit from above
    signal = signal + (near - signal) * flakes[..., None]
    luminance = np.maximum(signal @ LUMINANCE, 1e-4)
    # Photons arrive at random: variance is in proportion to light; reading the sensor adds a constant.
    deviation = water.noise * np.sqrt(np.clip(signal, 0, 1) + 0.01)
    raw = to_srgb(signal + deviation * rng.standard_normal(signal.shape))

    sheet = water.daylight() * transmission + backscatter
    maps = [
        *np.moveaxis(1 - transmission, -1, 0),
        backscatter @ LUMINANCE / np.maximum((direct + backscatter) @ LUMINANCE, 1e-4),
        1 - sheet.min(-1) / sheet.max(-1),
        1 - _contrast((direct + backscatter) @ LUMINANCE) / np.maximum(_contrast(scene @ LUMINANCE), 1e-3),
        sigma / (BLUR_LIMIT * width),
        water.noise * np.sqrt(luminance + 0.01) / luminance / NOISE_LIMIT,
        1 - exposure,
        gaussian_filter(flakes, width / 50) / SNOW_LIMIT,
    ]
    return raw, np.clip(maps, 0, 1)


def _blur(image: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian blur whose deviation in pixels differs from place to place: between five blurred copies, linearly."""
    levels = np.linspace(0, max(sigma.max(), 1e-6), 5)
    position = sigma / levels[-1] * 4
    copies = [image, *(gaussian_filter(image, (s, s, 0)) for s in levels[1:])]
    return sum(np.clip(1 - abs(position - k), 0, 1)[..., None] * copy for k, copy in enumerate(copies))


def _contrast(luminance: np.ndarray) -> np.ndarray:
    size = luminance.shape[1] / 25
    mean = gaussian_filter(luminance, size)
    return np.sqrt(np.maximum(gaussian_filter(luminance**2, size) - mean**2, 0)) / np.maximum(mean, 1e-3)


def _snow(water: Water, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W) opacity of drifting particles: many small sharp ones, a few large ones out of focus."""
    scale = shape[1] / 200
    count = water.snow * shape[0] * shape[1] / 1000 / scale**2
    opacity = np.zeros(shape)
    for share, size, strength in ((0.7, 0.5, 0.9), (0.25, 0.9, 0.7), (0.05, 2.2, 0.35)):
        points = np.zeros(shape)
        number = rng.poisson(count * share)
        points[rng.integers(shape[0], size=number), rng.integers(shape[1], size=number)] = rng.uniform(0.4, 1, number)
        if number:
            size *= scale
            opacity += strength * gaussian_filter(points, size) * 2 * math.pi * size**2
    return np.clip(opacity, 0, 0.95)


# ---------------------------------------------------------------------------------------------------------------------
# Clean pictures

PHOTOS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "pagoda": lambda: load_sample_image("china.jpg"),
    "coffee": skimage.data.coffee,
    "dahlia": lambda: load_sample_image("flower.jpg"),
}
TRAIN_PHOTOS = ("astronaut", "cat", "motorcycle", "pagoda")
TEST_PHOTOS = ("coffee", "dahlia")


def clean_scene(
    rng: np.random.Generator, size: tuple[int, int] = (160, 200), photos: tuple[str, ...] = TRAIN_PHOTOS
) -> tuple[np.ndarray, np.ndarray]:
    """A clean picture (H, W, 3), sRGB in [0, 1], and the distance of each pixel in metres: a crop of one of the photographs
    or a rendered sea floor, half each."""
    return photograph(rng, size, photos) if rng.random() < 0.5 else sea_floor(rng, size)


def photograph(
    rng: np.random.Generator, size: tuple[int, int], photos: tuple[str, ...] = TRAIN_PHOTOS
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of a photograph, before a slanted wall with bumps, since nobody has measured its distances."""
    image = Image.fromarray(PHOTOS[photos[rng.integers(len(photos))]]())
    height, width = size
    scale = rng.uniform(0.45, 1) * min(image.height / height, image.width / width)
    left, top = rng.uniform(0, image.width - width * scale), rng.uniform(0, image.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    clean = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box), np.float64) / 255
    if rng.random() < 0.5:
        clean = clean[:, ::-1]
    rows, columns = np.linspace(1, -1, height)[:, None], np.linspace(-1, 1, width)
    slant = rows * rng.uniform(0.2, 1) + columns * rng.uniform(-0.6, 0.6) + 0.35 * fractal(rng, size, 2.5)
    slant = (slant - slant.min()) / np.ptp(slant)
    near = rng.uniform(NEAR, 2.5)
    return clean, near + slant * rng.uniform(1, min(5, FAR - near))


def sea_floor(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A rendered reef with corals, boulders and fish, as it would look in air, and its true distances."""
    scene = _Scene(rng, size)
    things = [(z, _boulder) for z in rng.uniform(1.2, 6.5, rng.integers(5, 12))]
    things += [(z, _coral) for z in rng.uniform(1.0, 5.0, rng.integers(3, 9))]
    things += [(z, _fish) for z in rng.uniform(1.2, 5.0, rng.integers(1, 8))]
    for z, draw in sorted(things, key=lambda thing: -thing[0]):
        draw(scene, rng, z)
    exposed = scene.colour / np.quantile(scene.colour @ LUMINANCE, 0.97) * rng.uniform(0.7, 0.95)
    return to_srgb(exposed), np.clip(scene.distance, NEAR, FAR)


def _paint(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """(3,) A linear colour. Two in three lie between pink and yellow, as those of most corals do: they suffer most."""
    hue = rng.uniform(-0.8, 1.1) if rng.random() < 0.67 else rng.uniform(0, 6)
    ramp = np.clip(np.abs((hue - np.array([3, 2, 4]) + 3) % 6 - 3) * [1, -1, -1] + [-1, 2, 2], 0, 1)
    return to_linear(rng.uniform(*value) * (1 - rng.uniform(*saturation) * (1 - ramp)))


VIVID = (0.4, 0.85), (0.45, 0.95)
EARTHY = (0.15, 0.55), (0.3, 0.7)


class _Scene:
    """A camera above a hilly sea floor: colours (linear light), distances, and a way to paint things into them."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.size = height, width = size
        self.focal = 0.9 * width
        self.horizon = rng.uniform(0.1, 0.4) * height
        self.camera = rng.uniform(0.8, 1.6)
        self.rows, self.columns = np.mgrid[:height, :width].astype(float)
        self.sun = np.array([rng.uniform(-0.5, 0.5), -0.8, -0.5])  # x to the right, y down, z away from the camera
        self.sun /= np.linalg.norm(self.sun)
        self.grain, self.bumps, self.waves = (fractal(rng, size, slope) for slope in (1.1, 1.3, 2.0))
        self._ground(rng)

    def _ground(self, rng: np.random.Generator) -> None:
        tile, per_metre = 256, 24
        hills = fractal(rng, (tile, tile), 2.2) * rng.uniform(0.1, 0.35) + 0.02 * fractal(rng, (tile, tile), 1)
        wall, begin = rng.uniform(0, 3.5), rng.uniform(2, 5)

        def at(field: np.ndarray, x: np.ndarray, z: np.ndarray) -> np.ndarray:
            return map_coordinates(field, [z * per_metre, x * per_metre], order=1, mode="grid-wrap")

        steps = np.geomspace(NEAR, 1.5 * FAR, 300)
        x = (self.columns[0] - self.size[1] / 2) * steps[:, None] / self.focal
        ground = at(hills, x, np.broadcast_to(steps[:, None], x.shape))
        ground += wall * np.clip((steps[:, None] - begin) / 4, 0, 1) ** 2
        self.profile = steps, ground
        # The first distance, seen from the camera, at which the ground stands as high as the pixel.
        skyline = np.minimum.accumulate(self.horizon + self.focal * (self.camera - ground) / steps[:, None])
        self.distance = np.stack([np.interp(-self.rows[:, 0], -s, steps) for s in skyline.T], 1)
        water = self.rows < skyline[-1]
        z, x = self.distance, (self.columns - self.size[1] / 2) * self.distance / self.focal

        slope_z, slope_x = (np.gradient(hills, axis=axis) * per_metre for axis in (0, 1))
        normal = np.stack([-at(slope_x, x, z), -np.ones(self.size), -at(slope_z, x, z)], -1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        colour = np.broadcast_to(to_linear(np.array([0.80, 0.72, 0.60]) * rng.uniform(0.85, 1.12, 3)), (*self.size, 3))
        for rarity in (rng.uniform(-0.8, 0.8), 0.5, 0.8, 1.0, 1.2):  # rock first, then what grows on it
            paint = _paint(rng, *EARTHY) if rarity > 0.8 else to_linear(rng.uniform(0.3, 0.5) * np.array([1, 0.92, 0.85]))
            kind = at(fractal(rng, (tile, tile), 1.4), x, z) + 0.3 * np.roll(self.grain, rng.integers(self.size[1]), 1)
            share = 1 / (1 + np.exp(-4 * (kind - rarity)))
            colour = colour + share[..., None] * (paint - colour)
        light = 0.3 + 0.7 * np.clip(normal @ self.sun, 0, 1)
        colour = colour * (light * np.exp(0.25 * self.grain))[..., None]
        surface = to_linear(np.array([rng.uniform(0.25, 0.6), 0.75, 0.88]) * rng.uniform(0.85, 1.05, 3))
        fade = np.clip(1 - 0.5 * self.rows / max(self.horizon, 1), 0.4, 1)[..., None]
        self.colour = np.where(water[..., None], surface * fade, colour)

    def place(self, rng: np.random.Generator, z: float) -> tuple[float, float]:
        """(x, height of the ground) of a random place in view at distance z."""
        steps, ground = self.profile
        column = rng.uniform(-0.05, 1.05) * (self.size[1] - 1)
        height = ground[np.searchsorted(steps, z), int(np.clip(column, 0, self.size[1] - 1))]
        return (column - self.size[1] / 2) * z / self.focal, float(height)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """(row, column) of a point at height y."""
        return self.horizon + self.focal * (self.camera - y) / z, x * self.focal / z + self.size[1] / 2

    def box(self, row: float, column: float, radius: float) -> tuple[slice, slice]:
        """The part of the picture within `radius` pixels."""
        low, high = (np.clip(np.rint([row + r, column + r]), 0, self.size).astype(int) for r in (-radius, radius + 1))
        return slice(low[0], high[0]), slice(low[1], high[1])

    def paint(self, box: tuple[slice, slice], opacity: np.ndarray, colour: np.ndarray, z: np.ndarray | float) -> None:
        seen = opacity * (z < self.distance[box])
        self.colour[box] += seen[..., None] * (colour - self.colour[box])
        self.distance[box] = np.where(seen > 0.5, z, self.distance[box])

    def shadow(self, row: float, column: float, radius: float) -> None:
        """Soft and flat, where a thing meets the ground."""
        box = self.box(row, column, 3 * radius)
        square = ((self.rows[box] - row) / (0.45 * radius)) ** 2 + ((self.columns[box] - column) / (1.3 * radius)) ** 2
        self.colour[box] *= (1 - 0.55 * np.exp(-square))[..., None]


def _boulder(scene: _Scene, rng: np.random.Generator, z: float) -> None:
    """A stone, a brain coral or a sponge: a bumpy ellipsoid."""
    x, ground = scene.place(rng, z)
    radius = rng.uniform(0.12, 0.45)
    row, column = scene.project(x, ground + 0.4 * radius, z)
    pixels = radius * scene.focal / z
    scene.shadow(row + 0.5 * pixels, column, pixels)
    box = scene.box(row, column, 2 * pixels)
    shift = rng.integers(scene.size)
    bumps, waves = (np.roll(field, shift, (0, 1))[box] for field in (scene.bumps, scene.waves))
    wobble = 1 + 0.08 * np.clip(waves, -2, 2)
    u = (scene.columns[box] - column) / (pixels * rng.uniform(0.9, 1.4)) * wobble
    v = (scene.rows[box] - row) / (pixels * rng.uniform(0.7, 1.0)) * wobble
    inside = 1 - u**2 - v**2
    out = np.sqrt(np.clip(inside, 0, None))
    kind = rng.integers(3)
    first = _paint(rng, *VIVID)
    second, pattern = 0.5 * first, np.clip(bumps, 0, 1)  # a sponge
    if kind == 0:  # a stone with growth on it
        first, second = np.array([0.16, 0.13, 0.11]) * rng.uniform(0.6, 1.8), first * 0.7
        pattern = 1 / (1 + np.exp(-6 * (bumps - 0.8)))
    elif kind == 1:  # a brain coral
        second = 0.4 * first
        pattern = 0.5 + 0.5 * np.sin(rng.uniform(14, 26) * (u * out + 0.5 * bumps / pixels**0.5) + 3 * np.sin(5 * v))
    light = 0.25 + 0.75 * np.clip(u * scene.sun[0] + v * scene.sun[1] - out * scene.sun[2], 0, 1)
    colour = (first + pattern[..., None] * (second - first)) * (light * np.exp(0.25 * scene.grain[box]))[..., None]
    scene.paint(box, np.clip(inside * pixels / 2, 0, 1), colour, z - radius * out)


def _coral(scene: _Scene, rng: np.random.Generator, z: float) -> None:
    """A branching coral: each branch ends in two or three thinner ones."""
    x, ground = scene.place(rng, z)
    row, column = scene.project(x, ground - 0.03, z)
    length = rng.uniform(0.1, 0.25) * scene.focal / z
    scene.shadow(row, column, length)
    base, tip = _paint(rng, *VIVID), rng.uniform(0.2, 0.6)  # tips grow, and are paler
    branches = [(row, column, rng.uniform(-0.3, 0.3), length, 0)]
    spread, thickness = rng.uniform(0.35, 0.7), rng.uniform(0.1, 0.2)
    while branches:
        row, column, angle, length, level = branches.pop(0)
        up, right = math.cos(angle) * length, math.sin(angle) * length
        width = max(thickness * length, 0.6)
        box = scene.box(row - up / 2, column + right / 2, length / 2 + width + 1)
        y, x = row - scene.rows[box], scene.columns[box] - column
        reach = np.clip((y * up + x * right) / length**2, 0, 1)
        away = np.hypot(y - reach * up, x - reach * right) / width
        light = 0.7 + 0.4 * np.clip((x - reach * right) / width * np.sign(scene.sun[0]), -1, 1)
        colour = base + ((level + reach) / 4 * tip)[..., None] * (1 - base)
        colour = colour * (light * np.exp(0.2 * scene.grain[box]))[..., None]
        scene.paint(box, np.clip((1 - away) * width + 0.5, 0, 1), colour, z - 0.02 * level)
        if level < 3:
            for turn in np.linspace(-spread, spread, rng.integers(2, 4)):
                turned, shorter = angle + turn + rng.normal(0, 0.15), length * rng.uniform(0.6, 0.85)
                branches.append((row - up, column + right, turned, shorter, level + 1))


def _fish(scene: _Scene, rng: np.random.Generator, z: float) -> None:
    x, ground = scene.place(rng, z)
    row, column = scene.project(x, ground + rng.uniform(0.3, 1.0), z)
    half = rng.uniform(0.06, 0.18) * scene.focal / z
    box = scene.box(row, column, 1.7 * half)
    ahead, tilt = rng.choice([-1, 1]), rng.normal(0, 0.2)
    right, down = (scene.columns[box] - column) / half, (scene.rows[box] - row) / half
    u, v = ahead * (right * math.cos(tilt) + down * math.sin(tilt)), down * math.cos(tilt) - right * math.sin(tilt)
    tall = rng.uniform(0.3, 0.55)
    body = 1 - abs(u) ** 1.7 - (v / (tall * (1 + 0.3 * u))) ** 2
    tail = np.minimum(0.8 * (-0.75 - u) + 0.08 - abs(v) * 0.8, u + 1.4 - 0.25 * np.cos(4 * v))
    fin = np.minimum(0.35 - abs(u + 0.15) * 0.6, v + 1.15 * tall)
    shape = np.maximum(np.maximum(body, 3 * tail), 2 * np.where(v < 0, fin, -1))
    first, second = _paint(rng, *VIVID), _paint(rng, *VIVID)
    along = u if rng.random() < 0.5 else 2 * v
    stripes = (0.5 + 0.5 * np.tanh(3 * np.sin(rng.uniform(3, 9) * along + rng.uniform(0, 6)))) * rng.uniform(0.2, 0.9)
    light = 0.5 + 0.5 * np.clip(0.6 - v / tall * 0.6, 0, 1)
    colour = (first + stripes[..., None] * (second - first)) * light[..., None]
    eye = ((u - 0.6) ** 2 + (v + 0.12 * tall) ** 2)[..., None]
    colour = np.where(eye < 0.006, 0.02, np.where(eye < 0.016, 0.7, colour))
    scene.paint(box, np.clip(shape * half / 2, 0, 1), colour, z)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

PARTS = ("train", "test", "challenging", "nonref")


def make_picture(
    part: str, index: int, *, seed: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Water]:
    """Picture `index` of a part: raw and clean (H, W, 3), maps (10, H, W), and the water."""
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    names = TURBID if part in ("challenging", "nonref") else WATERS
    water = draw_water(names[rng.integers(len(names))], rng)
    clean, depth = clean_scene(rng, size, TRAIN_PHOTOS if part == "train" else TEST_PHOTOS)
    # In murky water one goes nearer: a third of the green light, or more, arrives from the farthest place.
    depth = depth * min(1, FARTHEST / -np.log(water.transmission(depth.max())[1]))
    raw, maps = degrade(clean, depth, water, rng)
    return raw, clean, maps, water


def write(
    folder: str | Path,
    train: int = 160,
    *,
    test: int = 24,
    nonref: int = 12,
    seed: int = 0,
    size: tuple[int, int] = (160, 200),
    label_size: int = 16,
    progress: bool = True,
) -> None:
    """Make the folder. It appears when it is complete: a run that was killed leaves nothing that looks like a data set."""
    folder = Path(folder).absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another --out or delete it first.")
    counts = {"train": train, "test": test, "challenging": nonref // 2, "nonref": nonref}
    places = {
        "train": ("UIEB/raw-890/{}.png", "UIEB/reference-890/{}.png"),
        "test": ("testset_ref/held-out/input/{}.png", "testset_ref/held-out/target/{}.png"),
        "challenging": ("UIEB/challenging-60/{}.png",),
        "nonref": ("testset_nonref/turbid/{}.jpg",),
    }
    bar = tqdm(total=sum(counts.values()), desc="underwater", unit=" pictures", disable=not progress)
    with made_whole(folder) as partial, bar:
        labels = partial / "pseudo" / "train"
        for path in [labels, *((partial / place).parent for every in places.values() for place in every)]:
            path.mkdir(parents=True)
        for part, count in counts.items():
            for index in range(count):
                raw, clean, maps, water = make_picture(part, index, seed=seed, size=size)
                stem = f"{part}-{index:04d}-{water.name}"
                for place, picture in zip(places[part], (raw, clean), strict=False):
                    pixels = np.rint(picture * 255).astype(np.uint8)
                    Image.fromarray(pixels).save(partial / place.format(stem), quality=92)
                if part == "train":
                    np.savez(labels / f"{stem}.npz", **_label(maps, water, label_size))
                bar.update()


def _label(maps: np.ndarray, water: Water, size: int) -> dict[str, np.ndarray]:
    """What a teacher would have said of a picture, here the truth: masks are means over the cells of a grid."""
    grids = [Image.fromarray(m.astype(np.float32)).resize((size, size), Image.Resampling.BOX) for m in maps]
    means = maps.mean((1, 2))
    return {
        "masks": np.rint(np.stack(grids) * 255).astype(np.uint8),
        "probs": (means / means.sum()).astype(np.float16),
        "code": water.code(),
        "names": np.array(MAPS),
        "source": np.array("common.demo_data.underwater"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=160, help="pairs to train on")
    parser.add_argument("--test", type=int, default=24, help="pairs held out")
    parser.add_argument("--nonref", type=int, default=12, help="turbid pictures without a reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=[160, 200], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--label-size", type=int, default=16, help="side of the label maps")
    flags = vars(parser.parse_args())
    folder = flags.pop("out")
    with sentences(last=False):
        write(folder, flags.pop("train"), size=tuple(flags.pop("size")), **flags)
    print(f"{folder}: made")


if __name__ == "__main__":
    main()
