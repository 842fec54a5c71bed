"""What train_vqgan.py promises: the same run on any number of processes and after any interruption, both networks trained
and neither by the other's gradients, a codebook that lives, tiles without seams, sentences for bad flags and files."""

import csv
import re
import shutil
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, assert_same_run, rows, run
from pages import assert_explained

from common import ct
from common.cli import UserError
from common.data import StepSampler
from scripts import train_vqgan as job

ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
launch = partial(run, script=ROOT / "scripts" / "train_vqgan.py")
TINY = ("--patch-size", 16, 16, 16, "--width", 4, "--blocks", 1, "--n-codes", 32, "--disc-width", 4, "--disc-layers", 2)
TINY += ("--perceptual-weight", 0)
QUICK = (*TINY, "--tile-size", 32, "--tracker", "none", "--num-workers", 0, "--log-every", 1)
STEPS, START, GLOBAL_BATCH = 9, 4, 4


def small(**flags) -> job.Config:
    settings = {"patch_size": (16, 16, 16), "width": 4, "blocks": 1, "n_codes": 32, "disc_width": 4, "disc_layers": 2}
    settings["perceptual_weight"] = 0.0
    return job.Config(**settings | {"tile_size": 16} | flags)


def build(**flags) -> tuple[job.Config, job.VQGAN, job.Discriminators]:
    torch.manual_seed(0)
    config = small(**flags)
    model = job.VQGAN(config)
    if config.quantizer == "ema":
        model.quantizer.start(Accelerator(cpu=True), [torch.randn(1, config.embedding_dim, 8, 8, 8)], seed=0)
    return config, model, job.Discriminators(config)


