"""CT volumes: NIfTI files of any shape and orientation, read once into a cache of int16 HU, from which a crop costs
milliseconds; patients and their splits; volumes written back as the file had them.

Volumes are (x, y, z) in RAS+ order: x grows to the patient's right, y to the front, z to the head.
"""

import base64
import dataclasses
import fcntl
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from tqdm import tqdm

from common.checkpoints import write_atomically
from common.cli import UserError, some
from common.launch import stop_requested
from common.logs import clock

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("run")

SUFFIXES = (".nii.gz", ".nii")
# Up to the first part with a digit: train_1 of train_1_a_1, patient007 of patient007_scan2. Parts end with "_". A name
# without digits gives its first part: too few patients are noticed, too many would leak between the splits.
PATIENT = r"^((?:[^_\d]*_)*?[^_\d]*\d[^_]*?|.[^_]*?)(?:_.*)?\.nii(?:\.gz)?$"
BODY = -500  # HU: what is above it is body (or table), not air or lung
BLOCK = 16
DRAWS = 20
EDGES = np.arange(-3100, 4101, 100)  # HU
VERSION = 1  # of the cached files: another number makes them anew
PIECE = 1 << 24  # bytes

Triple = tuple[int, int, int]
ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


# ---------------------------------------------------------------------------------------------------------------------
# Files and patients


def find_volumes(root: Path, flag: str) -> list[Path]:
    """All NIfTI files below a folder, sorted; or the one file that `root` is. Hidden files and folders are not data."""
    if root.is_file() and root.name.lower().endswith(SUFFIXES):
        return [root]
    if not root.is_dir():
        raise UserError(f"{flag} {root} is neither a folder nor a .nii or .nii.gz file; check the path.")
    found, others, seen = [], Counter(), set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]  # a link may lead back
        for name in files if real not in seen else ():
            if not name.startswith("."):
                if name.lower().endswith(SUFFIXES):
                    found.append(Path(place, name))
                else:
                    others[Path(name).suffix.lower() or "files without ending"] += 1
        seen.add(real)
    if not found:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(4)) or "it has no files"
        raise UserError(
            f"{flag} {root} holds no .nii or .nii.gz file (found: {kinds}). Expected one file per scan, e.g."
            f" {root}/patient007_scan1.nii.gz, in folders of any depth. Convert DICOM with `dcm2niix -z y -o OUT IN`,"
            " other formats (.mha, .nrrd) with SimpleITK."
        )
    return sorted(found)


def patient_of(path: Path, pattern: str = PATIENT) -> str:
    """What the group of `pattern` finds in the file's name."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--patient-pattern {pattern!r} is not a regular expression ({error}); check it.") from None
    if compiled.groups != 1:
        raise UserError(f"--patient-pattern {pattern!r} has {compiled.groups} groups: put (...) around the patient, once.")
    match = compiled.search(path.name)
    if not match or not match[1]:
        raise UserError(
            f"--patient-pattern {pattern!r} finds no patient in the name {path.name}: change the one or the other."
        )
    return match[1]


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing NIfTI


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a RAS+ volume lie, and how the file had them. The file's header gives back axes, affines with
    their codes, and units to the bit; the rest is derived from it, for readers of the JSON."""

    header: str  # base64
    shape: Triple
    spacing: tuple[float, float, float]  # mm
    affine: np.ndarray = field(compare=False)  # of the RAS+ volume
    orientation: str  # of the file, e.g. LPS

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"affine": self.affine.tolist()}

    @classmethod
    def from_dict(cls, values: dict) -> "Geometry":
        arrays = {"shape": tuple(values["shape"]), "spacing": tuple(values["spacing"]), "affine": np.array(values["affine"])}
        return cls(**(values | arrays))


