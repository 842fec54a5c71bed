"""The command line: precedence, YAML as strict as flags, errors as one sentence with exit code 2."""

import dataclasses
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT, SCRIPT, run

from common.cli import parse
from scripts.train_quantumgrav import Config


def test_flags_win_over_files_over_the_preset_over_defaults(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("lr: 1e-4\nepochs: 7\nbatch-size: 5\ntime_reversal: no\nsplit: [0.5, 0.25, 0.25]\n")
    two.write_text("epochs: 8\nrun_name: null\n")
    config = parse(Config, ["--demo", "--config", str(one), f"--config={two}", "--batch-size", "6"])
    assert (config.lr, config.epochs, config.batch_size) == (1e-4, 8, 6)
    assert config.time_reversal is False and config.split == (0.5, 0.25, 0.25) and config.run_name is None
    assert config.eval_every == Config.DEMO["eval_every"] and config.width == Config.width
    assert parse(Config, []).eval_every == Config.eval_every


def sentence(*args) -> str:
    """The output of a launch that must fail fast, in one message, without a traceback."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    text = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert done.returncode == 2, text
    assert "Traceback" not in text
    assert time.monotonic() - began < 10
    return text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch-sizee", "4"], "--batch-size"),
        (["--batch-size", "many"], "--batch-size"),
        (["--batch-size", "0"], "--batch-size is 0: give 1 or more"),
        (["--batch", "4"], "--batch"),
        (["--tracker", "wandbb"], "--tracker"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        (["--split", "0.5", "0.5", "0.5"], "add up to 1"),
        (["--tasks", "spin"], "--tasks"),
        (["--early-stop-metrics", "class/accuracy"], "--early-stop-metrics class/accuracy"),
        (["--model", "transformer", "--width", "30", "--heads", "4"], "--width 30 must be a multiple of --heads 4"),
        (["--mixed-precision", "fp16", "--tracker", "none"], "--mixed-precision fp16 needs a GPU"),
        (["--dataset-path", "/no/such/folder", "--tracker", "none"], "--dataset-path"),
    ],
)
def test_bad_flags_are_one_sentence(args, words):
    assert words in sentence(*args)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sizee: 4", 'unknown key "batch_sizee" (did you mean "batch_size"?)'),
        ("batch_size: 4.5", "--batch-size"),
        ("tracker: wandbb", "--tracker"),
        ("training:\n  lr: 1", 'unknown key "training"'),
        ("split:\n  train: 1", "nested keys"),
        ("a: [", "is not valid YAML"),
        ("just words", "holds no `key: value` lines"),
    ],
)
def test_bad_yaml_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert words in sentence("--config", path)


def test_help_reads_well_in_80_columns_and_comes_at_once():
    began = time.monotonic()
    text = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, env={"COLUMNS": "80", "PATH": ""}
    ).stdout
    assert time.monotonic() - began < 3
    assert max(map(len, text.splitlines())) <= 80
    for name in (field.name for field in dataclasses.fields(Config)):
        assert "--" + name.replace("_", "-") in text, name


def test_an_error_is_printed_once_however_many_processes(sets, tmp_path):
    text = run(["--dataset-path", tmp_path / "none", "--tracker", "none"], processes=2, via="torchrun", ok=False)
    assert text.count("ERROR:") == 1 and text.count("--dataset-path") == 1
    text = run(["--lrr", "1"], processes=2, ok=False)
    assert text.count("Unrecognized options: --lrr") == 1


def test_config_yaml_repeats_the_run(sets, tmp_path):
    flags = [
        "--dataset-path",
        sets,
        "--tracker",
        "none",
        "--max-steps",
        3,
        "--batch-size",
        8,
        "--num-workers",
        0,
        "--log-every",
        1,
    ]
    run([*flags, "--output-dir", tmp_path / "a", "--split", 0.6, 0.2, 0.2])
    saved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert saved["split"] == [0.6, 0.2, 0.2] and "resume_from" not in saved
    run(["--config", tmp_path / "a" / "config.yaml", "--output-dir", tmp_path / "b"])
    from helpers import assert_same_run

    assert_same_run(tmp_path / "a", tmp_path / "b")
