"""Is a training script's distributed training correct? See tests/README.md.

    python -m pytest tests/conformance --script scripts/my_fork.py [--script-args "--demo --width 16"] [--quick]

Every check launches the script as its users do or reads what an earlier check's launch has left. All that it knows of the
script is the command line, the run folder and what the hook of `hook/sitecustomize.py` records of torch itself."""

import json
import os
import pickle
import random
import shutil
import signal
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from helpers import rows
from lab import (
    SIGKILL,
    SIGTERM,
    Lab,
    assert_finite,
    assert_same_to_the_bit,
    batches,
    checkpoints,
    fail,
    first_difference,
    ledger,
    named,
    tail,
    tell,
    tensors,
)

EXACT = (
    "not everything that the next step depends on is in the checkpoint or a function of the step: optimizer, averaged"
    " weights, place in the epoch, augmentation and dropout seeds, learning rate, best score, patience."
)

# ---------------------------------------------------------------------------------------------------------------------
# one process or several


def advice_on_split(difference: tuple) -> str:
    step, key, *_ = difference
    if step == 1 and key and "norm" not in key:
        return (
            "already the first step's losses do, so other samples are in the batch, the loss is a mean over each process's"
            " own count (labels, pixels) instead of the global one, or what is logged is one process's share."
        )
    if step == 1:
        return (
            "its losses agree, so the gradient is scaled: look at `accumulate`, loss / accumulation, DDP's mean, zero_grad."
        )
    return (
        "the first step agrees, so look at what happens between steps: scheduler, zero_grad, parameters that DDP does not"
        " know (thawed after prepare), a mean over each process's own count of labels, BatchNorm, noise that depends on the"
        " rank (pass --dropout 0 in --script-args)."
    )


@pytest.mark.parametrize(
    ("processes", "accumulation"),
    [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.full), pytest.param(1, 4, marks=pytest.mark.full)],
)
def test_training_does_not_depend_on_the_split_of_the_batch(lab: Lab, processes, accumulation):
    one, other = lab.run(), lab.run(processes=processes, accumulation=accumulation)
    for a, b in zip(rows(other, "train"), rows(one, "train"), strict=False):
        values = [{k: v for k, v in row.items() if k != "train/lr"} for row in (a, b)]
        if difference := first_difference(*([v] for v in values), lab.job.rtol, lab.job.atol):
            tell(difference, named(processes, accumulation), "one process", advice_on_split(difference))
    if len(rows(one, "train")) != len(rows(other, "train")):
        tell(first_difference(rows(other, "train"), rows(one, "train"), 1, 1), named(processes, accumulation), "one", "")


def test_the_learning_rate_does_not_depend_on_the_split_of_the_batch(lab: Lab):
    one = [{"step": row["step"], "train/lr": row["train/lr"]} for row in rows(lab.run(), "train")]
    for options in ({"processes": 2}, {"accumulation": 2}):
        other = [{"step": row["step"], "train/lr": row["train/lr"]} for row in rows(lab.run(**options), "train")]
        if difference := first_difference(other, one, 1e-12):
            advice = (
                "is the scheduler stepped once per process or micro-batch (accelerator.prepare does that) instead of once?"
            )
            tell(difference, named(**options), "one process", advice)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_evaluation_does_not_depend_on_the_number_of_processes(lab: Lab, processes):
    if any(batch % processes for batch in lab.job.batches.values()):
        pytest.skip(f"the batch does not divide among {processes} processes")
    one, other = lab.run(), lab.run(processes=processes)
    for part in ("val", "test"):
        if difference := first_difference(rows(other, part), rows(one, part), lab.job.rtol, lab.job.atol):
            tell(
                difference, named(processes), "one process",
                "look for metrics of one rank's shard, samples that pad the last batch counted twice, a mean of the means of"
                " unequal batches; gather one value per sample, drop duplicates, average once.",
            )  # fmt: skip
    assert rows(one, "val"), f"metrics.jsonl has no val/... row at all: {rows(one)[-1]}"