class _Unusable(Exception):
    """Why a file cannot be used, as half a sentence."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Damaged files raise anything (EOFError, zlib.error, struct.error, HeaderDataError). What the disk or a permission is
    to blame for says nothing about the file: that ends the run instead of being remembered."""
    try:
        yield
    except (_Unusable, MemoryError):
        raise
    except ImageFileError as error:
        raise _Unusable(f"not a NIfTI file ({str(error).replace(str(path), path.name)})") from None
    except EOFError as error:
        raise _Unusable(f"truncated ({error})") from None
    except OSError as error:
        if error.errno:
            raise UserError(f"{path} cannot be read ({error.strerror}): repair or remove it, then start again.") from None
        raise _Unusable(f"damaged ({error})") from None
    except Exception as error:
        raise _Unusable(f"damaged ({error or type(error).__name__})") from None


def _open(path: Path) -> tuple[nib.Nifti1Image, Geometry]:
    """The header, if it describes one volume of grey values at a known place."""
    with _reading(path):
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise _Unusable(f"not a NIfTI file but {type(image).__name__}")
        header, shape, kind = image.header, image.shape, image.dataobj.dtype
        if len(shape) < 3 or math.prod(shape[3:]) > 1:
            raise _Unusable(f"{len(shape)}D ({'x'.join(map(str, shape))}); store one 3D volume per file")
        if 0 in shape:
            raise _Unusable(f"an empty dimension ({'x'.join(map(str, shape))})")
        if kind.kind not in "iuf":
            raise _Unusable("colours instead of HU" if kind.fields else f"voxels of the kind {kind}")
        if not header["sform_code"] and not header["qform_code"]:
            raise _Unusable("sform and qform are both unset, so that spacing and orientation are unknown")
        affine = header.get_best_affine()
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise _Unusable("its affine is singular, so that spacing and orientation are unknown")
        axes = io_orientation(affine)
        ras = affine @ inv_ornt_aff(axes, shape[:3])
        geometry = Geometry(
            base64.b64encode(header.binaryblock).decode(),
            tuple(shape[i] for i in np.argsort(axes[:, 0])),
            tuple(nib.affines.voxel_sizes(ras).tolist()),
            ras,
            "".join(nib.aff2axcodes(affine)),
        )
        return image, geometry


def _voxels(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """The 3D array as it is stored: no scaling, no other type. Read to the file's end, where gzip compares its checksum,
    which nibabel does not come to."""
    stored = image.dataobj
    size = math.prod(stored.shape) * stored.dtype.itemsize
    if size > 1100 * path.stat().st_size:  # deflate packs no better; spares the memory that a damaged header asks for
        raise _Unusable(f"truncated or damaged: {size:,} bytes of voxels cannot be in a file of {path.stat().st_size:,}")
    found = np.empty(size, np.uint8)
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        file.seek(stored.offset)
        for start in range(0, size, PIECE):
            part = file.read(min(PIECE, size - start))
            found[start : start + len(part)] = np.frombuffer(part, np.uint8)
            if start + len(part) < min(start + PIECE, size):
                raise _Unusable(f"truncated: {start + len(part):,} of {size:,} bytes of voxels")
        while file.read(PIECE):
            pass
    return found.view(stored.dtype).reshape(stored.shape[:3], order="F")


def _slabs(path: Path, image: nib.Nifti1Image) -> Iterator[np.ndarray]:
    """The volume in int16 HU and RAS+ order, BLOCK planes of x at a time: nothing but the file's own array is ever whole."""
    with _reading(path):
        stored = _voxels(path, image)
    slope, inter = image.dataobj.slope, image.dataobj.inter
    if stored.dtype.kind == "f":
        if bad := sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in stored.T):
            raise _Unusable(f"{bad:,} voxels are NaN or infinite")
    exact = slope == 1 and inter == 0 and np.can_cast(stored.dtype, np.int16)
    turned = apply_orientation(stored, io_orientation(image.header.get_best_affine()))
    limits = np.iinfo(np.int16)
    for start in range(0, len(turned), BLOCK):
        slab = turned[start : start + BLOCK]
        if not exact:
            slab = np.clip(np.rint(slab * np.float64(slope) + inter), limits.min, limits.max)
        # first of few planes as they lie, then turned: three times as fast as turning the volume (512x512x300, measured)
        yield np.ascontiguousarray(slab.astype(np.int16, order="K"))