def patches(count: int = 2, side: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(count, 1, side, side, side, generator=generator) * 2 - 1
    picks = torch.rand(count, job.PICKS, generator=generator)
    return {"volume": volume, "slices": torch.rand(count, 3, 2, generator=generator), "picks": picks}


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def flags(chests):
    """Discriminators train from step 2, the generator sees them from 4 on with a ramp of 3 steps, to the end at 9."""
    often = ("--epochs", 3, "--max-steps", STEPS, "--eval-every", 5, "--save-every", 3, "--warmup-steps", 2)
    split = ("--val-patients", 2, "--test-patients", 3, "--crops-per-scan", 3)
    gan = ("--discriminator-iter-start", START, "--discriminator-warmup", 2, "--gan-ramp", 3)
    return ["--dataset-path", chests / "scans", *QUICK, *often, *split, *gan]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """(folder, what was printed) of a run with this global batch, made when first asked for."""

    @cache
    def get(processes: int = 1, accumulation: int = 1, *more) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("trained")
        dealt = ("--batch-size", GLOBAL_BATCH // processes // accumulation, "--accumulation-steps", accumulation)
        via = "python" if processes == 1 and not more else None  # draws its pictures
        return folder, launch([*flags, *dealt, *more, "--output-dir", folder], processes=processes, via=via)

    return get


ALL = ("--adaptive-weight", "--lecam-weight", 0.01)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_the_same_global_batch_gives_the_same_run(trained, processes, accumulation):
    """Both networks and the codebook, with every weight that is measured while training."""
    (one, _), (other, _) = trained(1, 1, *ALL), trained(processes, accumulation, *ALL)
    assert len(rows(one, "train")) == STEPS
    assert_same_run(other, one, rtol=2e-4, atol=2e-6)


def test_each_network_begins_at_its_step(trained):
    for row in rows(trained()[0], "train"):
        step = row["step"] - 1  # steps are counted from 0, rows say how many are done
        assert ("train/image_disc" in row) == ("train/video_disc" in row) == (step >= START - 2)
        assert ("train/video_gan" in row) == ("train/gan_feat" in row) == (row["train/gan_factor"] > 0)
        assert row["train/gan_factor"] == pytest.approx(min(max((step - START) / 3, 0), 1), abs=0.34)
    assert rows(trained()[0], "train")[-1]["train/gan_factor"] == 1
    assert re.search(r"sees it from step 4 of 9", trained()[1])


def gone_back(golden: Path, folder: Path) -> None:
    """A copy of a run as it was when it had saved step 6, in the adversarial phase."""
    shutil.copytree(golden, folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if path.name > "step-00000006":
            shutil.rmtree(path)
    (folder / "DONE").unlink()


def test_a_run_interrupted_in_the_adversarial_phase_goes_on_to_the_bit_and_workers_change_nothing(trained, flags, tmp_path):
    """The codebook, Adam's moments of both networks, and all weights that are measured while training."""
    golden = trained(1, 1, *ALL)[0]
    gone_back(golden, tmp_path / "run")
    dealt = ("--batch-size", GLOBAL_BATCH, "--output-dir", tmp_path / "run", "--resume-from", "auto", "--num-workers", 2)
    assert "Resumed from step 6\n" in launch([*flags, *ALL, *dealt])
    assert_same_run(tmp_path / "run", golden)
    mine, theirs = (sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (tmp_path / "run", golden))
    assert (mine / "disc.safetensors").read_bytes() == (theirs / "disc.safetensors").read_bytes()


def test_one_process_goes_on_as_two(trained, flags, tmp_path):
    golden = trained(1, 1, *ALL)[0]
    gone_back(golden, tmp_path / "run")
    dealt = ("--batch-size", GLOBAL_BATCH // 2, "--output-dir", tmp_path / "run", "--resume-from", "auto")
    launch([*flags, *ALL, *dealt], processes=2)
    assert_same_run(tmp_path / "run", golden, rtol=2e-4, atol=2e-6)


def test_a_killed_test_phase_is_finished_by_two_processes_with_the_same_numbers(trained, flags, tmp_path):
    shutil.copytree(trained()[0], tmp_path / "run")
    for name in ("DONE", "report.txt", "test.csv"):
        (tmp_path / "run" / name).unlink()
    dealt = ("--batch-size", GLOBAL_BATCH // 2, "--output-dir", tmp_path / "run", "--resume-from", "auto")
    launch([*flags, *dealt], processes=2)
    assert_same_run(tmp_path / "run", trained()[0])
    for name in ("test.csv", "report.txt"):
        assert (tmp_path / "run" / name).read_text() == (trained()[0] / name).read_text()


@pytest.mark.parametrize(
    "more",
    [
        ("--quantizer", "fsq", "--fsq-levels", 5, 4, 3, "--downsample", 4, 4, 2, "--gradient-checkpointing"),
        ("--norm", "batch", "--mixed-precision", "bf16", "--stride", 32, 32, 32),
        ("--norm", "group", "--gan-feat-weight", 0, "--image-gan-weight", 0, "--video-gan-weight", 0, "--max-patients", 7),
    ],
    ids=["fsq", "batch", "group"],
)
def test_every_choice_trains_on_two_processes(trained, more):
    folder, text = trained(2, 1, *more)
    train = rows(folder, "train")
    assert len(train) >= 6 and all(np.isfinite(row["train/loss"]) for row in train)
    assert ("differ from the whole volume" in text) == ("group" in more)
    assert ("train/video_disc" in train[-1]) == ("group" not in more)


def test_the_record_of_a_run(trained, chests):
    folder, text = trained()
    assert re.search(r"\[CT\] test: PSNR=\d+\.\d\d dB, RMSE \d+\.\d HU, SSIM=0\.\d+ at 0\.078 bits per voxel", text)
    assert re.search(r"32 codes, one for 4x4x4 voxels: 0\.078 bits per voxel, 205 times less than int16", text)
    lines = list(csv.DictReader((folder / "test.csv").open()))
    tested = {line["image"] if "image" in line else line["scan"] for line in lines}
    [row] = rows(folder, "test")
    assert np.mean([float(line["psnr"]) for line in lines]) == pytest.approx(row["test/psnr"], rel=1e-5)
    assert {ct.patient_of(Path(name), ct.PATIENT) for name in tested}.__len__() == 3
    assert row["test/resize_psnr"] > 0 and 0 < row["test/codes_used"] <= 1
    for name in ("validation", "test"):
        assert (folder / "samples" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "resize" in (folder / "report.txt").read_text()
    val = rows(folder, "val")
    assert {"val/psnr", "val/hu_rmse", "val/ssim", "val/codes_used", "val/code_perplexity"} <= val[0].keys()
    assert_explained("vqgan", folder, trained(1, 1, *ALL)[0], unseen={"train/perceptual"})


def test_the_exported_average_is_what_was_evaluated(trained, chests):
    folder, _ = trained()
    model, saved = job.load_model(folder / "model")
    coder = job.Coder(model, saved["config"]["hu_min"], saved["config"]["hu_max"], 64, torch.device("cpu"))  # other tiles
    for line in csv.DictReader((folder / "test.csv").open()):
        name = line["image"] if "image" in line else line["scan"]
        hu, _ = ct.read_scan(next((chests / "scans").rglob(name)))
        hu = torch.from_numpy(hu)
        output = coder.decode(coder.encode(hu), hu.shape)
        error = (output.clamp(-1000, 1000).double() - hu.clamp(-1000, 1000).double()).square().mean().sqrt().item()
        assert float(line["hu_rmse"]) == pytest.approx(error, rel=1e-3)


def test_a_frozen_encoder_keeps_every_code_while_the_decoder_learns(trained, flags, tmp_path):
    start = trained()[0] / "model"
    args = [*flags, "--freeze-encoder", "--init-from", start, "--patch-size", 24, 24, 24, "--batch-size", 2]
    launch([*args, "--max-steps", 5, "--discriminator-iter-start", 2, "--output-dir", tmp_path / "run"])
    (before, _), (after, _) = job.load_model(start), job.load_model(tmp_path / "run/model")
    volume = patches()["volume"]
    assert torch.equal(before.encode(volume), after.encode(volume))
    for name, value in after.state_dict().items():
        same = torch.equal(value, before.state_dict()[name])
        assert same != name.startswith("decoder"), name


def test_weights_of_another_model_are_refused(trained, flags, tmp_path):
    args = [*flags, "--init-from", trained()[0] / "model", "--width", 8, "--output-dir", tmp_path / "run"]
    text = launch(args, ok=False)
    assert "does not fit: give a model/ folder, same model flags." in text and "Traceback" not in text


# ---------------------------------------------------------------------------------------------------------------------
# data


def test_bad_files_are_named_before_training_and_a_folder_of_none_is_refused(chests, tmp_path, caplog):
    caplog.set_level("INFO", "run")
    shutil.copytree(chests / "scans", tmp_path / "scans", ignore=shutil.ignore_patterns(".cache"))
    paths = sorted((tmp_path / "scans").glob("*.nii.gz"))
    image = nibabel.load(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:2000])
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 3), np.int16), image.affine), tmp_path / "scans/four_1.nii.gz")
    (tmp_path / "scans/series.dcm").write_bytes(b"no")
    config = small(dataset_path=tmp_path / "scans", val_patients=2, test_patients=2)
    parts = job.prepare_data(config, ALONE)
    assert f"{paths[1].name}: " in caplog.text and "four_1.nii.gz: " in caplog.text
    used = [scan.path.name for part in (parts.train, parts.val, parts.test) for scan in part.scans]
    assert sorted(used) == [path.name for path in paths if path != paths[1]]
    with pytest.raises(UserError, match="--dataset-path"):
        job.prepare_data(small(dataset_path=tmp_path / "nothing"), ALONE)


def test_scans_of_one_patient_are_in_one_part(chests):
    for seed in range(5):
        parts = job.prepare_data(small(dataset_path=chests / "scans", val_patients=2, test_patients=3, seed=seed), ALONE)
        patients = [{scan.patient for scan in part.scans} for part in (parts.train, parts.val, parts.test)]
        assert len(set.union(*patients)) == sum(map(len, patients)) and len(patients[1]) == 2 and len(patients[2]) == 3


def test_patches_are_a_function_of_seed_epoch_and_index(chests):
    def sample(key, **more):
        return job.prepare_data(small(dataset_path=chests / "scans", val_patients=2, test_patients=3, **more), ALONE).train[
            key
        ]

    one, again = sample((2, 5)), sample((2, 5))
    assert all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(again[name])) for name in one)
    for other in (sample((3, 5)), sample((2, 6))):
        assert not torch.equal(one["volume"], other["volume"]) and not torch.equal(one["slices"], other["slices"])
    assert one["volume"].shape == (1, 16, 16, 16) and -1 <= one["volume"].min() and one["volume"].max() <= 1


