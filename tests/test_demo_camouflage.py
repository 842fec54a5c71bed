"""The camouflage generator: colours give nothing away, textures do; its folder is COD10K's. And the classical baselines."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import kill_while_it_writes
from PIL import Image
from scipy.ndimage import gaussian_filter

from common import camouflage_baselines as baselines
from common.cli import UserError
from common.demo_data import camouflage

SMALL = dict(train=8, test=4, noncam=0.5, size=48, progress=False)
NAME = re.compile(r"COD10K-(CAM|NonCAM)-([1-5])-(Aquatic|Terrestrial|Flying|Amphibian|Other)-(\d+)-([A-Za-z]+)-(\d+)")


def pictures(part: str, count: int, **settings) -> list[camouflage.Picture]:
    settings = {"camouflaged": True, "seed": 0, "size": 96} | settings
    return [camouflage.make_picture(part, index, **settings) for index in range(count)]


def samples(*args, **settings) -> list[baselines.Sample]:
    return [(picture.image, picture.mask) for picture in pictures(*args, **settings)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def plain():
    return pictures("train", 60, difficulty=(1, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    camouflage.write(path, seed=3, **SMALL)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_a_picture_depends_on_seed_part_and_index_only():
    def make(part="train", index=3, camouflaged=True, seed=5):
        settings = dict(camouflaged=camouflaged, seed=seed, size=48, difficulty=(0.3, 1))
        return camouflage.make_picture(part, index, **settings)

    first = make()
    make(index=0)
    again = make()
    assert np.array_equal(first.image, again.image) and np.array_equal(first.mask, again.mask)
    assert (first.level, first.label) == (again.level, again.label)
    for changes in (dict(part="test"), dict(index=4), dict(seed=6), dict(camouflaged=False)):
        other = make(**changes)
        assert other.level != first.level
        assert other.mask.shape != first.mask.shape or not np.array_equal(other.mask, first.mask)


def test_objects_have_the_size_that_is_promised(plain):
    shares = np.array([picture.mask.mean() for picture in plain])
    low, high = camouflage.SHARE
    assert shares.min() >= 0.7 * low and shares.max() <= high + 0.005  # a quarter may be hidden
    assert np.quantile(shares, 0.2) < 0.11 and np.quantile(shares, 0.8) > 0.17
    assert len({picture.label for picture in plain}) == 9
    sides = np.array([picture.image.shape[:2] for picture in plain])
    assert sides.min(0).tolist() >= [88, 96] and sides.max(0).tolist() <= [112, 128] and len(np.unique(sides, axis=0)) > 30


def test_without_an_object_the_mask_is_empty_and_the_ground_is_whole():
    """The level changes objects only, so it cannot change a picture without one, and outside of the object nothing."""
    for index in range(3):
        for camouflaged in (False, True):
            settings = dict(seed=1, size=64, camouflaged=camouflaged)
            low, high = (camouflage.make_picture("test", index, difficulty=(x, x), **settings) for x in (0.3, 1.0))
            changed = np.abs(low.image.astype(int) - high.image).max(-1) > 0
            assert np.array_equal(low.mask, high.mask)
            assert low.mask.any() == camouflaged == changed.any()
            if camouflaged:
                assert changed[low.mask].mean() > 0.9
                assert changed[gaussian_filter(low.mask.astype(float), 3) < 0.01].mean() < 0.02


def test_level_is_how_much_the_texture_differs():
    ground = camouflage.draw_texture("Terrestrial", np.random.default_rng(0))
    rng = np.random.default_rng(1)
    assert ground.changed(0, rng) == ground
    differences = []
    for level in (0.1, 0.5, 1.0):
        skin = ground.changed(level, np.random.default_rng(2))
        assert skin.kind == ground.kind
        numbers = ("scale", "angle", "stretch", "roughness")
        differences.append([abs(getattr(skin, number) - getattr(ground, number)) for number in numbers])
    assert (np.diff(differences, axis=0) > 0).all()


@pytest.mark.parametrize("kind", camouflage.SUPER_CLASSES)
def test_a_field_is_finer_with_scale_and_follows_its_angle(kind):
    def roughness(axis, **changes):
        texture = camouflage.Texture(kind, **({"scale": 8, "angle": 0.0, "stretch": 4.0, "roughness": 2.2} | changes))
        field = texture.field(np.random.default_rng(0), (96, 120), 96)
        assert field.shape == (96, 120) and abs(field.mean()) < 1e-9 and field.std() == pytest.approx(1)
        return (np.diff(field, axis=axis) ** 2).mean()

    assert roughness(0, stretch=1.0, scale=14) > 1.3 * roughness(0, stretch=1.0, scale=7)
    assert roughness(0) > 1.5 * roughness(1)  # features lie along the rows
    assert roughness(1, angle=np.pi / 2) > 1.5 * roughness(0, angle=np.pi / 2)


def test_a_transplant_has_the_values_and_the_local_means_of_what_it_hides():
    rng = np.random.default_rng(0)
    ground = gaussian_filter(rng.standard_normal((96, 96)), 2) * 20
    where = np.zeros((96, 96), bool)
    where[20:70, 30:80] = True
    skin = camouflage.transplant(3 + 5 * rng.standard_normal((96, 96)) ** 3, ground, where, 96)
    means = gaussian_filter(ground, 6)
    assert np.allclose(np.sort((skin - means)[where]), np.sort((ground - means)[where]))
    assert np.abs(gaussian_filter(skin, 6) - means)[30:60, 40:70].mean() < 0.2 * ground.std()
    assert abs(np.corrcoef((skin - means)[where], (ground - means)[where])[0, 1]) < 0.1


def test_no_threshold_on_colour_finds_the_objects(plain):
    """Though it is chosen on the very pictures that it is scored on, and though they are the plainest ones."""
    train = [(picture.image, picture.mask) for picture in plain]
    predict = baselines.colour_threshold(train)
    score = np.mean([baselines.iou(predict(image), mask) for image, mask in train])
    everything = np.mean([mask.mean() for _, mask in train])
    assert score < everything + 0.04 < 0.22


def test_plain_objects_are_found_by_their_texture_and_invisible_ones_are_not(plain):
    easy = [(picture.image, picture.mask) for picture in plain]
    hard = samples("train", 60, difficulty=(0, 0))
    scores = {}
    for name, data in (("easy", easy), ("hard", hard)):
        predict = baselines.boosted_texture(data[:40], 0)
        scores[name] = np.mean([baselines.iou(predict(image), mask) for image, mask in data[40:]])
    assert scores["easy"] > scores["hard"] + 0.12


# ---------------------------------------------------------------------------------------------------------------------
# Folder


def test_the_folder_is_the_same_for_the_same_seed(folder, tmp_path):
    camouflage.write(tmp_path / "same", seed=3, **SMALL)
    camouflage.write(tmp_path / "other", seed=4, **SMALL)
    first, other = contents(folder), contents(tmp_path / "other")
    assert contents(tmp_path / "same") == first
    masks = [{data for path, data in every.items() if "GT_Object/COD10K-CAM" in path} for every in (first, other)]
    assert len(masks[0]) == 12 and not masks[0] & masks[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "same"]  # nothing half-made beside them


def test_the_folder_is_that_of_cod10k(folder):
    assert {path.name for path in folder.iterdir()} == {"Train", "Test", "Info"}
    numbers = {"CAM": [], "NonCAM": []}
    for part, counts in (("Train", {"CAM": 8, "NonCAM": 4}), ("Test", {"CAM": 4, "NonCAM": 2})):
        stems = [sorted(p.stem for p in (folder / part / kind).iterdir()) for kind in ("Image", "GT_Object", "GT_Edge")]
        assert stems[0] == stems[1] == stems[2]
        for group, count in counts.items():
            listed = (folder / "Info" / f"{group}_{part.lower()}.txt").read_text().splitlines()
            assert sorted(listed) == sorted(f"{stem}.jpg" for stem in stems[0] if f"-{group}-" in stem)
            assert len(listed) == count
        for stem in stems[0]:
            group, number, name, sub_number, sub_name, identity = NAME.fullmatch(stem).groups()
            assert list(camouflage.SUPER_CLASSES)[int(number) - 1] == name
            assert (int(sub_number), sub_name) in [sub[:2] for sub in camouflage.SUPER_CLASSES[name]]
            numbers[group].append(int(identity))
    assert sorted(numbers["CAM"]) == list(range(1, 13)) and sorted(numbers["NonCAM"]) == list(range(1, 7))


def test_masks_are_of_their_pictures(folder):
    twice = []
    for path in sorted(folder.glob("*/Image/*.jpg")):
        image = Image.open(path)
        mask, edge = (Image.open(path.parents[1] / kind / f"{path.stem}.png") for kind in ("GT_Object", "GT_Edge"))
        assert image.mode == "RGB" and mask.mode == edge.mode == "L" and mask.size == edge.size
        if mask.size != image.size:
            assert mask.size == (2 * image.width, 2 * image.height)
            twice.append(path.stem)
        mask, edge = np.asarray(mask), np.asarray(edge)
        assert set(np.unique(mask)) == ({0} if "-NonCAM-" in path.stem else {0, 255})
        assert set(np.unique(edge)) == set(np.unique(mask))
        assert not (edge > mask).any() and edge.sum() <= 0.9 * mask.sum()
    assert len(twice) == 1 and twice[0].startswith("COD10K-CAM") and twice[0].endswith("-6")  # picture 5 of Train


def test_textures_survive_the_jpeg(folder):
    stems = (folder / "Info" / "CAM_test.txt").read_text().splitlines()
    for index, stem in enumerate(stems):
        picture = camouflage.make_picture("test", index, camouflaged=True, seed=3, size=48)
        stored = np.asarray(Image.open(folder / "Test" / "Image" / stem), float)
        assert np.abs(stored - picture.image).mean() < 0.15 * picture.image.std()


def test_every_object_has_its_level_in_the_table(folder):
    with open(folder / "Info" / "difficulty.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    listed = [(folder / "Info" / f"CAM_{part}.txt").read_text().splitlines() for part in ("train", "test")]
    assert [f"{row['name']}.jpg" for row in rows] == listed[0] + listed[1]
    levels = [float(row["level"]) for row in rows]
    made = [p.level for part, count in (("train", 8), ("test", 4)) for p in pictures(part, count, seed=3, size=48)]
    assert levels == pytest.approx(made, abs=1e-4)
    low, high = camouflage.DIFFICULTY
    assert low <= min(levels) < max(levels) <= high and len(set(levels)) == 12


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    make = camouflage.make_picture

    def interrupted(part, index, **settings):
        if (part, index) == ("test", 1):
            raise KeyboardInterrupt
        return make(part, index, **settings)

    monkeypatch.setattr(camouflage, "make_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        camouflage.write(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_no_folder(tmp_path):
    kill_while_it_writes("common.demo_data.camouflage", tmp_path / "set", "Train/GT_Edge/*", "--size", "48")
    assert not (tmp_path / "set").exists()


def test_a_folder_that_exists_is_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--out"):
        camouflage.write(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("difficulty", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_levels_are_between_0_and_1(tmp_path, difficulty):
    with pytest.raises(UserError, match="--difficulty"):
        camouflage.write(tmp_path / "set", difficulty=difficulty, **SMALL)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def discs(count: int, seed: int, *, coloured: bool) -> list[baselines.Sample]:
    """Noise with a disc in it that is redder, or whose noise is turned by a right angle."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = rng.integers(48, 60, 2)
        row, column = rng.uniform(15, 33, 2)
        mask = np.hypot(np.arange(height)[:, None] - row, np.arange(width) - column) < rng.uniform(9, 13)
        lying, standing = (gaussian_filter(rng.standard_normal((height, width)), s) for s in ((0.7, 3), (3, 0.7)))
        field = np.where(mask, lying if coloured else standing, lying)
        image = np.repeat(128 + 60 * (field / field.std())[..., None], 3, axis=-1)
        image[..., 1:] -= 90 * (mask & coloured)[..., None]
        made.append((np.clip(image, 0, 255).astype(np.uint8), mask))
    return made