def read_scan(path: Path) -> tuple[np.ndarray, Geometry]:
    """int16 HU in RAS+ order."""
    try:
        image, geometry = _open(path)
        volume = np.empty(geometry.shape, np.int16)
        for start, slab in zip(itertools.count(0, BLOCK), _slabs(path, image), strict=False):
            volume[start : start + BLOCK] = slab
    except _Unusable as error:
        raise UserError(f"{path} cannot be used: {error}.") from None
    return volume, geometry


def write_scan(path: Path, hu: np.ndarray, geometry: Geometry) -> None:
    """A RAS+ volume as int16 HU with the axes, affines and units of the file that the geometry is of. Whole or absent."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path}: volumes are written as .nii or .nii.gz; give it one of these endings.")
    if hu.shape != geometry.shape or hu.dtype != np.int16:
        raise ValueError(f"{hu.dtype} {hu.shape} instead of int16 {geometry.shape}")
    block = base64.b64decode(geometry.header)
    header = (nib.Nifti2Header if len(block) == nib.Nifti2Header.sizeof_hdr else nib.Nifti1Header)(block)
    axes = io_orientation(header.get_best_affine())
    stored = apply_orientation(hu, ornt_transform([[0, 1], [1, 1], [2, 1]], axes)).reshape(header.get_data_shape())
    header.set_data_dtype(np.int16)
    image = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[: -len(suffix)]}.partial{suffix}")
    nib.save(image(stored, None, header), partial)
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@dataclass(frozen=True)
class Scan:
    """A scan in the cache. `array` is an uncompressed .npy of int16 HU in RAS+ order."""

    path: Path
    patient: str
    array: Path
    geometry: Geometry
    digest: str  # of shape and voxels: a copy under another name or in another orientation has the same
    body: float  # share of the voxels above BODY
    low: int  # HU
    high: int
    below: np.ndarray = field(compare=False)  # share of the voxels below each of EDGES
    above: np.ndarray = field(compare=False)

    @property
    def shape(self) -> Triple:
        return self.geometry.shape

    @property
    def spacing(self) -> tuple[float, float, float]:
        return self.geometry.spacing

    @property
    def affine(self) -> np.ndarray:
        return self.geometry.affine

    @property
    def orientation(self) -> str:
        return self.geometry.orientation

    @property
    def blocks(self) -> np.ndarray:
        """Share of body in each block of 16^3 voxels, 0 to 255. Read anew each time: of 50,000 scans they are a gigabyte."""
        return np.load(self.array.with_suffix(".blocks.npy"))

    def clipped(self, hu_min: int, hu_max: int) -> tuple[float, float]:
        """Shares of the voxels below and above a window: exact for multiples of 100 HU, between them interpolated."""
        return float(np.interp(hu_min, EDGES, self.below)), float(np.interp(hu_max, EDGES, self.above))


def _name(path: Path) -> str:
    """Of the cached files. It changes with the source, so what is there is always right; old files stay, since another run
    may be reading them."""
    source = path.resolve()
    state = source.stat()
    key = f"{VERSION} {source} {state.st_size} {state.st_mtime_ns}"
    return f"{_stem(path)[:120]}-{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}"


@contextmanager
def _claim(lock: Path) -> Iterator[bool]:
    """Whether this process has the right to make something. The kernel takes it back when the process dies."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        except (BlockingIOError, FileNotFoundError):  # another process has it; or had it, and removed the file as it ended
            mine = False
        yield mine
        if mine:
            lock.unlink()


def _build(path: Path, entry: Path) -> bool:
    """Makes the files of one scan, `entry` last. False while another process is at it."""
    if entry.exists():
        return True
    with _claim(entry.with_name(f".{entry.name}.lock")) as mine:
        if mine and not entry.exists():
            partial = entry.with_name(f".{entry.name}.partial")
            try:
                values = _fill(path, partial, entry.with_suffix(".blocks.npy"))
            except _Unusable as error:
                partial.unlink(missing_ok=True)
                values = {"problem": str(error)}
            else:
                os.replace(partial, entry.with_suffix(".npy"))
            write_atomically(entry, json.dumps({"source": str(path), **values}))
        return mine


