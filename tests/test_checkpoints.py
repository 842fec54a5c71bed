"""Checkpoints: atomic, verified, rotated, portable, and never executed."""

import json
import os
import pickle
import random
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import ROOT, Launch, run
from torch import nn

from common.checkpoints import RunFolder, damage, read_checkpoint
from common.cli import RunConfig, UserError


def folder(path: Path, **values) -> RunFolder:
    return RunFolder(RunConfig(output_dir=path, **values), Accelerator(cpu=True), {"samples per step": 8})


def parts(value: float = 0.0):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model}, {"optimizer": optimizer}


def saved_steps(path: Path) -> list[int]:
    return sorted(int(d.name[5:]) for d in (path / "checkpoints").glob("step-*"))


def test_round_trip(tmp_path):
    run_folder = folder(tmp_path)
    modules, optimizers = parts(2.0)
    run_folder.save({"step": 3, "best_loss": 0.1 + 0.2}, modules, optimizers)
    del run_folder
    fresh, fresh_optimizers = parts(5.0)
    state = folder(tmp_path, resume_from="latest").resume(fresh, fresh_optimizers)
    assert state == {"step": 3, "best_loss": 0.1 + 0.2}
    assert torch.equal(fresh["model"].weight, modules["model"].weight)
    for a, b in zip(fresh_optimizers["optimizer"].state.values(), optimizers["optimizer"].state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)
    names = {p.name for p in (tmp_path / "checkpoints" / "step-00000003").iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "state.json", "manifest.json"}
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in (tmp_path / "checkpoints" / "step-00000003").iterdir())


def test_a_step_saved_twice_holds_what_came_later(tmp_path):
    """A run stopped where an evaluation is due evaluates on resume and saves the same step again."""
    run_folder = folder(tmp_path)
    run_folder.save({"step": 3, "evaluated": 0}, *parts(1.0))
    run_folder.save({"step": 3, "evaluated": 3}, *parts(2.0))
    del run_folder
    assert saved_steps(tmp_path) == [3] and not list((tmp_path / "checkpoints").glob(".*"))
    fresh = parts(5.0)
    assert folder(tmp_path, resume_from="latest").resume(*fresh) == {"step": 3, "evaluated": 3}
    assert torch.equal(fresh[0]["model"].weight, parts(2.0)[0]["model"].weight)


def test_last_two_best_and_top_k_are_kept(tmp_path):
    run_folder = folder(tmp_path, keep_top_k=2)
    state = {}
    for step, score in enumerate([0.1, 0.9, 0.3, 0.8, 0.2, 0.4], start=1):
        state["step"] = step
        assert run_folder.wants(state, score) == (step in (1, 2, 3, 4))
        run_folder.save(state, *parts(), score=score, best=score == 0.9)
    assert saved_steps(tmp_path) == [2, 4, 5, 6]
    names = json.loads((tmp_path / "checkpoints" / "names.json").read_text())
    assert names == {
        "last": "step-00000006",
        "best": "step-00000002",
        "top": [[0.9, "step-00000002"], [0.8, "step-00000004"]],
    }


@pytest.fixture
def three(tmp_path):
    run_folder = folder(tmp_path, keep_top_k=3)
    state = {}
    for step in (1, 2, 3):
        state["step"] = step
        run_folder.save(state, *parts(step), score=float(step))
    return tmp_path


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/bomb-went-off",))


def reforge(directory: Path) -> None:
    """A manifest that fits: what an attacker would write too."""
    from common.checkpoints import _sha256

    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in directory.iterdir() if p.name != "manifest.json"
    }
    (directory / "manifest.json").write_text(json.dumps({"step": 3, "files": files}))