def test_every_sample_comes_once_per_epoch(lab: Lab):
    steps = lab.steps()
    epochs = [row["epoch"] for row in rows(lab.run(), "train")]
    alone = batches(ledger(lab.run())[0], steps, 1)
    shares = [batches(events, steps, 1) for events in ledger(lab.run(processes=2))]
    if alone is None:
        pytest.skip("the training batches do not come from a torch DataLoader with one number per sample")
    if None in shares:
        fail(
            "On one process each step asks its DataLoader for a batch; of two processes one asks for fewer batches than it"
            " takes steps: is its share dealt again (a sampler that knows the rank, and accelerator.prepare)?"
        )
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    for step, (mine, theirs) in enumerate(zip(together, alone, strict=True), 1):
        if sorted(mine) != sorted(theirs):
            twice = len(mine) - len(set(mine))
            fail(
                f"Step {step} has other samples on 2 processes than on one ({len(set(mine) & set(theirs))} of {len(theirs)}"
                f" in common, {twice} on both ranks): are they dealt twice (DistributedSampler and accelerator.prepare), not"
                " at all, or shuffled with a seed of each rank's own?"
            )
    orders = {}
    for epoch, places in groupby(range(steps), lambda step: epochs[step]):
        places = list(places)
        dealt = [sample for step in places for sample in alone[step]]
        orders[epoch] = dealt
        if len(set(dealt)) < len(dealt):
            fail(f"Epoch {epoch} deals {len(dealt) - len(set(dealt))} samples more than once.")
        whole, size = places[-1] + 1 < steps, dealt[0][1]
        if whole and size is not None and size - len(dealt) >= len(alone[places[0]]):
            fail(f"Epoch {epoch} deals {len(dealt)} of {size} training samples, whole steps fewer.")
    first, second, *_ = [*orders.values(), None, None]
    if second and first[: len(second)] == second[: len(first)]:
        fail("The second epoch has the first one's order: does the sampler's set_epoch(epoch) get called?")


def test_all_ranks_hold_the_same_weights_after_every_step(lab: Lab):
    steps = [[e for e in events if e["event"] == "step"] for events in ledger(lab.run(processes=2))]
    for one, other in zip(*steps, strict=False):
        if one["checksum"] != other["checksum"]:
            fail(
                f"After optimizer step {one['step']} the two ranks hold different weights: look for parameters that DDP"
                " did not see (thawed or added after prepare), a forward pass through the unwrapped model, an update or a"
                " clipped gradient that each rank computes by itself."
            )
    assert len(steps[0]) == len(steps[1]) > 0, f"the ranks took {len(steps[0])} and {len(steps[1])} optimizer steps"


def test_only_one_rank_writes(lab: Lab):
    written = [e["path"] for e in ledger(lab.run(processes=2))[1] if e["event"] == "touch" and e["kind"] == "write"]
    if written:
        fail(
            f"Rank 1 writes below --output-dir too: {', '.join(sorted(set(written))[:5])}. Two ranks that write one file"
            " tear it: write under `if accelerator.is_main_process`."
        )


# ---------------------------------------------------------------------------------------------------------------------
# what trains


def test_no_loss_term_is_constant(lab: Lab):
    found = rows(lab.run(), "train")
    for key in sorted({k for row in found for k in row if k.startswith("train/")}):
        values = [row[key] for row in found if key in row]
        name = key.removeprefix("train/")
        if name not in ("lr", "skipped", "side") and len(values) > 2 and len(set(values)) == 1:
            fail(
                f"{key} is {values[0]:.4g} at every logged step: a term that never changes trains nothing. Is it detached, a"
                " constant, of weight 0, or not logged as it is now?"
            )


def test_every_trained_parameter_gets_a_gradient(lab: Lab):
    events = ledger(lab.run())[0]
    names = [name for e in events if e["event"] == "parameters" for name in e["names"]]
    moved = {name for e in events if e["event"] == "gradient" for name in e["names"]}
    idle = [name for name in names if name not in moved and not name.startswith(lab.job.idle)]
    assert names, "no torch optimizer has stepped"
    if idle:
        fail(
            f"{len(idle)} of {len(names)} parameters in the optimizers never get a gradient other than 0:"
            f" {', '.join(idle[:6])}. Are they used in the forward pass, is their loss term detached, is zero_grad called"
            " between backward and step?"
        )


