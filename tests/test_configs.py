"""Every shipped YAML is accepted by accelerate and starts as many processes as it says, here on the CPU."""

import json
import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT, Launch, free_port, run

CONFIGS = sorted(p.name for p in (ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.fixture
def flags(sets, tmp_path):
    return [
        *("--dataset-path", sets, "--output-dir", tmp_path, "--tracker", "none"),
        *("--max-steps", 2, "--batch-size", 4, "--num-workers", 0, "--baseline-sets", 0),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_short_commented_and_valid(name):
    path = ROOT / "accelerate_configs" / name
    keys = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert 3 <= len(keys) <= 8 and all("#" in line for line in keys)
    config = load_config_from_file(str(path))
    said = re.search(r"(?:(\d+)x)?(\d+)x", name)
    if said:
        assert config.num_processes == int(said[1] or 1) * int(said[2])
    assert config.mixed_precision in ("no", "fp16", "bf16") and isinstance(config.mixed_precision, str)


@pytest.mark.parametrize("name", [c for c in CONFIGS if not c.startswith("2x8")])
def test_it_launches(name, flags, tmp_path):
    processes = 1 if name in ("cpu.yaml", "1xgpu.yaml") else 2
    text = run(flags, processes=processes, via="accelerate", config=name)
    assert f"Process 0/{processes} started on cpu" in text
    assert f"{processes} processes x batch 4 x accumulation 1 = {4 * processes} sets per step" in text
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 2


def test_two_machines(flags):
    """Two launchers on this machine, one process each, as SLURM starts them."""
    port = free_port()
    machines = [
        Launch(
            flags, processes=2, via="accelerate", config="2x8xa100.yaml",
            launcher_args=["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)],
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [machine.wait() for machine in machines] == [0, 0], machines[0].output() + machines[1].output()
    assert "2 processes x batch 4" in machines[0].output()
