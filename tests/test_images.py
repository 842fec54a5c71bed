"""Image files: what is read is what is in the file, upright; what is broken is named; metadata survive."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers import ROOT, free_port
from PIL import Image, ImageCms

from common import images
from common.cli import UserError
from common.images import as_float, find_images, inspect, read_image, write_image

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 9, 3), dtype=np.uint16)
MAKE, DESCRIPTION, EXPOSURE, WIDTH_IN_EXIF, GPS_LATITUDE = 0x010F, 0x010E, 0x829A, 0xA002, 2


def smooth(height: int, width: int) -> np.ndarray:
    """Survives JPEG within a few grey levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], -1).astype(np.uint8)


def camera_file(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112], exif[MAKE], exif[DESCRIPTION] = orientation, "Diver", "reef"
    exif.get_ifd(0x8769).update({EXPOSURE: 0.25, WIDTH_IN_EXIF: 9})
    exif.get_ifd(0x8825)[GPS_LATITUDE] = (10.0, 20.0, 30.0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), icc_profile=profile)
    return path


def test_only_visible_images_are_found_in_a_fixed_order(tmp_path):
    for name in ("b/2.PNG", "b/1.jpeg", "a.tif", "._a.tif", ".ipynb_checkpoints/a.png", "notes.txt", "b/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == ["a.tif", "b/1.jpeg", "b/2.PNG"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    stored = {
        1: PHOTO, 2: PHOTO[:, ::-1], 3: PHOTO[::-1, ::-1], 4: PHOTO[::-1], 5: PHOTO.transpose(1, 0, 2),
        6: np.rot90(PHOTO), 7: PHOTO[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PHOTO, -1),
    }[orientation]  # fmt: skip
    for suffix in (".png", ".tif"):
        path = camera_file(tmp_path / f"turned{suffix}", np.ascontiguousarray(stored), orientation)
        assert np.array_equal(read_image(path), PHOTO), suffix


def test_every_kind_of_file_becomes_three_channels(tmp_path):
    grey, alpha = PHOTO[..., 0], PHOTO[..., :1]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([PHOTO, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([grey, alpha[..., 0]]), "LA").save(tmp_path / "la.png")
    few = PHOTO // 128 * 255
    Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(tmp_path / "palette.png")
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    repeated = np.repeat(grey[..., None], 3, 2)
    expected = {"grey": repeated, "la": repeated, "rgba": PHOTO, "palette": few, "bits": (repeated > 127) * np.uint8(255)}
    for name, pixels in expected.items():
        found = read_image(tmp_path / f"{name}.png")
        assert found.dtype == np.uint8 and np.array_equal(found, pixels), name
        found += 1  # a caller may write into it


def test_16_bit_values_are_exact(tmp_path):
    for name in ("a.png", "a.tif"):
        cv2.imwrite(str(tmp_path / name), DEEP[..., ::-1])
        cv2.imwrite(str(tmp_path / f"grey_{name}"), DEEP[..., 0])
        assert np.array_equal(read_image(tmp_path / name), DEEP), name
        assert np.array_equal(read_image(tmp_path / f"grey_{name}"), np.repeat(DEEP[..., :1], 3, 2)), name
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([DEEP[..., ::-1], DEEP[..., 1]]))
    assert np.array_equal(read_image(tmp_path / "alpha.png"), DEEP)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = cv2.imencode(".png", np.ascontiguousarray(np.rot90(DEEP)[..., ::-1]))[1].tobytes()
    (tmp_path / "turned.png").write_bytes(images._png_chunks(turned, {"exif": exif.tobytes()}))
    assert np.array_equal(read_image(tmp_path / "turned.png"), DEEP)


def test_a_16_bit_file_that_the_decoders_read_differently_is_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", DEEP)
    monkeypatch.setattr(images.cv2, "imread", lambda *_: np.ascontiguousarray(DEEP))  # red and blue exchanged
    with pytest.raises(UserError, match="a.png .*16-bit PNG"):
        read_image(tmp_path / "a.png")


def test_32_bit_pixels_are_refused(tmp_path):
    Image.fromarray(DEEP[..., 0].astype(np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif .*8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "deep.png", "deep.tif"])
def test_truncated_files_are_named(tmp_path, name):
    noise = np.random.default_rng(2).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
    write_image(tmp_path / name, noise if name.startswith("deep") else (noise >> 8).astype(np.uint8))
    whole = (tmp_path / name).read_bytes()
    assert read_image(tmp_path / name).shape == (64, 64, 3)
    for share in (0, 0.02, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
        assert inspect([tmp_path / name])[tmp_path / name].problem
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "nowhere.png")


