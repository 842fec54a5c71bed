"""What train_ultimate.py promises: the same run on any number of processes and after any interruption, in both stages and
through every thaw; routers that learn to share; masks that lie on their images; sentences for bad folders and weights."""

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import ROOT, assert_same_run, free_port, rows, run
from pages import assert_explained
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor

from common import logs, losses, training
from common.camouflage import MaskedImages
from common.cli import UserError, parse_only, sentences
from common.images import read_image, write_image
from scripts import train_ultimate as job

ALONE = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
launch = partial(run, script=ROOT / "scripts" / "train_ultimate.py")
TINY = ("--backbone", "test_convnext", "--backbone-weights", "none", "--img-size", 64, "--width", 16, "--top-k", 2)
QUICK = (*TINY, "--tracker", "none", "--num-workers", 0, "--log-every", 1)
FIRST, SECOND = 12, 6  # images per step of the two stages, of 21: 1 and 3 steps per epoch
STAGES = ("--stage1-epochs", 2, "--epochs", 4, "--warmup-epochs", 1, "--progressive-unfreeze", "--multi-scale", 1.0, 1.5)
STEPS, BOUNDARY, THAWS = 8, 2, {2: 1, 4: 2, 6: 6}  # step to the number of the backbone's parts that train from there on
BACKBONES = ("test_convnext", "test_resnet", "test_byobnet", "test_efficientnet", "edgenext_xx_small")


def small(**flags) -> job.Config:
    return job.Config(**{"backbone": "test_convnext", "img_size": 64, "width": 16, "top_k": 2} | flags)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs: one as users start it; the others are forked from a process that has read torch and timm once


def without_pictures() -> None:
    """They take longer than the run and are looked at in another test."""
    job.report = job.ablate = logs.draw_curves = lambda *_: None


