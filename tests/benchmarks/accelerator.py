"""Speed and memory of the four scripts on the GPUs of this machine, at the sizes of the original jobs.

    python tests/benchmarks/accelerator.py [--processes 1] [--steps 100] [--out accelerator.json] [quantumgrav] ...

Makes its own data (about 1 GB in a temporary folder), launches each line below and prints samples per second of its last
third, the share of the time spent waiting for data, and the most memory that a GPU showed. Tensors are channels-last in
the three scripts that have images; there is no flag for it. `student` and `vqgan` need torchvision's and timm's VGG19, which
they download. NOT RUN SO FAR: no GPU was at hand.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

DATA = {
    "quantumgrav": "causal_sets --out csets --count 100000 --workers 8",
    "student": "underwater --out water --train 256 --test 4 --nonref 2 --size 320 400",
    "ultimate": "camouflage --out camouflage --train 200 --test 4 --size 320",
    "vqgan": "ct --out ct --patients 8 --size 192 192 192",
}
FLAGS = {
    "quantumgrav": "--dataset-path csets --baseline-sets 0",
    "student": "--train-root water/UIEB --pseudo-root water/pseudo --test-images 4 --val-images 4 --img-size 256",
    "ultimate": "--dataset-path camouflage --backbone-weights none --skip-stage1 --multi-scale 1 --img-size 320",
    "vqgan": "--dataset-path ct/scans --val-patients 1 --test-patients 1 --patch-size 128 128 128",
}
LAUNCHES = {
    "quantumgrav": (
        "--batch-size 64 --mixed-precision no",
        "--batch-size 64 --mixed-precision bf16",
        "--batch-size 512 --mixed-precision no",
        "--batch-size 512 --mixed-precision bf16",
    ),
    "student": (
        "--batch-size 4 --mixed-precision no",
        "--batch-size 4 --mixed-precision bf16",
        "--batch-size 4 --mixed-precision bf16 --compile",
        "--batch-size 16 --mixed-precision no",
        "--batch-size 16 --mixed-precision bf16",
        "--batch-size 16 --mixed-precision bf16 --compile",
        "--batch-size 16 --mixed-precision bf16 --gradient-checkpointing",
    ),
    "ultimate": (
        "--batch-size 20 --mixed-precision no",
        "--batch-size 20 --mixed-precision fp16",
        "--batch-size 20 --mixed-precision bf16",
    ),
    "vqgan": (
        "--batch-size 2 --mixed-precision no",
        "--batch-size 2 --mixed-precision bf16",
        "--batch-size 2 --mixed-precision bf16 --compile",
        "--batch-size 2 --mixed-precision bf16 --gradient-checkpointing",
        "--batch-size 4 --mixed-precision bf16",
    ),
}


def flags_of(job: str, line: str, steps: int) -> list[str]:
    """Enough epochs for that many steps; none is evaluated before the last."""
    shared = f"--max-steps {steps} --epochs 100000 --log-every 5 --eval-every {steps} --save-every {steps} --tracker none"
    return shlex.split(f"{FLAGS[job]} {shared} {line}")


class Memory(threading.Thread):
    """The most memory in MB that nvidia-smi shows of one GPU, other programs and PyTorch's cache included."""

    def __init__(self):
        super().__init__(daemon=True)
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=200"]
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self.most = 0
        self.start()

    def run(self) -> None:
        for line in self.process.stdout:
            self.most = max(self.most, int(line))

    def stop(self) -> int:
        self.process.terminate()
        self.join()
        return self.most


def launched(job: str, line: str, processes: int, steps: int, folder: str) -> dict:
    config = "1xgpu.yaml" if processes == 1 else "8xa100.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config)]
    script = [str(ROOT / "scripts" / f"train_{job}.py"), *flags_of(job, line, steps), "--num-workers", "8"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, *launcher, "--num_processes", str(processes), *script, "--output-dir", out]
        memory = Memory()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        peak = memory.stop()
        row = {"script": job, "flags": line, "processes": processes, "torch": version("torch"), "peak_mb": peak}
        if done.returncode:
            said = [text for text in done.stderr.splitlines() if "ERROR" in text] or done.stderr.splitlines()[-1:]
            return row | {"failed": said[0] if said else f"exit code {done.returncode}"}
        return row | speed([json.loads(text) for text in Path(out, "metrics.jsonl").read_text().splitlines()])


def speed(rows: list[dict]) -> dict[str, float]:
    """Medians over the last third of the training rows: past the compiler and the discriminators' start."""
    train = [row for row in rows if "perf/samples_per_s" in row]
    late = train[-max(1, len(train) // 3) :]
    return {key: statistics.median(row[f"perf/{key}"] for row in late) for key in ("samples_per_s", "data_wait")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(LAUNCHES))
    parser.add_argument("--processes", type=int, default=1, help="GPUs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    options = parser.parse_args()
    names = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    print(f"{names.stdout.splitlines()[0]} x {options.processes}, torch {version('torch')}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for job in options.scripts or LAUNCHES:
            made = [sys.executable, "-m", *f"common.demo_data.{DATA[job]}".split()]
            made[made.index("--out") + 1] = f"{folder}/{made[made.index('--out') + 1]}"
            subprocess.run(made, cwd=ROOT, check=True)
            for line in LAUNCHES[job]:
                row = launched(job, line, options.processes, options.steps, folder) | {
                    "device": names.stdout.splitlines()[0]
                }
                results.append(row)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                said = row.get("failed") or f"{row['samples_per_s']:,.1f} samples/s, data wait {row['data_wait']:.0%}"
                print(f"{job} {line}: {said}, {row['peak_mb']:,} MB", flush=True)


if __name__ == "__main__":
    main()