def test_what_is_written_is_read_back(tmp_path):
    for suffix in (".png", ".bmp", ".tif", ".tiff"):
        write_image(tmp_path / "new" / f"a{suffix}", PHOTO)
        assert np.array_equal(read_image(tmp_path / "new" / f"a{suffix}"), PHOTO), suffix
    for suffix in (".png", ".tif"):
        write_image(tmp_path / f"deep{suffix}", DEEP)
        assert np.array_equal(read_image(tmp_path / f"deep{suffix}"), DEEP), suffix
    for suffix in (".jpg", ".webp"):
        write_image(tmp_path / f"a{suffix}", smooth(64, 64))
        assert np.abs(read_image(tmp_path / f"a{suffix}").astype(int) - smooth(64, 64)).max() <= 12, suffix
    red_and_blue = np.zeros((16, 16, 3), np.uint8)
    red_and_blue[:, ::2, 0], red_and_blue[:, 1::2, 2] = 255, 255
    write_image(tmp_path / "sharp.jpg", red_and_blue)  # colours of half resolution would turn it purple
    assert np.abs(read_image(tmp_path / "sharp.jpg").astype(int) - red_and_blue).mean() < 8
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    with pytest.raises(UserError, match="16-bit images as .png"):
        write_image(tmp_path / "deep.jpg", DEEP)
    with pytest.raises(UserError, match="a.gif"):
        write_image(tmp_path / "a.gif", PHOTO)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", PHOTO)
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_image(tmp_path / "a.png", 255 - PHOTO)
    assert np.array_equal(read_image(tmp_path / "a.png"), PHOTO)
    assert find_images(tmp_path) == [tmp_path / "a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "deep.png"])
@pytest.mark.parametrize("source", ["camera.jpg", "camera.tif"])
def test_metadata_survive_and_say_upright(tmp_path, name, source):
    like = camera_file(tmp_path / source, np.ascontiguousarray(np.rot90(smooth(32, 48))), 6)
    upright = read_image(like)
    assert upright.shape == (32, 48, 3)
    pixels = upright.astype(np.uint16) * 257 if name.startswith("deep") else upright
    write_image(tmp_path / name, pixels, like)
    assert np.abs(read_image(tmp_path / name).astype(int) - pixels).max() <= (12 if name in ("a.jpg", "a.webp") else 0)
    with Image.open(like) as old, Image.open(tmp_path / name) as new:
        exif = new.getexif()
        assert (exif[0x0112], exif[MAKE], exif[DESCRIPTION]) == (1, "Diver", "reef")
        assert exif.get_ifd(0x8769)[EXPOSURE] == 0.25 and WIDTH_IN_EXIF not in exif.get_ifd(0x8769)
        assert exif.get_ifd(0x8825)[GPS_LATITUDE] == (10.0, 20.0, 30.0)
        assert new.info["icc_profile"] == old.info["icc_profile"]


def test_a_grey_profile_and_absent_metadata_are_not_written(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = profile[:16] + b"GRAY" + profile[20:]
    Image.fromarray(PHOTO[..., 0]).save(tmp_path / "grey.png", icc_profile=grey)
    write_image(tmp_path / "a.png", PHOTO, tmp_path / "grey.png")
    with Image.open(tmp_path / "a.png") as image:
        assert "icc_profile" not in image.info and "exif" not in image.info


def test_as_float():
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max
        values = as_float(np.array([0, top // 5, top], dtype))
        assert values.dtype == np.float32 and values.tolist() == [0.0, np.float32(0.2), 1.0]


def test_inspection_knows_a_copy_by_its_pixels(tmp_path):
    write_image(tmp_path / "a.png", PHOTO)
    write_image(tmp_path / "copy.tif", PHOTO)
    camera_file(tmp_path / "turned.png", np.ascontiguousarray(np.rot90(PHOTO)), 6)
    other = PHOTO.copy()
    other[0, 0, 0] ^= 1
    write_image(tmp_path / "other.png", other)
    write_image(tmp_path / "long.png", PHOTO.reshape(9, 6, 3))  # the same bytes, another shape
    (tmp_path / "broken.png").write_bytes(b"none")
    found = inspect(find_images(tmp_path) * 2)
    digest = {path.name: result.digest for path, result in found.items()}
    assert digest["a.png"] == digest["copy.tif"] == digest["turned.png"]
    assert len({digest[name] for name in ("a.png", "other.png", "long.png", "broken.png")}) == 4
    assert found[tmp_path / "long.png"].size == (9, 6) and found[tmp_path / "a.png"].problem is None
    assert "not an image" in found[tmp_path / "broken.png"].problem


def test_a_long_inspection_says_so(tmp_path, monkeypatch, caplog):
    write_image(tmp_path / "a.png", PHOTO)
    caplog.set_level(logging.INFO, "run")
    inspect([tmp_path / "a.png"])
    assert not caplog.records
    ticks = iter((0.0, 7.0))
    monkeypatch.setattr(images, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    inspect([tmp_path / "a.png"])
    assert "Decoded 1 images to check them in 7 s" in caplog.text


SHARED = """
import sys
from pathlib import Path
from accelerate import Accelerator
from common import images
accelerator, opened = Accelerator(cpu=True), []
decode = images._decode
images._decode = lambda path: opened.append(path) or decode(path)
found = images.inspect(images.find_images(Path(sys.argv[1])), accelerator)
print("opened", len(opened), "found", {path.name: (r.digest, r.size, r.problem) for path, r in found.items()})
accelerator.end_training()
"""


def test_processes_share_the_inspection(tmp_path):
    for i in range(5):
        write_image(tmp_path / f"{i}.png", PHOTO + np.uint8(i))
    (tmp_path / "5.png").write_bytes(b"none")
    env = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(tmp_path)], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    answers = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    alone = {path.name: (r.digest, r.size, r.problem) for path, r in inspect(find_images(tmp_path)).items()}
    for answer in answers:
        assert answer[:3] == ["opened", "3", "found"] and " ".join(answer[3:]) == str(alone)
    assert len(alone) == 6


def test_threads_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(images.os, "cpu_count", lambda: 4)
    began = time.perf_counter()
    assert images.share_work(range(8), lambda i: time.sleep(0.1) or i * i, None, "%d") == {i: i * i for i in range(8)}
    assert time.perf_counter() - began < 0.6  # 0.8 s one after the other