def wrapped_once() -> None:
    """The mistake: DDP is built while the backbone is frozen and knows nothing of what thaws."""
    without_pictures()
    rewrap, made = training.rewrap, []

    def keep(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
        made.append(made[0] if made else rewrap(accelerator, model))
        return made[0]

    training.rewrap = keep


def one_rank(rank: int, processes: int, port: int, args: list[str], log: Path, change: Callable[[], None]) -> None:
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if processes > 1:
        os.environ.update({key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
    handle = os.open(log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.dup2(handle, 1), os.dup2(handle, 2)
    change()
    with sentences():
        job.main(parse_only(job.Config, args))


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """main() on that many processes; what they print."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")  # else huggingface_hub tries for a minute
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["scripts.train_ultimate"])

        def go(args, *, processes: int = 1, ok: bool = True, change: Callable[[], None] = without_pictures) -> str:
            log = tmp_path_factory.mktemp("fork") / "log"
            given = (processes, free_port(), [str(a) for a in args], log, change)
            ranks = [context.Process(target=one_rank, args=(rank, *given)) for rank in range(processes)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(200)
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                process.kill()
            assert None not in codes and any(codes) != ok, f"{codes}:\n{log.read_text()}"
            return log.read_text()

        yield go


def dealt(processes: int, accumulation: int = 1) -> list:
    parts = processes * accumulation
    sizes = ("--batch-size", FIRST // parts, "--stage2-batch-size", SECOND // parts)
    return [*sizes, "--accumulation-steps", accumulation]


@pytest.fixture(scope="module")
def flags(camouflaged):
    """Every step is evaluated and its checkpoint kept."""
    return ["--dataset-path", camouflaged, *QUICK, *STAGES, "--eval-every", 1, "--save-every", 1, "--keep-top-k", STEPS]


@pytest.fixture(scope="module")
def golden(flags, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("golden") / "run"
    return folder, launch([*flags, *dealt(1), "--num-workers", 2, "--checkpoint-dir", folder], via="python")


def checkpoint(folder: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def cut(folder: Path, to: Path, step: int) -> Path:
    """The run as it was after so many steps."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (to / "DONE").unlink()
    return to


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 3), (3, 1)])
def test_the_same_global_batch_gives_the_same_run(golden, flags, fork, tmp_path, processes, accumulation):
    """A process's batch of one included. Replicas are compared at every thaw, or the run ends."""
    fork([*flags, *dealt(processes, accumulation), "--output-dir", tmp_path / "run"], processes=processes)
    mine, theirs = rows(tmp_path / "run", "train"), rows(golden[0], "train")
    assert len(mine) == STEPS and {row["train/side"] for row in mine} == {64, 96}
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert_same_run(tmp_path / "run", golden[0], rtol=1e-5, atol=1e-3)  # a pixel more or less in a metric's threshold


def test_replicas_that_drift_apart_after_a_thaw_end_the_run(flags, fork, tmp_path):
    args = [*flags, *dealt(2), "--output-dir", tmp_path / "run"]
    text = fork(args, processes=2, ok=False, change=wrapped_once)
    assert "RuntimeError: at step 4, stage 2: the processes hold different weights" in text


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_test_phase_is_finished_by_any_number_of_processes_with_the_same_numbers(
    golden, flags, fork, tmp_path, processes
):
    """To the bit, with test images for two of the processes."""
    folder = cut(golden[0], tmp_path / "run", STEPS)
    args = [*flags, *dealt(processes), "--output-dir", folder, "--resume-from", "auto"]
    assert f"Resumed from step {STEPS}\n" in fork(args, processes=processes)
    assert rows(folder, "test") == rows(golden[0], "test") != []
    assert_same_run(folder, golden[0])


@pytest.mark.parametrize("step", [1, BOUNDARY, 3, 4, 6, 7])
def test_an_interrupted_run_ends_as_the_undisturbed_one(golden, flags, fork, tmp_path, step):
    """In stage 1, between the stages, within an epoch, at each thaw; without the loader workers that it had."""
    folder = cut(golden[0], tmp_path / "run", step)
    text = fork([*flags, *dealt(1), "--output-dir", folder, "--resume-from", "auto"])
    assert f"Resumed from step {step}\n" in text
    assert_same_run(folder, golden[0])


def test_a_run_may_go_from_one_process_to_two_and_back(golden, flags, fork, tmp_path):
    folder = cut(golden[0], tmp_path / "run", 1)
    args = [*flags, "--output-dir", folder, "--resume-from", "auto"]
    assert "Resumed from step 1\n" in fork([*args, *dealt(2), "--max-steps", 5], processes=2)
    assert "Resumed from step 5\n" in fork([*args, *dealt(1)])
    assert_same_run(folder, golden[0], rtol=1e-5, atol=1e-3)


def test_a_time_limit_saves_and_another_session_continues(golden, flags, fork, tmp_path):
    args = [*flags, *dealt(1), "--output-dir", tmp_path / "run", "--resume-from", "auto"]
    text = fork([*args, "--max-hours", 1e-5])
    assert "Stopped by a signal or --max-hours at step 1; continue with --resume-from auto" in text
    assert not (tmp_path / "run/DONE").exists()
    assert "Resumed from step 1\n" in fork([*args, "--max-hours", 11.5])
    assert_same_run(tmp_path / "run", golden[0])
    assert "has reached its end already" in fork([*args, "--max-hours", 11.5])


def test_another_batch_in_the_second_stage_is_refused_with_the_flag_that_restores_it(golden, flags, fork, tmp_path):
    folder = cut(golden[0], tmp_path / "run", 3)
    args = [*flags, "--batch-size", FIRST, "--output-dir", folder, "--resume-from", "auto"]
    text = fork([*args, "--stage2-batch-size", 7], ok=False)
    assert "was trained with samples per step of stage 2 = 6, this launch has 7" in text and "Traceback" not in text
    assert "pass --stage2-batch-size 6 --accumulation-steps 1" in text


def test_the_first_stage_can_be_skipped(flags, fork, tmp_path):
    fork([*flags, *dealt(1), "--skip-stage1", "--max-steps", 2, "--output-dir", tmp_path / "run"])
    mine = rows(tmp_path / "run", "train")
    assert [row["epoch"] for row in mine] == [2, 2]
    before, after = initial(), checkpoint(tmp_path / "run", 2)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("backbone.stages_3") for name in changed)
    assert not any(name.startswith("backbone.stages_2") for name in changed)


def test_the_test_sets_choose_nothing(golden, flags, fork, camouflaged, tmp_path):
    """Without them the run is the same to the bit."""
    shutil.copytree(camouflaged, tmp_path / "data")
    shutil.rmtree(tmp_path / "data/Test")
    fork([*flags, *dealt(1), "--dataset-path", tmp_path / "data", "--output-dir", tmp_path / "run"])
    assert rows(tmp_path / "run") == [row for row in rows(golden[0]) if row not in rows(golden[0], "test")]
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (golden[0] / "model/model.safetensors").read_bytes()
    best = max(rows(golden[0], "val"), key=lambda row: row["val/sm"])
    names = json.loads((golden[0] / "checkpoints/names.json").read_text())
    assert names["best"] == f"step-{best['step']:08d}"


