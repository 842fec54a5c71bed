"""The underwater generator: its physics is what it says, its parts share nothing, its folders are whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import kill_while_it_writes
from PIL import Image

from common.cli import UserError
from common.demo_data import underwater
from common.demo_data.underwater import JERLOV, MAPS, TURBID, WATERS

SMALL = dict(train=4, test=2, nonref=2, size=(48, 64), label_size=8, progress=False)


def water(name: str, seed: int = 0, **changes) -> underwater.Water:
    return replace(underwater.draw_water(name, np.random.default_rng(seed)), **changes)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(((a - b) ** 2).mean())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pictures():
    return [underwater.make_picture("train", index, seed=0, size=(160, 200)) for index in range(40)]


# ---------------------------------------------------------------------------------------------------------------------
# Physics


def test_srgb_and_linear_light_are_inverse_and_a_mid_grey_is_what_the_standard_says():
    values = np.linspace(0, 1, 256)
    assert np.abs(underwater.to_srgb(underwater.to_linear(values)) - values).max() < 1e-6
    assert underwater.to_linear(np.array(0.5)) == pytest.approx(0.21404, abs=1e-5)


def test_clear_water_without_distance_leaves_the_picture_as_it_is():
    clean, depth = underwater.photograph(np.random.default_rng(0), (96, 120))
    clear = water("I", depth=0.0, light=1.0, shade=0.0, noise=0.0, snow=0.0)
    raw, maps = underwater.degrade(clean, np.zeros_like(depth), clear, np.random.default_rng(1))
    assert np.abs(raw - clean).max() < 1e-6
    assert maps.max() < 1e-6


def test_attenuation_maps_are_the_sum_over_wavelengths():
    """Told again with loops: Beer and Lambert per wavelength, weighted with daylight and response."""
    clean, depth = underwater.sea_floor(np.random.default_rng(0), (24, 30))
    here = water("3C", depth=4.0)
    _, maps = underwater.degrade(clean, depth, here, np.random.default_rng(1))
    for row, column in ((0, 0), (12, 15), (23, 29)):
        for channel, (centre, width) in enumerate(((605, 25), (535, 30), (475, 35))):
            seen = arrived = 0.0
            for wavelength, beam in zip(range(400, 701, 25), here.spectrum, strict=True):
                surface = np.interp(wavelength, range(400, 701, 50), JERLOV["3C"])
                light = np.exp(-(((wavelength - centre) / width) ** 2) / 2 - surface * 4.0)
                seen += light
                arrived += light * np.exp(-beam * depth[row, column])
            beta = -np.log(arrived / seen) / depth[row, column]
            assert maps[channel, row, column] == pytest.approx(1 - np.exp(-beta * depth[row, column]), abs=1e-12)


@pytest.mark.parametrize(
    "name, beta", [("I", (0.188, 0.049, 0.023)), ("III", (0.265, 0.125, 0.128)), ("5C", (0.410, 0.329, 0.418))]
)
def test_attenuation_is_that_of_a_real_camera(name, beta):
    """Against a Nikon D3X under daylight, 5 m deep and 3 m away."""
    here = water(name, depth=5.0, spectrum=underwater.jerlov(name))
    assert -np.log(here.transmission(3.0)) / 3 == pytest.approx(beta, abs=0.025)


def test_red_goes_first_in_the_ocean_and_blue_in_muddy_water():
    red, green, blue = water("I").transmission(5.0)
    assert red < 0.6 * green and green < blue
    red, green, blue = water("9C").transmission(2.0)
    assert blue < green and blue < red


def test_attenuation_per_metre_falls_with_distance():
    beta = [-np.log(water("II", depth=2.0).transmission(z)) / z for z in (0.5, 2.0, 8.0)]
    assert (beta[0] > beta[1]).all() and (beta[1] > beta[2]).all()


@pytest.mark.parametrize("name", WATERS)
def test_far_away_there_is_nothing_but_the_veil(name):
    here = water(name, noise=0.0, snow=0.0, shade=0.0, scatter=0.0)
    rng = np.random.default_rng(2)
    clean = rng.uniform(0.2, 0.8, (16, 20, 3))
    shares = []
    for distance in (0.5, 2.0, 8.0, 1000.0):
        raw, maps = underwater.degrade(clean, np.full((16, 20), distance), here, rng)
        shares.append(maps[MAPS.index("veil")])
    assert all((near < far).all() for near, far in zip(shares, shares[1:], strict=False))
    endless = underwater.to_linear(raw)
    assert np.ptp(endless, (0, 1)).max() < 1e-6
    assert endless[0, 0] / endless[0, 0].max() == pytest.approx(here.veil / here.veil.max(), abs=1e-3)


def test_scene_and_veil_have_their_own_coefficients():
    for name in WATERS:
        here = water(name)
        beta_d = -np.log(here.transmission(3.0)) / 3
        assert (np.abs(here.beta_b / beta_d - 1) > 0.01).all()


def test_daylight_grows_blue_with_depth_in_the_ocean_and_yellow_in_mud():
    red, green, blue = water("I", depth=8.0).daylight()
    assert red < 0.35 and blue == 1.0
    red, green, blue = water("9C", depth=4.0).daylight()
    assert blue < 0.3 and red > 0.8


def test_blur_leaves_near_things_sharp_and_keeps_the_light():
    clean = np.random.default_rng(0).random((40, 80, 3))
    sigma = np.where(np.arange(80) < 40, 0.0, 2.0) * np.ones((40, 1))
    blurred = underwater._blur(clean, sigma)
    assert np.array_equal(blurred[:, :40], clean[:, :40])
    assert blurred[:, 50:].std() < 0.5 * clean[:, 50:].std()
    assert blurred[:, 50:].mean() == pytest.approx(clean[:, 50:].mean(), abs=0.01)


def test_distances_of_a_sea_floor_grow_upwards():
    for seed in range(5):
        _, depth = underwater.sea_floor(np.random.default_rng(seed), (80, 100))
        assert underwater.NEAR <= depth.min() and depth.max() <= underwater.FAR
        assert depth[:10].mean() > 1.5 * depth[-10:].mean()


# ---------------------------------------------------------------------------------------------------------------------
# Maps, difficulty


def test_maps_are_ten_different_things(pictures):
    maps = np.stack([picture[2] for picture in pictures])
    assert maps.shape[1] == len(MAPS) == len(set(MAPS)) == 10
    assert maps.min() >= 0 and maps.max() <= 1
    assert (maps.std((0, 2, 3)) > 0.03).all()  # over the set
    assert (maps.std((2, 3)).mean(0) > 0.02).all()  # within a picture
    cells = maps.reshape(40, 10, 16, 10, 20, 10).mean((3, 5))
    differ = np.abs(cells[:, :, None] - cells[:, None]).mean((0, 3, 4)) + np.eye(10)
    assert differ.min() > 0.03
    alike = np.corrcoef(np.moveaxis(cells, 1, 0).reshape(10, -1)) - np.eye(10)
    assert alike.max() < 0.98  # green and blue, .97: muddy water takes both. All others are at most .9 alike


def test_inputs_are_about_as_far_from_their_references_as_those_of_uieb(pictures):
    scores = np.array([psnr(raw, clean) for raw, clean, _, _ in pictures])
    assert 14 < scores.mean() < 18  # UIEB: 17.1
    assert scores.std() > 1.2 and scores.min() > 9 and scores.max() < 25


def test_casts_are_of_many_colours(pictures):
    strongest = {int(raw.mean((0, 1)).argmax()) for raw, _, _, _ in pictures}
    assert strongest == {0, 1, 2}


def test_references_are_well_exposed(pictures):
    mean = np.array([clean.mean() for _, clean, _, _ in pictures])
    spread = np.array([clean.std() for _, clean, _, _ in pictures])
    assert mean.min() > 0.2 and mean.max() < 0.8 and spread.min() > 0.1


def test_no_colour_matrix_restores_them(pictures):
    """Not even each picture's own best affine map, found with its reference; one for all is far worse than that."""
    systems = [(np.c_[raw.reshape(-1, 3), np.ones(raw[..., 0].size)], clean.reshape(-1, 3)) for raw, clean, _, _ in pictures]
    own = [psnr(a @ np.linalg.lstsq(a, b, rcond=None)[0], b) for a, b in systems]
    matrix = np.linalg.lstsq(np.concatenate([a for a, _ in systems]), np.concatenate([b for _, b in systems]), rcond=None)[0]
    shared = np.mean([psnr(a @ matrix, b) for a, b in systems])
    before = np.mean([psnr(raw, clean) for raw, clean, _, _ in pictures])
    assert np.mean(own) < 28
    assert before < shared < np.mean(own) - 4


