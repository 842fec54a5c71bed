"""Codes and reconstructions: scans come back where they were, codes mean one model's, tiles and processes do not show."""

import csv
import json
import math
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, run
from nibabel.orientations import axcodes2ornt, ornt_transform
from safetensors.torch import save_file

from common import ct
from common.checkpoints import tensors_of
from common.cli import UserError
from common.volume_metrics import scores
from scripts import predict_vqgan as predict
from scripts import train_vqgan as job

PREDICT = {"script": ROOT / "scripts" / "predict_vqgan.py"}
WINDOW = {"hu_min": -1000, "hu_max": 800}
# name: (axes of the file, shape in RAS order). None is a multiple of 4 throughout, one is thinner than a cell, and two are
# longer than a tile of 16 with the 20 voxels around it that the network sees.
SCANS = {
    "patient1_scan1.nii.gz": ("RAS", (63, 14, 17)),
    "sub/patient1_scan2.nii": ("LPS", (18, 11, 57)),
    "sub/deep/patient2.nii.gz": ("PSR", (14, 33, 22)),
    "patient3.nii.gz": ("SRA", (3, 9, 18)),
}


def write_volume(path: Path, axes: str, shape: tuple[int, ...], seed: int = 0) -> None:
    """Blobs and noise beyond the window, at a place of their own."""
    rng = np.random.default_rng([seed, *shape])
    coarse = rng.normal(-300, 600, [side // 5 + 2 for side in shape])
    blobs = coarse[np.ix_(*(np.arange(side) // 5 for side in shape))]
    hu = (blobs + rng.normal(0, 60, shape)).round().astype(np.int16)
    tilt = nib.eulerangles.euler2mat(0.05, -0.08, 0.1) * [0.8, 0.7, 1.25]  # mm
    image = nib.Nifti1Image(hu, nib.affines.from_matvec(tilt, [-71.5, 33, 1002]))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))), path)


def make_model(path: Path, **changes) -> Path:
    """model/ of a tiny VQ-GAN that is not as it begins, when its blocks are the identity."""
    flags = {"downsample": (4, 4, 4), "width": 4, "blocks": 1, "norm": "rms", "quantizer": "ema", "n_codes": 64}
    flags |= {"embedding_dim": 4, "fsq_levels": (8, 6, 5), **WINDOW} | changes
    assert flags.keys() == set(job.MODEL_FLAGS)
    torch.manual_seed(len(path.parts[-1]))
    model = job.VQGAN(job.Config(**flags))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                module.weight.normal_(std=1 / math.sqrt(module.weight[0].numel()))
                module.bias.normal_(std=0.1)
    path.mkdir(parents=True)
    save_file(tensors_of(model), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"config": flags, "step": 1}))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("vqgan") / "model")


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ct")
    for seed, (name, (axes, shape)) in enumerate(SCANS.items()):
        write_volume(root / name, axes, shape, seed)
    return root


def do(folder: Path, source: Path, out: Path | None, mode: str, **flags) -> None:
    predict.main(predict.Config(folder, (source,), out, **{mode: True}, **({"tile_size": 16} | flags)))


