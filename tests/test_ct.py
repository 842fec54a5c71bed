"""CT files: what is read is what is in the file, in RAS; what is broken is named; the cache survives a kill and is shared;
patients do not leak; crops lie where they should."""

import gzip
import itertools
import json
import multiprocessing
import os
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff

from common import ct
from common.cli import UserError

SHAPE = (37, 20, 51)  # odd: no block of 16 ends with the volume
AFFINE = np.array([[0.7, 0.02, 0, -120.5], [-0.02, 0.7, 0.1, -90.25], [0, -0.1, 1.5, 30.125], [0, 0, 0, 1]])  # oblique


def chest(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """int16 HU, RAS: air outside, a body whose every voxel differs from its neighbours."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, -900, shape).astype(np.int16)
    inner = tuple(slice(n // 4, n - n // 8) for n in shape)
    hu[inner] = rng.integers(-499, 1400, hu[inner].shape)
    return hu


def stored(path: Path, hu: np.ndarray, codes: str = "RAS", kind=nib.Nifti1Image, **header) -> Path:
    """Writes a RAS volume with its axes as `codes` say."""
    axes = axcodes2ornt(tuple(codes))  # of the file's axes in RAS
    shape = tuple(hu.shape[int(axis)] for axis in axes[:, 0])
    turned = apply_orientation(hu, nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], axes))
    assert turned.shape == shape
    image = kind(turned, AFFINE @ np.linalg.inv(inv_ornt_aff(axes, shape)))
    for name, value in header.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def scaled(path: Path, raw: np.ndarray, slope: float, inter: float) -> Path:
    """A file whose voxels are `raw` and whose header has this slope and intercept."""
    header = nib.Nifti1Header()
    header.set_data_dtype(raw.dtype)
    header.set_data_shape(raw.shape)
    header.set_sform(AFFINE, 1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = slope, inter, 352, b"n+1"
    content = header.binaryblock + b"\0" * 4 + raw.tobytes("F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def cached(folder: Path, hu: np.ndarray, name: str = "p1.nii.gz") -> ct.Scan:
    return ct.prepare_scans([stored(folder / name, hu)], folder / ".cache")[0]


def listed(*patients: str) -> list[ct.Scan]:
    """Scans without files, one voxel value each."""
    return [
        ct.Scan(Path(f"{name}.nii"), ct.patient_of(Path(f"{name}.nii")), Path("x.npy"), None, name, 1, 0, 0, None, None)
        for name in patients
    ]


# ---------------------------------------------------------------------------------------------------------------------
# finding


def test_volumes_are_found_in_a_fixed_order_and_hidden_ones_are_not(tmp_path):
    for name in ("b/2.nii", "b/1.NII.GZ", "a.nii.gz", "._a.nii", ".cache/x.nii", "notes.txt", "b/.hidden.nii.gz"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/3.nii").touch()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/b/back").symlink_to(tmp_path / "data")  # without end, if it were followed for ever
    found = [path.relative_to(tmp_path / "data").as_posix() for path in ct.find_volumes(tmp_path / "data", "--x")]
    assert found == ["a.nii.gz", "b/1.NII.GZ", "b/2.nii", "linked/3.nii"]
    assert ct.find_volumes(tmp_path / "data/a.nii.gz", "--x") == [tmp_path / "data/a.nii.gz"]


def test_a_folder_without_volumes_says_what_it_has(tmp_path):
    for name in ("1.dcm", "2.dcm", "3.mha"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"--data .*no \.nii or \.nii\.gz.*2 \.dcm, 1 \.mha.*Expected.*dcm2niix"):
        ct.find_volumes(tmp_path, "--data")
    with pytest.raises(UserError, match="--data .*missing is neither a folder"):
        ct.find_volumes(tmp_path / "missing", "--data")


@pytest.mark.parametrize(
    "name, patient",
    [
        ("train_1_a_1.nii.gz", "train_1"), ("train_12_b_1.nii.gz", "train_12"), ("patient007_scan2.nii.gz", "patient007"),
        ("1.2.826.0.nii.gz", "1.2.826.0"), ("P12-ct.nii", "P12-ct"), ("sub-01_ses-2_ct.NII.GZ", "sub-01"),
        ("ABD_LYMPH_001.nii.gz", "ABD_LYMPH_001"), ("anna_followup.nii", "anna"),
    ],
)  # fmt: skip
def test_patients_are_told_by_name(name, patient):
    assert ct.patient_of(Path("some/where_9") / name) == patient


@pytest.mark.parametrize("pattern, told", [(r"^(ID\d+)", "finds no patient in the name scan_7.nii"),
                                           (r"(\d+", "not a regular expression"), (r"\d+", "has 0 groups")])  # fmt: skip
def test_a_pattern_that_does_not_fit_is_refused_before_anything_is_read(tmp_path, pattern, told):
    (tmp_path / "scan_7.nii").touch()
    with pytest.raises(UserError, match="--patient-pattern") as error:
        ct.prepare_scans([tmp_path / "scan_7.nii"], tmp_path / ".cache", pattern)
    assert told in str(error.value) and not (tmp_path / ".cache").exists()


# ---------------------------------------------------------------------------------------------------------------------
# reading and writing


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "ILA", "SAL"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_orientation_is_read_as_ras_and_written_back_as_it_was(tmp_path, codes, kind):
    hu = chest()
    path = stored(tmp_path / "in.nii.gz", hu, codes, kind, xyzt_units=2)
    image = nib.load(path)
    image.set_qform(image.affine, 3)
    image.set_sform(image.affine, 2)
    nib.save(image, path)
    read, geometry = ct.read_scan(path)
    canonical = nib.as_closest_canonical(nib.load(path))
    assert read.dtype == np.int16 and read.flags.c_contiguous
    assert np.array_equal(read, hu) and np.array_equal(read, np.asarray(canonical.dataobj))
    assert geometry.shape == hu.shape and geometry.orientation == codes
    np.testing.assert_allclose(geometry.affine, canonical.affine, rtol=0, atol=1e-12)
    np.testing.assert_allclose(geometry.spacing, nib.affines.voxel_sizes(canonical.affine), rtol=1e-12)
    geometry = ct.Geometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert geometry == ct.read_scan(path)[1]

    ct.write_scan(tmp_path / "new/out.nii", hu + np.int16(1), geometry)
    before, after = nib.load(path), nib.load(tmp_path / "new/out.nii")
    assert type(after) is kind and nib.aff2axcodes(after.affine) == tuple(codes)
    assert np.array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj) + 1)
    assert np.array_equal(before.affine, after.affine)
    for name in ("pixdim", "sform_code", "qform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "xyzt_units", "dim"):
        assert np.array_equal(before.header[name], after.header[name]), name
    assert after.get_data_dtype() == np.int16 and (after.dataobj.slope, after.dataobj.inter) == (1, 0)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out.nii"]


def test_a_trailing_dimension_of_one_is_kept(tmp_path):
    path = tmp_path / "in.nii"
    nib.save(nib.Nifti1Image(chest()[..., None], AFFINE), path)
    hu, geometry = ct.read_scan(path)
    assert np.array_equal(hu, chest())
    ct.write_scan(tmp_path / "out.nii.gz", hu, geometry)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj), chest()[..., None])


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "u1", "<u2", "<i4", "<f4", "<f8"])
@pytest.mark.parametrize("slope, inter", [(1, 0), (np.nan, np.nan), (0, 0), (1, -1024), (0.5, 3.25), (-2, 7)])
def test_values_are_those_of_nibabel_rounded_and_clipped(tmp_path, dtype, slope, inter):
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    if dtype.kind == "f":
        raw = rng.normal(0, 30000, (5, 4, 3)).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        raw = rng.integers(max(limits.min, -60000), min(limits.max, 60000), (5, 4, 3), endpoint=True).astype(dtype)
    path = scaled(tmp_path / "in.nii.gz", raw, slope, inter)
    expected = np.clip(np.rint(nib.load(path).get_fdata(dtype=np.float64)), -32768, 32767)
    assert np.array_equal(ct.read_scan(path)[0], expected)


def test_any_file_is_written_back_as_int16_hu(tmp_path):
    raw = (chest() + 1024).astype(np.uint16)
    for dtype, slope in ((np.uint16, 1), (np.float32, 0.5), (np.int32, -1)):
        hu, geometry = ct.read_scan(scaled(tmp_path / "in.nii", raw.astype(dtype), slope, -1024))
        ct.write_scan(tmp_path / "out.nii.gz", hu, geometry)
        after = nib.load(tmp_path / "out.nii.gz")
        assert after.get_data_dtype() == np.int16 and (after.dataobj.slope, after.dataobj.inter) == (1, 0)
        assert np.array_equal(after.get_fdata(), hu)


def test_a_large_integer_file_is_never_whole_in_floats(tmp_path, monkeypatch):
    path = scaled(tmp_path / "in.nii", chest((96, 96, 96)), 1, 0)
    monkeypatch.setattr(ct, "PIECE", 1 << 16)
    tracemalloc.start()
    ct.read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 96**3 * 2 * 3, peak  # the file's array and the result, 2 bytes each; a whole float64 would need 8


# ---------------------------------------------------------------------------------------------------------------------
# files that cannot be used


def spoiled(folder: Path) -> dict[str, str]:
    """Files that cannot be used, by name, and what must be said of each."""
    hu = chest()
    good = stored(folder / "p0_good.nii.gz", hu).read_bytes()
    (folder / "p1_cut.nii.gz").write_bytes(good[: len(good) // 2])
    flipped = bytearray(good)
    flipped[-6] ^= 1  # in gzip's checksum: each voxel is still there, but may be wrong
    (folder / "p2_flipped.nii.gz").write_bytes(flipped)
    plain = stored(folder / "p3_short.nii", hu)
    plain.write_bytes(plain.read_bytes()[:-10])
    (folder / "p4_empty.nii.gz").touch()
    (folder / "p5_text.nii").write_bytes(b"no" * 400)
    nib.save(nib.Nifti1Image(np.repeat(hu[..., None], 3, 3), AFFINE), folder / "p6_series.nii")
    bad = hu.astype(np.float32)
    bad[1, 2, 3], bad[30, 10, 50], bad[0, 0, 0] = np.nan, np.inf, np.nan
    nib.save(nib.Nifti1Image(bad, AFFINE), folder / "p7_nan.nii.gz")
    stored(folder / "p8_air.nii", np.full(SHAPE, -1000, np.int16))
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), folder / "p9_colours.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 0, 5), np.int16), AFFINE), folder / "p10_nothing.nii")
    image = nib.Nifti1Image(hu, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, folder / "p11_nowhere.nii")
    nib.save(nib.Nifti1Image(hu[0], AFFINE), folder / "p12_slice.nii")
    content = bytearray(scaled(folder / "p13_flat.nii", hu, 1, 0).read_bytes())
    content[312:328] = bytes(16)  # srow_z
    (folder / "p13_flat.nii").write_bytes(content)
    nib.save(nib.MGHImage(hu.astype(np.float32), AFFINE), folder / "x.mgz")
    (folder / "x.mgz").rename(folder / "p14_other.nii.gz")
    return {
        "p1_cut.nii.gz": "truncated", "p2_flipped.nii.gz": "CRC", "p3_short.nii": "truncated",
        "p4_empty.nii.gz": "not a NIfTI", "p5_text.nii": "not a NIfTI", "p6_series.nii": "4D (37x20x51x3)",
        "p7_nan.nii.gz": "3 voxels are NaN or infinite",
        "p8_air.nii": "all air", "p9_colours.nii": "colours", "p10_nothing.nii": "an empty dimension (4x0x5)",
        "p11_nowhere.nii": "sform and qform", "p12_slice.nii": "2D", "p13_flat.nii": "affine is singular",
        "p14_other.nii.gz": "not a NIfTI",
    }  # fmt: skip


def count_reads(monkeypatch) -> list[Path]:
    opened, read = [], ct._open
    monkeypatch.setattr(ct, "_open", lambda path: opened.append(path) or read(path))
    return opened


def test_what_cannot_be_used_is_named_once_with_its_reason_also_by_a_second_start_that_reads_nothing(
    tmp_path, caplog, monkeypatch
):
    told = spoiled(tmp_path)
    paths = ct.find_volumes(tmp_path, "--data")
    assert len(paths) == len(told) + 1
    opened = count_reads(monkeypatch)
    first = None
    for start in range(2):
        caplog.clear()
        scans = ct.prepare_scans(paths, tmp_path / ".cache")
        assert [scan.path.name for scan in scans] == ["p0_good.nii.gz"]
        [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert warning.startswith(f"{len(told)} of {len(paths)} left out: ")
        for name, reason in told.items():
            assert reason in warning.partition(f"{name}: ")[2].partition(f", {tmp_path}")[0], name
        assert first is None or scans == first
        first = scans
        assert bool(opened) == (start == 0)
        opened.clear()
    assert not list((tmp_path / ".cache").glob(".*")) and len(list((tmp_path / ".cache").glob("*.npy"))) == 2
    with pytest.raises(UserError, match="--data: none of the 14 scans can be used: .*p10_nothing.nii: an empty"):
        ct.prepare_scans([path for path in paths if path.name in told], tmp_path / ".cache", flag="--data")
    for name, reason in told.items():
        if name != "p8_air.nii":  # reading has nothing against air
            with pytest.raises(UserError) as error:
                ct.read_scan(tmp_path / name)
            assert reason in str(error.value) and name in str(error.value)


def test_trouble_with_the_disk_ends_the_start_and_is_not_remembered(tmp_path, monkeypatch):
    path, read = stored(tmp_path / "p1.nii", chest()), ct._voxels

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ct, "_voxels", fails)
    with pytest.raises(UserError, match=r"p1\.nii cannot be read \(Input/output error\)"):
        ct.prepare_scans([path], tmp_path / ".cache")
    monkeypatch.setattr(ct, "_voxels", read)
    assert len(ct.prepare_scans([path], tmp_path / ".cache")) == 1


def test_values_that_are_not_hu_are_noticed(tmp_path, caplog):
    offset = stored(tmp_path / "p1.nii", (chest() + 1024).astype(np.uint16))
    fine = stored(tmp_path / "p2.nii", chest())
    ct.prepare_scans([offset, fine], tmp_path / ".cache")
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("1 of 2 seem not to be in HU") and "p1.nii: 0 to 2423" in warning and "p2" not in warning


def test_a_cache_that_does_not_fit_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    paths = [stored(tmp_path / f"p{i}.nii", chest()) for i in range(3)]
    needed = 3 * 2 * np.prod(SHAPE)
    for free in (needed - 1, needed):
        monkeypatch.setattr(ct.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free < needed:
            with pytest.raises(UserError, match=r"needs 0\.0 GB more.*--cache-path"):
                ct.prepare_scans(paths, tmp_path / ".cache")
            assert not list((tmp_path / ".cache").iterdir())
        else:
            assert len(ct.prepare_scans(paths, tmp_path / ".cache")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_the_cache_holds_the_volume_and_what_is_known_of_it(tmp_path):
    hu = chest()
    hu[0, 0, :7] = 3000
    paths = [stored(tmp_path / "p1_a.nii", hu), stored(tmp_path / "more/p2.nii.gz", hu, "LPS")]
    scans = ct.prepare_scans(paths, tmp_path / ".cache")
    for scan, codes in zip(scans, ("RAS", "LPS"), strict=True):
        assert np.array_equal(np.load(scan.array), hu) and scan.shape == SHAPE and scan.orientation == codes
        np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-4)
        assert scan.body == pytest.approx((hu > -500).mean(), abs=1e-12)
        assert (scan.low, scan.high) == (hu.min(), hu.max())
        for window in ((-1000, 1000), (-500, 500), (-1100, 2900)):
            expected = (hu < window[0]).mean(), (hu > window[1]).mean()
            assert scan.clipped(*window) == pytest.approx(expected, abs=1e-12)
        for corner in itertools.product(*(range(-(-n // 16)) for n in SHAPE)):
            part = hu[tuple(slice(16 * i, 16 * i + 16) for i in corner)]
            assert abs(scan.blocks[corner] / 255 - (part > -500).mean()) <= 0.5 / 255
        assert scan.blocks.shape == (3, 2, 4) and scan.blocks.dtype == np.uint8
    assert scans[0].digest == scans[1].digest and scans[0].array != scans[1].array
    assert [scan.patient for scan in scans] == ["p1", "p2"]
    line = ct.describe(scans, -1000, 1000)
    assert "2 scans of 2 patients, 37x20x51 voxels of 0.7" in line and f"{(hu > 1000).mean():.2%} above 1000 HU" in line
    hu[5, 5, 5] += 1
    assert cached(tmp_path / "other", hu).digest != scans[0].digest


def test_only_a_changed_source_is_read_again(tmp_path, monkeypatch):
    paths = [stored(tmp_path / f"p{i}.nii", chest(seed=i)) for i in range(3)]
    ct.prepare_scans(paths, tmp_path / ".cache")
    stored(paths[1], chest(seed=9))
    os.utime(paths[1], ns=(1, 1))
    opened = count_reads(monkeypatch)
    scans = ct.prepare_scans(paths, tmp_path / ".cache")
    assert set(opened) == {paths[1]}
    for scan, seed in zip(scans, (0, 9, 2), strict=True):
        assert np.array_equal(np.load(scan.array), chest(seed=seed))


def test_files_of_one_name_do_not_share_an_entry(tmp_path):
    paths = [stored(tmp_path / folder / "1.2.3.nii", chest(seed=i)) for i, folder in enumerate("ab")]
    for path in paths:
        os.utime(path, ns=(1, 1))
    for scan, seed in zip(ct.prepare_scans(paths, tmp_path / ".cache"), (0, 1), strict=True):
        assert np.array_equal(np.load(scan.array), chest(seed=seed))


FORK = multiprocessing.get_context("fork")


def build(root: Path, rank: int, ranks: int, quick: int, pause: float, made, together) -> None:
    fill, count = ct._fill, itertools.count()

    def slow(path: Path, *where: Path) -> dict:
        made.put((os.getpid(), path.name))
        values = fill(path, *where)
        time.sleep(pause if next(count) >= quick else 0)  # between the array and its entry
        return values

    ct._fill = slow
    together.wait()
    accelerator = SimpleNamespace(process_index=rank, num_processes=ranks, is_main_process=rank == 0)
    scans = ct.prepare_scans(ct.find_volumes(root, "--data"), root / ".cache", accelerator=accelerator)
    (root / f"{rank}_{ranks}.txt").write_text(" ".join(scan.digest for scan in scans))


def building(
    root: Path, rank: int = 0, ranks: int = 1, *, quick: int = 0, pause: float = 0.0, together=None
) -> tuple[multiprocessing.Process, object]:
    """A process of its own that pauses in each scan after the first ones, and the queue of what it makes. Forked, since
    importing torch takes seconds."""
    made = FORK.SimpleQueue()
    process = FORK.Process(target=build, args=(root, rank, ranks, quick, pause, made, together or FORK.Barrier(1)))
    process.start()
    return process, made


def finish(process: multiprocessing.Process, made) -> list[str]:
    process.join(60)
    assert process.exitcode == 0
    return [made.get()[1] for _ in iter(made.empty, True)]


def arrays(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("*.npy")}


@pytest.fixture(scope="module")
def nine(tmp_path_factory) -> Path:
    """Nine scans and one that cannot be used, with a finished cache in `done`."""
    root = tmp_path_factory.mktemp("nine")
    for i in range(9):
        stored(root / f"p{i}.nii.gz", chest(seed=i))
    (root / "p9.nii.gz").write_bytes(b"none")
    ct.prepare_scans(ct.find_volumes(root, "--data"), root / ".done")
    return root


def linked(nine: Path, folder: Path) -> Path:
    """The same files in a folder without a cache: an entry goes by what a link leads to."""
    for path in nine.glob("*.gz"):
        (folder / path.name).symlink_to(path)
    return folder / ".cache"


def test_a_killed_build_continues_where_it_was(nine, tmp_path):
    cache = linked(nine, tmp_path)
    first, _ = building(tmp_path, quick=3, pause=60)
    while len(list(cache.glob("*.json"))) < 3 or not list(cache.glob(".*.partial")):
        time.sleep(0.002)
    first.kill()
    first.join()
    done = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    assert len(done) == 3 and list(cache.glob(".*.partial"))  # it died in the middle of one
    made = finish(*building(tmp_path))
    assert len(made) == len(set(made)) == 10 - len(done)
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())
    assert arrays(cache) == arrays(nine / ".done")
    assert {path.name for path in cache.iterdir()} == {path.name for path in (nine / ".done").iterdir()}


def test_processes_share_the_work_and_wait_for_each_other(nine, tmp_path):
    """Three processes of two runs: ranks 0 and 1, and another run that knows of neither."""
    cache = linked(nine, tmp_path)
    together = FORK.Barrier(3)
    builders = [building(tmp_path, *who, pause=0.2, together=together) for who in ((0, 2), (1, 2), (0, 1))]
    made = [finish(*builder) for builder in builders]
    assert sorted(itertools.chain(*made)) == [f"p{i}.nii.gz" for i in range(10)]  # each once
    assert made[0] and made[1]
    digests = " ".join(scan.digest for scan in ct.prepare_scans(ct.find_volumes(nine, "--data"), nine / ".done"))
    assert [(tmp_path / f"{who}.txt").read_text() for who in ("0_2", "1_2", "0_1")] == [digests] * 3
    assert arrays(cache) == arrays(nine / ".done")


def test_waiting_for_a_process_that_was_stopped_ends_with_a_sentence(tmp_path, monkeypatch):
    import fcntl

    path = stored(tmp_path / "p1.nii", chest())
    (tmp_path / ".cache").mkdir()
    with open(tmp_path / ".cache" / f".{ct._name(path)}.json.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        asked = iter([False, False, True])
        monkeypatch.setattr(ct, "stop_requested", lambda: next(asked))
        with pytest.raises(UserError, match="Stopped while caching"):
            ct.prepare_scans([path], tmp_path / ".cache")
    monkeypatch.undo()
    assert len(ct.prepare_scans([path], tmp_path / ".cache")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# splits


def test_splits_are_by_patient_and_independent_of_the_files_order():
    names = [f"p{i}_{k}" for i in range(20) for k in range(1 + i % 3)]
    scans = listed(*names)
    parts = ct.split_patients(scans, 4, 3, seed=5)
    patients = [{scan.patient for scan in part} for part in parts]
    assert [len(part) for part in patients] == [13, 4, 3] and len(set.union(*patients)) == 20
    assert sorted(scan.digest for part in parts for scan in part) == sorted(names)
    assert ct.split_patients(scans[::-1], 4, 3, seed=5) == parts
    assert ct.split_patients(scans, 4, 3, seed=6) != parts
    one_more = ct.split_patients([*scans, *listed("p99")], 4, 3, seed=5)
    moved = sum(len({scan.patient for scan in new} - old - {"p99"}) for new, old in zip(one_more, patients, strict=True))
    assert moved <= 2  # a draw among all 21 afresh moves about 8


def test_a_split_without_training_patients_is_refused():
    with pytest.raises(UserError, match="2 scans are of 2 patients: 1 for validation and 1 for the test leave none"):
        ct.split_patients(listed("a1", "b1"), 1, 1, 0)
    with pytest.raises(UserError, match=r"2 scans are of 1 patient \(a1\).*--patient-pattern"):
        ct.split_patients(listed("a1_x", "a1_y"), 1, 0, 0)
    with pytest.raises(UserError, match="give 0 or more"):
        ct.split_patients(listed("a1", "b1"), -1, 0, 0)


def test_equal_voxels_in_two_parts_are_refused(tmp_path):
    paths = [stored(tmp_path / name, chest(seed=i)) for name, i in (("p1.nii", 0), ("p2.nii", 1), ("p3.nii.gz", 0))]
    one, two, copy = ct.prepare_scans(paths, tmp_path / ".cache")
    ct.check_leak([one, copy], [two])  # within one part they do no harm
    for parts in (([one], [copy]), ([one], [two], [copy]), ([two], [one], [copy])):
        with pytest.raises(UserError, match=r"1 scans of one part.*p1\.nii = .*p3\.nii\.gz"):
            ct.check_leak(*parts)


# ---------------------------------------------------------------------------------------------------------------------
# crops


def test_crops_are_the_volume_within_it_and_air_beyond(tmp_path):
    hu = chest()
    scan = cached(tmp_path, hu)
    wide = np.pad(hu, 60, constant_values=-1003)
    size = (16, 24, 9)
    for corner in itertools.product((-30, -5, 0, 3, 30, 60), (-24, -1, 4, 19), (-3, 42, 45, 51)):
        part = ct.crop(scan, corner, size, -1003)
        assert part.dtype == np.int16 and part.flags.c_contiguous and part.flags.writeable
        expected = wide[tuple(slice(at + 60, at + 60 + side) for at, side in zip(corner, size, strict=True))]
        assert np.array_equal(part, expected), corner
    part += 1
    assert np.array_equal(np.load(scan.array), hu)
    assert np.array_equal(ct.crop(scan, (0, 0, 0), SHAPE, 0), hu)


def test_corners_are_uniform_and_a_function_of_the_generator(tmp_path):
    scan = cached(tmp_path, chest((19, 16, 40)))
    rng = np.random.default_rng(1)
    drawn = [ct.random_corner(scan, (16, 16, 38), rng, 0.0) for _ in range(2400)]
    counts = {corner: drawn.count(corner) for corner in set(drawn)}
    assert counts.keys() == set(itertools.product(range(4), [0], range(3)))  # the first and the last place, too
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001
    again = np.random.default_rng(1)
    assert [ct.random_corner(scan, (16, 16, 38), again, 0.0) for _ in range(2400)] == drawn


def test_a_volume_smaller_than_the_patch_is_centred(tmp_path):
    scan = cached(tmp_path, chest((20, 33, 51)))
    corner = ct.random_corner(scan, (32, 32, 64), np.random.default_rng(0), 0.9)
    assert corner[0] == -6 and corner[1] in (0, 1) and corner[2] == -7
    assert ct.grid_corners(scan.shape, (32, 32, 64), (32, 32, 64)) == [(-6, 0, -7), (-6, 1, -7)]
    part = ct.crop(scan, corner, (32, 32, 64), -1000)
    assert (part[:6] == -1000).all() and (part[26:] == -1000).all() and (part[6:26, :, 7:58] != -1000).any()


def test_crops_are_mostly_of_the_body(tmp_path):
    """A body that fills the upper eighth: one corner in about 30 sees enough of it by chance."""
    hu = np.full((96, 96, 96), -1000, np.int16)
    hu[48:, 48:, 48:] = 40
    scan = cached(tmp_path, hu)
    rng = np.random.default_rng(0)

    def share(body: float) -> np.ndarray:
        corners = [ct.random_corner(scan, (32, 32, 32), rng, body) for _ in range(150)]
        return np.array([(ct.crop(scan, corner, (32, 32, 32), -1000) > -500).mean() for corner in corners])

    plain, half, little = share(0.0), share(0.5), share(0.05)
    assert plain.mean() < 0.2 and (plain < 0.05).mean() > 0.4
    assert half.mean() > 0.45 and (half < 0.05).mean() < 0.05
    assert (little > 0).all() and little.mean() < half.mean()
    assert share(1.1).mean() > half.mean()  # out of reach: the best of the draws

    flat = np.full((20, 96, 40), -1000, np.int16)
    flat[:16, 64:] = 40  # the patch begins before it
    scan = cached(tmp_path / "flat", flat)
    assert min(ct.random_corner(scan, (32, 32, 32), rng, 0.3)[1] for _ in range(30)) > 40


@pytest.mark.parametrize(
    "shape, patch, stride, count",
    [
        ((512, 512, 604), (128, 128, 128), (128, 128, 128), 80),
        (SHAPE, (16, 8, 16), (8, 8, 10), 60),
        (SHAPE, SHAPE, SHAPE, 1),
    ],
)
def test_grids_cover_the_volume_and_end_with_it(shape, patch, stride, count):
    corners = ct.grid_corners(shape, patch, stride)
    assert len(corners) == count and sorted(set(corners)) == corners
    for axis, (n, side, step) in enumerate(zip(shape, patch, stride, strict=True)):
        places = sorted({corner[axis] for corner in corners})
        assert places[0] == 0 and places[-1] == n - side and max(np.diff(places), default=0) <= step
        assert all(place % step == 0 for place in places[:-1])


@pytest.mark.parametrize("window", [(-1000, 1000), (-1024, 3071), (-160, 240)])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_units_and_hu_are_inverse_within_the_window(window, make):
    hu = np.arange(-32768, 32768, dtype=np.int16)
    unit = ct.to_unit(make(hu), *window)
    assert str(unit.dtype).endswith("float32") and (unit.min(), unit.max()) == (-1, 1)
    middle = sum(window) / 2
    np.testing.assert_allclose(np.asarray(unit), np.clip((hu - middle) / (window[1] - middle), -1, 1), atol=1e-6)
    back = ct.to_hu(unit, *window)
    assert str(back.dtype).endswith("int16") and np.array_equal(np.asarray(back), np.clip(hu, *window))
    assert np.array_equal(np.asarray(ct.to_hu(unit * 3, *window))[[0, -1]], window)
    floats = make(hu.astype(np.float32))
    ct.to_unit(floats, *window)
    assert np.array_equal(np.asarray(floats), hu)  # what was given is not touched
