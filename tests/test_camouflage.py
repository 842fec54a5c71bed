"""Camouflaged object data sets: the right files, NonCAM stays out, masks mean what they say, no test image in training."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from common import camouflage
from common.camouflage import MaskedImages, find_tests, find_training, read_mask, select, size_class, superclass
from common.cli import UserError
from common.images import inspect, write_image

RNG = np.random.default_rng(0)
CAM, NONCAM = "COD10K-CAM-3-Flying-55-Butterfly-{}", "COD10K-NonCAM-5-Background-5-Vegetation-{}"


def put_image(path: Path, seed: int | None = None, size: tuple[int, int] = (6, 8)) -> Path:
    rng = RNG if seed is None else np.random.default_rng(seed)
    write_image(path, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return path


def put_mask(path: Path, value: int = 255, size: tuple[int, int] = (6, 8)) -> Path:
    mask = np.zeros((*size, 3), np.uint8)
    mask[2:4, 3:6] = value
    write_image(path, mask)
    return path


def put(images: Path, masks: Path, *names: str) -> None:
    for name in names:
        put_image(images / f"{name}.jpg")
        put_mask(masks / f"{name}.png", 0 if "NonCAM" in name or "black" in name else 255)


def put_cod10k(root: Path, part: str = "Train", cam: int = 3, noncam: int = 2, first: int = 1) -> None:
    names = [CAM.format(i) for i in range(first, first + cam)] + [NONCAM.format(i) for i in range(first, first + noncam)]
    put(root / part / "Image", root / part / "GT_Object", *names)
    for name in names:
        put_mask(root / part / "GT_Edge" / f"{name}.png")
        put_mask(root / part / "GT_Instance" / f"{name}.png")


def put_camo(root: Path) -> None:
    put(root / "Images/Train", root / "GT", "camourflage_00001", "camourflage_00002")
    put(root / "Images/Test", root / "GT", "camourflage_01001")


def named(*stems: str) -> MaskedImages:
    """A set whose files do not exist."""
    stems = list(stems)
    camouflaged = np.array(["NonCAM" not in stem for stem in stems])
    return MaskedImages("set", "none", stems, [Path(s) for s in stems], [Path(s) for s in stems], camouflaged)


def many(counts: dict[str, int]) -> MaskedImages:
    return named(*(f"COD10K-{kind}-x-{i}" for kind, count in counts.items() for i in range(count)))


def shuffled(images: MaskedImages) -> MaskedImages:
    order = np.random.default_rng(5).permutation(len(images))
    parts = {key: [getattr(images, key)[i] for i in order] for key in ("stems", "images", "masks")}
    return dataclasses.replace(images, camouflaged=images.camouflaged[order], **parts)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("below", ["", "COD10K-v3", "input/COD10K-v3"])
def test_cod10k_trains_on_its_camouflaged_training_images(tmp_path, below):
    put_cod10k(tmp_path / below)
    put_cod10k(tmp_path / below, "Test", cam=2, noncam=4, first=100)
    for root in (tmp_path, tmp_path / below, tmp_path / below / "Train"):
        images = find_training(root)
        assert images.stems == [CAM.format(i) for i in (1, 2, 3)] + [NONCAM.format(i) for i in (1, 2)]
        assert images.camouflaged.tolist() == [True] * 3 + [False] * 2
        assert {p.parent for p in images.images} == {tmp_path / below / "Train/Image"}
        assert images.masks == [tmp_path / below / "Train/GT_Object" / f"{stem}.png" for stem in images.stems]
        used = select(images, 0, seed=0)
        assert used.stems == images.stems[:3] and used.camouflaged.all()
        assert "Image + " in used.describe() and "3 images" in used.describe()
        assert "5 files: 3 camouflaged used, 2 without object left out" in used.describe()
    assert "not trained on: " in find_training(tmp_path).describe()
    tests = find_tests(tmp_path)
    assert [len(test) for test in tests.values()] == [6] and len(select(next(iter(tests.values())), 0, 0)) == 2
    if below:
        assert list(tests) == ["COD10K"]


def test_camo_has_the_masks_of_both_splits_in_one_folder(tmp_path):
    put_camo(tmp_path / "CAMO-V.1.0-CVIU2019")
    for root in (tmp_path, tmp_path / "CAMO-V.1.0-CVIU2019"):
        images = find_training(root)
        assert images.stems == ["camourflage_00001", "camourflage_00002"] and all(images.masks)
        assert {name: test.stems for name, test in find_tests(root).items()} == {"CAMO": ["camourflage_01001"]}


@pytest.mark.parametrize("train", ["TrainDataset", "TrainValDataset"])
def test_the_combined_folders_and_their_four_test_sets(tmp_path, train):
    put(tmp_path / train / "Imgs", tmp_path / train / "GT", CAM.format(1), "camourflage_00001")
    sets = {"CHAMELEON": "animal-1", "CAMO": "camourflage_01001", "COD10K": CAM.format(9), "NC4K": "7"}
    for name, stem in sets.items():
        put(tmp_path / "TestDataset" / name / "Imgs", tmp_path / "TestDataset" / name / "GT", stem)
    for root in (tmp_path, tmp_path / train):
        assert find_training(root).stems == [CAM.format(1), "camourflage_00001"]
    expected = {name: [stem] for name, stem in sets.items()}
    assert {name: test.stems for name, test in find_tests(tmp_path).items()} == expected
    assert {name: test.stems for name, test in find_tests(tmp_path / "TestDataset", "--test-path").items()} == expected
    assert find_tests(tmp_path / train) == {}  # training data without test sets
    single = find_tests(tmp_path / "TestDataset/NC4K", "--test-path")
    assert list(single) == ["NC4K"] and single["NC4K"].stems == ["7"]


def test_benchmark_sets_without_any_hint_in_their_folder_are_not_trained_on(tmp_path):
    put_cod10k(tmp_path / "COD10K-v3", noncam=0)
    put_camo(tmp_path / "CAMO")
    for name in ("CHAMELEON", "NC4K", "TE-COD10K"):
        put(tmp_path / name / "im", tmp_path / name / "gt", f"{name}1")
    images = find_training(tmp_path)
    assert images.stems == [CAM.format(i) for i in (1, 2, 3)] + ["camourflage_00001", "camourflage_00002"]
    assert set(find_tests(tmp_path)) == {"CAMO", "CHAMELEON", "NC4K", "COD10K"}


@pytest.mark.parametrize(
    "sides",
    [("image", "mask"), ("images", "masks"), ("Image", "Mask"), ("Imgs", "GT"), ("im", "gt"), ("IMAGES", "GT_OBJECT")],
)
def test_plain_folders(tmp_path, sides):
    put(tmp_path / sides[0], tmp_path / sides[1], "b.v2", "deep/a", "black")
    images = find_training(tmp_path)
    assert images.stems == ["b.v2", "black", "deep/a"]
    assert images.masks == [tmp_path / sides[1] / f"{stem}.png" for stem in images.stems]
    assert images.camouflaged.tolist() == [True, False, True]  # without COD10K's names the mask decides
    assert find_tests(tmp_path) == {} and find_tests(tmp_path, "--test-path").popitem()[1].stems == images.stems


def test_the_same_pictures_in_two_layouts_count_once(tmp_path):
    put_cod10k(tmp_path / "COD10K-v3", noncam=0)
    combined = tmp_path / "TrainDataset"
    put(combined / "Imgs", combined / "GT", CAM.format(2), CAM.format(50), "1")
    put(tmp_path / "mine/images", tmp_path / "mine/masks", "1")  # a number, not the same picture
    images = find_training(tmp_path)
    assert images.stems == [CAM.format(i) for i in (1, 2, 3, 50)] + ["TrainDataset/1", "mine/1"]
    assert "1 files left out that are there already" in images.describe()


def test_wrong_roots_are_explained(tmp_path):
    with pytest.raises(UserError, match="--dataset-path .* is not a folder"):
        find_training(tmp_path / "no")
    with pytest.raises(UserError, match="no known layout: expected .*GT_Object"):
        find_training(tmp_path)
    put_cod10k(tmp_path / "a", "Test")
    with pytest.raises(UserError, match="test sets only"):
        find_training(tmp_path / "a")
    put_image(tmp_path / "b/image/1.jpg")
    put_mask(tmp_path / "b/mask/1_mask.png")
    with pytest.raises(UserError, match=r"no image has a mask of the same name .*1\.jpg"):
        find_training(tmp_path / "b")
    assert find_tests(tmp_path / "b") == {}


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def test_masks_of_every_kind_mean_the_same(tmp_path):
    truth = np.zeros((6, 8), bool)
    truth[2:4, 3:6] = True
    grey = np.uint8(255) * truth
    palette = Image.fromarray(truth.astype(np.uint8) * 7)
    palette.putpalette([0, 0, 0] * 7 + [128, 0, 0] + [0, 0, 0] * 248)
    shades = np.where(truth, 200, 100).astype(np.uint8)  # nothing is zero: half-way decides
    shades[0, 0] = 128
    kinds = {
        "grey": Image.fromarray(grey),
        "rgb": Image.fromarray(np.stack([grey] * 3, -1)),
        "red": Image.fromarray(np.stack([grey, 0 * grey, 0 * grey], -1)),
        "rgba": Image.fromarray(np.stack([grey] * 3 + [255 - grey // 2], -1)),
        "bilevel": Image.fromarray(grey).convert("1"),
        "palette": palette,
        "zero_one": Image.fromarray(truth.astype(np.uint8)),
        "sixteen": Image.fromarray(np.where(truth, 40000, 20000).astype(np.uint16)),
        "shades": Image.fromarray(shades),
    }
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", None), truth), name
    soft = cv2.GaussianBlur(grey, (3, 3), 1)  # a smoothed border does not widen the object
    Image.fromarray(soft).save(tmp_path / "soft.png")
    assert np.array_equal(read_mask(tmp_path / "soft.png", None), soft > 128) and (soft > 0).sum() > (soft > 128).sum()
    Image.fromarray(np.ones((6, 8), np.uint8)).save(tmp_path / "all.png")
    assert read_mask(tmp_path / "all.png", None).all()
    Image.fromarray(0 * grey).save(tmp_path / "none.png")
    assert not read_mask(tmp_path / "none.png", None).any()
    Image.fromarray(np.where(truth, 2, 1).astype(np.uint8)).save(tmp_path / "classes.png")
    with pytest.raises(UserError, match=r"classes\.png is no mask .*2 values .*Store it with 0 and 255"):
        read_mask(tmp_path / "classes.png", None)


def test_masks_are_resized_around_their_centre(tmp_path):
    mask = np.zeros((9, 9), np.uint8)
    mask[3:6, 3:6] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    small, large = read_mask(tmp_path / "m.png", (3, 3)), read_mask(tmp_path / "m.png", (18, 27))
    assert np.array_equal(small, np.eye(3)[1][:, None] * np.eye(3)[1] > 0) and small.dtype == bool
    assert np.array_equal(large, np.kron(mask > 0, np.ones((2, 3), bool)))
    even = read_mask(tmp_path / "m.png", (4, 4))
    assert np.array_equal(even, even[::-1, ::-1])


def test_classes_of_names_and_sizes():
    assert superclass(CAM.format(1)) == superclass("a/" + CAM.format(1)) == "Flying"
    assert superclass("COD10K-NonCAM-3-Flying-1515") == "Flying"
    assert superclass("camourflage_00001") == superclass("Flying-1") == "unknown"
    assert [size_class(f) for f in (0.001, 0.1, 0.11, 0.49, 0.5, 1)] == ["small"] * 2 + ["medium"] * 2 + ["large"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Which images are used


def test_a_share_of_the_images_without_an_object_can_be_kept():
    images = many({"CAM-1-Aquatic": 30, "NonCAM-5-Background": 20})
    half = select(images, 0.5, seed=1)
    assert half.camouflaged.sum() == 30 and len(half) == 40
    assert "50 files: 30 camouflaged and 10 without object used, 10 without object left out" in half.describe()
    assert set(select(shuffled(images), 0.5, seed=1).stems) == set(half.stems) != set(select(images, 0.5, seed=2).stems)
    assert set(half.stems) < set(select(images, 0.8, seed=1).stems)
    everything = select(images, 1.0, seed=1)
    assert everything.stems == images.stems and everything.describe().endswith("30 camouflaged and 20 without object used")
    only = select(half.subset(images.stems[:30]), 0.0, seed=0)
    assert len(only) == 30 and only.describe().endswith("30 files: 30 camouflaged used")
    with pytest.raises(UserError, match="--noncam-ratio is 1.5"):
        select(images, 1.5, seed=0)
    with pytest.raises(UserError, match="None of the 20 images .*camouflaged"):
        select(images.subset(images.stems[30:]), 0.5, seed=0)


def test_counts_of_thousands_are_readable():
    used = select(many({"CAM-1-Aquatic": 3040, "NonCAM-5-Background": 2960}), 0, seed=0)
    assert "6,000 files: 3,040 camouflaged used, 2,960 without object left out" in used.describe()


def test_known_duplicates_are_dropped_with_a_line():
    images = named(*camouflage.DUPLICATES, "COD10K-CAM-1-Aquatic-3-Crab-33", "COD10K-CAM-1-Aquatic-3-Crab-320")
    rest = camouflage.drop_known_duplicates(images)
    assert rest.stems == ["COD10K-CAM-1-Aquatic-3-Crab-33", "COD10K-CAM-1-Aquatic-3-Crab-320"]
    assert len(rest.left_out) == 1 and "7 left out" in rest.describe() and "Crab-32," in rest.describe()
    assert camouflage.drop_known_duplicates(rest) is rest


def test_the_validation_set_has_every_class_and_depends_on_names_alone():
    counts = {"CAM-1-Aquatic": 40, "CAM-2-Terrestrial": 80, "CAM-5-Other": 2, "CAM-4-Amphibian": 1, "NonCAM-1-Aquatic": 20}
    images = many(counts)
    rest, val = camouflage.take_validation(images, 0.1, seed=1)
    assert set(rest.stems) | set(val.stems) == set(images.stems) and not set(rest.stems) & set(val.stems)
    assert {kind: sum(kind in stem for stem in val.stems) for kind in counts} == {
        "CAM-1-Aquatic": 4 + 2,  # also those of NonCAM
        "CAM-2-Terrestrial": 8,
        "CAM-5-Other": 1,
        "CAM-4-Amphibian": 0,
        "NonCAM-1-Aquatic": 2,
    }
    for set_ in (rest, val):
        assert set_.camouflaged.tolist() == ["NonCAM" not in stem for stem in set_.stems]
        assert [path.name for path in set_.images] == set_.stems == [path.name for path in set_.masks]
    assert "Terrestrial 8, Aquatic 6, Other 1" in val.describe()
    assert set(camouflage.take_validation(shuffled(images), 0.1, seed=1)[1].stems) == set(val.stems)
    assert set(camouflage.take_validation(images, 0.1, seed=2)[1].stems) != set(val.stems)
    # not the first of each class, and without one image the others stay where they are
    assert sorted(int(s.rpartition("-")[2]) for s in val.stems if "Terrestrial" in s) != list(range(8))
    one_less = images.but([next(stem for stem in rest.stems if "Terrestrial" in stem)])
    assert set(camouflage.take_validation(one_less, 0.1, seed=1)[1].stems) == set(val.stems)
    with pytest.raises(UserError, match="too few"):
        camouflage.take_validation(images.subset(images.stems[:1]), 0.5, seed=0)
    with pytest.raises(UserError, match="--val-share is 1"):
        camouflage.take_validation(images, 1, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, caplog):
    image, mask = tmp_path / "image", tmp_path / "mask"
    put(image, mask, "good", "cut", "cut_mask", "resized", "side", "classes", CAM.format(1), NONCAM.format(1))
    for path in (image / "cut.jpg", mask / "cut_mask.png"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    put_image(image / "lonely.jpg")
    put_mask(mask / "resized.png", size=(12, 16))
    put_mask(mask / "side.png", size=(8, 6))
    put_mask(mask / f"{CAM.format(1)}.png", 0)
    put_mask(mask / f"{NONCAM.format(1)}.png", 255)
    Image.fromarray(RNG.integers(0, 4, (6, 8), dtype=np.uint8)).save(mask / "classes.png")
    images = find_training(tmp_path)
    found = inspect(images.images)
    kept = camouflage.check_readable(images, found)
    assert kept.stems == ["good", "resized"] and kept.camouflaged.all()
    assert "1 masks have another size than their image" in kept.describe() and "7 that cannot be used" in kept.describe()
    (warning,) = (record.getMessage() for record in caplog.records)
    for sentence in (
        "7 of 9 left out", "cut.jpg: ", "cut_mask.png cannot be read", "lonely.jpg: it has no mask",
        "side.png lies on its side", "classes.png is no mask", "1.png is black", "1.png is not black",
    ):  # fmt: skip
        assert sentence in warning
    caplog.clear()
    assert camouflage.check_readable(images.subset(["good"]), found).left_out == [] and not caplog.records
    with pytest.raises(UserError, match="None of the 2 images .*no mask"):
        camouflage.check_readable(images.subset(["lonely", "cut"]), found)


def test_overlap_is_refused_by_pixels_and_by_name(tmp_path):
    def a_set(folder: str, **seeds: int) -> MaskedImages:
        for name, seed in seeds.items():
            put_image(tmp_path / folder / f"image/{name.replace('_', '-')}.png", seed)
            put_mask(tmp_path / folder / f"mask/{name.replace('_', '-')}.png")  # equal masks are no overlap
        return find_training(tmp_path / folder)

    cod10k = "COD10K_CAM_1_Aquatic_3_Crab_5"
    train = a_set("train", **{"1": 1, "2": 2, cod10k: 3})
    apart, pixels, name = a_set("a", **{"1": 11, "5": 12}), a_set("b", **{"9": 2}), a_set("c", **{cod10k: 13, "8": 14})
    found = inspect(path for images in (train, apart, pixels, name) for path in images.images)
    camouflage.check_overlap(train, {"apart": apart}, found)  # a number is no name
    with pytest.raises(UserError, match=r"1 images of the test set NC4K are also trained on: .*9\.png = .*2\.png"):
        camouflage.check_overlap(train, {"apart": apart, "NC4K": pixels}, found)
    with pytest.raises(UserError, match="1 images of the test set COD10K are also trained on: COD10K-CAM-.* by its name"):
        camouflage.check_overlap(train, {"COD10K": name}, found)
