"""What comes at a run from outside: signals, kills, restarts, faults of one rank, crowded folders, trackers.

This file is also a program that the tests launch: the training script with the fault that PLANT names."""

import itertools
import json
import math
import os
import re
import signal
import sqlite3

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import ROOT, Launch, assert_same_run, last_step, rows, run, weights
from safetensors.numpy import load_file

from common import checkpoints
from common.checkpoints import damage
from common.cli import parse, rank, sentences
from scripts import train_quantumgrav as script

ENDLESS = ("--epochs", 10**6, "--eval-every", 10**9, "--save-every", 10**9)


@pytest.fixture(scope="module")
def flags(sets):
    return [
        *("--dataset-path", sets, "--tracker", "none", "--log-every", 1, "--batch-size", 8, "--num-workers", 0),
        *("--width", 16, "--layers", 1, "--baseline-sets", 0),
    ]


@pytest.fixture
def start():
    """Launch; when the test ends, nothing of it goes on."""
    launches = []

    def begin(args, **options) -> Launch:
        launches.append(Launch(args, **options))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.kill()


def planted(fault: str) -> dict:
    return {"script": __file__, "env": {"PYTHONPATH": str(ROOT), "PLANT": fault}}


# -- the launcher


def tell(launch: Launch, how: str) -> None:
    if how == "Ctrl-C":  # reaches all processes of the terminal
        os.killpg(launch.pid, signal.SIGINT)
    else:
        os.kill(launch.pid, signal.Signals[how])


def checkpoint_names(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("step-*")}


@pytest.mark.slow
@pytest.mark.parametrize(("via", "processes"), [(None, 1), ("accelerate", 1), ("accelerate", 2)])
def test_a_run_that_is_told_to_end_saves_where_it_stops_and_continues_there(start, flags, tmp_path, via, processes):
    """Again and again, in each way; what it saves, it saves because it was told to."""
    args = [*flags, *ENDLESS, "--num-workers", 2, "--output-dir", tmp_path, "--resume-from", "auto"]
    config = "cpu.yaml" if processes == 1 else "2xcpu.yaml"  # the launcher has another code path for one process
    stop, saved = 0, set()
    for how in ("SIGTERM", "SIGUSR1", "Ctrl-C", *(["SIGKILL"] if via == "accelerate" else [])):
        launch = start(args, processes=processes, via=via, config=config)
        launch.wait_for(lambda stop=stop: last_step(tmp_path) >= stop + 20)
        tell(launch, how)
        assert not launch.wait_gone(), how
        text = launch.output()
        assert not stop or f"Resumed from step {stop}\n" in text
        stop, before, saved = last_step(tmp_path), saved, checkpoint_names(tmp_path)
        assert saved - before == {f"step-{stop:08d}"}, how
        assert damage(tmp_path / "checkpoints" / f"step-{stop:08d}") is None
        assert f"Stopped by a signal at step {stop}; continue with --resume-from auto" in text

    run([*args, "--max-steps", stop + 10], processes=processes)
    assert (tmp_path / "DONE").exists()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, stop + 11))  # each step once


RESTARTED = ("--epochs", 9, "--max-steps", 90, "--eval-every", 30, "--save-every", 10)


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run([*flags, *RESTARTED, "--output-dir", folder], processes=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(2))
def test_a_launcher_with_max_restarts_brings_the_run_to_its_end(start, undisturbed, flags, tmp_path, attempt):
    """Two launches of three restarts: stock torch loses about half of all restarts."""
    args = [*flags, *RESTARTED, "--output-dir", tmp_path, "--resume-from", "auto"]
    launch = start(args, processes=2, via="accelerate", launcher_args=["--max_restarts", "3"])
    for step, victim in ((25, attempt % 2), (45, 1), (65, 0)):
        launch.wait_for(lambda step=step: last_step(tmp_path) >= step)
        os.kill(launch.ranks()[victim], signal.SIGKILL)
    assert launch.wait() == 0, launch.output()
    assert launch.output().count("Resumed from step") == 3
    assert_same_run(tmp_path, undisturbed)


