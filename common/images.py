"""Image files: read upright and whole, written with their metadata, and every file decoded once before training starts."""

import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.cli import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("run")

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SIXTEEN_BIT = (".png", ".tif", ".tiff")
ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
# What a copy may say of the original: its words, camera, time and resolution. Tags that describe how a file stores its
# pixels would be wrong in another file, and the thumbnail would show another picture.
KEPT_TAGS = (0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0131, 0x0132, 0x013B, 0x8298)
STORED_SIZE = (0xA002, 0xA003)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted. Hidden files and folders (.ipynb_checkpoints, ._a.jpg) are not data."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, n) for n in files if not n.startswith(".") and n.lower().endswith(SUFFIXES)]
    return sorted(found)


def _decode(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.format == "PNG":
            deep = str(image.tile[0][3]).endswith(";16B")
        else:
            deep = image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) == 16
        image.load()  # Pillow notices a truncated file, OpenCV fills the missing part with grey
        ImageOps.exif_transpose(image, in_place=True)
        if not deep:
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of the kind {image.mode}; store 8 or 16 bits per channel")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        # Pillow has only the high bytes of 16-bit colours. OpenCV has all, but misreads planar TIFF (measured, 5.0) and
        # its older versions ignore the orientation in PNG, so it must agree with Pillow.
        high = np.asarray(image) >> 8 if image.mode[0] == "I" else np.asarray(image.convert("RGB"))
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is not None and pixels.dtype == np.uint16:
        pixels = np.ascontiguousarray(pixels[..., ::-1])
        high = np.broadcast_to(high.reshape(*high.shape[:2], -1), (*high.shape[:2], 3))
        if np.array_equal(pixels >> 8, high):
            return pixels
    raise ValueError("a 16-bit kind that OpenCV cannot read; store it as a 16-bit PNG")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "empty, not an image, or of a kind that Pillow does not know"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) RGB, upright: uint16 for 16-bit PNG and TIFF, else uint8. Grey is repeated, transparency is dropped."""
    try:
        return _decode(path)
    except Exception as error:  # decoders raise anything on damaged files: SyntaxError, struct.error, IndexError, ...
        raise UserError(f"{path} cannot be read as an image ({_reason(error)}): repair or remove it.") from None


def as_float(pixels: np.ndarray) -> np.ndarray:
    """float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def _metadata(like: Path | None) -> dict[str, bytes]:
    """The EXIF of an image, said of upright pixels, and its colour profile, unless that is one of grey or CMYK."""
    if like is None:
        return {}
    with Image.open(like) as image:
        old, profile = image.getexif(), image.info.get("icc_profile")
        exif = Image.Exif()
        for tag in KEPT_TAGS:
            if tag in old:
                exif[tag] = old[tag]
        for ifd in (EXIF_IFD, GPS_IFD):
            kept = {tag: value for tag, value in old.get_ifd(ifd).items() if tag not in STORED_SIZE}
            if kept:
                exif.get_ifd(ifd).update(kept)
    found = {}
    if len(exif) or exif.get_ifd(EXIF_IFD) or exif.get_ifd(GPS_IFD):
        exif[ORIENTATION] = 1
        found["exif"] = exif.tobytes()
    if profile and profile[16:20] == b"RGB ":
        found["icc_profile"] = profile
    return found


def _png_chunks(png: bytes, metadata: dict[str, bytes]) -> bytes:
    """OpenCV's PNG with metadata, which belongs behind the header's 33 bytes."""
    bodies = {b"iCCP": b"ICC\0\0" + zlib.compress(metadata["icc_profile"])} if "icc_profile" in metadata else {}
    if "exif" in metadata:
        bodies[b"eXIf"] = metadata["exif"].removeprefix(b"Exif\0\0")
    chunks = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in bodies.items()]
    return png[:33] + b"".join(chunks) + png[33:]


def write_image(path: Path, pixels: np.ndarray, like: Path | None = None) -> None:
    """uint8 or uint16 RGB in the format of the suffix, with the EXIF and colour profile of `like` (a 16-bit TIFF has none:
    neither Pillow nor OpenCV can write them together). Whole or absent."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: images are written as {' '.join(SUFFIXES)}; give it one of these endings.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    if pixels.dtype == np.uint16:
        if suffix not in SIXTEEN_BIT:
            raise UserError(f"{path}: {suffix} holds 8 bits per channel; write 16-bit images as {' '.join(SIXTEEN_BIT)}.")
        encoded = cv2.imencode(suffix, np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()
        partial.write_bytes(_png_chunks(encoded, _metadata(like)) if suffix == ".png" else encoded)
    else:
        quality = {"quality": 95, "subsampling": 0} if suffix in (".jpg", ".jpeg", ".webp") else {}
        Image.fromarray(pixels).save(partial, **quality, **_metadata(like))
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# every file once, before training


def share_work(
    items: Sequence[ItemT], work: Callable[[ItemT], ResultT], accelerator: "Accelerator | None", done: str
) -> dict[ItemT, ResultT]:
    """`work` of every item, known to all processes: items are dealt to the processes, then to threads, which helps where the
    work leaves Python's lock alone, as decoding and reading do. `done` is the log line for what takes long, with %d."""
    began = time.perf_counter()
    items = list(dict.fromkeys(items))
    several = accelerator is not None and accelerator.num_processes > 1
    mine = items[accelerator.process_index :: accelerator.num_processes] if several else items
    threads = min(16, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    with ThreadPoolExecutor(threads) as pool:
        pairs = list(zip(mine, pool.map(work, mine), strict=True))
    if several:
        from accelerate.utils import gather_object

        pairs = gather_object(pairs)
    results = dict(pairs)
    seconds = time.perf_counter() - began
    if seconds > 5:
        logger.info(done + " in %.0f s", len(items), seconds)
    return {item: results[item] for item in items}


@dataclass(frozen=True)
class Inspection:
    """What a full decode tells of a file. `digest` is of the pixels: a lossless copy in another format has the same."""

    digest: str
    size: tuple[int, int]  # height, width
    problem: str | None


def _inspect(path: Path) -> Inspection:
    try:
        pixels = _decode(path)
    except Exception as error:  # as in read_image
        return Inspection("", (0, 0), _reason(error))
    digest = hashlib.blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=16)
    digest.update(pixels)
    return Inspection(digest.hexdigest(), pixels.shape[:2], None)


def inspect(paths: Iterable[Path], accelerator: "Accelerator | None" = None) -> dict[Path, Inspection]:
    """Decodes every file once: a truncated one is named now and not in the middle of an epoch."""
    return share_work(list(paths), _inspect, accelerator, "Decoded %d images to check them")
