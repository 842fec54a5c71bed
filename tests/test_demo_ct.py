"""The CT generator: Murray's law, tissues of their HU in their places, geometry of the files, folders whole or absent."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, map_coordinates

from common.cli import UserError
from common.demo_data import ct

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(size=(30, 28, 32), progress=False)
ILL = 8  # the seed of a patient with 8 emboli


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def anatomy(seed: int, scan: int = 1) -> ct.Anatomy:
    return ct.build(seed, ct.draw_patient(seed), ct.draw_protocol(seed, scan), scan)


@pytest.fixture(scope="module")
def ill():
    return anatomy(ILL)


@pytest.fixture(scope="module")
def scan():
    return ct.volume(ILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    ct.write(path, 7, seed=3, **SMALL)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Anatomy


def test_branches_obey_murrays_law(ill):
    assert set(ill.trees) == {f"{kind} {side}" for kind in ct.KINDS for side in ("right", "left")}
    for tree in ill.trees.values():
        children = np.bincount(tree.parent[1:], minlength=len(tree.radius))
        assert tree.parent[0] == -1 and set(children) == {0, 2} and (children == 0).sum() == ct.LEAVES
        forks = children == 2
        cubes = np.bincount(tree.parent[1:], tree.radius[1:] ** 3, len(tree.radius))
        assert np.allclose(cubes[forks], tree.radius[forks] ** 3)
        assert np.allclose(tree.start[1:], tree.end[tree.parent[1:]])
        share = tree.radius[1:] ** 3 / tree.radius[tree.parent[1:]] ** 3
        assert np.quantile(share, 0.1) < 0.36 and tree.radius[0] / tree.radius.min() > 10  # uneven forks, long taper


def test_a_tree_reaches_every_point_that_it_supplies():
    points = np.random.default_rng(0).normal(size=(57, 3))
    tree = ct.grow(points, (5, 0, 0), 2.0, np.random.default_rng(1))
    leaves = np.setdiff1d(np.arange(len(tree.radius)), tree.parent)
    assert np.allclose(np.sort(tree.end[leaves], axis=0), np.sort(points, axis=0))
    assert np.allclose(tree.radius[leaves], 2 / 57 ** (1 / 3)) and np.array_equal(tree.start[0], [5, 0, 0])


def test_vessels_run_inside_the_lungs(ill):
    for name, tree in ill.trees.items():
        middle = (tree.start + tree.end) / 2
        lengths = np.linalg.norm(tree.end - tree.start, axis=1)
        away = map_coordinates(ill.fields["lung"], ((middle - ill.grid.origin) / ill.grid.step).T[::-1], order=1)
        assert lengths[away < 0].sum() > 0.96 * lengths.sum(), name
        assert (np.sign(tree.end[:, 0]) == (1 if "right" in name else -1)).mean() > 0.99


def test_emboli_lie_on_the_axes_of_wider_arteries(ill):
    clots = ill.tubes["clot"]
    assert len(clots.first) >= ct.draw_protocol(ILL).emboli == 8
    arteries = ct.joined([ill.trees[f"artery {side}"].tubes() for side in ("right", "left")])
    towards = arteries.end - arteries.start
    for i in range(len(clots.first)):
        hosts = np.ones(len(arteries.first), bool)
        for point in (clots.start[i], clots.end[i]):
            share = ((point - arteries.start) * towards).sum(1) / (towards**2).sum(1)
            away = np.linalg.norm(arteries.start + share[:, None] * towards - point, axis=1)
            hosts &= (away < 1e-6) & (share > -1e-6) & (share < 1 + 1e-6)
        assert hosts.sum() == 1 and 0.5 < clots.first[i] / arteries.first[hosts][0] < 0.96


def test_two_scans_of_a_patient_show_the_same_chest():
    one, two, other = anatomy(1), anatomy(1, scan=2), anatomy(2)
    for name, tree in one.trees.items():
        again = two.trees[name]
        upper = (tree.start[:, 2] > 0) & (tree.end[:, 2] > 0)  # what breath does not move
        assert np.array_equal(tree.end[upper], again.end[upper]) and np.array_equal(tree.radius, again.radius)
        assert not np.allclose(tree.end, again.end)
        assert not np.allclose(tree.radius, other.trees[name].radius)
    assert np.array_equal(one.fields["body"], two.fields["body"])
    assert ct.draw_protocol(1, 1).contrast != ct.draw_protocol(1, 2).contrast


# ---------------------------------------------------------------------------------------------------------------------
# Tubes on a grid


def test_distances_to_tubes_are_those_of_round_cones():
    grid = ct.Grid(np.array([-3.0, 1.0, 2.0]), np.array([0.7, 0.9, 1.1]), (14, 11, 9))
    tubes = ct.Tubes(
        np.array([[0, 4, 5.0], [4, 8, 6]]), np.array([[3, 7, 8.0], [4, 8, 6]]), np.array([1, 2.0]), np.ones(2) * 2
    )
    made = ct.distance(tubes, grid, 4.0)
    assert made.shape == (9, 11, 14)
    x, y, z = grid.mesh()
    points = np.stack(np.broadcast_arrays(x, y, z), -1)
    wanted = np.full(made.shape, 4.0)
    for a, b, first, last in zip(*tubes, strict=True):
        share = np.clip((points - a) @ (b - a) / max((b - a) @ (b - a), 1e-9), 0, 1)[..., None]
        away = np.linalg.norm(points - a - share * (b - a), axis=-1) - (first + share[..., 0] * (last - first))
        wanted = np.minimum(wanted, away)
    assert np.allclose(made, wanted, atol=1e-4)


def test_thin_tubes_keep_their_volume():
    grid = ct.Grid(np.zeros(3), np.array([2.0, 2.5, 3.0]), (20, 20, 20))
    tube = ct.Tubes(np.array([[10, 12, 15.0]]), np.array([[28, 30, 40.0]]), np.array([0.5]), np.array([0.5]))
    length = np.linalg.norm(tube.end - tube.start)
    filled = ct.splat(tube, grid)
    assert filled.sum() * 15 == pytest.approx(math.pi * 0.25 * length, rel=1e-3)
    assert 0 < filled.max() < 0.5
    beyond = tube._replace(end=np.array([[28, 30, 400.0]]))
    assert np.isfinite(ct.splat(beyond, grid)).all() and ct.splat(beyond, grid)[-1].any()


# ---------------------------------------------------------------------------------------------------------------------
# Volumes


def test_a_volume_is_a_function_of_its_arguments(scan):
    hu, labels = ct.volume(ILL)
    assert np.array_equal(hu, scan[0]) and np.array_equal(labels, scan[1])
    assert hu.dtype == np.int16 and labels.dtype == np.uint8 and hu.shape == labels.shape == ct.SIZE
    tiny = [
        ct.volume(*arguments, scan=k)
        for arguments, k in (((5, (40, 40, 40)), 1), ((6, (40, 40, 40)), 1), ((5, (40, 40, 40)), 2))
    ]
    assert len({one[0].tobytes() for one in tiny}) == len({one[1].tobytes() for one in tiny}) == 3
    for _, labels in tiny:
        assert (np.bincount(labels.ravel(), minlength=7)[:6] > 50).all()


def test_tissues_have_their_hu(scan):
    hu, labels = scan
    protocol = ct.draw_protocol(ILL)
    middle = {name: np.median(hu[labels == i]) for i, name in enumerate(ct.LABELS)}
    assert middle["outside"] < -990 and -880 < middle["lung"] < -740
    assert 220 < middle["bone"] < 500
    assert 0.5 * protocol.contrast < middle["vessel"] < 1.1 * protocol.contrast
    assert middle["embolus"] < middle["vessel"] - 120
    body = np.histogram(hu[labels == ct.BODY], np.arange(-205, 206, 10))[0]
    fat, muscle, between = body[8:13].max(), body[22:28].max(), body[15:20].min()  # -120..-80, 20..70, -50..0
    assert min(fat, muscle) > 2.5 * between and body[8:13].argmax() == 2
    air = np.histogram(hu[(hu > -1020)], np.arange(-1010, -700, 20))[0]
    assert air[0] > 20 * air[2:4].max() and air[4:].max() > 3 * air[2:4].max()  # -1000 outside, -860 in the lungs
    assert hu.min() == ct.BEYOND and hu.max() < 3071


def test_left_is_left_and_up_is_up(scan):
    """RAS: the liver is on the right, the heart on the left, the spine behind, the trachea above its bifurcation."""
    hu, labels = scan
    centre = {name: np.argwhere(labels == i).mean(0) for i, name in enumerate(ct.LABELS)}
    assert centre["airway"][2] > centre["vessel"][2] + 5
    lung = labels == ct.LUNG
    assert lung[48:].sum() > 1.05 * lung[:48].sum()
    bottom = labels[:, :, :12]
    solid = (bottom == ct.BODY) & (np.abs(hu[:, :, :12] - 78) < 25)
    assert solid[48:].sum() > 1.5 * solid[:48].sum()
    middle = (labels == ct.BONE)[44:52]
    assert middle[:, :48].sum() > 3 * middle[:, 48:].sum()


def test_emboli_are_surrounded_by_what_they_lie_in(scan):
    _, labels = scan
    clot = labels == ct.EMBOLUS
    assert clot.sum() > 100
    shell = binary_dilation(clot) & ~clot
    assert np.isin(labels[shell], [ct.VESSEL, ct.LUNG, ct.BODY, ct.AIRWAY]).all()
    assert (labels[shell] == ct.VESSEL).mean() > 0.35
    assert set(np.unique(labels[binary_dilation(labels == ct.LUNG, iterations=3)])) >= {ct.VESSEL, ct.EMBOLUS, ct.AIRWAY}


def test_slabs_do_not_show(scan, monkeypatch):
    monkeypatch.setattr(ct, "SLAB", 7 * 40 * 40)
    parts = ct.volume(ILL, (40, 40, 40))
    monkeypatch.setattr(ct, "SLAB", 1 << 30)
    whole = ct.volume(ILL, (40, 40, 40))
    assert np.abs(parts[0].astype(int) - whole[0]).max() <= 1  # rounding: sums of other lengths
    assert (parts[1] != whole[1]).mean() < 1e-4


def test_noise_falls_with_the_size_of_a_voxel(monkeypatch):
    drawn = replace(ct.draw_protocol(1), noise=18.0)
    deviations = []
    for size, spacing in (((56, 56, 5), (3.5, 3.5, 3.5)), ((64, 64, 5), (0.8, 0.8, 0.8))):
        made = []
        for noise in (18.0, 0.0):
            monkeypatch.setattr(ct, "draw_protocol", lambda *_, noise=noise: replace(drawn, noise=noise))
            made.append(ct.volume(1, size, spacing)[0][10:-10, 10:-10])
        difference = made[0].astype(float) - made[1]
        deviations.append(difference.std())
        window = np.outer(*2 * [np.hanning(len(difference))])
        power = (np.abs(np.fft.fft2(difference * window[..., None], axes=(0, 1))) ** 2).mean(2)
        frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, power.shape), indexing="ij"))
        low, middle, high = (
            power[(frequency > a) & (frequency < b)].mean() for a, b in ((0, 0.07), (0.15, 0.3), (0.45, 0.7))
        )
        assert max(low, high) < 0.5 * middle  # band-passed in the plane
    assert 8 < deviations[0] < 13 and 16 < deviations[1] < 23


# ---------------------------------------------------------------------------------------------------------------------
# Folder


def test_patients_do_not_depend_on_how_many_there_are(folder, tmp_path):
    ct.write(tmp_path / "two", 2, seed=3, **SMALL)
    ct.write(tmp_path / "other", 1, seed=4, **SMALL)
    many, two, other = contents(folder), contents(tmp_path / "two"), contents(tmp_path / "other")
    for name in set(two) - {"info.json", "sheet.png"}:
        assert two[name] == many[name]
    assert json.loads(two["info.json"])["scans"] == json.loads(many["info.json"])["scans"][:2]
    assert other["scans/patient001_scan1.nii.gz"] != many["scans/patient001_scan1.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "two"]  # nothing half-made beside them


def test_files_are_the_volumes_in_their_geometry(folder):
    info = json.loads((folder / "info.json").read_text())
    names = [f"patient{i:03d}_scan1" for i in range(1, 8)] + ["patient007_scan2"]
    assert [scan["name"] for scan in info["scans"]] == names
    assert sorted(path.name for path in (folder / "scans").iterdir()) == [f"{name}.nii.gz" for name in names]
    assert info["scans"][6]["patient"] == info["scans"][7]["patient"]
    assert info["scans"][6]["protocol"] != info["scans"][7]["protocol"]
    corners = set()
    for scan in info["scans"]:
        image = nibabel.load(folder / "scans" / f"{scan['name']}.nii.gz")
        assert "".join(nibabel.aff2axcodes(image.affine)) == scan["orientation"]
        assert image.get_data_dtype() == np.int16 and image.header.get_slope_inter() == (None, None)
        straight = nibabel.as_closest_canonical(image)
        assert np.allclose(np.diag(straight.affine)[:3], scan["spacing"], rtol=1e-5)
        corners.add(tuple(straight.affine[:3, 3]))
        truth = np.load(folder / "truth" / f"{scan['name']}.npz")
        assert truth["names"].tolist() == list(ct.LABELS) and truth["labels"].shape == straight.shape == tuple(scan["shape"])
        if scan["name"] in ("patient001_scan1", "patient003_scan1", "patient007_scan2"):
            hu, labels = ct.volume(scan["volume_seed"], scan["shape"], scan["spacing"], scan=scan["scan"])
            assert np.array_equal(np.asarray(straight.dataobj), hu) and np.array_equal(truth["labels"], labels)
    assert len(corners) == 8
    assert {scan["orientation"] for scan in info["scans"]} == {"RAS", "LPS", "PSR"}


def test_shapes_and_spacings_are_odd(folder):
    scans = json.loads((folder / "info.json").read_text())["scans"]
    shapes = np.array([scan["shape"] for scan in scans])
    assert shapes[0].tolist() == list(SMALL["size"]) and (shapes[1:] % 2 == 1).all()
    assert len(np.unique(shapes, axis=0)) >= 6
    assert (shapes >= 0.85 * np.array(SMALL["size"])).all() and (shapes <= 1.12 * np.array(SMALL["size"])).all()
    extent = shapes * [scan["spacing"] for scan in scans]
    assert (extent[:, 2] > 260).all() and (extent[:, 2] < 370).all() and (extent.max(1) > 270).all()


def test_the_sheet_shows_the_first_patients(folder):
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    assert sheet.shape == (6 * 320, 6 * 320)
    tiles = sheet.reshape(6, 320, 6, 320).std((1, 3))
    assert (tiles > 30).all()


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ct.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        ct.write(tmp_path / "set", 2, **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_killed_write_leaves_no_folder(tmp_path):
    command = [sys.executable, "-m", "common.demo_data.ct", "--out", tmp_path / "set", "--patients", "1000"]
    process = subprocess.Popen([*map(str, command), "--size", "24", "24", "24"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(".set.partial-*/truth/*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "set").exists()


def test_the_command_line_makes_a_folder(tmp_path, monkeypatch, capsys):
    flags = ["--out", str(tmp_path / "set"), "--patients", "1", "--seed", "3", "--size", "24", "26", "25"]
    monkeypatch.setattr(sys, "argv", ["ct", *flags])
    ct.main()
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: made\n"
    assert nibabel.load(tmp_path / "set" / "scans" / "patient001_scan1.nii.gz").shape == (24, 26, 25)


@pytest.mark.parametrize(
    "flag, settings", [("--out", {}), ("--size", {"size": (96, 20, 96)}), ("--patients", {"patients": 0})]
)
def test_what_cannot_be_made_is_refused(tmp_path, flag, settings):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=flag):
        ct.write(tmp_path if flag == "--out" else tmp_path / "set", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
