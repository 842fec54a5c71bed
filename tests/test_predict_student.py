"""Prediction with a student: what goes in comes out in the same size, place and format, without seams, on any number of
processes."""

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

from common import metrics
from common.cli import UserError
from common.images import read_image, write_image
from scripts import predict_student as predict
from scripts import train_student as job

PREDICT = {"script": ROOT / "scripts" / "predict_student.py"}


def picture(height: int, width: int, seed: int, dtype: type = np.uint8) -> np.ndarray:
    """Smooth in the large, noisy in the small, like a photograph."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.random((max(height // 16, 2), max(width // 16, 2), 3))
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * 0.6 + 0.2
    levels = np.iinfo(dtype).max
    return ((pixels + rng.normal(0, 0.02, pixels.shape)).clip(0, 1) * levels).round().astype(dtype)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """model/ of a tiny student that is not the identity: its layers that start at zero are drawn instead, and its condition
    matters as much as a trained one's."""
    path = tmp_path_factory.mktemp("student") / "model"
    path.mkdir()
    flags = {"width": 8, "blocks": (1, 1, 2), "heads": 4}
    torch.manual_seed(0)
    model = job.Student(job.Config(**flags), 5, 6)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.03)
        model.condition.summarize[-1].weight *= 30
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"config": flags, "classes": 5, "teacher": 6, "step": 1}))
    return path


@pytest.fixture(scope="session")
def model(folder) -> job.Student:
    return job.load_model(folder)[0]


def restore_files(folder: Path, out: Path, *inputs: Path, **flags) -> None:
    predict.main(predict.Config(folder, inputs, out, **flags))


def plan(out: Path, *inputs: Path, **flags) -> list[predict.Task]:
    return predict.plan(predict.Config(Path("model"), inputs, out, **flags))