def test_the_largest_batch_is_looked_for_with_the_largest_images(flags, fork, tmp_path):
    args = [*flags, "--batch-size", 6, "--find-batch-size", "--max-steps", 1, "--output-dir", tmp_path / "run"]
    assert "--find-batch-size: batch 6 x accumulation 1" in fork([*args, "--no-deep-supervision"])
    assert "train/deep" not in rows(tmp_path / "run", "train")[0]


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_the_record_of_a_run(golden, camouflaged):
    folder, text = golden
    report = (folder / "report.txt").read_text()
    assert report.strip() in text
    for words in ("camouflage: 10 images", "validation: 5 images", "Aquatic", "Terrestrial", "stride 16", "IoU lost"):
        assert words in report
    assert all(job.expert_name(i) in report for i in range(7))
    stems = sorted(path.stem for path in (camouflaged / "Test/GT_Object").glob("*-CAM-*"))
    lines = table(folder / "camouflage.csv")
    assert [line["image"] for line in lines] == stems and len(table(folder / "validation.csv")) == 5
    [test] = rows(folder, "test")
    for key in ("sm", "wfm", "mae", "iou"):
        assert np.mean([float(line[key]) for line in lines]) == pytest.approx(test[f"test/camouflage/{key}"], rel=1e-4)
    for name in ("camouflage", "validation", "routing"):
        assert (folder / "samples" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert_explained("ultimate", folder)
    assert read_image(folder / "curves.png").shape[2] == 3
    assert "Stage 1 from step 0: 0 of the backbone's parts train" in text
    assert "Stage 2 from step 6: 6 of the backbone's parts train" in text


def test_saved_maps_of_the_exported_model_score_what_the_run_says(golden, camouflaged, fork, tmp_path):
    """The export is what was evaluated, and --evaluate-maps measures like the run."""
    model, config, saved = job.load_model(golden[0] / "model")
    tests = job.prepare_data(small(dataset_path=camouflaged), ALONE).tests["camouflage"]
    for index, stem in enumerate(tests.images.stems):
        sample = tests[index]
        maps, _ = job.predict_maps(model, sample["image"][None], [tuple(sample["mask"].shape)])
        write_image(tmp_path / "maps" / f"{stem}.png", (maps[0].numpy() * 255).round().astype(np.uint8))
    text = fork(["--evaluate-maps", tmp_path / "maps", camouflaged / "Test/GT_Object"])
    assert "10 maps: sm 0." in text
    mine, theirs = table(tmp_path / "maps-scores.csv"), table(golden[0] / "camouflage.csv")
    for a, b in zip(mine, theirs, strict=True):
        assert a["image"] == b["image"]
        for key in ("sm", "wfm", "mae", "iou", "dice"):
            assert float(a[key]) == pytest.approx(float(b[key]), abs=2e-3)
    assert config.top_k == 2 and saved["scratch"] is True


def test_the_threshold_is_the_best_of_the_validation_images(golden, camouflaged):
    model, _, saved = job.load_model(golden[0] / "model")
    val = job.prepare_data(small(dataset_path=camouflaged), ALONE).val
    found = {threshold / 255: 0.0 for threshold in range(256)}
    for index in range(len(val)):
        sample = val[index]
        answer = job.predict_maps(model, sample["image"][None], [tuple(sample["mask"].shape)])[0][0].numpy()
        levels, mask = (answer * 255).round(), sample["mask"].numpy()
        for threshold in found:
            binary = levels >= threshold * 255 - 1e-6
            found[threshold] += (binary & mask).sum() / (binary | mask).sum() / len(val)
    assert found[saved["threshold"]] == pytest.approx(max(found.values()), abs=2e-3)
    assert max(found.values()) > min(found.values()) + 0.01


# ---------------------------------------------------------------------------------------------------------------------
# stages and rates


def initial() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return job.Segmenter(small(), job.make_backbone("test_convnext", "none", scratch=True)).state_dict()


def test_what_is_frozen_does_not_change_a_bit_and_thaws_from_the_end(golden):
    """Neither by weight decay nor in the average."""
    before, names = initial(), [name for name, _ in job.parts_of(job.make_backbone("test_convnext", "none", scratch=True))]
    for step in range(1, STEPS + 1):
        live = max((count for since, count in THAWS.items() if since < step), default=0)
        for kind in ("model", "ema"):
            after = checkpoint(golden[0], step, kind)
            for number, part in enumerate(names):
                inside = [name for name in before if name.startswith(f"backbone.{part}.")]
                same = [torch.equal(before[name], after[name]) for name in inside]
                assert inside and (all(same) if number < len(names) - live else not all(same)), (step, kind, part)
            assert not torch.equal(before["fuse.0.body.0.weight"], after["fuse.0.body.0.weight"])


def test_the_optimizer_used_the_rates_of_the_plan(golden):
    plan = plan_of(epochs=4, stage1_epochs=2, batch_size=FIRST, stage2_batch_size=SECOND, warmup_epochs=1, size=21)
    for step in range(1, STEPS + 1):
        path = golden[0] / "checkpoints" / f"step-{step:08d}" / "optimizer.pt"
        groups = torch.load(path, weights_only=True)["param_groups"]
        lr = plan.learning_rate(step - 1)
        assert [group["lr"] for group in groups] == [lr * group["scale"] for group in groups]
        assert rows(golden[0], "train")[step - 1]["train/lr"] == lr
    scales = [group["scale"] for group in groups]
    assert scales == pytest.approx([0.1 * 0.8**i for i in (5, 4, 3, 2, 1, 0)] + [1.0, job.ROUTER_LR, 1.0])


@pytest.mark.parametrize("name", BACKBONES)
def test_parts_and_groups_hold_every_parameter_once_and_all_of_them_learn(name):
    """From scratch, and with a backbone that came with batch normalization, whose statistics stay."""
    for scratch in (True, False):
        torch.manual_seed(0)
        backbone = job.make_backbone(name, "none", scratch=scratch)
        model = job.Segmenter(small(backbone=name), backbone).train()
        parts = job.parts_of(backbone)
        assert len(parts) > 2
        inside = [id(p) for _, parameters in parts for p in parameters]
        assert inside == [id(p) for p in backbone.parameters()]
        grouped = [id(p) for group in job.parameter_groups(model, small()) for p in group["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}

        normed = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        has_them = name not in ("test_convnext", "edgenext_xx_small")
        assert bool(normed) == (has_them and not scratch)
        statistics = {key: value.clone() for key, value in model.named_buffers()}
        images, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64)
        mask[:, 20:40, 10:50] = 1
        terms = job.loss_terms(small(), model, model(images), mask)
        sum(term.sum() for term in terms.values()).backward()
        assert [key for key, value in model.named_buffers() if not torch.equal(value, statistics[key])] == []
        assert [key for key, p in model.named_parameters() if p.grad is None] == []
        job.thaw(model.backbone, 1)
        live = {id(p) for p in backbone.parameters() if p.requires_grad}
        assert live == {id(p) for p in parts[-1][1]}


def plan_of(size: int = 240, **flags) -> job.Plan:
    return job.Plan(small(progressive_unfreeze=True, **flags), size, 6, ALONE)


def test_the_learning_rate_is_continuous_and_ends_where_it_shall():
    plan = plan_of(epochs=100, stage1_epochs=20, lr=1e-3, stage2_lr=2e-4, min_lr=1e-6, warmup_epochs=2, batch_size=12)
    rates = np.array([plan.learning_rate(step) for step in range(plan.total_steps)])
    assert plan.boundary == 400 and len(rates) == 2000
    assert rates[39] == pytest.approx(1e-3) and rates[0] == pytest.approx(1e-3 / 40)  # linear warm-up
    assert rates[399] == pytest.approx(2e-4, rel=1e-3) and rates[400] == pytest.approx(2e-4)
    assert rates[-1] == pytest.approx(1e-6, rel=2e-2)
    assert np.abs(np.diff(rates)).max() < 3e-5 and np.diff(rates)[40:].max() <= 0
    backwards = [plan.learning_rate(step) for step in reversed(range(plan.total_steps))]
    assert backwards[::-1] == rates.tolist()
    skipped = plan_of(epochs=100, stage1_epochs=20, skip_stage1=True, stage2_lr=2e-4, warmup_epochs=2, batch_size=12)
    assert skipped.learning_rate(0) == pytest.approx(2e-4 / 40) and skipped.total_steps == 1600


def test_thirds_of_the_second_stage():
    plan = plan_of(epochs=4, stage1_epochs=2, batch_size=FIRST, stage2_batch_size=SECOND, size=21)
    assert [(p.stage, p.start, p.end, p.thawed) for p in plan.phases] == [
        (1, 0, 2, 0),
        (2, 2, 4, 1),
        (2, 4, 6, 2),
        (2, 6, 8, 6),
    ]
    assert [plan.epoch(step) for step in range(STEPS)] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert [step for step in range(STEPS + 1) if plan.epoch_ends(step)] == [1, 2, 5, 8]
    assert plan_of(epochs=4, stage1_epochs=0, batch_size=12, size=21).phases[0].stage == 2


# ---------------------------------------------------------------------------------------------------------------------
# mixture of experts


def untrained(**flags) -> job.Segmenter:
    torch.manual_seed(0)
    return job.Segmenter(small(**flags), job.make_backbone("test_convnext", "none", scratch=True))


def mixture(**flags) -> job.Mixture:
    torch.manual_seed(0)
    return job.Mixture(16, small(**flags))


def features(count: int) -> Tensor:
    """Images whose means differ, around one that they share."""
    noise = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(n, 16, 1, 1, generator=noise) for n in (1, count))
    return torch.randn(count, 16, 4, 4, generator=noise) * 0.3 + own + shared


def collapsed(images: Tensor) -> job.Mixture:
    """Every image is sent to expert 0."""
    layer = mixture()
    with torch.no_grad():
        shared = torch.nn.functional.layer_norm(images.mean((0, 2, 3)), [16])
        layer.router.weight[0] = shared * 0.5
        layer.load.copy_(torch.tensor([0.5, *[0.5 / 6] * 6]))
        assert (layer.route(images)[1] == 0).any(1).float().mean() > 0.95
    return layer


def test_balance_and_z_have_a_gradient_on_the_router():
    images = features(64)
    for number in (0, 1):
        layer = collapsed(images)
        logits, _, _ = layer.route(images)
        terms = layer.losses(logits)
        assert terms[number].shape == (64,)
        terms[number].mean().backward()
        assert layer.router.weight.grad.abs().max() > 1e-2
        with torch.no_grad():
            layer.router.weight -= 0.05 * layer.router.weight.grad
        after, _, _ = layer.route(images)
        assert layer.losses(after)[number].mean() < terms[number].mean()
        assert number == 1 or after.softmax(1)[:, 0].mean() < logits.softmax(1)[:, 0].mean()
        with torch.no_grad():
            layer.load.fill_(1 / 7)
        assert torch.allclose(layer.losses(logits)[0], torch.ones(64))


@pytest.mark.parametrize("remedy", ["none", "balance", "centre"])
def test_a_collapsed_router_recovers_by_the_balance_loss_or_by_the_centre(remedy):
    images = features(128)
    layer = collapsed(images)
    optimizer = torch.optim.Adam(layer.router.parameters(), 0.01)
    seen = []
    for _ in range(300 if remedy == "balance" else 30):
        logits, chosen, _ = layer.route(images)
        share = torch.nn.functional.one_hot(chosen, 7).sum((0, 1)) / chosen.numel()
        if remedy == "balance":
            layer.losses(logits)[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        layer.follow(share.tolist(), logits.mean(0).tolist())
        if remedy != "centre":
            layer.centre.zero_()
        seen.append(share)
    assert layer.load.tolist() == pytest.approx(share.tolist(), abs=0.1)
    share = torch.stack(seen[-20:]).mean(0)
    assert share[0] > 0.47 if remedy == "none" else 0.05 < share.min() < share.max() < 0.25


def test_an_expert_that_starves_is_named_once(caplog):
    watch, model = job.RouterWatch(patience=3), SimpleNamespace(mixtures={"8": mixture()})
    for loads in ([0.9] + [0.1 / 6] * 6, [0.01] + [0.165] * 6, *[[0.165] * 6 + [0.01]] * 5, [1 / 7] * 7):
        model.mixtures["8"].load.copy_(torch.tensor(loads))
        watch.update(model)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Router at stride 8: contrast gets almost no images; raise --balance-weight"]


def test_dense_is_sparse_with_its_gradients():
    model, images = untrained(), torch.rand(3, 3, 64, 64)
    found = []
    for dense in (False, True):
        answer = model(images, dense=dense)
        answer["maps"][0].square().mean().backward()
        found.append((answer["maps"], [p.grad for p in model.mixtures.parameters()]))
        model.zero_grad()
    for sparse, dense in zip(*(maps for maps, _ in found), strict=True):
        assert torch.allclose(sparse, dense, atol=1e-5)
    for sparse, dense in zip(*(gradients for _, gradients in found), strict=True):
        assert torch.allclose(sparse, dense, atol=1e-6, rtol=1e-3)


def test_an_expert_that_nobody_chooses_has_a_gradient_of_zero():
    """None would leave DDP waiting."""
    model = untrained()
    answer = model(torch.rand(1, 3, 64, 64))
    sum(m.square().mean() for m in answer["maps"]).backward()
    for key, layer in model.mixtures.items():
        for number, expert in enumerate(layer.experts):
            gradients = [p.grad for p in expert.parameters()]
            assert all(g is not None for g in gradients)
            assert (sum(g.abs().sum() for g in gradients) > 0) == (number in answer["chosen"][key])


@torch.no_grad()
def test_an_expert_can_be_silenced():
    """The others keep their images and weights."""
    model, images = untrained().eval(), torch.rand(2, 3, 64, 64)
    whole = model(images)
    for number in range(7):
        answer = model(images, without=number)
        hooks = [layer.experts[number].register_forward_hook(lambda *a: 0 * a[-1]) for layer in model.mixtures.values()]
        silent = model(images)
        for hook in hooks:
            hook.remove()
        chosen = [(whole["chosen"][key] == number).any().item() for key in model.mixtures]
        assert torch.allclose(answer["maps"][0], silent["maps"][0], atol=1e-6)
        assert torch.equal(answer["maps"][0], whole["maps"][0]) != any(chosen)
        assert all(torch.equal(answer["chosen"][key], whole["chosen"][key]) for key in model.mixtures)


def test_the_router_works_in_float32():
    layer, images = mixture(), features(8)
    expected = layer.route(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.route(images)
        model = untrained()
        answer = model(torch.rand(2, 3, 64, 64))
        assert model.head(torch.rand(1, 8, 2, 2)).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {logits.dtype for logits in answer["logits"].values()} == {torch.float32}


def test_the_load_is_a_running_mean_of_the_global_batch(golden):
    """That of two and three processes is compared with the whole run."""
    first, rate = rows(golden[0], "train")[0], job.FOLLOW
    for stride in (8, 16, 32):
        mine = [{i: row[f"train/{job.expert_name(i)}/load_{stride}"] for i in range(7)} for row in rows(golden[0], "train")]
        assert all(sum(load.values()) == pytest.approx(1) for load in mine)
        counts = (np.array(list(mine[0].values())) - (1 - rate) / 7) / rate * FIRST * 2
        assert np.allclose(counts, counts.round(), atol=1e-3) and counts.sum() == pytest.approx(FIRST * 2)
    assert first["train/balance"] == pytest.approx(1)  # before the first step all loads are equal


# ---------------------------------------------------------------------------------------------------------------------
# images and masks


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> MaskedImages:
    """A bright ellipse, left of the middle, in images of several sizes; the last mask has another size than its image."""
    root = tmp_path_factory.mktemp("planted")
    names, sizes = ["small", "wide", "large", "odd"], [(40, 40), (50, 90), (150, 130), (100, 80)]
    for name, (height, width) in zip(names, sizes, strict=True):
        mask = np.zeros((height, width), np.uint8)
        cv2.ellipse(mask, (int(width * 0.3), int(height * 0.4)), (width // 6, height // 4), 20, 0, 360, 255, -1)
        write_image(root / "image" / f"{name}.png", np.where(mask[..., None] > 0, 170, 60).repeat(3, 2).astype(np.uint8))
        if name == "odd":
            mask = cv2.resize(mask, (2 * width, 2 * height), interpolation=cv2.INTER_NEAREST)
        write_image(root / "gt" / f"{name}.png", mask)
    paths = [[root / side / f"{name}.png" for name in names] for side in ("image", "gt")]
    return MaskedImages("planted", "", names, *paths, np.ones(4, bool))


def overlap(image: Tensor, mask: Tensor) -> float:
    """IoU of the mask and of what is bright."""
    bright = image.mean(0) > (image.min() + image.max()) / 2
    return ((bright & mask).sum() / (bright | mask).sum()).item()


def test_images_and_masks_stay_on_each_other(planted):
    dataset = job.Masked(planted, small())
    left, angles = [], []
    for index in range(4):
        for epoch in range(24):
            sample = dataset[epoch, index]
            assert sample["image"].shape == (3, 64, 64) and sample["mask"].shape == (64, 64)
            assert overlap(sample["image"], sample["mask"]) > 0.93, (index, epoch)
            assert overlap(sample["image"], sample["mask"].roll(4, 1)) < 0.85
            y, x = sample["mask"].nonzero().double().T
            left.append((x.mean() < 32).item())
            angles.append(np.cov(x, y)[0, 1])
            assert sample["image"].min() >= 0 and sample["image"].max() <= 1
    assert 0.3 < np.mean(left) < 0.7 and min(angles) < -10 < 10 < max(angles)
    whole = [dataset[index] for index in range(4)]
    assert [tuple(sample["mask"].shape) for sample in whole] == [(40, 40), (50, 90), (150, 130), (200, 160)]
    batch = job.collate_whole(whole)
    assert batch["image"].shape == (4, 3, 64, 64)
    for image, mask in zip(batch["image"], batch["mask"], strict=True):
        large = job.upsample(image[None], mask.shape)[0]
        assert overlap(large, mask) > 0.9


def test_augmentation_is_a_function_of_seed_epoch_and_index(planted):
    one, same, other = (job.Masked(planted, small(seed=seed)) for seed in (0, 0, 1))
    same[3, 1], same[0, 2]  # what was drawn before does not matter
    for key in ((0, 0), (0, 1), (5, 0)):
        assert torch.equal(one[key]["image"], same[key]["image"]) and torch.equal(one[key]["mask"], same[key]["mask"])
        assert not torch.equal(one[key]["image"], other[key]["image"])
    assert len({one[epoch, 0]["image"].numpy().tobytes() for epoch in range(10)}) == 10


def test_another_side_keeps_masks_on_images(planted):
    batch = torch.utils.data.default_collate([job.Masked(planted, small())[0, index] for index in range(4)])
    image, mask = job.rescale(batch, 64)
    assert image is batch["image"] and torch.equal(mask, batch["mask"].float())
    for side in (32, 96):
        image, mask = job.rescale(batch, side)
        assert image.shape == (4, 3, side, side) and set(mask.unique().tolist()) == {0.0, 1.0}
        assert all(overlap(i, m > 0.5) > 0.88 for i, m in zip(image, mask, strict=True))
    sides = [job.round_to(352 * factor) for factor in (0.01, 0.75, 1.0, 1.25)]
    assert sides == [32, 256, 352, 448]


def test_scales_are_drawn_by_step_alone():
    plan = plan_of(multi_scale=(0.75, 1.0, 1.25))
    drawn = [plan.scale(step) for step in range(300)]
    assert all(60 < drawn.count(factor) < 140 for factor in (0.75, 1.0, 1.25))
    assert [plan.scale(step) for step in (7, 3)] == [drawn[7], drawn[3]]


# ---------------------------------------------------------------------------------------------------------------------
# losses


def test_structure_and_edge_loss_are_what_they_say():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 40, 36))
    mask = np.stack([cv2.ellipse(np.zeros((40, 36)), (12 + 8 * i, 20), (9, 12), 30 * i, 0, 360, 1, -1) for i in (0, 1)])
    mask[1, :, :3] = 1  # an object at the border
    answer = 1 / (1 + np.exp(-logits))

    def entropy(target: np.ndarray) -> np.ndarray:
        return -(target * np.log(answer) + (1 - target) * np.log(1 - answer))

    around = np.stack([ndimage.uniform_filter(m, 31, mode="constant") for m in mask])
    weight = 1 + 5 * np.abs(around - mask)
    inside, either = ((weight * part).sum((1, 2)) for part in (answer * mask, answer + mask - answer * mask))
    structure = (weight * entropy(mask)).mean((1, 2)) / weight.mean((1, 2)) + 1 - (inside + 1) / (either + 1)
    outline = np.stack([ndimage.maximum_filter(m, 3) - ndimage.minimum_filter(m, 3) for m in mask])
    dice = 1 - (2 * (answer * outline).sum((1, 2)) + 1) / ((answer + outline).sum((1, 2)) + 1)
    edge = entropy(outline).mean((1, 2)) + dice
    given = torch.tensor(logits, dtype=torch.float32), torch.tensor(mask, dtype=torch.float32)
    weights = losses.structure_weight(given[1])
    assert np.allclose(losses.structure_loss(*given, weights), structure, rtol=1e-4)
    assert np.allclose(losses.edge_loss(*given), edge, rtol=1e-4)
    assert (losses.structure_loss(40 * given[1] - 20, given[1], weights) < 1e-3).all()


# ---------------------------------------------------------------------------------------------------------------------
# flags, weights, bad folders


def test_the_originals_command_line_is_understood(tmp_path):
    command = (
        f"--dataset-path X --checkpoint-dir {tmp_path} --resume-from auto --skip-stage1 --backbone edgenext_base"
        " --num-experts 7 --batch-size 24 --stage2-batch-size 20 --accumulation-steps 1 --img-size 320 --epochs 140"
        " --stage1-epochs 30 --lr 0.00085 --stage2-lr 0.00018 --scheduler cosine --min-lr 0.00001 --warmup-epochs 10"
        " --progressive-unfreeze --deep-supervision --num-workers 16"
    )
    config = parse_only(job.Config, command.split())
    assert config.output_dir == tmp_path and config.resume_from == "auto" and config.skip_stage1
    assert (config.lr, config.stage2_lr, config.min_lr) == (0.00085, 0.00018, 0.00001)
    assert (config.batch_size, config.stage2_batch_size, config.epochs, config.stage1_epochs) == (24, 20, 140, 30)
    assert config.progressive_unfreeze and config.deep_supervision and config.num_workers == 16


@pytest.mark.parametrize(
    "flags",
    [
        *({"img_size": 100}, {"top_k": 8}, {"stage1_epochs": 100}, {"val_share": 1.0}, {"multi_scale": ()}),
        {"find_batch_size": True, "stage2_batch_size": 4},
    ],
)
def test_bad_numbers_are_sentences(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags)).replace('_', '-')}"):
        small(**flags)


def write_noise(path: Path) -> Path:
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    return path


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("edgenext_bas", "none", "edgenext_bas is unknown to timm .*Near names: edgenext_base"),
        ("xyzzy", "none", "Near names: "),
        ("test_convnext", "nowhere.pth", "--backbone-weights nowhere.pth is no file"),
        ("test_convnext", "noise", "--backbone-weights .*noise.pth cannot be read .*give timm's weights of test_convnext"),
        ("test_convnext", "foreign", "foreign.pth does not hold the weights of timm's test_convnext .97 of 97 are missing"),
        ("test_vit", "none", "--backbone test_vit has feature maps of fewer than three sizes: choose another"),
    ],
)
def test_backbones_and_weights_that_cannot_be_had_are_sentences(tmp_path, name, weights, words):
    if weights == "noise":
        weights = str(write_noise(tmp_path / "noise.pth"))
    elif weights == "foreign":  # timm itself would begin with random weights
        weights = str(tmp_path / "foreign.pth")
        torch.save(timm.create_model("test_resnet").state_dict(), weights)
    with pytest.raises(UserError, match=words) as caught:
        job.make_backbone(name, weights, scratch=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "wrapped"), [("test_convnext", False), ("mvitv2_tiny", True)])
