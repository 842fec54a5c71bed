"""Prediction with a segmenter: every image becomes a map of its size, in its place, on any number of processes; what is
measured and drawn is what is saved."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, run
from PIL import Image
from safetensors.torch import save_file

from common.camouflage import MaskedImages
from common.cli import UserError
from common.images import read_image, write_image
from common.predict import Task
from common.segmentation_metrics import score
from scripts import predict_ultimate as predict
from scripts import train_ultimate as job

PREDICT = {"script": ROOT / "scripts" / "predict_ultimate.py"}
FLAGS = {"backbone": "test_convnext", "num_experts": 7, "top_k": 2, "width": 16, "deep_supervision": True, "img_size": 64}


def picture(height: int, width: int, seed: int, dtype: type = np.uint8) -> np.ndarray:
    """Smooth in the large, noisy in the small, like a photograph."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.random((max(height // 16, 2), max(width // 16, 2), 3))
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * 0.6 + 0.2
    levels = np.iinfo(dtype).max
    return ((pixels + rng.normal(0, 0.02, pixels.shape)).clip(0, 1) * levels).round().astype(dtype)


def blob(height: int, width: int, seed: int) -> np.ndarray:
    """A mask as it is stored, with an object somewhere."""
    rng = np.random.default_rng([seed, 1])
    mask = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.3, 0.7)), int(height * rng.uniform(0.3, 0.7)))
    return cv2.ellipse(mask, centre, (width // 4, height // 5), 30, 0, 360, 255, -1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """model/ of a tiny segmenter whose maps go from black to white though it has learnt nothing."""
    path = tmp_path_factory.mktemp("ultimate") / "model"
    path.mkdir()
    torch.manual_seed(0)
    model = job.Segmenter(job.Config(**FLAGS), job.make_backbone(FLAGS["backbone"], "none", scratch=True))
    with torch.no_grad():
        model.head.weight *= 5
        model.head.bias -= 1.5
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"config": FLAGS, "scratch": True, "threshold": 0.4, "step": 1}))
    return path


@pytest.fixture(scope="session")
def model(folder) -> job.Segmenter:
    return job.load_model(folder)[0]


def segment_files(folder: Path, out: Path, *inputs: Path, **flags) -> None:
    predict.main(predict.Config(folder, inputs, out, **flags))


def plan(out: Path, *inputs: Path, **flags) -> list[Task]:
    return predict.plan(predict.Config(Path("model"), inputs, out, **flags))


