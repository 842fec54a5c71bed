"""What train_student.py promises: the same run on any number of processes and after any interruption, crops and labels that
lie on each other, a model that needs the image alone, losses that count what is labelled, sentences for bad folders."""

import csv
import json
import logging
import re
import shutil
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, assert_same_run, rows, run
from pages import assert_explained
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

from common import metrics, underwater
from common.cli import UserError
from common.images import find_images, read_image, write_image
from common.training import EMA, TermWatch
from scripts import train_student as job

ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
launch = partial(run, script=ROOT / "scripts" / "train_student.py")
TINY = ("--img-size", 32, "--width", 8, "--blocks", 1, 1, 2, "--heads", 4, "--perceptual-weight", 0)
QUICK = (*TINY, "--tracker", "none", "--num-workers", 0, "--log-every", 1)
STEPS, GLOBAL_BATCH = 6, 6


def small(**flags) -> job.Config:
    settings = {"img_size": 32, "width": 8, "blocks": (1, 1, 2), "heads": 4, "perceptual_weight": 0.0, "val_images": 3}
    return job.Config(**settings | flags)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def places(root: Path) -> list:
    """Flags that say where the demo data lie."""
    tests = ("--val-ref-root", root / "testset_ref", "--val-nonref-root", root / "testset_nonref")
    return ["--train-root", root / "UIEB", "--pseudo-root", root / "pseudo", *tests]