def _fill(path: Path, partial: Path, blocks_file: Path) -> dict:
    """Writes the voxels; returns what is known of them."""
    image, geometry = _open(path)
    shape = geometry.shape
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    counts = np.zeros(1 << 16, np.int64)
    blocks = []
    starts = [np.arange(0, n, BLOCK) for n in shape]
    with open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i2", "fortran_order": False, "shape": shape})
        for slab in _slabs(path, image):
            file.write(slab)
            digest.update(slab)
            counts += np.bincount(slab.view(np.uint16).ravel(), minlength=len(counts))
            body = (slab > BODY).sum(0, dtype=np.int32)
            blocks.append(np.add.reduceat(np.add.reduceat(body, starts[1], 0), starts[2], 1))
        file.flush()
        os.fsync(file.fileno())
    sides = [np.minimum(BLOCK, n - at) for n, at in zip(shape, starts, strict=True)]
    np.save(blocks_file, np.rint(255 * np.stack(blocks) / np.einsum("i,j,k->ijk", *sides)).astype(np.uint8))
    counts = np.roll(counts, 1 << 15)  # from the bit patterns' order to -32768 ... 32767
    total, values = counts.sum(), np.flatnonzero(counts) - (1 << 15)
    if values[-1] <= BODY:
        blocks_file.unlink()
        raise _Unusable(f"all air: nothing is above {BODY} HU")
    up_to = np.concatenate([[0], counts.cumsum()]) / total  # up_to[v + 32768]: the share below v
    return {
        "geometry": geometry.to_dict(),
        "digest": digest.hexdigest(),
        "body": float(1 - up_to[BODY + 1 + (1 << 15)]),
        "low": int(values[0]),
        "high": int(values[-1]),
        "below": up_to[EDGES + (1 << 15)].tolist(),
        "above": (1 - up_to[EDGES + 1 + (1 << 15)]).tolist(),
    }


def _check_space(missing: Iterable[Path], cache: Path, pool: ThreadPoolExecutor) -> None:
    def size(path: Path) -> int:
        try:
            return 2 * math.prod(_open(path)[1].shape)
        except _Unusable:
            return 0

    needed, free = sum(pool.map(size, missing)), shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(
            f"The cache of int16 volumes needs {needed / 1e9:.1f} GB more, but {cache} has {free / 1e9:.1f} GB left: free"
            " space, choose another folder with --cache-path, or use fewer scans."
        )


def _build_all(missing: dict[Path, Path], accelerator: "Accelerator | None") -> None:
    """Every process begins elsewhere and takes what no other has taken, so that all are busy to the end. They wait for each
    other by looking at files: a collective would time out."""
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    cache = next(iter(missing.values())).parent
    names = {entry.name for entry in missing.values()}
    begin = len(missing) * rank // ranks
    left = [*list(missing)[begin:], *list(missing)[:begin]]
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    pool = ThreadPoolExecutor(min(8, threads))  # each holds a volume
    bar = tqdm(
        total=len(missing), desc="Caching", unit="scan", disable=rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True
    )
    began = looked = said = time.perf_counter()
    try:
        if rank == 0:
            _check_space(missing, cache, pool)
        while left:
            again = []
            for path, there in zip(left, pool.map(lambda path: _build(path, missing[path]), left), strict=True):
                again += [] if there else [path]
                if stop_requested():
                    raise UserError(f"Stopped while caching scans in {cache}; the next start continues there.")
                now = time.perf_counter()
                if rank == 0 and now - looked > 1:
                    looked, done = now, len(names.intersection(os.listdir(cache)))  # also of the other processes
                    bar.update(done - bar.n)
                    if bar.disable and done and now - said > 60:
                        said = now
                        remaining = clock((now - began) / done * (len(names) - done))
                        logger.info("Cached %d of %d scans, ETA %s", done, len(names), remaining)
            left = again
            if left:
                time.sleep(0.5)
        bar.update(len(names) - bar.n)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    if rank == 0:
        logger.info("Cached %d scans in %s, %s", len(names), cache, clock(time.perf_counter() - began))


