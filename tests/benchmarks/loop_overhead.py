"""What the loop costs beyond the mathematics: a script against a bare PyTorch loop of the same model, data and optimizer.

    python tests/benchmarks/loop_overhead.py

Both run as processes in turn, A B A B ..., since machines are noisy; the median of the paired ratios counts. Goals: at least
0.98 of the bare loop's speed at steps of 50 ms and more, at most 0.4 ms per step in all.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CASES = {
    "small steps": (["--width", "8", "--layers", "1", "--batch-size", "8"], 600),
    "large steps": (["--width", "48", "--batch-size", "64"], 120),
}
PAIRS, WARM = 5, 0.2


def bare_loop(flags: list[str], steps: int) -> float:
    """Milliseconds per step of the same work, written as in a tutorial."""
    import torch

    from common import training
    from common.causal_sets import Store
    from common.cli import parse
    from scripts import train_quantumgrav as job

    config = parse(job.Config, flags)
    store = Store(config.dataset_path)
    train = job.CausalSets(store, job.split_ids(store, config)[0], config)
    tasks = job.Tasks.of(store, train.ids, config.tasks)
    torch.manual_seed(0)
    model = job.CausalNet(config, tasks.outputs())
    ema = training.EMA(model, config.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    epochs = [
        [(epoch, i) for i in torch.randperm(len(train)).tolist()]
        for epoch in range(1 + steps * config.batch_size // len(train))
    ]
    keys = sorted_chunks([key for epoch in epochs for key in epoch], config.batch_size)[:steps]
    loader = iter(torch.utils.data.DataLoader(train, batch_sampler=keys, collate_fn=job.collate))
    for step in range(steps):
        if step == int(steps * WARM):
            began = time.perf_counter()
        batch = next(loader)
        losses = tasks.losses(model(batch), batch)
        loss = sum(values.mean() for values in losses.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
    return (time.perf_counter() - began) / (steps - int(steps * WARM)) * 1e3


def sorted_chunks(keys: list, size: int) -> list[list]:
    return [keys[i : i + size] for i in range(0, len(keys) - size + 1, size)]


def script_loop(flags: list[str], steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        every = int(steps * WARM)
        command = [
            sys.executable,
            "scripts/train_quantumgrav.py",
            *flags,
            "--max-steps",
            str(steps),
            "--epochs",
            "999",
            "--output-dir",
            folder,
        ]
        command += ["--log-every", str(every), "--eval-every", "9999", "--save-every", "9999"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["perf/samples_per_s"] for row in rows if "perf/samples_per_s" in row][1:]
    return statistics.fmean(1e3 / speed for speed in speeds) * int(flags[flags.index("--batch-size") + 1])


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    data = Path(tempfile.mkdtemp()) / "sets"
    from common.demo_data.causal_sets import write

    write(data, 1500, seed=0, preset="zoo", progress=False)
    results = {}
    for name, (flags, steps) in CASES.items():
        flags = ["--dataset-path", str(data), "--tracker", "none", "--num-workers", "0", "--baseline-sets", "0", *flags]
        pairs = []
        for _ in range(PAIRS):
            done = subprocess.run(
                [sys.executable, __file__, "bare", str(steps), *flags], cwd=ROOT, check=True, capture_output=True, text=True
            )
            pairs.append((float(done.stdout.split()[-1]), script_loop(flags, steps)))
        ratios = sorted(bare / ours for bare, ours in pairs)
        bare, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        added = statistics.median(o - b for b, o in pairs)
        results[name] = {
            "bare_ms": bare,
            "script_ms": ours,
            "speed_ratio": statistics.median(ratios),
            "ratios": ratios,
            "added_ms": added,
        }
        print(
            f"{name}: bare {bare:.2f} ms, script {ours:.2f} ms, added {added:.2f} ms,"
            f" speed {statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        print(bare_loop(sys.argv[3:], int(sys.argv[2])))
    else:
        main()