def test_a_file_with_the_backbones_weights_is_read(tmp_path, name, wrapped):
    """timm renames what is in them in two ways; its own training puts them into another dict."""
    torch.manual_seed(7)
    state = timm.create_model(name).state_dict()
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "weights.pth")
    backbone = job.make_backbone(name, str(tmp_path / "weights.pth"), scratch=False)
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    mine = {key.removeprefix("model.").replace(".", "_"): value for key, value in backbone.state_dict().items()}
    assert len(mine) > 50 and all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_a_launch_that_cannot_begin_ends_with_one_sentence(camouflaged, flags, fork, tmp_path):
    cases = {
        "without a network": ["--backbone-weights", "timm"],
        "near names: ": ["--backbone", "test_convnex"],
        "give a multiple of 32": ["--img-size", 100],
        "holds no known layout": ["--dataset-path", tmp_path],
    }
    for words, wrong in cases.items():
        text = fork([*flags, *dealt(1), *wrong, "--output-dir", tmp_path / "run"], ok=False)
        assert words.lower() in " ".join(text.replace("│", " ").split()).lower() and "Traceback" not in text, text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_folder_without_objects_is_refused(camouflaged, tmp_path):
    shutil.copytree(camouflaged, tmp_path / "data")
    for path in (tmp_path / "data/Train").rglob("*-CAM-*"):
        path.unlink()
    with pytest.raises(UserError, match="None of the 5 images of data has a camouflaged object"):
        job.prepare_data(small(dataset_path=tmp_path / "data"), ALONE)


def test_files_that_cannot_be_used_are_named_before_training(camouflaged, tmp_path, caplog):
    shutil.copytree(camouflaged, tmp_path / "data")
    images = sorted((tmp_path / "data/Train/Image").glob("*-CAM-*"))
    images[0].write_bytes(images[0].read_bytes()[:-200])
    (tmp_path / "data/Train/GT_Object" / f"{images[1].stem}.png").unlink()
    parts = job.prepare_data(small(dataset_path=tmp_path / "data"), ALONE)
    [told] = [record.getMessage() for record in caplog.records if "left out: " in record.getMessage()]
    assert "2 of 26 left out" in told and images[0].name in told and f"{images[1]}: it has no mask" in told
    assert len(parts.train) + len(parts.val) == 24
    assert set(parts.train.images.stems).isdisjoint(parts.val.images.stems)