@pytest.mark.parametrize("coloured", [True, False])
def test_each_baseline_finds_what_it_is_made_for(coloured):
    scores = baselines.fit_and_score(discs(20, 0, coloured=coloured), discs(8, 1, coloured=coloured), seed=0)
    assert list(scores) == ["colour threshold", "boosted texture features"]
    colour, texture = scores.values()
    assert colour.shape == texture.shape == (8,)
    if coloured:
        assert colour.mean() > 0.85
    else:
        assert texture.mean() > 0.6 and colour.mean() < 0.25


def test_baselines_are_a_function_of_the_training_set_and_the_seed():
    train, test = discs(12, 0, coloured=False), discs(5, 1, coloured=False)
    first, again, part = (baselines.fit_and_score(train, some, seed=3) for some in (test, test, test[2:]))
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert np.array_equal(first[name][2:], part[name])  # the test set teaches nothing
    changed = baselines.fit_and_score(train, test, seed=4)
    assert not np.array_equal(changed["boosted texture features"], first["boosted texture features"])


def test_predictors_give_masks_of_any_picture():
    train = discs(10, 0, coloured=True)
    for predict in baselines.fit(train, seed=0).values():
        mask = predict(np.zeros((30, 41, 3), np.uint8))
        assert mask.shape == (30, 41) and mask.dtype == bool