def answer(model: job.Segmenter, pixels: np.ndarray, side: int = 64, *, mirrored: bool = False) -> np.ndarray:
    """The network's probabilities at the image's size, computed with nothing of the script."""
    image = torch.from_numpy(job.resize(pixels, side)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = model(image.flip(3) if mirrored else image)["maps"][0]
        logits = logits.flip(2) if mirrored else logits
        return job.upsample(logits.sigmoid()[:, None], pixels.shape[:2])[0, 0].numpy()


def read_map(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L" and image.format == "PNG"
        return np.array(image).astype(float)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_every_kind_of_file_becomes_a_grey_map_of_its_size_in_its_place(folder, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write_image(source / "odd.png", picture(61, 83, 0))
    write_image(source / "deep" / "er" / "plain.JPG", picture(48, 40, 1))
    write_image(source / "two.dots.bmp", picture(5, 7, 2))
    write_image(source / "one.png", picture(1, 1, 2))
    write_image(source / "large.webp", picture(200, 150, 2))
    write_image(source / "deep" / "sixteen.png", picture(40, 56, 3, np.uint16))
    Image.fromarray(picture(40, 50, 5)[..., 0]).save(source / "grey.png")
    Image.fromarray(np.dstack([picture(40, 50, 6), np.full((40, 50), 9, np.uint8)])).save(source / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(picture(40, 64, 7)).save(source / "turned.jpg", exif=exif, quality=95)
    segment_files(folder, out, source)

    originals = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    written = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert written == sorted(path.with_suffix(".png") for path in originals) and len(written) == 9
    for relative in originals:
        pixels, result = read_image(source / relative), read_map(out / relative.with_suffix(".png"))
        pixels = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
        assert result.shape == pixels.shape[:2], relative
        assert np.abs(answer(model, pixels) * 255 - result).max() < 0.51, relative
        if min(pixels.shape[:2]) > 5:
            assert result.min() < 51 and result.max() > 153, relative  # else it would be equal to many maps
    assert read_map(out / "turned.png").shape == (64, 40)


def test_binary_and_overlay_show_the_object_at_the_threshold(folder, tmp_path):
    """0.4 of config.json, unless --threshold says otherwise, which changes no map."""
    pixels = picture(120, 91, 0)
    write_image(tmp_path / "in" / "sub" / "a.png", pixels)
    for name, flags, threshold in (("one", {}, 0.4), ("two", {"threshold": 0.7}, 0.7)):
        out = tmp_path / name / "sub"
        segment_files(folder, tmp_path / name, tmp_path / "in", overlay=True, binary=True, **flags)
        assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_mask.png", "a_overlay.jpg"]
        mask = read_map(out / "a.png") >= threshold * 255
        assert 0.005 < mask.mean() < 0.98
        assert np.array_equal(read_map(out / "a_mask.png"), mask * 255)
        write_image(tmp_path / "again.jpg", predict.overlay(pixels, mask))
        assert (out / "a_overlay.jpg").read_bytes() == (tmp_path / "again.jpg").read_bytes()
    assert (tmp_path / "one/sub/a.png").read_bytes() == (tmp_path / "two/sub/a.png").read_bytes()
    assert (tmp_path / "one/sub/a_mask.png").read_bytes() != (tmp_path / "two/sub/a_mask.png").read_bytes()


def test_overlay_tints_the_object_outlines_it_and_leaves_the_rest():
    pixels = picture(600, 400, 0)
    mask = blob(600, 400, 0) > 0
    hole = (slice(295, 305), slice(195, 205))
    mask[hole] = False
    drawn = predict.overlay(pixels, mask)
    line = (drawn == predict.RED).all(2)
    near = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((7, 7), np.uint8)) > 0
    border = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    assert not (line & ~near).any() and line[border & mask].all()  # the hole's border, too
    assert np.array_equal(drawn[~mask & ~line], pixels[~mask & ~line])
    tinted = mask & ~line
    assert np.abs(drawn[tinted] - (0.65 * pixels[tinted] + 0.35 * np.array(predict.RED))).max() <= 0.5
    assert np.array_equal(predict.overlay(pixels, np.zeros_like(mask)), pixels)


# ---------------------------------------------------------------------------------------------------------------------
# averages


def test_flip_averages_both_directions(folder, model, tmp_path):
    pixels = picture(75, 101, 0)
    write_image(tmp_path / "a.png", pixels)
    segment_files(folder, tmp_path / "out", tmp_path / "a.png", flip=True)
    both = [answer(model, pixels), answer(model, pixels, mirrored=True)]
    assert np.abs(both[0] - both[1]).max() > 0.1
    assert np.abs(np.mean(both, 0) * 255 - read_map(tmp_path / "out" / "a.png")).max() < 0.51


def test_scales_are_averaged_with_and_without_flip(folder, model, tmp_path):
    pixels = picture(75, 101, 0)
    write_image(tmp_path / "a.png", pixels)
    segment_files(folder, tmp_path / "out", tmp_path / "a.png", scales=(0.5, 1.0, 1.4))
    single = [answer(model, pixels, side) for side in (32, 64, 96)]  # multiples of 32, as in training
    assert min(np.abs(a - b).max() for a, b in zip(single, single[1:], strict=False)) > 0.1
    assert np.abs(np.mean(single, 0) * 255 - read_map(tmp_path / "out" / "a.png")).max() < 0.51
    segment_files(folder, tmp_path / "six", tmp_path / "a.png", scales=(0.5, 1.0, 1.4), flip=True)
    six = single + [answer(model, pixels, side, mirrored=True) for side in (32, 64, 96)]
    assert np.abs(np.mean(six, 0) * 255 - read_map(tmp_path / "six" / "a.png")).max() < 0.51


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_metrics_are_those_of_the_written_maps_and_of_training(folder, model, tmp_path, capfd):
    source, masks, out = (tmp_path / name for name in ("in", "masks", "out"))
    for index, name in enumerate(("a.jpg", "sub/b.png", "sub/alone.png")):
        write_image(source / name, picture(60 + index, 76, index))
    for index, name in enumerate(("a.png", "sub/b.bmp", "unused.png")):
        write_image(masks / name, np.dstack([blob(60 + index, 76, index)] * 3))
    segment_files(folder, out, source, masks=masks)
    lines = {line["image"]: line for line in csv.DictReader((out / "metrics.csv").open())}
    assert sorted(lines) == ["a", "sub/b"]
    files = {"a": ("a.jpg", "a.png"), "sub/b": ("sub/b.png", "sub/b.bmp")}
    images, references = ([root / pair[i] for pair in files.values()] for i, root in enumerate((source, masks)))
    found = MaskedImages("some", "by hand", list(files), images, references, np.ones(2, bool))
    validation = job.Masked(found, job.Config(**FLAGS))
    iou = []
    for index, name in enumerate(files):
        target = torch.from_numpy(read_image(references[index])[None, ..., 0])
        saved = torch.from_numpy(read_map(out / f"{name}.png"))[None].to(torch.uint8)
        sample = validation[index]
        maps, _ = job.predict_maps(model, sample["image"][None], [tuple(sample["mask"].shape)])
        for direct in (score(saved, target), score(maps[0][None], sample["mask"][None])):
            wanted = {key: float(value) for key, value in direct.items() if value.ndim == 1}
            wanted["area"] = float((target > 128).double().mean())
            assert wanted.keys() == lines[name].keys() - {"image"}
            assert {key: float(lines[name][key]) for key in wanted} == pytest.approx(wanted, rel=1e-5), name
        iou.append(float(lines[name]["iou"]))
    assert min(iou) > 0.02 and iou[0] != iou[1]
    said = capfd.readouterr().err
    assert "1 inputs have no reference and are not measured: sub/alone" in said
    assert f"2 masks: sm {np.mean([float(line['sm']) for line in lines.values()]):.4f}, wfm" in said
    assert f"iou {np.mean(iou):.4f}" in said


def test_masks_of_another_size_are_measured_at_theirs(folder, model, tmp_path):
    write_image(tmp_path / "in" / "a.png", picture(60, 90, 0))
    write_image(tmp_path / "masks" / "a.png", blob(120, 150, 0))
    segment_files(folder, tmp_path / "out", tmp_path / "in", masks=tmp_path / "masks")
    (line,) = csv.DictReader((tmp_path / "out" / "metrics.csv").open())
    large = cv2.resize(read_map(tmp_path / "out" / "a.png"), (150, 120), interpolation=cv2.INTER_LINEAR)
    wanted = score(torch.from_numpy(large / 255)[None], torch.from_numpy(blob(120, 150, 0))[None])
    for key in ("mae", "iou", "wfm", "sm"):
        assert float(line[key]) == pytest.approx(float(wanted[key]), rel=0.02), key
    assert read_map(tmp_path / "out" / "a.png").shape == (60, 90)


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_collisions_and_overwriting_are_refused(tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    for path in (one / "a.png", one / "a_mask.png", two / "b.png", two / "b.jpg", two / "sub" / "a.png"):
        write_image(path, picture(16, 16, 0))
    with pytest.raises(UserError, match=r"two/b.jpg and .*two/b.png would both be written to .*out/b.png"):
        plan(out, two)
    with pytest.raises(UserError, match=r"would both be written to .*out/a_mask.png"):
        plan(out, one, binary=True)
    assert len(plan(out, one, one / "a.png", overlay=True)) == 2
    for inputs, where in (((one,), one), ((one / "a.png",), one), ((two,), two / "sub"), ((two,), two / "new")):
        with pytest.raises(UserError, match="--output-dir"):
            plan(where, *inputs)
    with pytest.raises(UserError, match="--inputs or --masks and would be overwritten"):
        plan(two / "sub", one / "a.png", masks=two / "sub")
    with pytest.raises(UserError, match="--masks .*sub: no reference has the name of an input"):
        plan(out, two / "b.png", masks=two / "sub")
    with pytest.raises(UserError, match="--masks: .*b.jpg and .*b.png have one name"):
        plan(out, one, masks=two)
    assert not out.exists()


def test_wrong_flags_are_sentences(folder, tmp_path):
    for flags, said in (
        ({}, "--inputs is missing"),
        ({"inputs": (tmp_path,), "threshold": 0.5}, "--threshold changes no map"),
        ({"inputs": (tmp_path,), "threshold": 40.0, "binary": True}, "--threshold 40.0"),
        ({"inputs": (tmp_path,), "scales": (1.0, 0.0)}, "--scales 1.0 0.0"),
        ({"inputs": (tmp_path,), "scales": ()}, "--scales"),
    ):
        with pytest.raises(ValueError, match=said):
            predict.Config(folder, **flags)
    with pytest.raises(UserError, match="holds no config.json"):
        predict.main(predict.Config(tmp_path, (tmp_path,)))


# ---------------------------------------------------------------------------------------------------------------------
# processes


def test_damaged_files_are_named_and_any_number_of_processes_writes_the_same(folder, tmp_path):
    source, masks = tmp_path / "in", tmp_path / "masks"
    for index in range(5):
        name = f"sub{index % 2}/{index}.png"
        write_image(source / name, picture(40 + index, 56 - index, index))
        write_image(masks / name, blob(40 + index, 56 - index, index))
    whole = (source / "sub1" / "3.png").read_bytes()
    (source / "sub1" / "3.png").write_bytes(whole[: len(whole) // 2])
    (source / "note.png").write_text("not an image")
    write_image(masks / "sub0" / "4.png", blob(52, 44, 0))  # the image is 44 high and 52 wide
    write_image(masks / "sub0" / "2.png", picture(42, 54, 0) // 4)  # too dark for an object, too many values for 0 and 1
    write_image(source / "sub0" / "alone.jpg", picture(9, 30, 0))
    common = ["--model", folder, "--inputs", source, "--masks", masks, "--overlay", "--binary", "--flip", "--output-dir"]
    texts = [run([*common, tmp_path / f"out{n}"], ok=False, processes=n, **PREDICT) for n in (1, 2)]
    for text in texts:
        assert "sub1/3.png cannot be read" in text and "note.png cannot be read" in text
        assert "masks/sub0/4.png lies on its side" in text and "masks/sub0/2.png is no mask of an object" in text
        assert "ERROR: 4 of 7 images could not be segmented or measured" in text and "Traceback" not in text
        assert "2 masks: sm 0." in text
    written = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")} for out in (tmp_path / "out1", tmp_path / "out2")
    ]
    assert written[0] == written[1]
    images = ["sub0/0", "sub0/2", "sub0/4", "sub0/alone", "sub1/1"]
    kinds = (".png", "_mask.png", "_overlay.jpg")
    assert {str(path) for path in written[0]} == {"metrics.csv", *(name + kind for name in images for kind in kinds)}


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.mark.slow
def test_onnx_gives_the_same_map(folder, model, tmp_path):
    """The export compares itself; this looks at pictures, which the routers send to different experts."""
    onnxruntime = pytest.importorskip("onnxruntime")
    predict.main(predict.Config(folder, onnx=tmp_path / "new" / "ultimate.onnx"))
    assert [path.name for path in tmp_path.rglob("*.onnx")] == ["ultimate.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "ultimate.onnx", providers=["CPUExecutionProvider"])
    routes = set()
    for seed in range(6):
        image = job.to_tensor(picture(64, 64, seed))[None]
        with torch.no_grad():
            wanted = model(image)
        routes.add(str(wanted["chosen"]))
        (result,) = session.run(None, {"image": image.numpy()})
        assert np.abs(result - wanted["maps"][0].sigmoid().numpy()).max() < 1e-5
        assert result.min() < 0.2 and result.max() > 0.6
    assert len(routes) > 1