# -- one rank of two


def test_when_a_rank_is_killed_the_other_says_so_and_ends_and_the_run_can_go_on(start, flags, tmp_path):
    args = [*flags, *ENDLESS, "--save-every", 10, "--num-workers", 2, "--output-dir", tmp_path, "--resume-from", "auto"]
    saved = 0
    for victim in (0, 1):
        launch = start(args, processes=2)
        launch.wait_for(lambda saved=saved: last_step(tmp_path) >= saved + 25)
        launch.children[victim].kill()
        assert launch.children[1 - victim].wait(30) == 1
        assert not launch.wait_gone()
        text = launch.output()
        assert f"[RANK {1 - victim}] ERROR: Another process of this run died or stopped answering" in text
        assert text.count("ERROR") == 1 and "Traceback" not in text
        saved = max(int(name[5:]) for name in checkpoint_names(tmp_path))
    assert f"Resumed from step {saved}" in run([*args, "--max-steps", saved + 10], processes=2)
    assert (tmp_path / "DONE").exists()


def test_when_a_rank_has_a_bug_its_traceback_is_seen_and_the_other_ends(flags, tmp_path):
    text = run([*flags, "--output-dir", tmp_path], processes=2, ok=False, timeout=60, **planted("bug"))
    assert "ValueError: planted" in text and text.count("Traceback") == 1
    assert "[RANK 0] ERROR: Another process of this run died or stopped answering" in text


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(flags, tmp_path):
    args = [*flags, "--max-steps", 25, "--output-dir", tmp_path]  # past the end of an epoch, where replicas are compared
    text = run(args, processes=2, **planted("nan at step 3"))
    skips = [line for line in text.splitlines() if "is skipped on all processes: loss, manifold_like is not finite" in line]
    assert all("Step 3 " in line for line in skips) and sorted(line[:8] for line in skips) == ["[RANK 0]", "[RANK 1]"]
    train = rows(tmp_path, "train")
    assert [row["train/skipped"] for row in train] == [0] * 2 + [1] * 23
    assert [row["step"] for row in train if row["train/loss"] is None] == [3]
    assert all(np.isfinite(value).all() for value in weights(tmp_path).values())


def test_steps_that_are_not_finite_in_a_row_end_the_run_with_a_sentence(flags, tmp_path):
    args = [*flags, "--max-skipped-steps", 4, "--output-dir", tmp_path]
    text = run(args, processes=2, ok=False, timeout=60, **planted("nan from step 3"))
    assert "4 steps in a row had a loss or gradient that is not finite (--max-skipped-steps), last at step 6" in text
    assert "Traceback" not in text


# -- the folder


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run([*flags, "--epochs", 2, "--output-dir", folder], via="python")
    return folder


def test_a_run_leaves_its_record_and_its_model(finished):
    height, width, _ = matplotlib.image.imread(finished / "curves.png").shape
    assert height > 100 and width > 100
    assert "width: 16" in (finished / "config.yaml").read_text()
    described = json.loads((finished / "model" / "config.json").read_text())
    assert described["tasks"]["names"] == ["manifold_like"]
    best = json.loads((finished / "checkpoints" / "names.json").read_text())["best"]
    model, average = load_file(finished / "model" / "model.safetensors"), finished / "checkpoints" / best / "ema.safetensors"
    assert all(np.array_equal(model[name], value) for name, value in load_file(average).items())