DAMAGES = {
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 40), "has 40 bytes instead of"),
    "flipped": (lambda d: flip(d / "model.safetensors"), "does not match its checksum"),
    "flipped optimizer": (lambda d: flip(d / "optimizer.pt"), "does not match its checksum"),
    "missing": (lambda d: (d / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest cannot be read"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "manifest cannot be read"),
    "manifest of another kind": (lambda d: (d / "manifest.json").write_text("[1]"), "manifest cannot be read"),
    "hostile optimizer": (
        lambda d: ((d / "optimizer.pt").write_bytes(pickle.dumps(Bomb())), reforge(d)),
        "something else than tensors",
    ),
    "hostile zip": (
        lambda d: (torch.save({"state": Bomb()}, d / "optimizer.pt"), reforge(d)),
        "something else than tensors",
    ),
    "hostile weights": (
        lambda d: ((d / "model.safetensors").write_bytes(pickle.dumps(Bomb())), reforge(d)),
        "something else than tensors",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_hostile_checkpoint_is_named_and_the_one_before_is_used(three, name, caplog):
    bomb = Path("/tmp/bomb-went-off")
    bomb.unlink(missing_ok=True)
    newest = three / "checkpoints" / "step-00000003"
    harm, words = DAMAGES[name]
    harm(newest)
    modules, optimizers = parts(9.0)
    state = folder(three, resume_from="auto").resume(modules, optimizers)
    assert state["step"] == 2 and "step-00000003" in caplog.text and words in caplog.text
    assert modules["model"].weight[0, 0].item() == pytest.approx(2.0, abs=0.01)
    before = modules["model"].weight.clone()
    with pytest.raises(UserError, match="is not an intact checkpoint"):
        folder(three, resume_from=str(newest)).resume(modules, optimizers)
    assert torch.equal(modules["model"].weight, before), "half-loaded"
    assert not bomb.exists(), "code in a checkpoint was run"


def test_what_resume_from_means(tmp_path, three):
    with pytest.raises(UserError, match="--resume-from latest: .* holds no checkpoint"):
        folder(tmp_path / "new", resume_from="latest").resume(*parts())
    assert folder(tmp_path / "new2", resume_from="auto").resume(*parts()) is None
    with pytest.raises(UserError, match="already holds a run: continue with --resume-from latest"):
        folder(three)
    with pytest.raises(UserError, match="is a run folder: give one of"):
        folder(tmp_path / "new3", resume_from=str(three)).resume(*parts())
    # a path: go back to it; what came after is set aside
    assert folder(three, resume_from=str(three / "checkpoints" / "step-00000002")).resume(*parts())["step"] == 2
    assert saved_steps(three) == [1, 2] and (three / "checkpoints" / "abandoned-step-00000003").exists()
    for d in (three / "checkpoints").glob("step-*"):
        shutil.rmtree(d / "nothing", ignore_errors=True)
        (d / "manifest.json").unlink()
    with pytest.raises(UserError, match="Every checkpoint .* is damaged"):
        folder(three, resume_from="auto").resume(*parts())


def test_another_global_batch_or_model_is_refused(three):
    other = RunFolder(
        RunConfig(output_dir=three, resume_from="auto", batch_size=4), Accelerator(cpu=True), {"samples per step": 4}
    )
    with pytest.raises(
        UserError, match="samples per step = 8, this launch has 4.*pass --batch-size 4 --accumulation-steps 2"
    ):
        other.resume(*parts())
    del other
    with pytest.raises(UserError, match="does not fit this model"):
        folder(three, resume_from="auto").resume({"model": nn.Linear(4, 2)}, parts()[1])


def test_two_jobs_cannot_share_a_folder(tmp_path, monkeypatch):
    first = folder(tmp_path)
    monkeypatch.setattr("common.checkpoints.time.sleep", lambda s: None)
    with pytest.raises(UserError, match="is in use by another running process"):
        folder(tmp_path)
    del first
    folder(tmp_path)


def test_an_unwritable_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        folder(tmp_path / "file" / "run")


def test_a_full_disk_loses_nothing(three, monkeypatch):
    run_folder = folder(three, resume_from="auto", keep_top_k=3)
    state = run_folder.resume(*parts())
    real = torch.save

    def full(*args, **kwargs):
        real(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is full, so step-00000004 was not saved; the checkpoints before it are intact"):
        run_folder.save(state | {"step": 4}, *parts())
    assert saved_steps(three) == [1, 2, 3] and not list((three / "checkpoints").glob(".*"))
    assert all(damage(d) is None for d in (three / "checkpoints").glob("step-*"))


def test_a_really_full_disk(sets, tmp_path):
    """A file system of 1 MB under the run folder."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        flags = [
            "--dataset-path",
            sets,
            "--output-dir",
            small / "run",
            "--tracker",
            "none",
            "--batch-size",
            8,
            "--num-workers",
            0,
        ]
        text = run([*flags, "--save-every", 1, "--width", 24, "--layers", 1, "--keep-top-k", 9], ok=False)
        assert "is full" in text and "Traceback" not in text
        newest = sorted((small / "run" / "checkpoints").glob("step-*"))[-1]
        assert read_checkpoint(newest)["state"]["step"] >= 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_tears_nothing(tmp_path):
    """A process that does nothing but save is killed at random moments; what it leaves always loads and is consistent."""
    saver = tmp_path / "saver.py"
    saver.write_text(
        textwrap.dedent(f"""
            import sys; sys.path.insert(0, {str(ROOT)!r})
            import torch
            from torch import nn
            from pathlib import Path
            from accelerate import Accelerator
            from common.checkpoints import RunFolder
            from common.cli import RunConfig
            config = RunConfig(output_dir=Path({str(tmp_path)!r}), resume_from="auto")
            folder = RunFolder(config, Accelerator(cpu=True), {{}})
            model = nn.Linear(1000, 1000)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            state = folder.resume({{"model": model}}, {{"optimizer": optimizer}}) or {{"step": 0}}
            print("ready", flush=True)
            while True:
                state["step"] += 1
                nn.init.constant_(model.weight, state["step"])
                for p in model.parameters(): optimizer.state[p] = {{"momentum_buffer": torch.full_like(p, state["step"])}}
                folder.save(state, {{"model": model}}, {{"optimizer": optimizer}})
        """)
    )
    rng = random.Random(0)
    reached = 0
    for _ in range(16):
        launch = Launch([], script=saver)
        launch.wait_for(lambda launch=launch: "ready" in launch.output())
        time.sleep(0.15 + rng.random() * 0.2)
        launch.kill()
        intact = [d for d in sorted((tmp_path / "checkpoints").glob("step-*")) if damage(d) is None]
        assert len(intact) == len(list((tmp_path / "checkpoints").glob("step-*"))) >= 1
        content = read_checkpoint(intact[-1])
        step = content["state"]["step"]
        assert content["modules"]["model"]["weight"].unique().tolist() == [step]
        assert content["optimizers"]["optimizer"]["state"][0]["momentum_buffer"].unique().tolist() == [step]
        assert step >= reached
        reached = step
    assert reached > 16