@pytest.fixture(scope="module")
def half(water, tmp_path_factory):
    """Labels for every other pair only: their number per process varies."""
    root = tmp_path_factory.mktemp("data") / "half"
    shutil.copytree(water, root)
    for path in sorted((root / "pseudo/train").iterdir())[::2]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def flags(half):
    often = ("--max-steps", STEPS, "--eval-every", 3, "--save-every", 3, "--warmup-steps", 2)
    return [*places(half), *QUICK, *often, "--val-images", 3]


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


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 3), (3, 1)])
def test_the_same_global_batch_gives_the_same_run(trained, processes, accumulation):
    (one, _), (other, _) = trained(), trained(processes, accumulation)
    assert len(rows(one, "train")) == STEPS and {"train/mask", "train/kd", "train/code"} <= rows(one, "train")[0].keys()
    assert_same_run(other, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_test_phase_is_finished_by_any_number_of_processes_with_the_same_numbers(
    trained, flags, tmp_path, processes
):
    """To the bit, for sets of 5, 3 and 1 images."""
    shutil.copytree(trained()[0], tmp_path / "run")
    for name in ("DONE", "report.txt", "test_held-out.csv", "test_turbid.csv", "test_challenging-60.csv"):
        (tmp_path / "run" / name).unlink()
    dealt = ("--batch-size", GLOBAL_BATCH // processes, "--output-dir", tmp_path / "run", "--resume-from", "auto")
    launch([*flags, *dealt], processes=processes)
    assert_same_run(tmp_path / "run", trained()[0])
    for path in trained()[0].glob("test_*.csv"):
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "run/report.txt").read_text() == (trained()[0] / "report.txt").read_text()


def test_an_interrupted_run_ends_as_the_undisturbed_one_and_loader_workers_change_not_a_bit(trained, flags, tmp_path):
    shutil.copytree(trained()[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints" / f"step-{STEPS:08d}")
    (tmp_path / "run/DONE").unlink()
    dealt = ("--batch-size", GLOBAL_BATCH, "--output-dir", tmp_path / "run", "--resume-from", "auto", "--num-workers", 2)
    assert "Resumed from step 3\n" in launch([*flags, *dealt])
    assert_same_run(tmp_path / "run", trained()[0])


@pytest.fixture(scope="module")
def frugal(trained):
    """A run that recomputes what it can, with other choices that must not change the training either."""
    return trained(1, 1, "--gradient-checkpointing", "--attn-chunk-size", 16, "--nr-metric-impl", "funie")


def test_gradient_checkpointing_and_chunked_attention_give_the_same_run(trained, frugal):
    mine, theirs = rows(trained()[0]), rows(frugal[0])
    for a, b in zip(mine, theirs, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7) or any("uiqm" in key for key in a)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_record_of_a_run(trained, frugal, half):
    folder, text = trained()
    assert re.search(r"\[Ref\] held-out: PSNR=\d+\.\d\d dB, SSIM=\d\.\d{4} \(input \d+\.\d\d, ", text)
    assert re.search(r"\[Non-Ref\] turbid: UIQM\[paper\]=\d\.\d+, UCIQE\[paper\]=\d\.\d+ \(input ", text)
    assert re.search(r"\[Non-Ref\] turbid: UIQM\[funie\]=", frugal[1]) and "[paper]" not in frugal[1]
    assert "Pseudo-labels: " in text and re.search(r"\d+ of 20 images have no label, left out", text)
    for name, count in {"held-out": 5, "turbid": 3, "challenging-60": 1}.items():
        lines = table(folder / f"test_{name}.csv")
        stems = [line["image"] for line in lines]
        part = {"held-out": "testset_ref/held-out/input", "turbid": "testset_nonref/turbid"}.get(name, f"UIEB/{name}")
        assert stems == [path.stem for path in find_images(half / part)] and len(stems) == count
        value = rows(folder, "test")
        key = "psnr" if name == "held-out" else "uiqm"
        [mean] = [row[f"test/{name}/{key}"] for row in value if f"test/{name}/{key}" in row]
        assert np.mean([float(line[key]) for line in lines]) == pytest.approx(mean, rel=1e-5)
    for name in ("validation", "test_held-out", "test_turbid", "test_challenging-60"):
        assert (folder / "samples" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out, 5 images" in (folder / "report.txt").read_text()
    assert "grey-world" in (folder / "report.txt").read_text()
    assert_explained("student", folder, unseen={"train/perceptual", "train/tv"})
    assert json.loads((folder / "model/config.json").read_text())["classes"] == 10


def test_no_reference_metrics_are_never_validated_by(trained):
    seen = {key for row in rows(trained()[0], "val") for key in row if key.startswith("val/")}
    assert seen == {"val/psnr", "val/ssim"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_exported_average_is_what_was_evaluated(trained, half, precision):
    """Not the raw model: accelerate patches `forward` on the instance that the average is copied from."""
    folder, _ = trained(*([] if precision == "no" else (1, 1, "--mixed-precision", "bf16")))
    assert all(np.isfinite(row["train/loss"]) for row in rows(folder, "train"))
    model, _ = job.load_model(folder / "model")
    images = underwater.find_pairs(half / "testset_ref/held-out", "--val-ref-root")
    for line, path, target in zip(table(folder / "test_held-out.csv"), images.inputs, images.targets, strict=True):
        image, target = (job.to_tensor(read_image(p))[None] for p in (path, target))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = job.restore(model, image).float()
        mine = metrics.psnr(metrics.to_uint8(output), metrics.to_uint8(target)).item()
        assert float(line["psnr"]) == pytest.approx(mine, abs=1e-4)
        assert float(line["psnr"]) != pytest.approx(float(line["input_psnr"]), abs=1e-3)  # it has learned something


def test_the_average_of_a_prepared_model_runs_its_own_weights():
    accelerator = Accelerator(cpu=True)
    raw = accelerator.unwrap_model(accelerator.prepare(untrained()))
    ema, images = EMA(raw, 0.9), random_images(1, 24, 24)
    before = ema.module(images)[0]
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.add_(0.1)
    assert torch.equal(ema.module(images)[0], before) and not torch.equal(raw(images)[0], before)


def test_files_of_all_kinds_train_without_labels_and_a_truncated_one_is_named_first(water, tmp_path):
    """Greyscale, RGBA, 16 bits, images smaller than the crop; two processes, one of which has no test image."""
    root = tmp_path / "UIEB"
    shutil.copytree(water / "UIEB", root)
    shutil.rmtree(root / "challenging-60")
    raw = find_images(root / "raw-890")[:6]
    pairs = [(path, root / "reference-890" / path.name) for path in raw]
    for path in pairs[0]:
        Image.open(path).convert("L").save(path)
    for path in pairs[1]:
        Image.open(path).convert("RGBA").save(path)
    for path in pairs[2]:
        write_image(path, read_image(path).astype(np.uint16) * 257)
    for path in pairs[3]:
        Image.open(path).resize((25, 20)).save(path)
    jpeg = raw[4].with_suffix(".jpg")
    Image.open(raw[4]).save(jpeg)
    raw[4].unlink()
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    raw[5].with_name("lonely.png").write_bytes(raw[5].read_bytes())

    args = ["--train-root", root, *QUICK, "--val-images", 3, "--test-images", 1, "--batch-size", 9, "--max-steps", 2]
    text = launch([*args, "--epochs", 2, "--output-dir", tmp_path / "run"], processes=2)
    named = re.search(rf"WARNING: UIEB: 1 of 23 left out: .*{jpeg.name}: .*truncated", text)
    assert named and named.end() < text.index("Starting training epoch 0")
    assert "1 files without a partner left out (raw-890/lonely.png)" in text
    assert "Test part of" in text and "1 images by --split seed:0, list " in text
    first, second = rows(tmp_path / "run", "train")
    assert {"train/rec", "train/dssim", "train/hf", "train/lf"} <= first.keys()
    assert not any(f"train/{name}" in first for name in job.NEEDS)
    assert np.isfinite(second["train/loss"])
    [line] = table(tmp_path / "run/test_UIEB-test.csv")
    assert "UIEB-test, 1 images" in (tmp_path / "run/report.txt").read_text() and line["psnr"]


def test_perceptual_weights_that_do_not_exist_end_the_run_with_one_sentence_before_it_starts(water, tmp_path):
    missing = ("--perceptual-weight", 0.05, "--perceptual-weights", tmp_path / "vgg.pth")
    text = launch([*places(water), *QUICK, "--val-images", 3, *missing, "--output-dir", tmp_path / "run"], ok=False)
    assert "Traceback" not in text and text.count("ERROR") == 1
    assert f"--perceptual-weights {tmp_path / 'vgg.pth'} cannot be read" in text
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# bad folders


def prepare(root: Path, **flags) -> job.Parts:
    defaults = {"train_root": root / "UIEB", "val_ref_root": root / "testset_ref", "pseudo_root": root / "pseudo"}
    return job.prepare_data(small(**defaults | flags), ALONE)


@pytest.fixture
def copy(water, tmp_path):
    root = tmp_path / "water"
    shutil.copytree(water, root)
    return root


def test_the_demo_data_are_found_whole(water, caplog):
    caplog.set_level(logging.INFO, "run")
    parts = prepare(water, val_nonref_root=water / "testset_nonref")
    assert (len(parts.train), len(parts.val)) == (20, 3)
    assert {name: len(images) for name, images in parts.tests.items()} == {"held-out": 5, "turbid": 3, "challenging-60": 1}
    assert set(parts.train.pairs.stems).isdisjoint(parts.val.images.stems)
    assert "Pseudo-labels: 20 of 20 images, 10 classes, a code of 12 numbers" in caplog.text


@pytest.mark.parametrize(
    ("harm", "flags", "words"),
    [
        ("other names", {}, "no input has a target of the same name"),
        ("empty set", {}, "--val-ref-root .* holds no images"),
        ("a training picture", {}, "are also trained on, to the pixel: .*train-0000"),
        ("a training name", {}, "have the name of a training image: train-0000"),
        ("list", {"split": "list.txt"}, "--split .*list.txt names images that UIEB does not have: nobody"),
        (None, {"val_ref_root": None, "test_images": 23}, "takes 23 of the 23 pairs"),
        (None, {"val_images": 23}, "takes 23 of the 23 pairs"),
        ("constant maps", {}, "No pseudo-label of UIEB can teach anything. 20 of 20 images .*without any place in them"),
        (None, {"hf_mask": 10}, "--hf-mask 10: the labels have maps 0 to 9"),
        (None, {"hf_mask": 1, "pseudo_root": None}, "give --pseudo-root"),
    ],
)
def test_bad_folders_are_sentences(copy, harm, flags, words):
    references, held_out = copy / "UIEB/reference-890", copy / "testset_ref/held-out"
    [first] = references.glob("train-0000*")
    if harm == "other names":
        for path in references.iterdir():
            path.rename(path.with_stem(path.stem + "_gt"))
    elif harm == "empty set":
        shutil.rmtree(held_out)
    elif harm == "a training picture":
        for side in ("input", "target"):
            shutil.copy(first, held_out / side / "new.png")
    elif harm == "a training name":
        for side in ("input", "target"):
            min((held_out / side).iterdir()).rename(held_out / side / first.name)
    elif harm == "list":
        (copy / "list.txt").write_text(f"{first.name}\nnobody.png\n")
        flags = {"split": str(copy / flags["split"])}
    elif harm == "constant maps":
        for path in (copy / "pseudo/train").iterdir():
            np.savez(path, masks=np.full((10, 8, 8), np.linspace(0.1, 0.9, 10)[:, None, None], np.float32))
    with pytest.raises(UserError, match=words) as caught:
        prepare(copy, **flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [{"heads": 0}, {"heads": 5}, {"width": 0}, {"blocks": (1, -1, 1)}, {"attn_chunk_size": -1}, {"img_size": 16}],
)
def test_bad_numbers_are_sentences(flags):
    """ValueErrors of the config, which the command line prints as one."""
    with pytest.raises(ValueError, match=f"--{next(iter(flags)).replace('_', '-')}"):
        small(**flags)


def test_labels_of_another_size_are_used_and_an_odd_number_of_classes_is_left_out_by_name(copy, caplog):
    caplog.set_level(logging.INFO, "run")
    stems = prepare(copy).train.pairs.stems
    masks = np.random.default_rng(0).random((10, 13, 29), np.float32)
    code = np.zeros(12, np.float32)
    np.savez(copy / f"pseudo/train/{stems[0]}.npz", masks=masks, code=code)
    np.savez(copy / f"pseudo/train/{stems[1]}.npz", masks=masks[:7], code=code)
    train = prepare(copy).train
    assert f"1 of 20 images have another number of classes or another code than most, left out: {stems[1]}" in caplog.text
    samples = [train[0, index] for index in range(2)]
    assert [sample["has_masks"] for sample in samples] == [True, False]
    assert [sample["has_probs"] for sample in samples] == [False, False]
    assert train.counts(np.arange(20)) == {None: 20, "masks": 19, "probs": 18, "code": 19}


# ---------------------------------------------------------------------------------------------------------------------
# crops


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Pictures whose target is their negative and whose maps are their brightness and its negative, at several sizes:
    fine, coarse, for a picture of 20 x 24, and for a square one."""
    root = tmp_path_factory.mktemp("planted")
    (root / "labels").mkdir()
    noise = np.random.default_rng(0)
    for name, (height, width), side in (
        *(("fine", (96, 120), 224), ("coarse", (96, 120), 24)),
        *(("little", (20, 24), 16), ("square", (64, 64), 64)),
    ):
        grid = noise.random((height // 8, width // 8), np.float32)
        bright = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        pixels = np.rint(bright * 255).astype(np.uint8)
        write_image(root / "input" / f"{name}.png", np.repeat(pixels[..., None], 3, 2))
        write_image(root / "target" / f"{name}.png", np.repeat(255 - pixels[..., None], 3, 2))
        labels = cv2.resize(bright, (side, side), interpolation=cv2.INTER_AREA if side < height else cv2.INTER_LINEAR)
        probs, code = np.array([0.5, 0.5], np.float32), np.ones(3, np.float32)
        np.savez(root / "labels" / f"{name}.npz", masks=np.stack([labels, 1 - labels]), probs=probs, code=code)
    return root


def crops(root: Path, **flags) -> job.Crops:
    pairs = underwater.find_pairs(root, "--train-root")
    labels = underwater.find_labels(root / "labels", pairs)
    return job.Crops(pairs, underwater.audit_labels(labels, pairs), small(**flags))


def shrink(image: Tensor, side: int) -> np.ndarray:
    return cv2.resize(image.mean(0).numpy(), (side, side), interpolation=cv2.INTER_AREA)


def test_image_target_thumbnail_and_maps_are_cut_and_turned_alike(planted):
    dataset = crops(planted, img_size=64)
    for index, stem in enumerate(dataset.pairs.stems):
        for epoch in range(12):
            sample = dataset[epoch, index]
            assert sample["image"].shape == sample["target"].shape == (3, 64, 64)
            assert torch.allclose(sample["image"] + sample["target"], torch.ones(1), atol=0.02 if stem == "little" else 1e-6)
            seen, said = shrink(sample["image"], job.LABEL_SIZE).ravel(), sample["masks"][0].numpy().ravel()
            assert np.corrcoef(seen, said)[0, 1] > (0.99 if stem in ("fine", "square") else 0.95), (stem, epoch)
            if stem in ("fine", "square"):
                assert np.abs(seen - said).max() < 0.05
            if stem == "square":  # the crop is the whole image
                assert torch.allclose(sample["thumbnail"], job.thumbnail(sample["image"][None])[0], atol=1e-6)
    turned = {dataset[epoch, index]["image"].numpy().tobytes() for epoch in range(40)}
    assert stem == "square" and len(turned) == 4  # both flips, and both together


def test_augmentation_is_a_function_of_seed_epoch_and_index(planted):
    one, same, other = crops(planted), crops(planted), crops(planted, seed=1)
    same[3, 1], same[0, 2]  # what was drawn before does not matter
    for key in ((0, 0), (0, 1), (5, 0)):
        assert all(torch.equal(one[key]["image"], again[key]["image"]) for again in (same, one))
        assert not torch.equal(one[key]["image"], other[key]["image"])
    seen = [one[epoch, 0]["image"] for epoch in range(8)]
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    given = [one[epoch, index]["given"] for epoch in range(100) for index in range(4)]
    assert 0.2 < np.mean(given) < 0.4  # 1 - --mask-dropout
    assert not any(crops(planted, mask_dropout=1.0)[epoch, 0]["given"] for epoch in range(20))


def test_crops_grow_over_equal_parts_of_the_epochs(planted):
    dataset = crops(planted, progressive_sizes=(32, 40, 48), epochs=9)
    assert [dataset[epoch, 0]["image"].shape[-1] for epoch in range(9)] == [32] * 3 + [40] * 3 + [48] * 3
    assert crops(planted, progressive_sizes=(32, 64), epochs=1).size(0) == 32


@pytest.mark.parametrize("size", [64, 96, 101, 128, 160, 192, 224, 256])
def test_every_crop_size_trains_with_labels_of_every_size(water, tmp_path, size):
    """7 x 7, 16 x 16 and 224 x 224 in one batch."""
    images = underwater.find_pairs(water / "UIEB", "--train-root")
    images = images.subset(images.stems[:3])
    noise = np.random.default_rng(0)
    for stem, side in zip(images.stems, (7, 16, 224), strict=True):
        masks, code = noise.random((10, side, side), np.float32), noise.random(12, np.float32)
        np.savez(tmp_path / f"{stem}.npz", masks=masks, probs=np.full(10, 0.1, np.float32), code=code)
    labels = underwater.find_labels(tmp_path, images)
    config = small(img_size=size, hf_mask=6, lf_mask=3, tv_weight=0.1)
    dataset = job.Crops(images, underwater.audit_labels(labels, images), config)
    batch = default_collate([dataset[0, index] for index in range(3)])
    model = untrained(classes=10, teacher=12)
    terms = job.loss_terms(config, job.forward(model, batch), batch, None)
    assert terms.keys() == set(job.WEIGHTS) - {"perceptual"}
    assert {(*term.shape, term.dtype) for term in terms.values()} == {(3, torch.float32)}
    sum(term.mean() for term in terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# model


def untrained(classes: int = 5, teacher: int = 3, **flags) -> job.Student:
    torch.manual_seed(0)
    return job.Student(small(**flags), classes, teacher)


def experienced(**options) -> job.Student:
    """No layer is zero any more, as after some training."""
    model = untrained(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(33, 47), (5, 7), (101, 64), (1, 1)])
def test_any_size_goes_and_the_first_answer_is_the_image_itself(height, width):
    images = random_images(2, height, width) * 4 - 2  # nothing is clamped
    output, alpha_maps, deg_logits = untrained()(images)
    assert torch.equal(output, images)
    assert deg_logits.shape == (2, 5) and len(alpha_maps) == 3
    deepest = torch.tensor([-(-height // 8), -(-width // 8)])
    for alpha, channels, scale in zip(alpha_maps, (32, 16, 8), (1, 2, 4), strict=True):  # coarse to fine
        assert alpha.shape == (2, channels, *(deepest * scale).tolist())
        assert 0 < alpha.min() and alpha.max() < 1


def test_an_untrained_model_scores_as_its_input(water):
    images = job.WholeImages(underwater.find_pairs(water / "testset_ref/held-out", "--val-ref-root"))
    accelerator, config = Accelerator(cpu=True), small(num_workers=0)
    loader = job.data.make_loader(images, job.data.EvalSampler(len(images), 1, accelerator), config)
    values, rows_of = job.evaluate(untrained().eval(), loader, accelerator, config, full=True)
    for name in ("psnr", "ssim", "psnr_y", "ssim_y", "psnr_256", "ssim_256"):
        assert np.array_equal(rows_of[name], rows_of[f"input_{name}"])
    assert values["psnr"] == values["input_psnr"] != values["grey_world_psnr"]


def test_tiles_cover_the_image_and_leave_no_seams():
    images = random_images(1, 203, 331)
    assert torch.allclose(job.restore(untrained(), images, 128), images, atol=1e-6)
    constant = torch.full((1, 3, 200, 328), 0.4)
    model = experienced()
    inside = job.restore(model, constant, 128)[..., 64:-64, 64:-64]  # padding of convolutions is seen at the borders
    for axis in (2, 3):  # three Haar levels: what a constant becomes repeats every 8 pixels
        steps = inside.narrow(axis, 8, inside.shape[axis] - 8) - inside.narrow(axis, 0, inside.shape[axis] - 8)
        assert steps.abs().max() < 1e-2
    assert (inside - 0.4).abs().max() > 0.05


def test_the_default_is_small():
    model = job.Student(job.Config(), 10, 128)
    assert sum(p.numel() for p in model.parameters()) <= 4e6
    assert job.gigaflops(model) <= 27


def test_maps_and_code_of_the_teacher_are_used_where_they_are_given():
    model, images = experienced().eval(), random_images(3, 32, 40)
    masks, code = torch.rand(3, 5, 7, 7), torch.randn(3, 3)
    alone, taught = model(images)[0], model(images, z_d=code, masks=masks)[0]
    for more in (model(images, masks=masks)[0], model(images, z_d=code)[0]):
        assert all(not torch.allclose(more[i], alone[i], atol=1e-4) for i in range(3))
        assert all(not torch.allclose(more[i], taught[i], atol=1e-4) for i in range(3))
    mixed = model(images, z_d=code, masks=masks, given=torch.tensor([True, False, True]))[0]
    for i, expected in enumerate((taught, alone, taught)):
        assert torch.allclose(mixed[i], expected[i], atol=1e-5)


def batch_of(count: int, labelled: list[bool] | None, given: list[bool] | None = None, size: int = 32) -> dict[str, Tensor]:
    batch = {"image": random_images(count, size, size), "target": random_images(count, size, size, seed=1)}
    batch["thumbnail"] = job.thumbnail(batch["image"])
    if labelled is not None:
        noise = torch.Generator().manual_seed(2)
        flags = torch.tensor(labelled)
        batch |= {f"has_{kind}": flags for kind in ("masks", "probs", "code")}
        batch["masks"] = torch.rand(count, 5, 32, 32, generator=noise) * flags[:, None, None, None]
        batch["probs"] = torch.rand(count, 5, generator=noise).softmax(1)
        batch["code"] = torch.randn(count, 3, generator=noise) * flags[:, None]
        batch["confidence"] = torch.ones(count)
        batch["given"] = flags & torch.tensor(given or [False] * count)
    return batch


@pytest.mark.parametrize(
    ("labelled", "given"),
    [(None, None), ([True] * 3, None), ([True] * 3, [True] * 3), ([True, True, False], [True, False, False])],
)
def test_every_parameter_learns(labelled, given):
    """None is left out of the graph, which DDP would wait for, whatever the labels of this process's batch."""
    model, config = experienced(teacher=0 if labelled is None else 3), small()
    batch = batch_of(3, labelled, given)
    terms = job.loss_terms(config, job.forward(model, batch), batch, None)
    sum(term.sum() for term in terms.values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize(("labelled", "given"), [([False] * 3, None), ([True] * 3, [True] * 3)])
def test_every_parameter_is_in_the_graph_when_no_term_is_about_it(labelled, given):
    model, config = untrained(), small(mask_weight=0.0, code_weight=0.0, kd_weight=0.0, feature_weight=0.0)
    batch = batch_of(3, labelled, given)
    sum(term.sum() for term in job.loss_terms(config, job.forward(model, batch), batch, None).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 1000])
def test_chunked_attention_is_the_fused_one(chunk):
    def answer(size: int) -> list[Tensor]:
        noise = torch.Generator().manual_seed(0)
        inputs = [torch.randn(2, 4, 40, 8, generator=noise).requires_grad_() for _ in range(3)]
        output = job.attention(*inputs, size)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        with torch.no_grad():
            assert torch.allclose(job.attention(*inputs, size), output, atol=1e-6)
        return [output, *(x.grad for x in inputs)]

    for mine, fused in zip(answer(chunk), answer(0), strict=True):
        assert torch.allclose(mine, fused, atol=1e-6)


def kept_for_backward(call) -> tuple[Tensor, int]:
    """What it returns, and how many numbers autograd keeps meanwhile."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return output, sum(kept.values())


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_memory_of_attention_falls_with_the_chunk_size():
    """What is kept for the backward pass, and the largest tensor of both passes: scores of a chunk, not of the image."""
    places, heads = 256, 2

    def cost(attention) -> tuple[int, int]:
        inputs = [torch.randn(1, heads, places, 4).requires_grad_() for _ in range(3)]
        with Largest() as largest:
            output, kept = kept_for_backward(lambda: attention(*inputs))
            output.sum().backward()
        return kept, largest.numbers

    whole_kept, whole_largest = cost(job.attend)
    assert whole_largest == heads * places**2 <= whole_kept
    largest = []
    for chunk in (128, 64, 16):
        kept, most = cost(partial(job.attention, chunk=chunk))
        assert kept < whole_kept / 10
        largest.append(most)
    assert largest == [heads * chunk * places for chunk in (128, 64, 16)]


def test_gradient_checkpointing_keeps_less():
    images = random_images(1, 64, 64)
    kept = [
        kept_for_backward(lambda model=model: model(images)[0])[1]
        for model in (experienced(blocks=(2, 2, 2), gradient_checkpointing=recompute) for recompute in (False, True))
    ]
    assert kept[1] < kept[0] / 2


def test_compiled_training_is_nearly_the_same():
    """As one graph, whatever the labels of a batch. Not with inductor, whose C++ takes this network 48 s to compile; it gave
    the losses of the eager network to 1e-4."""
    config, batch = small(), batch_of(2, [True, False], [True, False])

    def losses_of(compiled: bool) -> list[float]:
        model = experienced(blocks=(0, 0, 2))
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        optimizer, values = torch.optim.SGD(model.parameters(), 0.05), []
        for _ in range(2):
            loss = sum(term.sum() for term in job.loss_terms(config, job.forward(model, batch), batch, None).values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    eager = losses_of(False)
    assert losses_of(True) == pytest.approx(eager, rel=1e-4) and eager[0] != pytest.approx(eager[1], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_a_weight_of_zero_leaves_a_term_out_and_changes_no_other():
    batch = batch_of(2, [True, True])
    answer = job.forward(experienced(), batch)

    class Vgg(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().flatten(1).mean(1)

    every = {f"{name}_weight": 0.5 for name in job.WEIGHTS}
    whole = job.loss_terms(small(**every), answer, batch, Vgg())
    assert whole.keys() == set(job.WEIGHTS)
    for name in job.WEIGHTS:
        config = small(**every | {f"{name}_weight": 0.0})
        rest = job.loss_terms(config, answer, batch, Vgg() if config.perceptual_weight else None)
        assert rest.keys() == whole.keys() - {name}
        assert all(torch.equal(value, whole[other]) for other, value in rest.items())


def test_a_sample_without_a_label_counts_in_no_term_about_labels():
    batch, model = batch_of(3, [True, False, True]), experienced()
    seen = [batch["image"].requires_grad_(), batch["thumbnail"].requires_grad_()]
    terms = job.loss_terms(small(hf_mask=0), job.forward(model, batch), batch, None)
    alone = {key: value[1:2] for key, value in batch.items()}
    for name, term in terms.items():
        found = torch.autograd.grad(term.sum(), seen, retain_graph=True, allow_unused=True)
        gradient = sum(g.abs().flatten(1).sum(1) for g in found if g is not None)
        if name in job.NEEDS:
            assert term[1] == 0 and gradient[1] == 0, name
            assert term[0] > 0 and term[2] > 0 and gradient[0] > 0, name
        else:
            assert term[1] > 0 and gradient[1] > 0
    unlabelled = {key: value for key, value in alone.items() if key in ("image", "target", "thumbnail")}
    without = job.loss_terms(small(), job.forward(model, unlabelled), unlabelled, None)
    assert without.keys().isdisjoint(job.NEEDS)
    for name, value in without.items():
        assert torch.allclose(value, terms[name][1:2], atol=1e-6), name


def test_a_term_that_trains_nothing_is_told_of_once(caplog):
    watch = TermWatch(patience=5)
    noise = np.random.default_rng(0)
    for step in range(12):
        watch.update(
            {"kd": 0.0, "mask": 0.25, "rec": float(noise.random()), "late": float(noise.random()) if step < 7 else 3.0}
        )
    told = [record.getMessage() for record in caplog.records]
    assert [" ".join(line.split()[3:5]) for line in told] == ["kd has", "mask has", "late has"]
    assert "kd has been 0 for 5 steps" in told[0] and "mask has been 0.25 for 5 steps" in told[1]