def expected(model: job.Student, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result = model(job.to_tensor(pixels)[None])[0][0].clamp(0, 1)
    return (result * np.iinfo(pixels.dtype).max).round().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_every_kind_of_file_keeps_its_size_place_and_format(folder, model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write_image(source / "odd.png", picture(61, 83, 0))
    write_image(source / "deep" / "er" / "plain.JPG", picture(48, 40, 1))
    write_image(source / "tiny.bmp", picture(5, 7, 2))
    write_image(source / "one.png", picture(1, 1, 2))
    write_image(source / "deep" / "sixteen.png", picture(40, 56, 3, np.uint16))
    write_image(source / "sixteen.tif", picture(33, 47, 4, np.uint16))
    Image.fromarray(picture(40, 50, 5)[..., 0]).save(source / "grey.png")
    Image.fromarray(np.dstack([picture(40, 50, 6), np.full((40, 50), 9, np.uint8)])).save(source / "alpha.png")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"  # turned by 90 degrees
    Image.fromarray(picture(40, 64, 7)).save(source / "turned.jpg", exif=exif, quality=95)
    restore_files(folder, out, source)

    originals = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file()) == originals and len(originals) == 9
    for relative in originals:
        pixels, result = read_image(source / relative), read_image(out / relative)
        assert result.shape == pixels.shape and result.dtype == pixels.dtype, relative
        error = np.abs(expected(model, pixels) - result)
        assert error.mean() < 3 if relative.suffix.lower() == ".jpg" else error.max() <= 1, relative
        if pixels.shape[0] > 1:
            assert np.abs(result.astype(float) - pixels).mean() > 0.02 * np.iinfo(pixels.dtype).max, relative
    with Image.open(out / "turned.jpg") as image:
        assert image.size == (40, 64) and image.getexif()[0x0112] == 1 and image.getexif()[0x010F] == "camera"


def test_sixteen_bits_are_more_than_eight(folder, tmp_path):
    """A result that went through 8 bits would have at most 256 levels."""
    write_image(tmp_path / "a.png", picture(64, 64, 0, np.uint16))
    restore_files(folder, tmp_path / "out", tmp_path / "a.png")
    assert len(np.unique(read_image(tmp_path / "out" / "a.png"))) > 5000
    restore_files(folder, tmp_path / "out", tmp_path / "a.png", suffix="jpg")
    assert read_image(tmp_path / "out" / "a.jpg").dtype == np.uint8


def test_side_by_side(folder, tmp_path):
    write_image(tmp_path / "in" / "sub" / "a.png", picture(40, 56, 0))
    restore_files(folder, tmp_path / "out", tmp_path / "in", side_by_side=True)
    both = read_image(tmp_path / "out" / "sub" / "a_side.png")
    halves = [read_image(tmp_path / name / "sub" / "a.png") for name in ("in", "out")]
    assert np.array_equal(both, np.hstack(halves))


# ---------------------------------------------------------------------------------------------------------------------
# tiles


@pytest.mark.parametrize("tile, overlap", [(128, 64), (128, 32), (256, 20), (1536, 64)])
def test_tiles_cover_every_length_with_at_least_the_overlap(tile, overlap):
    for length in [*range(1, 5 * tile, 7), tile, tile + 1, 2 * tile - overlap, 2 * tile - overlap + 1]:
        places = job.tiles(length, tile, overlap)
        assert places[0][0] == 0 and sum(places[-1]) == length
        assert all(size <= tile for _, size in places)
        for (start, size), (following, _) in zip(places, places[1:], strict=False):
            assert start < following and start + size - following >= overlap, length
        assert len(places) <= max(1, -(-length // (tile - overlap - 8)))  # none is wasted


def test_blended_tiles_of_the_identity_are_the_image():
    """Weights sum to one everywhere, whatever the tiles."""
    image = torch.rand(1, 3, 301, 470, generator=torch.Generator().manual_seed(0))
    result = job.restore(lambda window, small: (window,), image, 128, 48)
    assert (result - image).abs().max() < 1e-6


class Forgetful(torch.nn.Module):
    """Sees each tile as an image of its own."""

    def __init__(self, model: job.Student):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, small: torch.Tensor | None = None) -> tuple:
        return self.model(images)


@pytest.mark.parametrize("height, width", [(300, 420), (301, 423)])
def test_tiles_agree_with_the_whole_image_and_show_no_seam(model, height, width):
    """Measured: on average 0.07 levels of 255 from the whole image, which the network changes by 54. With a condition of
    its own for each tile 0.5; with last tiles that start off the grid of 8, where Haar bands are others, 0.9 and 8."""
    image = job.to_tensor(picture(height, width, 0))[None]
    water = torch.linspace(0.1, 1, width)  # dark and green on the left, bright and red on the right: tiles differ
    image = image * torch.stack([water, water.flip(0), water.sqrt()])[:, None]
    with torch.no_grad():
        whole = model(image)[0]
    tiled, alone = (job.restore(network, image, 160, 32) - whole for network in (model, Forgetful(model)))
    change, texture = (whole - image).abs().mean(), (whole[..., 1:] - whole[..., :-1]).abs().mean()
    assert tiled.abs().mean() < 0.005 * change
    assert tiled.abs().mean() < 0.25 * alone.abs().mean()
    for error, axis in ((tiled.diff(dim=3), (0, 1, 2)), (tiled.diff(dim=2), (0, 1, 3))):
        assert error.abs().mean(axis).max() < 0.05 * texture  # what tiling adds to the gradients of any row or column


def test_large_images_are_tiled(folder, model, tmp_path):
    pixels = picture(200, 330, 0)
    write_image(tmp_path / "a.png", pixels)
    restore_files(folder, tmp_path / "out", tmp_path / "a.png", tile_size=128, tile_overlap=32)
    tiled = job.restore(model, job.to_tensor(pixels)[None], 128, 32)
    result = read_image(tmp_path / "out" / "a.png")
    assert np.abs(result - (tiled[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()).max() <= 1
    assert np.abs(result - expected(model, pixels)).max() > 1  # else this would not tell tiles from the whole


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_metrics_are_those_of_the_written_files(folder, tmp_path):
    source, targets, out = (tmp_path / name for name in ("in", "refs", "out"))
    for index, name in enumerate(("a.png", "sub/b.png", "sub/alone.png")):
        write_image(source / name, picture(40 + index, 56, index))
    for index, name in enumerate(("a.bmp", "sub/b.png", "unused.png")):
        write_image(targets / name, picture(40 + index, 56, index + 10))
    restore_files(folder, out, source, targets=targets)
    lines = {line["image"]: line for line in csv.DictReader((out / "metrics.csv").open())}
    assert sorted(lines) == ["a", "sub/b"]
    for name, file in (("a", "a.bmp"), ("sub/b", "sub/b.png")):
        image, result, target = (
            torch.from_numpy(read_image(path)).permute(2, 0, 1)[None]
            for path in (source / f"{name}.png", out / f"{name}.png", targets / file)
        )
        for prefix, x in (("", result), ("input_", image)):
            for key, value in metrics.fidelity(x, target).items():
                assert float(lines[name][prefix + key]) == pytest.approx(float(value), rel=1e-4), (name, prefix + key)


def test_partners_are_listed(tmp_path, capfd):
    for name in ("in/a.png", "in/b.png", "refs/a.jpg", "refs/c.png"):
        write_image(tmp_path / name, picture(16, 16, 0))
    predict.setup_logging()
    tasks = plan(tmp_path / "out", tmp_path / "in", targets=tmp_path / "refs")
    said = capfd.readouterr().err
    assert "1 inputs have no reference and are not measured: b" in said and "1 references belong to no input: c" in said
    assert [task.reference and task.reference.name for task in tasks] == ["a.jpg", None]
    (tmp_path / "in" / "a.png").unlink()
    with pytest.raises(UserError, match="no reference has the name of an input"):
        plan(tmp_path / "out", tmp_path / "in", targets=tmp_path / "refs")
    write_image(tmp_path / "refs" / "c.jpg", picture(16, 16, 0))
    with pytest.raises(UserError, match="have one name"):
        plan(tmp_path / "out", tmp_path / "in", targets=tmp_path / "refs")


# ---------------------------------------------------------------------------------------------------------------------
# refusals


def test_collisions_and_overwriting_are_refused(tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    for path in (one / "a.png", one / "a.jpg", two / "a.png", two / "sub" / "b.png"):
        write_image(path, picture(16, 16, 0))
    with pytest.raises(UserError, match=r"one/a.png and .*two/a.png would both be written to .*out/a.png"):
        plan(out, one, two)
    with pytest.raises(UserError, match=r"would both be written to .*out/a.webp"):
        plan(out, one, suffix="webp")
    with pytest.raises(UserError, match=r"would both be written to .*out/a_side.png"):
        plan(out, one, side_by_side=True)
    assert len(plan(out, one, one / "a.png")) == 2  # one file named twice is one file
    for inputs, where in (((one,), one), ((one / "a.png",), one), ((two,), two / "sub"), ((two,), two / "new")):
        with pytest.raises(UserError, match="--output-dir"):
            plan(where, *inputs)
    with pytest.raises(UserError, match="would be overwritten"):
        plan(two, one / "a.png", targets=two)
    with pytest.raises(UserError, match="does not exist"):
        plan(out, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        plan(out, tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="none of .png"):
        plan(out, tmp_path / "notes.txt")
    assert not out.exists()


def test_wrong_flags_are_sentences(folder, tmp_path):
    with pytest.raises(ValueError, match="--inputs is missing"):
        predict.Config(folder)
    with pytest.raises(ValueError, match="--tile-size 100"):
        predict.Config(folder, (tmp_path,), tile_size=100)
    with pytest.raises(ValueError, match="--tile-overlap 0"):
        predict.Config(folder, (tmp_path,), tile_overlap=0)
    with pytest.raises(UserError, match="holds no config.json"):
        predict.main(predict.Config(tmp_path, (tmp_path,)))


# ---------------------------------------------------------------------------------------------------------------------
# processes


def test_damaged_files_are_named_and_any_number_of_processes_writes_the_same(folder, tmp_path):
    source, targets = tmp_path / "in", tmp_path / "refs"
    for index in range(5):
        for root in (source, targets):
            write_image(
                root / f"sub{index % 2}" / f"{index}.png", picture(40 + index, 56 - index, index + 10 * (root == source))
            )
    whole = (source / "sub1" / "3.png").read_bytes()
    (source / "sub1" / "3.png").write_bytes(whole[: len(whole) // 2])
    (source / "note.png").write_text("not an image")
    write_image(targets / "sub0" / "4.png", picture(20, 20, 0))
    write_image(source / "sub0" / "small.jpg", picture(9, 30, 0))
    common = ["--model", folder, "--inputs", source, "--targets", targets, "--side-by-side", "--output-dir"]
    texts = [run([*common, tmp_path / f"out{n}"], ok=False, processes=n, **PREDICT) for n in (1, 2)]
    for text in texts:
        assert "sub1/3.png cannot be read" in text and "note.png cannot be read" in text
        assert "refs/sub0/4.png is 20 x 20, not 52 x 44" in text
        assert "ERROR: 3 of 7 images could not be restored or measured" in text and "Traceback" not in text
        assert "[Ref] inputs: PSNR=" in text
    written = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")} for out in (tmp_path / "out1", tmp_path / "out2")
    ]
    assert written[0] == written[1]
    names = [str(path.with_suffix("")) for path in written[0]]
    images = ["sub0/0", "sub0/2", "sub0/4", "sub0/small", "sub1/1"]
    assert sorted(names) == sorted(["metrics", *images, *(f"{name}_side" for name in images)])


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.mark.slow
def test_onnx_gives_the_same_image_at_any_size(folder, model, tmp_path):
    """The export compares itself; this looks at further sizes, and at the values that a file may hold."""
    onnxruntime = pytest.importorskip("onnxruntime")
    predict.main(predict.Config(folder, onnx=tmp_path / "new" / "student.onnx"))
    assert [path.name for path in tmp_path.rglob("*.onnx")] == ["student.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "new" / "student.onnx", providers=["CPUExecutionProvider"])
    for height, width in ((16, 16), (33, 130), (300, 217)):
        image = job.to_tensor(picture(height, width, 0))[None]
        with torch.no_grad():
            wanted = model(image)[0].clamp(0, 1)
        (result,) = session.run(None, {"image": image.numpy()})
        assert result.shape == image.shape and np.abs(result - wanted.numpy()).max() < 1e-5
        assert np.abs(result - image.numpy()).mean() > 0.02


def test_onnx_says_which_packages_are_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("common.predict.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match="--onnx needs `pip install onnxscript`"):
        predict.main(predict.Config(folder, onnx=tmp_path / "student.onnx"))


@pytest.mark.slow
def test_onnx_that_differs_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("common.predict.PARITY", 0.0)
    with pytest.raises(UserError, match="differs from PyTorch by"):
        predict.main(predict.Config(folder, onnx=tmp_path / "student.onnx"))
    assert not list(tmp_path.iterdir())
