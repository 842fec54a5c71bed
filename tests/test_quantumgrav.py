"""What train_quantumgrav.py promises of its own: invariances, the split, missing labels, bad data, the report."""

import csv
import json
import pickle

import numpy as np
import pytest
import torch
from helpers import ROOT, Launch, rows, run
from pages import assert_explained

from common.causal_report import shortcut
from common.causal_sets import Store, StoreWriter
from common.cli import UserError
from common.demo_data import causal_sets as demo
from scripts import train_quantumgrav as job

QUICK = [
    "--tracker",
    "none",
    "--num-workers",
    0,
    "--batch-size",
    16,
    "--width",
    16,
    "--layers",
    1,
    "--max-steps",
    12,
    "--log-every",
    1,
]
ALL_TASKS = ("manifold_like", "class", "dimension", "curvature")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Sets with every kind of label; dimension, curvature and class are missing in some."""
    path = tmp_path_factory.mktemp("data") / "mixed"
    with StoreWriter(path, classes=demo.CLASSES) as writer:
        for index in range(240):
            preset = ("zoo", "dimension", "curvature")[index % 3]
            matrix, labels = demo.make_set(index, seed=2, preset=preset, n_min=8, n_max=16)
            writer.append(matrix, labels | ({"class": -1} if index % 7 == 0 else {}))
    return path


def network(model: str, store: Store, tasks=ALL_TASKS, **flags):
    torch.manual_seed(0)
    config = job.Config(model=model, width=16, layers=2, tasks=tasks, **flags)
    return job.CausalNet(config, job.Tasks.of(store, np.arange(len(store)), tasks).outputs()).eval(), config


@pytest.mark.parametrize("model", job.BODIES)
def test_neither_padding_nor_atom_order_nor_batch_mates_change_an_output(model, mixed):
    store = Store(mixed)
    net, config = network(model, store)
    sets = job.CausalSets(store, np.arange(len(store)), config)
    samples = [sets[i] for i in (3, 40, 77, 120)]
    together = net(job.collate(samples))
    for number, sample in enumerate(samples):
        alone = net(job.collate([sample]))
        order = np.random.default_rng(number).permutation(len(sample["relations"]))
        shuffled = net(job.collate([sample | {"relations": sample["relations"][np.ix_(order, order)]}]))
        for task in ALL_TASKS:
            torch.testing.assert_close(alone[task][0], together[task][number], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone[task], shuffled[task], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", job.BODIES)
def test_every_parameter_learns_from_one_step(model, mixed):
    store = Store(mixed)
    net, config = network(model, store)
    tasks = job.Tasks.of(store, np.arange(len(store)), ALL_TASKS)
    batch = job.collate([job.CausalSets(store, np.arange(len(store)), config)[i] for i in range(24)])
    sum(loss.sum() for loss in tasks.losses(net(batch), batch).values()).backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_links_heights_and_intervals_match_numpy(mixed):
    from common import causal_sets

    store = Store(mixed)
    matrix = store.matrix(5)
    batch = {"relations": torch.from_numpy(matrix)[None]}
    _, between, links = job.relation_matrices(batch)
    assert np.array_equal(links[0].bool().numpy(), causal_sets.links(matrix))
    assert np.array_equal((between[0] * matrix).int().numpy(), causal_sets.intervals(matrix) * matrix)
    below, above = causal_sets.heights(matrix)
    assert job.heights(links)[0].tolist() == below.tolist()
    assert job.heights(links.transpose(1, 2))[0].tolist() == above.tolist()


def test_relabelling_and_augmentation_depend_on_seed_epoch_and_sample_alone(mixed):
    store = Store(mixed)
    config = job.Config(coarse_grain=0.5)
    sets = job.CausalSets(store, np.arange(len(store)), config)
    again = pickle.loads(pickle.dumps(sets))
    for key in [(0, 4), (1, 4), 4]:
        assert np.array_equal(sets[key]["relations"], again[key]["relations"])
    sizes = {len(sets[(epoch, 4)]["relations"]) for epoch in range(20)}
    assert len(sizes) > 2 and min(sizes) >= len(store.matrix(4)) / 2
    assert not np.array_equal(np.triu(sets[4]["relations"], 1), sets[4]["relations"]), "the stored order of time is visible"


def test_split_is_exact_disjoint_and_keeps_duplicates_together(tmp_path):
    with StoreWriter(tmp_path / "s", classes=demo.CLASSES) as writer:
        for index in range(300):
            matrix, labels = demo.make_set(index % 250, seed=0, n_min=12, n_max=16)
            order = np.random.default_rng(index).permutation(len(matrix))
            writer.append(matrix[np.ix_(order, order)], labels)  # 50 duplicates under another numbering
    store = Store(tmp_path / "s")
    parts = job.split_ids(store, job.Config())
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    assert abs(len(parts[0]) - 240) < 20 and min(len(parts[1]), len(parts[2])) > 10
    where = {int(i): p for p, ids in enumerate(parts) for i in ids}
    assert all(where[i] == where[i + 250] for i in range(50))
    assert any(
        where[i] != w
        for i, w in {int(i): p for p, ids in enumerate(job.split_ids(store, job.Config(seed=1))) for i in ids}.items()
    )
    clean = Store(tmp_path / "s")
    clean.signatures = np.arange(300, dtype=np.uint64)
    assert [len(p) for p in job.split_ids(clean, job.Config())] == [240, 30, 30]


def test_all_tasks_with_missing_labels_on_two_processes(mixed, tmp_path):
    """The sets of the curvature task have no class and so on; every head takes part, so DDP does not complain."""
    run(["--dataset-path", mixed, "--output-dir", tmp_path, *QUICK, "--tasks", *ALL_TASKS], processes=2, via="python")
    row = rows(tmp_path, "test")[-1]
    for task in ALL_TASKS:
        assert np.isfinite(row[f"test/{task}/loss"])
    assert {"train/loss", *(f"train/{task}" for task in ALL_TASKS)} <= rows(tmp_path, "train")[0].keys()
    text = (tmp_path / "report.txt").read_text()
    assert "Myrheim-Meyer dimension, nearest integer" in text and "the commonest answer" in text and "curvature: r2" in text
    lines = list(csv.DictReader((tmp_path / "test.csv").open()))
    assert len({line["id"] for line in lines}) == len(lines) == 24
    assert {"kind", "atoms", "class", "class_answer", "class_confidence", "curvature", "dimension_answer"} <= lines[0].keys()
    for task in ALL_TASKS[:3]:
        assert (tmp_path / "samples" / f"test_{task}.png").read_bytes().startswith(b"\x89PNG")
    assert_explained("quantumgrav", tmp_path)


def test_numbers_split_and_early_stop_are_the_same_on_1_2_and_3_processes(sets, tmp_path):
    outputs = {}
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        flags = [
            "--dataset-path",
            sets,
            "--output-dir",
            folder,
            "--tracker",
            "none",
            "--num-workers",
            0,
            "--batch-size",
            12 // processes,
        ]
        flags += ["--width", 16, "--layers", 1, "--lr", 0.02, "--eval-every", 3, "--epochs", 30, "--early-stop-patience", 3]
        text = run([*flags, "--early-stop-metrics", "manifold_like/accuracy", "--baseline-sets", 0], processes=processes)
        test = rows(folder, "test")[-1]
        split = next(line.partition(", split ")[2] for line in text.splitlines() if "Data split complete" in line)
        outputs[processes] = (split.split()[0], json.loads((folder / "DONE").read_text())["step"], test)
    (split, stopped, test), *others = outputs.values()
    assert stopped < 30 * (162 // 12), "early stopping did not happen"
    for other in others:
        assert other[:2] == (split, stopped)
        assert other[2] == pytest.approx(test, rel=1e-4, abs=1e-6)


def test_node_budget_trains_and_logs_padding_and_imbalance(sets, tmp_path):
    run(["--dataset-path", sets, "--output-dir", tmp_path, *QUICK, "--node-budget", 1500, "--baseline-sets", 0], processes=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "perf/padding_waste" in line]
    assert len(train) == 12
    assert all(0 <= line["perf/padding_waste"] < 0.5 and 1 <= line["perf/imbalance"] < 2 for line in train)


def test_quantumgrav_zarr_stores_are_converted_once_and_trained_on(tmp_path):
    demo.write_zarr(tmp_path / "zoo.zarr", 90, seed=0, n_min=8, n_max=16)
    flags = ["--dataset-path", tmp_path / "zoo.zarr", *QUICK, "--baseline-sets", 0]
    text = run([*flags, "--output-dir", tmp_path / "a"], processes=2)
    assert "90 causal sets read, 90 kept" in text
    assert "causal sets read" not in run([*flags, "--output-dir", tmp_path / "b"])


def test_predictions_repeat_the_test_phase(sets, tmp_path):
    run(["--dataset-path", sets, "--output-dir", tmp_path / "run", *QUICK, "--baseline-sets", 0])
    predict = {"script": ROOT / "scripts" / "predict_quantumgrav.py"}
    common = ["--model", tmp_path / "run" / "model", "--output-dir", tmp_path / "out", "--inputs"]
    text = run([*common, sets], **predict)
    assert "manifold_like/accuracy" in text
    mine = {line["id"]: line for line in csv.DictReader((tmp_path / "out" / "predictions.csv").open())}
    for line in csv.DictReader((tmp_path / "run" / "test.csv").open()):
        assert mine[line["id"]]["manifold_like_answer"] == line["manifold_like_answer"]
        assert float(mine[line["id"]]["manifold_like_confidence"]) == pytest.approx(
            float(line["manifold_like_confidence"]), abs=1e-5
        )
    matrices = np.stack([demo.make_set(i, seed=9, n_min=12, n_max=12)[0] for i in range(5)])
    np.save(tmp_path / "m.npy", matrices)
    run([*common, tmp_path / "m.npy"], **predict)
    assert len(list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))) == 5
    matrices[2, 0, 0] = True
    np.save(tmp_path / "m.npy", matrices)
    assert "set 2 is not a causal set, diagonal set" in run([*common, tmp_path / "m.npy"], ok=False, **predict)


def write(path, count, change):
    with StoreWriter(path, classes=demo.CLASSES) as writer:
        for index in range(count):
            matrix, labels = demo.make_set(index, seed=0, n_min=8, n_max=12)
            writer.append(*change(matrix, labels))
    return path


@pytest.mark.parametrize(
    ("change", "tasks", "words"),
    [
        (lambda m, labels: (m, labels | {"manifold_like": 1}), ["manifold_like"], "hold 1 different labels"),
        (lambda m, labels: (m, labels | {"curvature": float("nan")}), ["curvature"], "hold 0 different labels"),
        (lambda m, labels: (m, {"manifold_like": labels["manifold_like"]}), ["dimension"], "hold 0 different labels"),
    ],
)
def test_labels_without_anything_to_learn_are_a_sentence(change, tasks, words, tmp_path):
    store = Store(write(tmp_path / "s", 40, change))
    with pytest.raises(UserError, match=words):
        job.Tasks.of(store, np.arange(40), tuple(tasks))


def test_bad_data_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    text = run(["--dataset-path", tmp_path / "empty", "--tracker", "none"], ok=False)
    assert "--dataset-path" in text and "is not a finished store" in text and "Traceback" not in text
    write(tmp_path / "few", 3, lambda m, labels: (m, labels))
    text = run(["--dataset-path", tmp_path / "few", "--tracker", "none"], ok=False)
    assert "--split leaves no" in text and "Traceback" not in text


def test_a_shortcut_is_found_where_there_is_one(tmp_path):
    path = write(tmp_path / "s", 600, lambda m, labels: (m, labels | {"manifold_like": int(len(m) > 10)}))
    store = Store(path)
    scores = shortcut(store, np.arange(600), store.labels["manifold_like"])
    assert scores["the number of atoms"] > 0.99 > 0.9 > scores["the ordering fraction"]


def test_the_output_folder_of_a_killed_test_phase_is_finished_by_a_relaunch(sets, tmp_path):
    """Killed between training and report: the relaunch trains nothing again and each test row stands once."""
    flags = ["--dataset-path", sets, "--output-dir", tmp_path, *QUICK, "--baseline-sets", 0, "--resume-from", "auto"]
    launch = Launch(flags)
    launch.wait_for(
        lambda: (tmp_path / "metrics.jsonl").exists() and "test/loss" in (tmp_path / "metrics.jsonl").read_text()
    )
    launch.kill()
    (tmp_path / "DONE").unlink(missing_ok=True)
    run(flags)
    assert (tmp_path / "DONE").exists() and len(rows(tmp_path, "test")) == 1 and len(rows(tmp_path, "train")) == 12
