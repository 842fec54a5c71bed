"""Underwater data sets: the right pairs, a split that stays, no test image in training, pseudo-labels that teach."""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import underwater
from common.cli import UserError
from common.images import inspect, write_image
from common.underwater import ImageSet, audit_labels, crop_masks, find_labels, find_pairs, find_sets, read_label, take_split

RNG = np.random.default_rng(0)


def put(path: Path, seed: int | None = None, size: tuple[int, int] = (4, 5)) -> Path:
    rng = RNG if seed is None else np.random.default_rng(seed)
    write_image(path, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return path


def named(count: int, name: str = "set") -> ImageSet:
    """A set whose files do not exist."""
    stems = [f"img_{i:03d}" for i in range(count)]
    return ImageSet(name, "plain", stems, [Path(f"in/{s}.png") for s in stems], [Path(f"gt/{s}.png") for s in stems])


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize(
    "sides", [layout[:2] for layout in underwater.LAYOUTS] + [("INPUT", "gt"), ("Raw-890", "Reference-890")]
)
@pytest.mark.parametrize("below", ["", "data", "a/b"])
def test_each_layout_is_found_with_inputs_and_targets_on_their_sides(tmp_path, sides, below):
    for name in ("2", "1", "c.v2", "deep/3"):
        put(tmp_path / below / sides[0] / f"{name}.png")
        put(tmp_path / below / sides[1] / f"{name}.jpg")  # the suffix may differ
    pairs = find_pairs(tmp_path, "--train-root")
    assert pairs.stems == ["1", "2", "c.v2", "deep/3"] and pairs.left_out == []
    for stem, first, second in zip(pairs.stems, pairs.inputs, pairs.targets, strict=True):
        assert first == tmp_path / below / sides[0] / f"{stem}.png"
        assert second == tmp_path / below / sides[1] / f"{stem}.jpg"
    assert sides[0].lower() in pairs.describe().lower() and "4 pairs" in pairs.describe()


def test_the_subsets_of_euvp_are_joined_and_its_test_images_stay_out(tmp_path):
    for subset in ("dark", "scenes"):
        for side in ("trainA", "trainB"):
            put(tmp_path / f"Paired/underwater_{subset}" / side / "n01.jpg")
        put(tmp_path / f"Paired/underwater_{subset}/validation/n02.jpg")
    for side in ("Inp", "GTr"):
        put(tmp_path / "test_samples" / side / "test_p1.jpg")
    for root in (tmp_path, tmp_path / "Paired"):  # the names do not depend on where one points
        pairs = find_pairs(root, "--train-root")
        assert pairs.stems == ["underwater_dark/n01", "underwater_scenes/n01"]
        assert pairs.inputs[1] == tmp_path / "Paired/underwater_scenes/trainA/n01.jpg"
    assert "left out as test or validation sets: test_samples" in find_pairs(tmp_path, "--train-root").describe()
    assert find_pairs(tmp_path / "test_samples", "--val-ref-root").stems == ["test_p1"]
    shutil.rmtree(tmp_path / "Paired")
    assert find_pairs(tmp_path, "--val-ref-root").stems == ["test_p1"]  # where there is nothing else, it is what is meant


def test_files_without_partner_are_listed(tmp_path):
    for name in ("input/a.png", "input/b.png", "input/b.jpg", "input/c.png", "GT/b.png", "GT/c.png", "GT/d.png"):
        put(tmp_path / name)
    pairs = find_pairs(tmp_path, "--train-root")
    assert pairs.stems == ["b", "c"]
    assert "2 pairs; 3 files without a partner left out (input/a.png, GT/d.png, input/b.png)" in pairs.describe()


def test_wrong_roots_are_explained(tmp_path):
    with pytest.raises(UserError, match="--train-root .*nowhere is not a folder"):
        find_pairs(tmp_path / "nowhere", "--train-root")
    put(tmp_path / "pictures/a.png")
    with pytest.raises(UserError, match="no known layout: expected the folders raw-890/ and reference-890/"):
        find_pairs(tmp_path, "--train-root")
    put(tmp_path / "other/input/x_raw.png")
    put(tmp_path / "other/GT/x_ref.png")
    with pytest.raises(UserError, match="no input has a target of the same name.*x_raw.png.*x_ref.png"):
        find_pairs(tmp_path, "--train-root")


def test_sets_are_folders(tmp_path):
    for name in ("ref/UIEB/input/a.png", "ref/UIEB/target/a.png", "ref/LSUI/input/b.png", "ref/LSUI/GT/b.png"):
        put(tmp_path / name)
    for name in ("non/U45/a.png", "non/UCCS/blue/a.png", "non/UCCS/green/a.png", "non/RUIE/input/a.png", "non/RUIE/x/b.png"):
        put(tmp_path / name)
    (tmp_path / "ref/.cache").mkdir()
    (tmp_path / "non/empty").mkdir()
    reference = find_sets(tmp_path / "ref", "--val-ref-root", reference=True)
    assert {name: s.stems for name, s in reference.items()} == {"LSUI": ["b"], "UIEB": ["a"]}
    assert reference["UIEB"].targets == [tmp_path / "ref/UIEB/target/a.png"]
    alone = find_sets(tmp_path / "non", "--val-nonref-root", reference=False)
    assert {name: s.stems for name, s in alone.items()} == {"RUIE": ["a"], "U45": ["a"], "UCCS": ["blue/a", "green/a"]}
    assert alone["U45"].targets == [] and "1 images" in alone["U45"].describe()
    assert list(find_sets(tmp_path / "ref/LSUI", "--val-ref-root", reference=True)) == ["LSUI"]  # the root is a set itself
    assert list(find_sets(tmp_path / "non/U45", "--val-nonref-root", reference=False)) == ["U45"]
    assert find_sets(tmp_path / "non/RUIE", "--val-nonref-root", reference=False)["RUIE"].stems == ["a"]
    for reference in (True, False):
        with pytest.raises(UserError, match="--val.* holds no images"):
            find_sets(tmp_path / "non/empty", "--val", reference=reference)


# ---------------------------------------------------------------------------------------------------------------------
# Split and overlap


def shuffled(images: ImageSet) -> ImageSet:
    order = np.random.default_rng(3).permutation(len(images))
    lists = {key: [getattr(images, key)[i] for i in order] for key in ("stems", "inputs", "targets")}
    return dataclasses.replace(images, **lists)


def test_a_split_by_seed_depends_on_names_alone():
    pairs = named(40)
    rest, test = take_split(pairs, "seed:1", 9)
    assert len(test) == 9 and set(rest.stems) | set(test.stems) == set(pairs.stems) and len(rest) == 31
    assert all(p.stem == s for p, s in zip(test.inputs + test.targets, test.stems * 2, strict=True))
    _, again = take_split(shuffled(pairs), "seed:1", 9)
    assert set(again.stems) == set(test.stems) and underwater.split_hash(again) == underwater.split_hash(test)
    assert underwater.split_hash(take_split(pairs, "seed:2", 9)[1]) != underwater.split_hash(test)
    assert test.stems != sorted(pairs.stems)[:9] and test.stems != sorted(pairs.stems)[-9:]
    rest_again, val = underwater.take_validation(rest, 5, seed=1)
    assert len(val) == 5 and set(val.stems).isdisjoint(rest_again.stems) and set(val.stems).isdisjoint(test.stems)
    assert underwater.take_validation(shuffled(rest), 5, seed=1)[1].stems != [] and len(rest_again) == 26
    assert set(underwater.take_validation(shuffled(rest), 5, seed=1)[1].stems) == set(val.stems)
    assert set(underwater.take_validation(rest, 5, seed=2)[1].stems) != set(val.stems)
    for count in (0, 40, 41):
        with pytest.raises(UserError, match=f"takes {count} of the 40 pairs"):
            take_split(pairs, "seed:1", count)


def test_a_split_by_file(tmp_path):
    pairs = named(6)
    listing = tmp_path / "test.txt"
    listing.write_text("\ufeff# the test list\nimg_001.png\n\nraw-890/img_003.JPG # noted\nC:\\UIEB\\img_005\n")
    rest, test = take_split(pairs, str(listing), 90)
    assert test.stems == ["img_001", "img_003", "img_005"] and rest.stems == ["img_000", "img_002", "img_004"]
    for text, reason in (
        ("img_001\nimg_9\nimg_8.png", "does not have: img_9, img_8.png"),
        ("# nothing", "names no test image"),
        ("\n".join(pairs.stems), "none is left to train on"),
    ):
        listing.write_text(text)
        with pytest.raises(UserError, match=reason):
            take_split(pairs, str(listing), 90)
    for wrong in ("seed:x", str(tmp_path / "no.txt")):
        with pytest.raises(UserError, match="neither seed:N"):
            take_split(pairs, wrong, 2)


def test_names_in_subsets_are_told_apart(tmp_path):
    pairs = named(3)
    pairs.stems = ["dark/n1", "scenes/n1", "scenes/n2"]
    listing = tmp_path / "test.txt"
    listing.write_text("n2.jpg\nEUVP/dark/n1.jpg")
    assert take_split(pairs, str(listing), 9)[1].stems == ["dark/n1", "scenes/n2"]
    listing.write_text("n1.jpg")
    with pytest.raises(UserError, match=r"n1.jpg \(which of dark/n1, scenes/n1\?\)"):
        take_split(pairs, str(listing), 9)


def test_unreadable_and_unequal_pairs_are_left_out_by_name(tmp_path, caplog):
    for name in ("good", "cut", "unequal"):
        put(tmp_path / "input" / f"{name}.png", size=(40, 50))
        put(tmp_path / "GT" / f"{name}.png", size=(40, 48) if name == "unequal" else (40, 50))
    cut = tmp_path / "GT/cut.png"
    cut.write_bytes(cut.read_bytes()[:500])
    pairs = find_pairs(tmp_path, "--train-root")
    found = inspect(pairs.files())
    assert underwater.check_readable(pairs, found).stems == ["good"]
    assert "2 of 3 left out" in caplog.text and "cut.png: image file is truncated" in caplog.text
    assert "unequal.png is 50x40, its target 48x40" in caplog.text
    caplog.clear()
    good = pairs.subset(["good"])
    assert underwater.check_readable(good, found) is good and not caplog.records
    with pytest.raises(UserError, match="None of the 2 images"):
        underwater.check_readable(pairs.subset(["cut", "unequal"]), found)


def test_overlap_is_refused_by_pixels_and_by_name(tmp_path):
    put(tmp_path / "train/input/1.png", seed=1)
    put(tmp_path / "train/GT/1.png", seed=2)
    for folder, name, input_seed, target_seed in (
        ("apart", "2", 3, 4), ("input_is_input", "2", 1, 4), ("target_is_target", "2", 3, 2), ("input_is_target", "2", 2, 4),
        ("same_name", "1", 3, 4),
    ):  # fmt: skip
        put(tmp_path / "tests" / folder / "input" / f"{name}.tif", seed=input_seed)  # another format, the same pixels
        put(tmp_path / "tests" / folder / "GT" / f"{name}.tif", seed=target_seed)
    train = find_pairs(tmp_path / "train", "--train-root")
    tests = find_sets(tmp_path / "tests", "--val-ref-root", reference=True)
    found = inspect([path for images in (train, *tests.values()) for path in images.files()])
    underwater.check_overlap(train, {"apart": tests["apart"]}, found, names=True)
    underwater.check_overlap(train, {"same_name": tests["same_name"]}, found, names=False)
    for folder in ("input_is_input", "target_is_target", "input_is_target"):
        with pytest.raises(UserError, match=f"1 files of the test set {folder} .*2.tif = .*1.png.*--split"):
            underwater.check_overlap(train, {"apart": tests["apart"], folder: tests[folder]}, found, names=False)
    with pytest.raises(UserError, match="1 images of the test set same_name .*--overlap-check content"):
        underwater.check_overlap(train, {"same_name": tests["same_name"]}, found, names=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pseudo-labels

K, D = 4, 6


def good_masks(seed: int = 0, classes: int = K, size: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (classes, size, size), dtype=np.uint8)


def write_label(root: Path, stem: str, masks: np.ndarray, *, code: int | None = D) -> None:
    arrays = {"masks": masks, "probs": np.full(len(masks), 0.5, np.float32)}
    if code is not None:
        arrays["code"] = np.arange(code, dtype=np.float32)
    np.savez(root / f"{stem}.npz", **arrays)


def test_all_formats_read_the_same(tmp_path):
    masks, probs, code = good_masks(), np.linspace(0, 1, K, dtype=np.float32), np.linspace(-3, 3, D, dtype=np.float32)
    shares = masks.astype(np.float32) / 255
    (tmp_path / "train/deep").mkdir(parents=True)
    original = {
        "masks": torch.tensor(shares), "probs": torch.zeros(K, 7, 7), "global_prob": torch.tensor(probs),
        "z_d": torch.tensor(code), "confidence_scale": torch.tensor(0.25), "metadata": {"temperature": 10, "prompts": ["a"]},
    }  # fmt: skip
    torch.save(original, tmp_path / "train/original.pt")
    np.savez(
        tmp_path / "train/deep/packed.npz", masks=masks, probs=probs, code=code, confidence=np.float32(0.25),
        names=np.array(["clear water"] * K), source=np.array("CLIP"),
    )  # fmt: skip
    np.save(tmp_path / "train/v2_masks.npy", shares.astype(np.float32))
    np.save(tmp_path / "train/v2_probs.npy", probs)
    np.save(tmp_path / "train/v2_features.npy", code)
    np.save(tmp_path / "train/bare_masks.npy", masks > 127)
    images = named(5)
    images.stems = ["bare", "deep/packed", "none", "original", "v2"]
    for root in (tmp_path, tmp_path / "train"):
        labels = find_labels(root, images)
        assert list(labels) == ["bare", "deep/packed", "original", "v2"]
    for stem, confidence in (("original", 0.25), ("deep/packed", 0.25), ("v2", 1.0)):
        label = read_label(labels[stem])
        assert np.array_equal(label.masks, shares) and label.masks.dtype == np.float32, stem
        assert np.array_equal(label.probs, probs) and np.array_equal(label.code, code), stem
        assert label.confidence == confidence
    bare = read_label(labels["bare"])
    assert bare.probs is None and bare.code is None and np.array_equal(bare.masks, (masks > 127) * np.float32(1))


def test_values_are_not_stretched(tmp_path):
    np.savez(tmp_path / "a.npz", masks=np.full((2, 3, 3), 51, np.uint8))
    assert np.allclose(read_label(tmp_path / "a.npz").masks, 0.2)
    np.savez(tmp_path / "a.npz", masks=np.full((2, 3, 3), 0.3, np.float16))
    assert np.allclose(read_label(tmp_path / "a.npz").masks, 0.3, atol=1e-3)


def test_labels_are_looked_for_with_a_sentence(tmp_path):
    images = named(2)
    with pytest.raises(UserError, match="--pseudo-root .*is not a folder"):
        find_labels(tmp_path / "nowhere", images)
    with pytest.raises(UserError, match="no label of set.*img_000.npz"):
        find_labels(tmp_path, images)
    write_label(tmp_path, "img_000", good_masks())
    np.save(tmp_path / "img_000_masks.npy", good_masks())
    with pytest.raises(UserError, match="two labels for one image"):
        find_labels(tmp_path, images)


MALFORMED = {
    "flat": ({"masks": good_masks()[0]}, "shape"),
    "empty": ({"masks": np.zeros((0, 7, 7), np.uint8)}, "shape"),
    "nan": ({"masks": np.full((2, 7, 7), np.nan, np.float32)}, "NaN"),
    "scaled": ({"masks": np.full((2, 7, 7), 255.0, np.float32)}, "not within 0 and 1"),
    "negative": ({"masks": np.full((2, 7, 7), -0.5, np.float32)}, "not within 0 and 1"),
    "logits": ({"masks": good_masks(), "probs": np.arange(K, dtype=np.float32)}, "probs goes from"),
    "probs": ({"masks": good_masks(), "probs": np.zeros(K + 1, np.float32)}, "4 masks but 5"),
    "code": ({"masks": good_masks(), "code": np.zeros((2, 3), np.float32)}, "the code has the shape"),
    "code_nan": ({"masks": good_masks(), "code": np.full(3, np.inf, np.float32)}, "the code holds NaN"),
    "confidence": ({"masks": good_masks(), "confidence": np.float32(3)}, "confidence is 3"),
    "absent": ({"probs": np.zeros(K, np.float32)}, "no masks, only probs"),
    "objects": ({"masks": np.array([[[None]]], object)}, "Object arrays|pickle"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_labels_are_named(tmp_path, name):
    arrays, reason = MALFORMED[name]
    np.savez(tmp_path / f"{name}.npz", **arrays)
    with pytest.raises(UserError, match=rf"{name}.npz is no pseudo-label \(.*({reason})"):
        read_label(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("suffix", [".pt", ".npz", "_masks.npy"])
def test_damaged_labels_are_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    torch.save({"masks": torch.rand(2, 64, 64)}, path) if suffix == ".pt" else None
    np.savez(path, masks=good_masks(size=64)) if suffix == ".npz" else None
    np.save(path, good_masks(size=64)) if suffix == "_masks.npy" else None
    whole = path.read_bytes()
    assert read_label(path).masks.shape[1:] == (64, 64)
    for size in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"a{suffix} is no pseudo-label"):
            read_label(path)


class Hostile:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_label_that_would_execute_code_does_not(tmp_path):
    witness = tmp_path / "executed"
    masks = torch.rand(2, 3, 3)
    torch.save({"masks": masks, "metadata": Hostile(witness)}, tmp_path / "zip.pt")
    torch.save({"masks": masks, "x": Hostile(witness)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(witness)))
    np.save(tmp_path / "a_masks.npy", np.array([[[Hostile(witness)]]], object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", masks=np.array([[[Hostile(witness)]]], object))
    for name in ("zip.pt", "old.pt", "plain.pt", "a_masks.npy", "b.npz"):
        with pytest.raises(UserError, match=f"{name} is no pseudo-label") as caught:
            read_label(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # no advice to execute it anyway
        assert not witness.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert witness.exists()  # it would have


FLAT = np.array([20, 60, 90, 200], np.uint8)[:, None, None]
SIMPLEX = np.stack([good_masks()[0] // 2, 127 - good_masks()[0] // 2, good_masks()[1] // 2, 127 - good_masks()[1] // 2])
PLANTED = {
    "zero": np.zeros((K, 7, 7), np.uint8),
    "constant": FLAT + np.zeros((7, 7), np.uint8),
    "identical": np.repeat(good_masks()[:1], K, 0),
    "twins": good_masks()[[0, 1, 1, 2]],
    "flat_mean": SIMPLEX,
    "odd": good_masks(classes=K + 1),
    "malformed": good_masks()[0],
}


def test_the_audit_finds_nothing_in_good_labels(tmp_path):
    images = named(8)
    sparse = good_masks(7)
    sparse[1:] = 0  # most degradations are absent: empty channels are no twins
    for i, stem in enumerate(images.stems):
        write_label(tmp_path, stem, sparse if i == 7 else good_masks(i))
    audit = audit_labels(find_labels(tmp_path, images), images)
    assert audit.findings == {} and list(audit.usable) == images.stems and (audit.classes, audit.code_size) == (K, D)
    assert audit.lines() == ["Pseudo-labels: 8 of 8 images, 4 classes, a code of 6 numbers"]


def test_the_audit_finds_each_planted_fault_and_no_other(tmp_path):
    images = named(len(PLANTED) + 8)
    faulty = dict(zip(PLANTED, images.stems, strict=False))
    missing, bits, other_code, *good = images.stems[len(PLANTED) :]
    for kind, stem in faulty.items():
        write_label(tmp_path, stem, PLANTED[kind])
    write_label(tmp_path, bits, good_masks() // 128)  # 0 and 1 as whole numbers: at most 1/255
    write_label(tmp_path, other_code, good_masks(), code=None)
    for stem in good:
        write_label(tmp_path, stem, good_masks(hash(stem) % 100))
    audit = audit_labels(find_labels(tmp_path, images), images)
    expected = {kind: [stem] for kind, stem in faulty.items()} | {"missing": [missing]}
    expected["zero"].append(bits)
    expected["odd"].append(other_code)
    assert audit.findings == expected
    assert set(audit.usable) == {*good, faulty["twins"], faulty["flat_mean"]}
    text = "\n".join(audit.lines())
    assert f"2 of {len(images)} images have masks that are zero everywhere" in text and f"{faulty['zero']}, {bits}" in text
    assert f"{faulty['malformed']}.npz is no pseudo-label" in text and len(audit.lines()) == 1 + len(underwater.FINDINGS)


def test_the_audit_sees_faults_through_rounding(tmp_path):
    images = named(3)
    noise = np.random.default_rng(0).random((K, 7, 7), dtype=np.float32) * 1.2e-4
    one = good_masks()[:1] / np.float32(256)
    for stem, masks in zip(
        images.stems, (one + noise, FLAT / np.float32(255) + noise, good_masks() / np.float32(255)), strict=True
    ):
        write_label(tmp_path, stem, masks)
    assert audit_labels(find_labels(tmp_path, images), images).findings == {
        "identical": ["img_000"],
        "constant": ["img_001"],
    }


@pytest.mark.parametrize("kind", ["zero", "constant", "identical", "malformed"])
def test_labels_that_teach_nothing_are_refused(tmp_path, kind):
    images = named(3)
    for stem in images.stems[:2]:
        write_label(tmp_path, stem, PLANTED[kind])
    with pytest.raises(UserError, match="No pseudo-label of set can teach anything. .*2 of 3 images have"):
        audit_labels(find_labels(tmp_path, images), images)


# ---------------------------------------------------------------------------------------------------------------------
# Crops of maps


@pytest.mark.parametrize("shape", [(7, 7), (16, 16), (13, 30), (224, 224), (1, 1)])
@pytest.mark.parametrize("size", [8, 17, 64])
def test_crops_agree_with_pillow(shape, size):
    masks = np.random.default_rng(0).random((3, *shape), dtype=np.float32)
    for box in ((0, 0, 1, 1), (0.1, 0.2, 0.37, 0.9), (0, 0.5, 0.03, 0.53), (0.93, 0.97, 1, 1)):
        pixels = tuple(share * shape[1 - i % 2] for i, share in enumerate(box))
        expected = [
            np.asarray(Image.fromarray(m).resize((size, size), Image.Resampling.BILINEAR, box=pixels)) for m in masks
        ]
        np.testing.assert_allclose(crop_masks(masks, box, size), np.stack(expected), atol=2e-5)


def test_crops_lie_where_the_image_crop_lies():
    """A ramp of positions: each output pixel holds the place of its own centre (a map pixel is 4e-3 wide or more)."""
    for length in (16, 224):
        places = (np.arange(length, dtype=np.float32) + 0.5) / length
        ramp = np.stack([np.tile(places, (length, 1)), np.tile(places[:, None], (1, length))])
        left, top, right, bottom = 0.2, 0.35, 0.7, 0.85
        x, y = crop_masks(ramp, (left, top, right, bottom), 20)
        centers = (np.arange(20) + 0.5) / 20
        np.testing.assert_allclose(x, np.tile(left + (right - left) * centers, (20, 1)), atol=2e-4)
        np.testing.assert_allclose(y, np.tile(top + (bottom - top) * centers, (20, 1)).T, atol=2e-4)
    whole = crop_masks(ramp, (0, 0, 1, 1), 64)
    quarter = crop_masks(ramp, (0.25, 0.5, 0.5, 0.75), 16)
    np.testing.assert_allclose(quarter, whole[:, 32:48, 16:32], atol=1e-5)


def test_crops_keep_constants_and_sums_over_classes():
    masks = np.random.default_rng(0).dirichlet(np.ones(5), (20, 20)).transpose(2, 0, 1).astype(np.float32)
    crop = crop_masks(masks, (0.13, 0.2, 0.8, 0.7), 33)
    assert crop.dtype == np.float32 and crop.shape == (5, 33, 33) and crop.min() >= 0
    np.testing.assert_allclose(crop.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(crop_masks(np.full((2, 9, 9), 0.3, np.float32), (0.4, 0, 1, 0.1), 50), 0.3, atol=1e-6)
    dot = np.zeros((1, 64, 64), np.float32)
    dot[0, 33, 21] = 1  # shrinking must not step over it
    assert crop_masks(dot, (0, 0, 1, 1), 8).sum() * 64 == pytest.approx(1, abs=1e-5)