def test_the_averaged_weights_follow_all_weights(lab: Lab):
    first, *_, last = map(tensors, checkpoints(lab.run()))
    averages = [key for key in last if key.startswith("ema/") and f"model/{key[4:]}" in last]
    if not averages:
        pytest.skip("the checkpoints have no ema.safetensors")
    stale = [
        key[4:]
        for key in averages
        if np.array_equal(first[key], last[key]) and not np.array_equal(first[f"model/{key[4:]}"], last[f"model/{key[4:]}"])
    ]
    if stale:
        fail(
            f"Between two checkpoints these weights changed and their averages did not: {', '.join(stale[:5])}. Does the"
            " average know all parameters, those that thaw later too, and buffers that were replaced?"
        )


def test_loader_workers_change_nothing(lab: Lab):
    advice = (
        "augmentation must be drawn from (seed, epoch, index), not from a generator of the process or the worker (each"
        " worker starts with a copy or a seed of its own)."
    )
    assert_same_to_the_bit(lab.run(workers=2), lab.run(), "2 loader workers", "none", advice)


def test_early_stopping_is_one_decision(lab: Lab):
    flags = ("--early-stop-patience", 1, "--eval-every", 1, *lab.job.early)
    one, other = lab.run(*flags), lab.run(*flags, processes=2)
    stops = [max(row["step"] for row in rows(run, "train")) for run in (one, other)]
    if stops[0] != stops[1]:
        fail(
            f"With --early-stop-patience 1 the run stops at step {stops[0]} on one process and at {stops[1]} on two: is it"
            " decided by each rank from its own share of the validation set?"
        )
    if stops[0] >= lab.steps():
        pytest.skip("the evaluations went on improving, so nothing stopped")


# ---------------------------------------------------------------------------------------------------------------------
# interrupted


def interrupted(lab: Lab, name: str, *more, processes: int = 1, strike: dict) -> tuple[Path, list[int]]:
    """A run that was struck: (folder, exit codes of its ranks)."""
    folder = lab.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    launch = lab.start(folder, *more, processes=processes, strike=strike)
    lab.end(launch, f"A run on {named(processes)} that was sent {signal.Signals(strike['signal']).name}")
    if not any(e["event"] == "strike" for e in ledger(folder)[strike.get("rank", 0)]):
        fail(f"The run ended before it was struck:\n{tail(launch)}")
    return folder, [child.poll() for child in launch.children]


def resume(lab: Lab, folder: Path, what: str, *more, **options) -> str:
    launch = lab.start(folder, "--resume-from", "auto", *more, **options)
    return lab.finish(launch, f"{what}, resumed with --resume-from auto,")


def test_a_run_killed_in_mid_epoch_resumes_exactly(lab: Lab):
    step = lab.middle()
    folder, _ = interrupted(lab, "killed", strike={"signal": SIGKILL, "step": step})
    saved = [path.name for path in checkpoints(folder)]
    assert saved, f"a run killed after step {step} has left no checkpoint although step {min(lab.saves())} was to be saved"
    resume(lab, folder, f"A run killed after step {step}")
    steps = len([e for e in ledger(folder)[0] if e["event"] == "step" and e["optimizer"] == 0])
    if steps >= lab.steps():
        fail(f"Killed after step {step} with {saved[-1]}, the run began again at step 0.")
    assert_same_to_the_bit(folder, lab.run(), f"a run killed after step {step} and resumed", "an undisturbed one", EXACT)


@pytest.mark.full
def test_a_run_killed_where_a_phase_begins_resumes_exactly(lab: Lab):
    """A phase: parameters that rested begin to train. Killed in its first step, after a checkpoint of the step before."""
    begins = lab.phases()
    if not begins:
        pytest.skip("all parameters train from the beginning")
    for step in begins:
        name, flags = f"phase-{step}", ("--save-every", 1)
        folder, _ = interrupted(lab, name, *flags, strike={"signal": SIGKILL, "step": step})
        what = f"a run killed in step {step}, the first of a phase,"
        resume(lab, folder, what, *flags)
        assert_same_to_the_bit(folder, lab.run(), what, "an undisturbed one", EXACT)


