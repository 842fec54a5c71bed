"""Every command of the README runs, here with two small CPU processes in place of the GPUs."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

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
    for target in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"^(common/\S+|scripts/|tests/|accelerate_configs/) ", README, re.M):
        assert (ROOT / name).exists(), name


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