def test_the_best_threshold_is_the_best_of_all_candidates():
    rng = np.random.default_rng(0)
    masks = [rng.random((20, 30)) < share for share in (0.1, 0.3, 0.2)]
    scores = [mask + rng.normal(0, 0.8, mask.shape) for mask in masks]
    threshold, mean = baselines._best_threshold(scores, masks)

    def at(value):
        return np.mean([baselines.iou(score >= value, mask) for score, mask in zip(scores, masks, strict=True)])

    assert at(threshold) == pytest.approx(mean)
    assert mean >= max(at(value) for value in np.linspace(-2, 3, 200)) - 0.01


def test_iou_is_that_of_one_picture():
    a, b = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    assert baselines.iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert baselines.iou(a, b) == pytest.approx(1 / 3)
    assert baselines.iou(a, np.zeros_like(a)) == 0


def test_features_tell_directions_apart_and_not_brightness():
    rng = np.random.default_rng(0)
    image = np.repeat(100 + 30 * gaussian_filter(rng.standard_normal((64, 64)), (0.7, 3))[..., None], 3, axis=-1)
    image = image.astype(np.uint8)
    lying, standing = (baselines.texture_features(x).mean((0, 1)) for x in (image, image.transpose(1, 0, 2)))
    assert np.abs(lying).max() < 0.05 and np.abs(standing).max() < 0.05  # relative to the picture
    half = np.where(np.arange(64)[:, None, None] < 32, image, image.transpose(1, 0, 2))
    features = baselines.texture_features(half)
    assert np.abs(features[:24].mean((0, 1)) - features[40:].mean((0, 1))).max() > 1