def test_the_grid_holds_every_voxel(chests):
    config = small(dataset_path=chests / "scans", val_patients=2, test_patients=3, stride=(12, 16, 10))
    train = job.prepare_data(config, ALONE).train
    seen = [np.zeros(scan.shape, bool) for scan in train.scans]
    for number, corner in train.corners:
        seen[number][tuple(slice(c, c + 16) for c in corner)] = True
    assert all(part.all() for part in seen)


# ---------------------------------------------------------------------------------------------------------------------
# model


@pytest.mark.parametrize("downsample", [(4, 4, 4), (4, 4, 2), (2, 1, 8)])
@pytest.mark.parametrize("quantizer", ["ema", "fsq"])
def test_codes_of_any_shape_and_back(downsample, quantizer):
    _, model, _ = build(downsample=downsample, quantizer=quantizer, patch_size=(16, 16, 32))
    volume = torch.rand(2, 1, 16, 24, 32)
    model.eval()
    codes = model.encode(volume)
    assert codes.shape == (2, *(side // step for side, step in zip((16, 24, 32), downsample, strict=True)))
    assert 0 <= codes.min() and codes.max() < model.quantizer.count
    torch.testing.assert_close(model.decode(codes), model(volume).reconstruction, rtol=1e-5, atol=1e-5)


def test_the_original_layout_is_the_default():
    config = job.Config()
    model = job.VQGAN(config)
    assert model.bits_per_voxel == pytest.approx(13 / 64)
    assert sum(p.numel() for p in model.parameters()) < 8e6


def test_a_place_is_normed_alone():
    norm = job.RMSNorm(3)
    x = torch.randn(2, 3, 4, 5, 6)
    expected = x / x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(norm(x)[:1, :, 1:3], norm(x[:1, :, 1:3]))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for recompute in (False, True):
        _, model, _ = build(gradient_checkpointing=recompute)
        model(patches()["volume"]).reconstruction.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_one_forward_pass_updates_the_codebook_once_and_only_at_the_step():
    _, model, _ = build()
    before = {name: value.clone() for name, value in model.quantizer.state_dict().items()}
    output = model(patches()["volume"], patches()["picks"])
    assert all(torch.equal(value, before[name]) for name, value in model.quantizer.state_dict().items())
    assert output.quantized.commitment.shape == (2,)
    model.quantizer.update(Accelerator(cpu=True))
    assert not torch.equal(model.quantizer.sums, before["sums"])


def test_tiles_leave_no_seam_where_the_norm_allows_it():
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1000, 1000, (37, 22, 51)).astype(np.int16))
    for norm in ("rms", "batch", "group"):
        _, model, _ = build(norm=norm)
        for _ in range(3):  # running statistics that are not those of a new layer
            model.train()(patches()["volume"])
        model.eval()
        whole, tiles = (job.Coder(model, -1000, 1000, tile, torch.device("cpu")) for tile in (64, 8))
        codes = whole.encode(hu)
        assert codes.shape == (1, 10, 6, 13)[1:] and whole.exact == (norm != "group")
        same = torch.equal(tiles.encode(hu), codes)
        away = (tiles.decode(codes, hu.shape).int() - whole.decode(codes, hu.shape).int()).abs().max()
        if norm != "group":
            assert same and away <= 1  # of rounding


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_every_parameter_learns_and_only_from_its_own_losses():
    config, model, disc = build()
    batch = patches()
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, job.Residual):
                block.conv2.weight.normal_(0, 0.1)  # they begin at zero
    disc.requires_grad_(False)
    output = model(batch["volume"], batch["picks"])
    terms = job.reconstruction_terms(output, batch, None) | job.generator_terms(disc, output, batch, config)
    assert terms.keys() == {"l1", "commitment", "image_gan", "video_gan", "gan_feat"}
    assert all(term.shape == (2,) for term in terms.values())
    job.weighted({name: term.mean() for name, term in terms.items()}, config).backward()
    disc.requires_grad_(True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert all(p.grad is None for p in disc.parameters())
    kept = [p.grad.clone() for p in model.parameters()]
    judged, _ = job.discriminator_terms(disc, output, batch, {})
    sum(term.sum() for term in judged.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in disc.parameters())
    assert all(torch.equal(p.grad, before) for p, before in zip(model.parameters(), kept, strict=True))


def test_a_quantizer_without_commitment_has_no_such_term():
    for flags in ({"quantizer": "fsq"}, {"freeze_encoder": True, "init_from": Path("x")}):
        _, model, _ = build(**flags)
        assert job.reconstruction_terms(model.train()(patches()["volume"]), patches(), None).keys() == {"l1"}


def test_terms_of_a_sample_know_nothing_of_its_batch():
    config, model, disc = build()
    batch = patches(3)
    model.eval()

    def terms(batch):
        output = model(batch["volume"])
        found = job.reconstruction_terms(output, batch, None) | job.generator_terms(disc, output, batch, config)
        return found | job.discriminator_terms(disc, output, batch, {})[0]

    together = terms(batch)
    for i in range(3):
        for name, value in terms({key: v[i : i + 1] for key, v in batch.items()}).items():
            torch.testing.assert_close(value[0], together[name][i], rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"downsample": (3, 4, 4)}, "--downsample 3"),
        ({"downsample": (1, 1, 1)}, "keeps every voxel"),
        ({"patch_size": (18, 16, 16)}, "--patch-size 18: give a multiple of 4"),
        ({"stride": (4, 0, 4)}, "--stride 4 0 4: give 1 or more"),
        ({"tile_size": 30}, "--tile-size 30: give a multiple of 4"),
        ({"hu_min": 1000}, "--hu-min 1000 must be below"),
        ({"freeze_encoder": True}, "--freeze-encoder would freeze random weights"),
        ({"sync_batchnorm": True}, "--norm rms: give --norm batch"),
        ({"quantizer": "fsq", "fsq_levels": (1, 5)}, "--fsq-levels"),
        ({"n_codes": 0}, "--n-codes is 0"),
    ],
)
def test_bad_numbers_are_sentences(flags, words):
    with pytest.raises(ValueError, match=words):
        small(**flags)


def test_a_start_that_is_never_reached_is_refused_before_training(flags, tmp_path):
    text = launch([*flags, "--discriminator-iter-start", 5000, "--output-dir", tmp_path / "run"], ok=False)
    assert "--discriminator-iter-start 5000" in text and "Traceback" not in text and not (tmp_path / "run").exists()


def test_the_default_start_is_the_originals_or_two_fifths():
    assert job.gan_schedule(small(), 1000).start == 400 and job.gan_schedule(small(), 10**6).start == 10_000
    assert not job.gan_schedule(small(image_gan_weight=0, video_gan_weight=0, gan_feat_weight=0), 1000).on


def test_a_batch_that_is_tried_does_not_touch_the_run(chests):
    config = small(dataset_path=chests / "scans", val_patients=2, test_patients=3)
    parts = job.prepare_data(config, ALONE)
    job.try_batch(config, torch.device("cpu"), None, parts.train, 2)
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    assert StepSampler(len(parts.train), config, accelerator).steps_per_epoch > 0