def test_a_finished_run_has_nothing_to_do(finished, flags):
    before = (finished / "metrics.jsonl").read_bytes()
    text = run([*flags, "--epochs", 2, "--output-dir", finished, "--resume-from", "auto"])
    assert f"{finished} has reached its end already: nothing to do" in text
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_the_folder_of_another_run_is_left_alone(finished, flags):
    before = (finished / "metrics.jsonl").read_bytes()
    text = run([*flags, "--epochs", 2, "--output-dir", finished], ok=False)
    assert re.search(f"ERROR: --output-dir {finished} already holds a run: .*--resume-from latest", text)
    assert "Traceback" not in text
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_goes_on(start, flags, tmp_path):
    args = [*flags, *ENDLESS, "--output-dir", tmp_path, "--resume-from", "auto"]
    first = start(args)
    first.wait_for(lambda: last_step(tmp_path) >= 1)
    text = run(args, ok=False, **planted("impatience"))
    assert f"ERROR: --output-dir {tmp_path} is in use by another running process" in text and "Traceback" not in text
    reached = last_step(tmp_path)
    first.wait_for(lambda: last_step(tmp_path) > reached)


# -- trackers


def test_wandb_without_a_login_writes_offline_and_a_resumed_run_keeps_its_id(flags, tmp_path):
    nobody = {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(tmp_path / "home")}
    args = [*flags, "--tracker", "wandb", "--output-dir", tmp_path]
    text = run([*args, "--max-steps", 5], env=nobody, via="python")
    assert f"No W&B login found: logging offline below {tmp_path}" in text
    run([*args, "--max-steps", 10, "--resume-from", "latest"], env=nobody, via="python")
    folders = [path.name.split("-") for path in (tmp_path / "wandb").glob("offline-run-*-*")]
    assert len(folders) == 2 and {name[-1] for name in folders} == {(tmp_path / "tracker_id").read_text()}


def test_tensorboard_gets_the_same_numbers_as_the_record(flags, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run([*flags, "--tracker", "tensorboard", "--max-steps", 5, "--output-dir", tmp_path])
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*") if path.parent.name == "quantumgrav"}
    accumulator = EventAccumulator(str(folder)).Reload()
    shown = [(event.step, event.value) for event in accumulator.Scalars("train/loss")]
    assert shown == [(row["step"], pytest.approx(row["train/loss"])) for row in rows(tmp_path, "train")]


def test_trackio_continues_a_resumed_run_and_keeps_another_of_the_same_name_apart(flags, tmp_path):
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    for folder, more in ((one, ()), (one, ("--max-steps", 7, "--resume-from", "latest")), (other, ())):
        args = [*flags, "--tracker", "trackio", "--max-steps", 5, *more, "--output-dir", folder]
        run(args, env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    with sqlite3.connect(tmp_path / "trackio" / "quantumgrav.db") as database:
        training = "instr(metrics, 'train/loss')"  # not the rows of evaluations
        logged = database.execute(f"SELECT run_id, step FROM metrics WHERE {training} ORDER BY id").fetchall()
    steps = {run_id: [step for mine, step in logged if mine == run_id] for run_id, _ in logged}
    assert list(steps.values()) == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5]]


def test_no_tracker_writes_nothing(finished):
    assert not any("wandb" in path.name or "tfevents" in path.name for path in finished.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# the program that `planted` launches


def plant(fault: str) -> None:
    """Faults of rank 1 while it trains; impatience is a job that does not wait until another one has left its folder."""
    if fault == "impatience":
        checkpoints.time.sleep = lambda seconds: None
        return
    honest, calls = script.Tasks.losses, itertools.count(1)

    def losses(tasks, outputs, batch):
        values = honest(tasks, outputs, batch)
        step = next(calls) if torch.is_grad_enabled() and rank() == 1 else 0
        if fault == "bug" and step == 3:
            raise ValueError("planted")
        if (fault == "nan at step 3" and step == 3) or (fault == "nan from step 3" and step >= 3):
            return {task: value * math.nan for task, value in values.items()}
        return values

    script.Tasks.losses = losses


if __name__ == "__main__":
    with sentences():
        config = parse(script.Config)
        plant(os.environ["PLANT"])
        script.main(config)