def prepare_scans(
    paths: Sequence[Path],
    cache: Path,
    pattern: str = PATIENT,
    accelerator: "Accelerator | None" = None,
    flag: str = "--dataset-path",
) -> list[Scan]:
    """The usable scans, in the order of `paths`. What the cache lacks is made first, by all processes together; one that was
    killed continues where it was. What cannot be used is named with its reason in one warning."""
    patients = {path: patient_of(path, pattern) for path in paths}
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache {cache} cannot be made ({error.strerror}): choose another --cache-path.") from None
    entries = {path: cache / f"{_name(path)}.json" for path in patients}
    if missing := {path: entry for path, entry in entries.items() if not entry.exists()}:
        if not os.access(cache, os.W_OK):
            raise UserError(f"The cache {cache} lacks {len(missing)} scans and is read-only: choose another --cache-path.")
        _build_all(missing, accelerator)
    scans, problems = [], []
    for path, entry in entries.items():
        values = json.loads(entry.read_text())
        del values["source"]
        if "problem" in values:
            problems.append(f"{path}: {values['problem']}")
            continue
        values["geometry"] = Geometry.from_dict(values["geometry"])
        values |= {side: np.array(values[side]) for side in ("below", "above")}
        scans.append(Scan(path=path, patient=patients[path], array=entry.with_suffix(".npy"), **values))
    if not scans:
        raise UserError(f"{flag}: none of the {len(entries):,} scans can be used: {some(problems, 5)}.")
    if accelerator is None or accelerator.is_main_process:
        if problems:
            logger.warning("%d of %d left out: %s", len(problems), len(entries), some(problems, 20))
        if odd := [f"{scan.path}: {scan.low} to {scan.high}" for scan in scans if scan.low >= 0]:
            logger.warning(
                "%d of %d seem not to be in HU, since nothing in them is below 0: %s. If the intercept (often -1024) was"
                " lost in the conversion, write it into the files; if they were scaled, convert them again",
                len(odd), len(scans), some(odd),
            )  # fmt: skip
    return scans