# ---------------------------------------------------------------------------------------------------------------------
# Parts, files


def test_a_picture_depends_on_seed_part_and_index_only():
    make = underwater.make_picture
    first = make("train", 3, seed=5, size=(40, 50))
    make("test", 0, seed=1, size=(40, 50))
    again = make("train", 3, seed=5, size=(40, 50))
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    for other in (("train", 4, 5), ("train", 3, 6), ("test", 3, 5), ("nonref", 3, 5)):
        changed = make(*other[:2], seed=other[2], size=(40, 50))
        assert not np.array_equal(first[0], changed[0])
        assert not np.array_equal(first[3].code(), changed[3].code())


def test_held_out_photographs_are_never_trained_on(monkeypatch):
    used = set()
    for name, load in underwater.PHOTOS.items():
        monkeypatch.setitem(underwater.PHOTOS, name, lambda name=name, load=load: (used.add(name), load())[1])
    seen = {}
    for part in underwater.PARTS:
        used.clear()
        for index in range(40 if part == "train" else 12):
            underwater.make_picture(part, index, seed=0, size=(16, 20))
        seen[part] = set(used)
    assert seen["train"] == {"astronaut", "cat", "motorcycle", "pagoda"}
    assert seen["test"] == seen["challenging"] == seen["nonref"] == {"coffee", "dahlia"}
    small = [np.asarray(Image.fromarray(load()).resize((16, 16)), float) for load in underwater.PHOTOS.values()]
    assert min(np.abs(a - b).mean() for i, a in enumerate(small) for b in small[:i]) > 10  # no picture under two names


