"""Every command of the README runs, here with two small CPU processes in place of the GPUs."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import write_flags
from helpers import ROOT

from common.cli import RunConfig, flag, parse_only

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import accelerator  # noqa: E402
import benchmark_page  # noqa: E402
import results  # noqa: E402

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LAUNCHES = [block for block in BLOCKS if "pip install" not in block]


@pytest.fixture
def clone(tmp_path, sets, water, camouflaged, chests):
    """A checkout with datasets where the README says, the tools of this environment on the path, and a toy SLURM."""
    for name in ("scripts", "common", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "csets").symlink_to(sets)
    (tmp_path / "data" / "COD10K-v3").symlink_to(camouflaged)
    (tmp_path / "data" / "ct").symlink_to(chests / "scans")
    for name in ("UIEB", "pseudo", "testset_ref", "testset_nonref"):
        (tmp_path / "data" / name).symlink_to(water / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    slurm = {
        "sbatch": "export SLURM_JOB_ID=7 SLURM_NNODES=2 SLURM_CPUS_PER_TASK=2 SLURM_GPUS_ON_NODE=1 SLURM_JOB_NODELIST=n\n"
        'exec bash "$@"',
        "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo 127.0.0.1; fi',
        "srun": "shift; trap 'kill -TERM $a $b; wait $a $b' TERM\n"
        'SLURM_NODEID=0 "$@" & a=$!\nSLURM_NODEID=1 "$@" & b=$!\nwait $a; wait $b',
    }
    for name, body in slurm.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(stat.S_IRWXU)
    return tmp_path


def shell(command: str, clone: Path) -> subprocess.CompletedProcess:
    path = f"{clone / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.run(["bash", "-ec", command], cwd=clone, env=environment, capture_output=True, text=True, timeout=300)


SMALL = {
    "quantumgrav": "--width 8 --layers 1",
    "ultimate": "--backbone test_convnext --backbone-weights none --width 16 --img-size 64 --multi-scale 1",
    "student": "--width 8 --blocks 1 1 1 --heads 4 --img-size 32 --val-images 2 --test-images 3 --perceptual-weight 0",
    "vqgan": "--patch-size 16 16 16 --width 4 --blocks 1 --n-codes 32 --disc-width 4 --disc-layers 2 --tile-size 32"
    " --crops-per-scan 4 --val-patients 2 --test-patients 2 --perceptual-weight 0",
}


def small(block: str) -> str:
    """The same commands, two processes, two steps."""
    block = re.sub(r"(\S+/\d+x(gpu|t4|h200|a100)\.yaml)", r"\1 --num_processes 2", block)
    block = re.sub(r"--patch-size( \d+){3}", "--patch-size 24 24 16", block)
    shared = "--max-steps 2 --batch-size 4 --num-workers 0 --tracker none"
    return re.sub(r"scripts/train_(\w+)\.py", lambda found: f"{found[0]} {shared} {SMALL[found[1]]}", block)


@pytest.mark.slow
@pytest.mark.parametrize("block", LAUNCHES, ids=lambda block: block.splitlines()[0][:40])
def test_the_readme_commands_run(block, clone):
    done = shell(small(block), clone)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = re.findall(r"--output-dir (\S+)", block)
    ends = [clone / folder / ("DONE" if folder.startswith("runs/") else "model.json") for folder in folders]
    assert ends and all(path.exists() for path in ends)
    assert not (clone / "requeued").exists()


def test_the_first_two_commands_are_what_ci_and_this_test_run():
    install, tests = BLOCKS[0].strip(), BLOCKS[1].strip()
    assert install == "pip install -r requirements.txt && python scripts/train_quantumgrav.py --demo"
    ci = (ROOT / ".ci" / "run").read_text()
    for part in tests.split(" && "):
        assert part.replace("pip install", "pip install -q") in ci or part in ci


@pytest.mark.parametrize("name", SMALL)
def test_the_flags_of_a_page_exist(name):
    """Fields of the job's settings, or flags of a demo generator. Left cells of a migration table are another program's."""
    page = re.search(rf"^## train_{name}\.py$(.*?)(?=^## |\Z)", (ROOT / "scripts" / "README.md").read_text(), re.M | re.S)[1]
    body, _, migration = page.partition("### From")
    named = body + "".join(line.split("|")[2] for line in migration.splitlines() if line.startswith("|"))
    sources = [*(ROOT / "scripts").glob(f"*_{name}.py"), ROOT / "common/cli.py", *(ROOT / "common/demo_data").glob("*.py")]
    defined = re.findall(r"^    (\w+): |\"--([\w-]+)\"", "".join(path.read_text() for path in sources), re.M)
    known = {(field or flag).replace("_", "-") for field, flag in defined}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", named)) - {"num_processes"}  # accelerate's
    assert len(flags) > 5 and flags <= known, flags - known


def test_links_and_the_tree_exist():
    for page in (pages.README, pages.SCRIPTS):
        for target, heading in re.findall(r"\]\(([\w./]+)(?:#([\w-]+))?\)", page.read_text()):
            assert (page.parent / target).exists(), target
            if heading:
                titles = re.findall(r"^#+ (.*)$", (page.parent / target).read_text(), re.M)
                anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
                anchors = [
                    name + (f"-{anchors[:i].count(name)}" if name in anchors[:i] else "") for i, name in enumerate(anchors)
                ]
                assert heading in anchors, (target, heading)
    tree = re.search(r"^scripts/ .*?(?=^```)", README, re.M | re.S)[0]
    inside = [name for line in tree.splitlines() if line.startswith("  ") for name in re.findall(r"\w+\.py", line)]
    assert sorted(inside) == sorted(path.name for path in (ROOT / "common").glob("*.py") if path.stem != "__init__")
    for name in re.findall(r"^(\w+/) ", tree, re.M):
        assert (ROOT / name).is_dir(), name


def test_the_page_of_flags_is_what_the_scripts_say():
    assert write_flags.PAGE.read_text() == write_flags.page(), "run: python tests/write_flags.py"


@pytest.mark.parametrize("script", [f"{kind}_{name}" for kind in ("train", "predict") for name in SMALL])
def test_every_flag_is_explained_in_a_sentence(script):
    cls = write_flags.settings(script)
    for each in (RunConfig, cls):
        inherited = () if each is RunConfig or not issubclass(cls, RunConfig) else write_flags.fields_of(RunConfig)
        for name, _, text in write_flags.described(each):
            assert name in inherited or (text and text.endswith(".") and len(text) > 12), f"{script}.py {flag(name)}: {text}"


def test_help_shows_the_same_sentences(capsys):
    """Also those of flags that a script inherits and of flags to which it gives another default."""
    with pytest.raises(SystemExit):
        parse_only(write_flags.settings("train_vqgan"), ["--help"])
    shown = "".join(re.sub(r"[│\s]", "", capsys.readouterr().out))
    for cls in (RunConfig, write_flags.settings("train_vqgan")):
        texts = [text for _, _, text in write_flags.described(cls) if text]
        assert len(texts) > 10 and all(re.sub(r"\s", "", text) in shown for text in texts)


OTHERS = {  # flags of accelerate, sbatch and pytest
    *("num_processes", "machine_rank", "main_process_ip", "config_file", "max_restarts"),
    *("nodes", "gpus-per-node", "cpus-per-task", "time", "signal", "pid", "script", "like", "quick"),
}


def test_the_flags_of_the_readme_exist_in_the_script_of_their_row():
    def flags_of(script: str) -> set[str]:
        return {flag(name)[2:] for name in write_flags.fields_of(write_flags.settings(script))}

    train = {name: flags_of(f"train_{name}") for name in SMALL}
    known = OTHERS.union(*train.values(), *(flags_of(f"predict_{name}") for name in SMALL))
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README)) <= known
    rows = re.findall(r"^\| `train_(\w+)\.py` \|(.*)$", README, re.M)
    assert len(rows) == 8
    for name, row in rows:
        assert set(re.findall(r"--([a-z][\w-]+)", row)) <= train[name], name


def test_what_the_readme_quotes_is_what_the_scripts_print():
    code = "".join(path.read_text() for path in (ROOT / "common").glob("*.py"))
    code = re.sub(r"\"\s+f?\"", "", code)  # strings that go on in the next line
    for quote in (
        "Out of memory. Halve --batch-size and double --accumulation-steps ",
        "Another process of this run died or stopped answering",
        "Process 0/4 started on ",
        "Cached 120 of 900 scans, ETA ",
        "waiting for another process to leave ",
        "Step 120/9000: ",
    ):
        assert quote in README and re.sub(r"\d+", "%d", quote) in code, quote


@pytest.mark.parametrize("name", accelerator.LAUNCHES)
def test_the_launches_for_a_gpu_are_understood(name):
    for line in accelerator.LAUNCHES[name]:
        config = parse_only(write_flags.settings(f"train_{name}"), accelerator.flags_of(name, line, 30))
        assert config.max_steps == 30 and config.mixed_precision in ("no", "fp16", "bf16")


def test_the_page_of_benchmarks_is_the_measured_one():
    report = json.loads(benchmark_page.REPORT.read_text())
    assert benchmark_page.PAGE.read_text() == benchmark_page.page(report), "run: python tests/benchmarks/benchmark_page.py"


def test_the_tables_of_results_are_the_measured_ones():
    records = results.read()
    assert {record["run"] for record in records} == set(pages.RUNS)
    for page, name, text in pages.blocks(records):
        assert pages.filled(page.read_text(), name, text) == page.read_text(), "run: python tests/benchmarks/results.py"
    for record in records:
        assert record["cpu"] and record["commit"] and record["cpu_minutes"] > 0.1 and record["peak_mb"] > 100
        assert record["command"] == f"{pages.RUNS[record['run']]['command']} --seed {record['seed']}"


@pytest.mark.parametrize("name", pages.RUNS)
def test_what_the_tables_of_results_show_is_logged_or_reported(name):
    run, script = pages.RUNS[name], pages.script_of(name)
    _, _, *flags = run["command"].split()
    parse_only(write_flags.settings(f"train_{script}"), flags)
    keys = {run["first"][1], *run["beside"].values(), *(key for row in run.get("rows", {}).values() for key in row[::2])}
    reports = "".join(path.read_text() for path in (ROOT / "common").glob("ca*.py"))
    for key in keys:
        logged = any(pages.explains(pattern, key) for pattern in pages.keys_of(f"train_{script}.py"))
        assert logged if "/" in key else f'"{key}"' in reports, key
    seeds = [{"run": name, "seed": seed, "metrics": dict.fromkeys(keys, seed / 8), **COST} for seed in (1, 3)]
    assert "seed 1, 3 |" in pages.overview(seeds, [name]) and " 0.12" in pages.overview(seeds, [name])
    if name in pages.DEMOS:
        lines = pages.own_page(seeds, name).splitlines()
        assert {line.count("|") for line in lines[:-2]} == {4} and lines[-1].startswith(
            "a CPU, 1 thread, torch 2, commit 123"
        )


COST = {"cpu_minutes": 1.0, "peak_mb": 512.0, "cpu": "a CPU", "torch": "2", "commit": "123"}


def test_a_demo_is_measured_as_a_user_runs_it(sets):
    small = ["--dataset-path", str(sets), "--transfer-path", "None", "--max-steps", "2", "--width", "8", "--batch-size", "8"]
    record = results.measured("quantumgrav", 3, *small)
    assert record["command"] == "python scripts/train_quantumgrav.py --demo --seed 3"
    assert 0 < record["cpu_minutes"] < 2 and 100 < record["peak_mb"] < 4000
    scores = record["metrics"]
    assert 0 <= scores["test/manifold_like/accuracy"] <= 1 and 0 <= scores["boosting on all classical observables"] <= 1
    assert scores["the commonest answer"] == pytest.approx(scores["test/manifold_like/majority"], abs=1e-3)


@pytest.mark.parametrize("name", ["zoo", "dimension-16"])
def test_a_further_run_is_measured_on_the_data_that_its_command_makes(name, monkeypatch):
    fewer = pages.RUNS[name]["data"].replace("--count 10000", "--count 200")
    monkeypatch.setitem(pages.RUNS, name, {**pages.RUNS[name], "data": fewer})
    record = results.measured(name, 0, "--max-steps", "2", "--width", "8", "--batch-size", "8")
    shown = {pages.RUNS[name]["first"][1], *pages.RUNS[name]["beside"].values()}
    assert shown <= set(record["metrics"]), shown - set(record["metrics"])


def test_a_run_that_fails_is_named_and_loses_no_other(monkeypatch):
    def measured(name: str, seed: int) -> dict:
        if seed == 1:
            raise RuntimeError(f"{name} with seed {seed} ended with 1")
        return {"run": name, "seed": seed}

    written = []
    monkeypatch.setattr(results, "measured", measured)
    monkeypatch.setattr(results, "read", lambda: written[-1] if written else [])
    monkeypatch.setattr(results, "write", written.append)
    monkeypatch.setattr(sys, "argv", ["results.py", "vqgan", "--seeds", "0", "1", "2"])
    with pytest.raises(SystemExit, match="vqgan with seed 1 ended with 1"):
        results.main()
    assert written[-1] == [{"run": "vqgan", "seed": 0}, {"run": "vqgan", "seed": 2}]


@pytest.mark.slow
def test_slurm_requeues_a_signalled_job_which_then_continues(clone):
    """SLURM's warning before the time limit reaches the processes; the job asks for a requeue and ends the run next time."""
    import signal
    import time

    from helpers import last_step

    command = (
        "sbatch accelerate_configs/slurm.sh scripts/train_quantumgrav.py --dataset-path data/csets --output-dir runs/s"
        " --max-steps 400 --epochs 99 --batch-size 2 --num-workers 0 --tracker none --width 8 --layers 1"
        " --log-every 1 --eval-every 200"
    )
    environment = os.environ | {
        "PATH": f"{clone / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    job = subprocess.Popen(
        ["bash", "-c", "exec " + command],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while last_step(clone / "runs/s") < 20 and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    text = job.communicate(timeout=120)[0]
    assert (clone / "requeued").read_text() == "7\n", text
    stopped = last_step(clone / "runs/s")
    assert f"Stopped by a signal at step {stopped}" in text and not (clone / "runs/s/DONE").exists()
    done = shell(command, clone)
    assert done.returncode == 0 and f"Resumed from step {stopped}" in done.stderr + done.stdout, done.stdout + done.stderr
    assert (clone / "runs/s/DONE").exists()
    shutil.rmtree(clone / "runs")