@pytest.mark.parametrize("share", [0.35, *(pytest.param(s, marks=pytest.mark.full) for s in (0.1, 0.6, 0.8, 0.95))])
def test_a_run_killed_while_it_saves_resumes_exactly(lab: Lab, share):
    saves = lab.saves()
    step = sorted(saves)[len(saves) // 2]
    moment = int(share * saves[step])
    folder, _ = interrupted(lab, f"torn-{share}", strike={"signal": SIGKILL, "at": step, "touch": moment})
    what = f"A run killed while it wrote the checkpoint of step {step} (at file operation {moment} of {saves[step]})"
    resume(lab, folder, what)
    advice = "write a checkpoint under another name, sync it, rename it when it is whole, and verify it before loading."
    assert_same_to_the_bit(folder, lab.run(), what[0].lower() + what[1:], "an undisturbed one", advice)


def stopped(lab: Lab):
    """A run on two processes of which one got SIGTERM: (folder, exit codes, step)."""
    if "stopped" not in lab.runs:
        step = lab.middle()
        strike = {"signal": SIGTERM, "step": step, "rank": 1}
        lab.runs["stopped"] = *interrupted(lab, "stopped", processes=2, strike=strike), step
    return lab.runs["stopped"]


def test_sigterm_saves_and_ends_on_all_ranks(lab: Lab):
    folder, codes, step = stopped(lab)
    newest, last = checkpoints(folder)[-1].name, max(row["step"] for row in rows(folder, "train"))
    if any(codes):
        fail(f"SIGTERM to rank 1 after step {step}: the ranks ended with exit codes {codes} instead of 0.")
    if last >= lab.steps():
        fail(f"SIGTERM to rank 1 after step {step} was not heard: the run went on to its end.")
    if int(newest.removeprefix("step-")) != last or last > step + 2:
        fail(
            f"SIGTERM to rank 1 after step {step}: the run ended at step {last}, its newest checkpoint is {newest}. All"
            " ranks must learn of the signal in the step's collective, save there and leave."
        )
    assert not (folder / "DONE").exists(), "a run that a signal has stopped is not DONE"


def test_a_run_continues_on_another_number_of_processes(lab: Lab):
    folder = lab.copy(stopped(lab)[0], "fewer")
    resume(lab, folder, "A run stopped on 2 processes")
    if difference := first_difference(rows(folder), rows(lab.run()), lab.job.rtol, lab.job.atol):
        advice = "the checkpoint holds something of one rank (RNG, sampler, micro-batch counter), or the order of the data"
        tell(
            difference,
            "a run begun on 2 processes and ended on one",
            "an undisturbed one",
            advice + " depends on the number of processes.",
        )


@pytest.mark.full
def test_a_stopped_run_resumes_exactly_on_two_processes(lab: Lab):
    folder = lab.copy(stopped(lab)[0], "again")
    resume(lab, folder, "A run stopped on 2 processes", processes=2)
    assert_same_to_the_bit(folder, lab.run(processes=2), "a run stopped by SIGTERM", "an undisturbed one", EXACT)


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_dies_the_others_end_and_the_run_can_go_on(lab: Lab, rank):
    step = lab.middle()
    folder, codes = interrupted(lab, f"dead-{rank}", processes=2, strike={"signal": SIGKILL, "step": step, "rank": rank})
    if codes[1 - rank] == 0:
        fail(
            f"Rank {rank} was killed and the other ended with exit code 0: a scheduler would take the run for complete. Is"
            " the error of the collective caught and forgotten?"
        )
    resume(lab, folder, f"A run whose rank {rank} was killed", processes=2)
    assert_same_to_the_bit(folder, lab.run(processes=2), f"a run whose rank {rank} was killed", "an undisturbed one", EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints that are not what they seem


def unfinished(lab: Lab, name: str):
    """The undisturbed run as if it had been killed after its last checkpoint: (folder, that checkpoint)."""
    folder = lab.copy(lab.run(), name)
    (folder / "DONE").unlink(missing_ok=True)
    return folder, checkpoints(folder)[-1]


@pytest.mark.parametrize(
    "damage", ["half a file", *(pytest.param(d, marks=pytest.mark.full) for d in ("a file missing", "a bit", "no json"))]
)
def test_a_damaged_checkpoint_is_passed_over(lab: Lab, damage):
    folder, newest = unfinished(lab, f"damaged-{damage.replace(' ', '-')}")
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    if damage == "half a file":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "a file missing":
        largest.unlink()
    elif damage == "a bit":
        content = bytearray(largest.read_bytes())
        content[-1] ^= 1
        largest.write_bytes(content)
    else:
        for path in newest.glob("*.json"):
            path.write_text("")
    before = checkpoints(folder)[-2].name
    what = f"A run whose {newest.name} has {damage} ({largest.name})"
    resume(lab, folder, what)
    steps = len([e for e in ledger(folder)[0] if e["event"] == "step" and e["optimizer"] == 0])
    if steps != lab.steps() - int(before.removeprefix("step-")):
        fail(f"{what} should go on from {before} and trained {steps} steps.")
    assert_same_to_the_bit(folder, lab.run(), what[0].lower() + what[1:], "an undisturbed one", "was the damage loaded?")


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.full
def test_a_hostile_checkpoint_runs_no_code(lab: Lab):
    import hashlib

    folder, newest = unfinished(lab, "hostile")
    mark = folder.with_name("exploded")
    extra = ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "pytorch_model.bin"]
    for directory in checkpoints(folder):
        binary = [p for p in directory.iterdir() if p.suffix not in (".json", ".safetensors")]
        for path in [*binary, *(directory / name for name in extra)]:
            path.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
        manifest = directory / "manifest.json"
        if manifest.exists():  # a forger knows the checksums
            content = json.loads(manifest.read_text())
            for path in binary:
                if path.name in content.get("files", {}):
                    data = path.read_bytes()
                    content["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest.write_text(json.dumps(content))
    launch = lab.start(folder, "--resume-from", "auto")
    lab.end(launch, "A run that resumes from a hostile checkpoint")
    if mark.exists():
        fail(
            "Resuming from a checkpoint has run code that was in it: load with weights_only=True (or safetensors), never"
            " pickle.load, torch.load(weights_only=False) or register_for_checkpointing."
        )


# ---------------------------------------------------------------------------------------------------------------------
# full: launchers, faults of a rank, the tracker


@pytest.mark.full
@pytest.mark.parametrize(("via", "processes"), [("accelerate", 1), ("accelerate", 2), ("torchrun", 1), ("torchrun", 2)])
def test_the_launcher_changes_nothing(lab: Lab, via, processes):
    advice = "the script must take rank and number of processes from the launcher and nothing else."
    mine, theirs = lab.run(via=via, processes=processes), lab.run(**({"processes": 2} if processes == 2 else {}))
    assert_same_to_the_bit(mine, theirs, named(processes, via=via), "plain python", advice)
    assert len(ledger(mine)) == processes, f"{via} started {processes} processes, {len(ledger(mine))} ranks trained"


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_on_one_rank_harms_no_weight_and_stops_no_rank(lab: Lab, rank):
    backward = random.Random(rank).randint(2, max(3, lab.steps() // 2))
    run = lab.run(processes=2, nan={"rank": rank, "backward": backward})
    assert any(e["event"] == "poisoned" for e in ledger(run)[rank]), "no module with parameters ran in training mode"
    assert_finite(run)
    checksums = [[e["checksum"] for e in events if e["event"] == "step"] for events in ledger(run)]
    if checksums[0] != checksums[1]:
        fail(f"After a NaN on rank {rank} the ranks hold different weights: only one of them skipped.")


@pytest.mark.full
def test_a_wandb_run_offline_is_complete(lab: Lab):
    pytest.importorskip("wandb")
    folder = lab.run("--tracker", "wandb", processes=2, via="python")
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 1, f"{len(runs)} W&B runs below {folder.name}/wandb, expected one: does every rank start its own?"
    [record] = runs[0].glob("run-*.wandb")
    content = record.read_bytes()
    keys = {key for row in rows(folder) for key in row if "/" in key}
    missing = sorted(key for key in keys if key.encode() not in content)
    assert not missing, f"W&B has not got {', '.join(missing[:5])}, which metrics.jsonl has"