def plan(source: Path | tuple[Path, ...], out: Path, mode: str) -> list[predict.Task]:
    sources = source if isinstance(source, tuple) else (source,)
    return predict.plan(predict.Config(Path("model"), sources, out, **{mode: True}))


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def packed(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii") + ".nii.gz"


def coded(name: str) -> str:
    return packed(name).removesuffix(".nii.gz") + ".npz"


@pytest.fixture(scope="session")
def reconstructed(folder, scans, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "reconstructed"
    do(folder, scans, out, "reconstruct")
    return out


@pytest.fixture(scope="session")
def encoded(folder, scans, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "codes"
    do(folder, scans, out, "encode")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# there and back


def test_scans_come_back_where_they_were(scans, reconstructed):
    assert files(reconstructed) == {packed(name) for name in SCANS} | {"metrics.csv", "model.json"}
    for name, (axes, shape) in SCANS.items():
        before, after = nib.load(scans / name), nib.load(reconstructed / packed(name))
        assert after.shape == before.shape and after.get_data_dtype() == np.int16, name
        assert np.array_equal(after.affine, before.affine), name
        assert "".join(nib.aff2axcodes(after.affine)) == axes and nib.as_closest_canonical(after).shape == shape
        assert after.header.get_slope_inter() in ((None, None), (1, 0))


def test_reconstructions_are_what_the_whole_network_makes(folder, scans, reconstructed):
    """Without any of the script: nibabel turns the volume, the network sees it whole, filled up to whole cells."""
    model, _ = job.load_model(folder)
    low, high = WINDOW.values()
    for name in SCANS:
        turned = nib.as_closest_canonical(nib.load(scans / name))
        hu = np.asarray(turned.dataobj).astype(np.float64)
        filled = np.pad(hu, [(0, -side % 4) for side in hu.shape], mode="edge").clip(low, high)
        with torch.no_grad():
            unit = torch.from_numpy((filled - low) / (high - low) * 2 - 1).float()[None, None]
            wanted = (model(unit).reconstruction[0, 0].numpy().clip(-1, 1) + 1) / 2 * (high - low) + low
        wanted = wanted[tuple(map(slice, hu.shape))]
        result = np.asarray(nib.as_closest_canonical(nib.load(reconstructed / packed(name))).dataobj)
        assert wanted.std() > 100 and np.abs(result - wanted).max() <= 0.51, name


def test_metrics_are_those_of_the_written_files(scans, reconstructed):
    lines = {line["image"]: line for line in csv.DictReader((reconstructed / "metrics.csv").open())}
    assert sorted(lines) == sorted(packed(name).removesuffix(".nii.gz") for name in SCANS)
    for name in SCANS:
        pair = (np.asarray(nib.load(root).dataobj) for root in (reconstructed / packed(name), scans / name))
        output, target = (torch.from_numpy(hu.astype(np.int16)) for hu in pair)
        line = lines[packed(name).removesuffix(".nii.gz")]
        for key, value in scores(output, target, **WINDOW, masks={}).items():
            assert float(line[key]) == pytest.approx(value, rel=1e-4), (name, key)


def test_encode_and_decode_are_the_reconstruction(folder, encoded, reconstructed, tmp_path):
    do(folder, encoded, tmp_path / "out", "decode", tile_size=64)
    assert files(tmp_path / "out") == {packed(name) for name in SCANS} | {"model.json"}
    for name in map(packed, SCANS):
        one, other = (nib.load(root / name) for root in (tmp_path / "out", reconstructed))
        assert np.array_equal(one.affine, other.affine) and one.get_data_dtype() == np.int16
        # tiles of another size round differently in the last digit of float32, seldom across a half
        difference = np.abs(np.asarray(one.dataobj).astype(int) - np.asarray(other.dataobj))
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    do(folder, encoded, tmp_path / "same", "decode")
    for name in map(packed, SCANS):
        one, other = (np.asarray(nib.load(root / name).dataobj) for root in (tmp_path / "same", reconstructed))
        assert np.array_equal(one, other), name


def test_code_files_are_as_documented(folder, scans, encoded):
    """What another script needs: integers whose rows of codebook.npy the decoder turns into the volume."""
    assert files(encoded) == {coded(name) for name in SCANS} | {"codebook.npy", "model.json"}
    model, _ = job.load_model(folder)
    codebook = np.load(encoded / "codebook.npy")
    assert codebook.shape == (64, 4) and codebook.dtype == np.float32
    for name in SCANS:
        with np.load(encoded / coded(name)) as file:
            codes, about = file["codes"], json.loads(str(file["about"]))
        hu, geometry = ct.read_scan(scans / name)
        assert codes.dtype == np.int16 and codes.shape == tuple(-(-side // 4) for side in hu.shape)
        assert codes.min() >= 0 and codes.max() < 64 and len(np.unique(codes)) > 8
        assert ct.Geometry.from_dict(about["geometry"]) == geometry
        assert np.array_equal(about["geometry"]["affine"], geometry.affine)
        assert {key: about[key] for key in ("hu_min", "hu_max", "codes")} == WINDOW | {"codes": 64}
        assert about["downsample"] == [4, 4, 4]
        with torch.no_grad():
            latents = torch.from_numpy(codebook[codes]).movedim(-1, 0)[None]
            assert torch.equal(model.decoder(latents), model.decode(torch.from_numpy(codes)[None].long()))


def test_many_codes_need_more_bits(scans, tmp_path):
    """65,536 codes do not fit into int16, where half of them would be negative."""
    model = make_model(tmp_path / "model", quantizer="fsq", fsq_levels=(16, 16, 16, 16))
    scan = scans / "patient1_scan1.nii.gz"
    do(model, scan, tmp_path / "codes", "encode")
    with np.load(tmp_path / "codes" / "patient1_scan1.npz") as file:
        assert file["codes"].dtype == np.int32 and file["codes"].max() >= 2**15
    assert np.load(tmp_path / "codes" / "codebook.npy").shape == (2**16, 4)
    do(model, tmp_path / "codes", tmp_path / "out", "decode")
    do(model, scan, tmp_path / "direct", "reconstruct")
    one, other = (nib.load(tmp_path / name / scan.name) for name in ("out", "direct"))
    assert np.array_equal(one.dataobj, other.dataobj)


# ---------------------------------------------------------------------------------------------------------------------
# whose codes


def test_codes_of_another_model_are_refused(folder, encoded, tmp_path, capfd):
    other = make_model(tmp_path / "another model")
    with pytest.raises(UserError, match="4 of 4 files failed"):
        do(other, encoded, tmp_path / "out", "decode")
    assert "patient3.npz holds codes of another model" in capfd.readouterr().err
    assert files(tmp_path / "out") == {"model.json"}
    shifted = make_model(tmp_path / "model", hu_min=-1024)  # the same weights (seeded by the name), another window
    with pytest.raises(UserError, match="4 of 4 files failed"):
        do(shifted, encoded, tmp_path / "out2", "decode")


def test_a_decoder_that_was_trained_further_reads_the_same_codes(folder, encoded, reconstructed, tmp_path):
    model, saved = job.load_model(folder)
    with torch.no_grad():
        model.decoder[-1].bias += 0.1
    (tmp_path / "model").mkdir()
    save_file(tensors_of(model), tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    do(tmp_path / "model", encoded, tmp_path / "out", "decode")
    one, other = (np.asarray(nib.load(root / "patient3.nii.gz").dataobj) for root in (tmp_path / "out", reconstructed))
    assert np.median(one - other) == pytest.approx(90, abs=1)  # 0.1 of half the window's 1800 HU
    with pytest.raises(UserError, match="holds files of another model"):  # its scans must not be mixed with the old ones
        do(folder, encoded, tmp_path / "out", "decode")


def test_codes_that_cannot_be_are_named(folder, encoded, tmp_path, capfd):
    good = encoded / "patient3.npz"
    with np.load(good) as file:
        codes, about = file["codes"], json.loads(str(file["about"]))
    source = tmp_path / "codes"
    for name, changed in {
        "beyond": np.where(codes == codes.max(), 64, codes),
        "negative": codes - 64,
        "float": codes.astype(np.float32),
        "shape": codes[:, :, 1:],
        "good": codes.astype(np.uint8),
    }.items():
        predict.write_codes(source / f"{name}.npz", changed, about)
    (source / "truncated.npz").write_bytes(good.read_bytes()[:-100])
    (source / "text.npz").write_text("no archive")
    np.savez(source / "foreign.npz", image=codes)
    with pytest.raises(UserError, match="7 of 8 files failed"):
        do(folder, source, tmp_path / "out", "decode")
    said = capfd.readouterr().err
    for name in ("beyond", "negative", "float"):
        assert f"{name}.npz holds codes that are not integers from 0 to 63" in said
    assert "shape.npz holds codes of the shape" in said
    for name in ("truncated", "text", "foreign"):
        assert f"{name}.npz cannot be read as a code file" in said
    assert files(tmp_path / "out") == {"good.nii.gz", "model.json"}


# ---------------------------------------------------------------------------------------------------------------------
# tiles


def told(text: str) -> tuple[float, float]:
    found = re.search(r"at most (\S+) HU apart before rounding, (\S+)% of the codes equal", text)
    return float(found[1]), float(found[2])


def test_check_tiling_finds_no_seams(folder, scans, capfd):
    do(folder, scans / "patient1_scan1.nii.gz", None, "check_tiling")
    text = capfd.readouterr().err
    apart, equal = told(text)
    assert apart < 0.01 and equal > 99.9 and "WARNING" not in text
    assert "takes the memory" in text


def test_one_tile_proves_nothing(folder, scans):
    with pytest.raises(UserError, match="is one tile, there is nothing to compare: give --tile-size "):
        coder = job.Coder(job.load_model(folder)[0], *WINDOW.values(), 512, torch.device("cpu"))
        predict.check_tiling(coder, scans / "patient1_scan1.nii.gz", 512)


def test_check_tiling_finds_seams(folder, scans, tmp_path, capfd):
    scan = scans / "patient1_scan1.nii.gz"
    predict.setup_logging()
    coder = job.Coder(job.load_model(folder)[0], *WINDOW.values(), 16, torch.device("cpu"))
    coder.halo_out = (coder.halo_out[0] - 2, *coder.halo_out[1:])
    predict.check_tiling(coder, scan, 16)
    text = capfd.readouterr().err
    assert told(text)[0] > 0.1 and "there are seams" in text
    do(make_model(tmp_path / "model", norm="group"), scan, None, "check_tiling")
    text = capfd.readouterr().err
    assert told(text)[0] > 1 and "--norm group" in text


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_what_exists_is_kept_and_measured(folder, scans, reconstructed, tmp_path, capfd):
    out = tmp_path / "out"
    do(folder, scans / "sub", out, "reconstruct")
    before = (out / "metrics.csv").read_text()
    (out / "metrics.csv").unlink()
    (out / "deep" / "patient2.nii.gz").unlink()
    kept = (out / "patient1_scan2.nii.gz").stat().st_mtime_ns
    capfd.readouterr()
    do(folder, scans / "sub", out, "reconstruct")
    assert "1 of 2 outputs exist and are kept and only measured" in capfd.readouterr().err
    assert (out / "patient1_scan2.nii.gz").stat().st_mtime_ns == kept
    assert (out / "metrics.csv").read_text() == before and (out / "deep" / "patient2.nii.gz").exists()
    do(folder, scans / "sub", out, "reconstruct", overwrite=True)
    assert (out / "patient1_scan2.nii.gz").stat().st_mtime_ns > kept
    other = make_model(tmp_path / "another model")
    with pytest.raises(UserError, match="holds files of another model"):
        do(other, scans / "sub", out, "reconstruct")
    do(other, scans / "sub", out, "reconstruct", overwrite=True)
    assert (out / "metrics.csv").read_text() != before


def test_collisions_and_overwriting_are_refused(scans, encoded, tmp_path):
    one = tmp_path / "one"
    write_volume(one / "a.nii", "RAS", (4, 4, 4))
    write_volume(one / "a.nii.gz", "RAS", (4, 4, 4))
    for mode in ("encode", "reconstruct"):
        with pytest.raises(UserError, match=r"one/a.nii and .*one/a.nii.gz would both be written to .*out/a"):
            plan(one, tmp_path / "out", mode)
        with pytest.raises(UserError, match="lies in --inputs"):
            plan(one, one / "new", mode)
    other = tmp_path / "other"
    write_volume(other / "a.nii", "RAS", (4, 4, 4))
    with pytest.raises(UserError, match=r"one/a.nii and .*other/a.nii would both be written to .*out/a"):
        plan((one / "a.nii", other / "a.nii"), tmp_path / "out", "encode")
    with pytest.raises(UserError, match="lies in --inputs"):
        plan((scans, other), other / "new", "encode")
    with pytest.raises(UserError, match="would be overwritten"):
        plan(one / "a.nii.gz", one, "reconstruct")
    with pytest.raises(UserError, match="holds no code files"):
        plan(scans, tmp_path / "out", "decode")
    with pytest.raises(UserError, match="holds no .nii"):
        plan(encoded, tmp_path / "out", "encode")
    with pytest.raises(UserError, match="does not exist"):
        plan(tmp_path / "nowhere", tmp_path / "out", "decode")
    assert not (tmp_path / "out").exists()


def test_files_and_folders_are_taken_together_and_each_once(scans, tmp_path):
    tasks = plan((scans / "sub", scans / "patient3.nii.gz", scans / "patient3.nii.gz"), tmp_path, "encode")
    made = {task.outputs["made"].relative_to(tmp_path).as_posix(): task.source for task in tasks}
    assert len(tasks) == 3 and made == {
        "patient1_scan2.npz": scans / "sub/patient1_scan2.nii",
        "deep/patient2.npz": scans / "sub/deep/patient2.nii.gz",
        "patient3.npz": scans / "patient3.nii.gz",
    }


def test_wrong_flags_are_sentences(folder, scans, tmp_path):
    for flags in ({}, {"encode": True, "decode": True}, {"decode": True, "check_tiling": True}):
        with pytest.raises(ValueError, match="Give one of --encode, --decode and --reconstruct"):
            predict.Config(folder, (scans,), tmp_path, **flags)
    with pytest.raises(ValueError, match="--output-dir is missing"):
        predict.Config(folder, (scans,), encode=True)
    with pytest.raises(ValueError, match="--inputs is missing"):
        predict.Config(folder, (), tmp_path, encode=True)
    with pytest.raises(ValueError, match="--check-tiling alone makes nothing"):
        predict.Config(folder, (scans,), tmp_path, check_tiling=True)
    with pytest.raises(ValueError, match="--tile-size 8"):
        predict.Config(folder, (scans,), tmp_path, encode=True, tile_size=8)
    with pytest.raises(UserError, match="holds no config.json"):
        do(tmp_path, scans, tmp_path / "out", "encode")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"backbone": "resnet"}}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="is no intact model of train_vqgan"):
        do(tmp_path, scans, tmp_path / "out", "encode")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(UserError, match="is no intact model of train_vqgan"):
        do(tmp_path, scans, tmp_path / "out", "encode")


def test_values_that_are_not_finite_are_not_written(folder, scans, tmp_path, capfd):
    model, saved = job.load_model(folder)
    with torch.no_grad():
        model.decoder[-1].bias.fill_(torch.inf)
    (tmp_path / "model").mkdir()
    save_file(tensors_of(model), tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="1 of 1 files failed"):
        do(tmp_path / "model", scans / "patient3.nii.gz", tmp_path / "out", "reconstruct")
    assert "patient3.nii.gz gave values that are not finite" in capfd.readouterr().err
    assert files(tmp_path / "out") == {"model.json"}


# ---------------------------------------------------------------------------------------------------------------------
# processes


def test_damaged_files_are_named_and_any_number_of_processes_writes_the_same(folder, scans, reconstructed, tmp_path):
    source = tmp_path / "in"
    for name in SCANS:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((scans / name).read_bytes())
    damaged = source / "sub" / "deep" / "patient2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    nib.save(nib.Nifti1Image(np.zeros((6, 6, 6, 2), np.int16), np.eye(4)), source / "series.nii.gz")
    common = ["--model", folder, "--inputs", source, "--reconstruct", "--tile-size", 16, "--check-tiling", "--output-dir"]
    texts = [run([*common, tmp_path / f"out{n}"], ok=False, processes=n, **PREDICT) for n in (1, 2)]
    for text in texts:
        assert "patient2.nii.gz cannot be used: truncated" in text and "series.nii.gz cannot be used: 4D" in text
        assert "ERROR: 2 of 5 files failed" in text and "Traceback" not in text
        assert told(text)[0] < 0.01 and text.count("HU apart") == 1
        assert all(re.search(rf"{name}: PSNR=\S+ dB, RMSE \S+ HU, SSIM=", text) for name in SCANS if "patient2" not in name)
    outs = [tmp_path / "out1", tmp_path / "out2"]
    made = {packed(name) for name in SCANS if "patient2" not in name}
    assert files(outs[0]) == files(outs[1]) == made | {"metrics.csv", "model.json"}
    assert (outs[0] / "metrics.csv").read_text() == (outs[1] / "metrics.csv").read_text()
    for name in made:
        one, other, wanted = (np.asarray(nib.load(root / name).dataobj) for root in (*outs, reconstructed))
        assert np.array_equal(one, other) and np.array_equal(one, wanted), name