def describe(scans: Sequence[Scan], hu_min: int, hu_max: int) -> str:
    """One line for the log."""

    def extent(values: Iterable[Sequence[float]], form: str) -> str:
        lowest, highest = (
            "x".join(format(bound(column), form) for column in zip(*values, strict=True)) for bound in (min, max)
        )
        return lowest if lowest == highest else f"{lowest} to {highest}"

    sizes = np.array([math.prod(scan.shape) for scan in scans])
    shares = np.average([(*scan.clipped(hu_min, hu_max), scan.body) for scan in scans], 0, sizes)
    return (
        f"{len(scans):,} scans of {len({scan.patient for scan in scans}):,} patients,"
        f" {extent([scan.shape for scan in scans], 'd')} voxels of {extent([scan.spacing for scan in scans], '.3g')} mm;"
        f" {shares[0]:.1%} of the voxels are below {hu_min} HU and {shares[1]:.2%} above {hu_max} HU (clipped),"
        f" {shares[2]:.0%} body; cache {2 * sizes.sum() / 1e9:.2f} GB"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def split_patients(scans: Sequence[Scan], val: int, test: int, seed: int) -> tuple[list[Scan], list[Scan], list[Scan]]:
    """(train, val, test) with so many patients in the last two. Each patient's place in the draw is a function of name and
    seed alone: a patient more changes little, another order of the files nothing."""
    if min(val, test) < 0:
        raise UserError(f"{val} patients for validation and {test} for the test: give 0 or more.")

    def place(patient: str) -> tuple[float, str]:
        return np.random.default_rng([seed, 0xC7, zlib.crc32(patient.encode())]).random(), patient

    patients = sorted({scan.patient for scan in scans}, key=place)
    if len(patients) <= val + test:
        alone = f" ({patients[0]}); if they are of several, say with --patient-pattern how names tell them"
        raise UserError(
            f"The {len(scans):,} scans are of {len(patients):,} patient{alone if len(patients) == 1 else 's'}: {val} for"
            f" validation and {test} for the test leave none to train on."
        )
    parts = set(patients[test + val :]), set(patients[test : test + val]), set(patients[:test])
    ordered = sorted(scans, key=lambda scan: (scan.patient, scan.path.name, scan.path))
    return tuple([scan for scan in ordered if scan.patient in part] for part in parts)


def check_leak(train: Sequence[Scan], *others: Sequence[Scan]) -> None:
    """Refuses voxels that are in two parts, under whatever names."""
    parts = [{scan.digest: scan for scan in part} for part in (train, *others)]
    same = [
        f"{one[digest].path} = {other[digest].path}"
        for one, other in itertools.combinations(parts, 2)
        for digest in one
        if digest in other
    ]
    if same:
        raise UserError(
            f"{len(same)} scans of one part of the split are also in another: {some(same, 3)}. Remove the copies, or give"
            " both the same patient with --patient-pattern."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Crops


def crop(scan: Scan, corner: Triple, size: Triple, hu_min: int) -> np.ndarray:
    """int16 HU; `hu_min` where it reaches beyond the volume. The file is opened each time (0.1 ms), so that nothing is held
    open and nothing is shared with forked workers."""
    voxels = np.load(scan.array, mmap_mode="r")
    first = [max(at, 0) for at in corner]
    last = [max(min(at + side, n), start) for at, side, n, start in zip(corner, size, voxels.shape, first, strict=True)]
    inside = np.array(voxels[tuple(map(slice, first, last))])
    if inside.shape == tuple(size):
        return inside
    padded = np.full(size, hu_min, np.int16)
    padded[tuple(slice(a - at, b - at) for a, b, at in zip(first, last, corner, strict=True))] = inside
    return padded


def random_corner(scan: Scan, size: Triple, rng: np.random.Generator, body: float) -> Triple:
    """Uniform among the corners whose crops lie within the volume and are body to this share at least, by its blocks; the
    best of DRAWS when there is no such one. Along an axis on which the volume is smaller it is centred."""
    blocks = scan.blocks if body > 0 else None
    best, most = None, -1.0
    for _ in range(DRAWS):
        corner = tuple(
            int(rng.integers(n - side + 1)) if n >= side else (n - side) // 2
            for n, side in zip(scan.shape, size, strict=True)
        )
        if blocks is None:
            return corner
        covered = tuple(slice(max(at, 0) // BLOCK, -(-(at + side) // BLOCK)) for at, side in zip(corner, size, strict=True))
        share = float(blocks[covered].mean()) / 255
        if share > most:
            best, most = corner, share
        if share >= body:
            break
    return best


def grid_corners(shape: Triple, patch: Triple, stride: Triple) -> list[Triple]:
    """A grid that covers the volume; the last patch of each axis ends with it. Smaller volumes are centred as above."""
    axes = [
        sorted({*range(0, n - side, step), n - side}) if n > side else [(n - side) // 2]
        for n, side, step in zip(shape, patch, stride, strict=True)
    ]
    return list(itertools.product(*axes))


def to_unit(hu: ArrayT, hu_min: int, hu_max: int) -> ArrayT:
    """float32 in [-1, 1]: the window, clipped. Tensors stay on their device, so that int16 can travel."""
    kept = hu.clip(hu_min, hu_max)  # in int16: 0.7 ms for 128^3, after it in float32 4.7 (measured)
    unit = kept.float() if isinstance(kept, torch.Tensor) else kept.astype(np.float32)
    unit -= (hu_min + hu_max) / 2
    unit /= (hu_max - hu_min) / 2
    return unit


def to_hu(unit: ArrayT, hu_min: int, hu_max: int) -> ArrayT:
    """int16, rounded, within the window."""
    half = (hu_max - hu_min) / 2
    if isinstance(unit, torch.Tensor):
        return ((unit.float().clip(-1, 1) + 1) * half + hu_min).round().to(torch.int16)
    return np.rint((unit.astype(np.float32).clip(-1, 1) + 1) * half + hu_min).astype(np.int16)
