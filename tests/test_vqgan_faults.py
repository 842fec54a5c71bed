"""A loss that is not finite on one process of train_vqgan.py: the step is skipped on all, as if it had not been.

This file is also the program that the test launches: the script with the faults that PLANT names, which writes down what
each process holds whenever it saves."""

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
from helpers import ROOT, assert_same_run, rows, run

from common.cli import parse, rank, sentences
from scripts import train_vqgan as script

STEPS, FAULTS = 9, {0: "l1", 6: "video_disc", 7: "l1"}  # steps 1, 7, 8; only the last two checkpoints are kept


def held(folder, process: int) -> dict[int, dict]:
    """What a process held after each step."""
    lines = (folder / f"rank{process}.jsonl").read_text().splitlines()
    return {row["step"]: row["held"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def flags(chests):
    """Everything that has a state is at work from step 4 on: both networks, the codebook, LeCAM, the adaptive weight."""
    small = ("--patch-size", 16, 16, 16, "--width", 4, "--blocks", 1, "--n-codes", 32, "--disc-width", 4, "--disc-layers", 2)
    gan = ("--discriminator-iter-start", 3, "--discriminator-warmup", 1, "--gan-ramp", 2)
    split = ("--max-patients", 4, "--val-patients", 1, "--test-patients", 0, "--batch-size", 2)
    quiet = ("--tile-size", 32, "--tracker", "none", "--num-workers", 0, "--log-every", 1, "--eval-every", 10**6)
    return [
        *("--dataset-path", chests / "scans", "--max-steps", STEPS, "--save-every", 1, "--perceptual-weight", 0),
        *("--adaptive-weight", "--lecam-weight", 0.01, "--warmup-steps", 2, *small, *gan, *split, *quiet),
    ]


def test_a_step_that_is_not_finite_on_one_process_is_as_if_it_had_not_been(flags, tmp_path):
    planted = {"script": __file__, "env": {"PYTHONPATH": str(ROOT), "PLANT": json.dumps(FAULTS)}}
    text = run([*flags, "--output-dir", tmp_path / "run"], processes=2, **planted)
    for step, term in FAULTS.items():
        found = [line for line in text.splitlines() if f"Step {step + 1} is skipped on all processes" in line]
        assert sorted(line[:8] for line in found) == ["[RANK 0]", "[RANK 1]"] and all(term in line for line in found)
    assert [row["train/skipped"] for row in rows(tmp_path / "run", "train")] == [1] * 6 + [2, 3, 3]

    mine, theirs = held(tmp_path / "run", 0), held(tmp_path / "run", 1)
    assert mine == theirs and list(mine) == list(range(1, STEPS + 1))
    assert mine[1]["model"] == mine[1]["ema"]  # the codes that the run began with
    for step in range(4, STEPS):
        changed = {name for name in mine[step] if mine[step + 1][name] != mine[step][name]}
        # the adaptive weight may learn of the reconstruction's and the generator's gradients, which were fine
        assert changed == ({"adaptive"} if step == 6 else set() if step in FAULTS else set(mine[step])), step

    # a launch that knows nothing of the skipped steps goes on in the same way: nothing of them was left in memory
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints" / f"step-{STEPS:08d}")
    (tmp_path / "again/DONE").unlink()
    text = run([*flags, "--output-dir", tmp_path / "again", "--resume-from", "latest"], processes=2, **planted)
    assert f"Resumed from step {STEPS - 1}\n" in text and "is skipped" not in text
    assert_same_run(tmp_path / "again", tmp_path / "run")
    assert held(tmp_path / "again", 0) == held(tmp_path / "again", 1) == mine


# ---------------------------------------------------------------------------------------------------------------------
# the program that the test launches


def plant(faults: dict[int, str]) -> None:
    """Rank 1 finds NaN in these terms of these steps."""
    seed_step, now = script.training.seed_step, {}

    def at_step(seed: int, step: int, micro: int, rank: int) -> None:
        now["step"] = step
        seed_step(seed, step, micro, rank)

    def poisoned(honest):
        def terms_of(*args):
            found = honest(*args)
            terms = found[0] if isinstance(found, tuple) else found
            term = faults.get(now["step"])
            if rank() == 1 and term in terms:
                terms[term] = terms[term] * math.nan
            return found

        return terms_of

    script.training.seed_step = at_step
    script.reconstruction_terms = poisoned(script.reconstruction_terms)
    script.discriminator_terms = poisoned(script.discriminator_terms)


def write_down_what_is_held() -> None:
    def digest(tensors) -> str:
        return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()

    honest = script.RunFolder.save

    def save(folder, state, modules, optimizers, **more) -> None:
        found = {name: digest(module.state_dict().values()) for name, module in modules.items()}
        found["codebook"] = digest(modules["model"].quantizer.buffers())
        adam = optimizers["optimizer"].state_dict()["state"]
        found["adam"] = digest(torch.as_tensor(part) for parts in adam.values() for part in parts.values())
        found |= {name: state[name] for name in ("image", "video", "adaptive")}
        with open(folder.path / f"rank{rank()}.jsonl", "a") as file:
            file.write(json.dumps({"step": state["step"], "held": found}) + "\n")
        honest(folder, state, modules, optimizers, **more)

    script.RunFolder.save = save


if __name__ == "__main__":
    with sentences():
        config = parse(script.Config)
        plant({int(step): term for step, term in json.loads(os.environ["PLANT"]).items()})
        write_down_what_is_held()
        script.main(config)