def test_the_folder_is_complete_and_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        underwater.write(tmp_path / name, seed=seed, **SMALL)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert not set(first.values()) & set(other.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing half-made beside them

    stems = {}
    for path in first:
        stems.setdefault(str(Path(path).parent), []).append(Path(path).stem)
    assert {folder: len(names) for folder, names in stems.items()} == {
        "UIEB/raw-890": 4,
        "UIEB/reference-890": 4,
        "UIEB/challenging-60": 1,
        "pseudo/train": 4,
        "testset_ref/held-out/input": 2,
        "testset_ref/held-out/target": 2,
        "testset_nonref/turbid": 2,
    }
    assert stems["UIEB/raw-890"] == stems["UIEB/reference-890"] == stems["pseudo/train"]
    assert stems["testset_ref/held-out/input"] == stems["testset_ref/held-out/target"]
    assert all(stem.split("-")[2] in TURBID for stem in stems["testset_nonref/turbid"] + stems["UIEB/challenging-60"])
    parts = ("UIEB/raw-890", "UIEB/challenging-60", "testset_ref/held-out/input", "testset_nonref/turbid")
    assert len({stem for part in parts for stem in stems[part]}) == 4 + 1 + 2 + 2  # no stem in two parts
    for path in (tmp_path / "a").rglob("*.[pj][np]g"):
        image = Image.open(path)
        assert image.size == (64, 48) and image.mode == "RGB"


def test_labels_are_the_true_maps_on_a_grid(tmp_path):
    underwater.write(tmp_path / "set", seed=3, **SMALL)
    for index, path in enumerate(sorted((tmp_path / "set/pseudo/train").iterdir())):
        label = np.load(path)
        _, _, maps, here = underwater.make_picture("train", index, seed=3, size=SMALL["size"])
        assert path.stem == f"train-{index:04d}-{here.name}"
        assert label["masks"].dtype == np.uint8 and label["masks"].shape == (10, 8, 8)
        cells = maps.reshape(10, 8, 6, 8, 8).mean((2, 4))
        assert np.abs(label["masks"] / 255 - cells).max() < 0.51 / 255
        means = maps.mean((1, 2))
        assert label["probs"].dtype == np.float16 and label["probs"].sum(dtype=float) == pytest.approx(1, abs=2e-3)
        assert label["probs"].astype(float) == pytest.approx(means / means.sum(), abs=1e-3)
        assert label["code"].dtype == np.float16 and label["code"].shape == (len(underwater.CODE),)
        assert label["names"].tolist() == list(MAPS)
        assert str(label["source"]) == "common.demo_data.underwater"


def test_codes_have_about_unit_size_and_tell_waters_apart():
    codes = np.array([water(name, seed).code() for name in WATERS for seed in range(10)], float)
    assert np.abs(codes).max() < 3 and (codes.std(0) > 0.05).all()


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    make = underwater.make_picture

    def interrupted(part, index, **settings):
        if (part, index) == ("train", 2):
            raise KeyboardInterrupt
        return make(part, index, **settings)

    monkeypatch.setattr(underwater, "make_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        underwater.write(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_no_folder(tmp_path):
    kill_while_it_writes("common.demo_data.underwater", tmp_path / "set", "pseudo/train/*", "--size", "48", "60")
    assert not (tmp_path / "set").exists()


def test_a_folder_that_exists_is_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--out"):
        underwater.write(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
