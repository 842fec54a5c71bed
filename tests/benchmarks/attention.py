"""What --attn-chunk-size saves: peak memory and time of one attention layer, forward and backward.

    python tests/benchmarks/attention.py

Each case is a process of its own. On a CPU the figure is the peak of resident memory above that before the layer ran, with a
GPU the allocator's peak. "kept" is the usual chunking, which saves no memory in training: every chunk's softmax waits for
the backward pass.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from scripts import train_student as job

SIDES = (384, 512)  # of the image; tokens are places at an eighth of it
CASES = {
    "no chunks, plain": "plain",
    "chunks of 256, kept": "kept",
    "chunks of 1024": 1024,
    "chunks of 256": 256,
    "fused": 0,
}


def measure(side: int, case: str | int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = job.Config(attn_chunk_size=case if isinstance(case, int) else 0)
    layer = job.Attention(4 * config.width, config).to(device)
    if case == "plain":
        job.attention = lambda q, k, v, chunk: job.attend(q, k, v)
    elif case == "kept":
        job.attention = lambda q, k, v, chunk: torch.cat([job.attend(part, k, v) for part in q.split(256, 2)], 2)
    small = torch.randn(1, 4 * config.width, 4, 4, device=device)
    layer(small).sum().backward()  # what PyTorch needs once is no layer's memory
    x = torch.randn(1, 4 * config.width, side // 8, side // 8, device=device, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    layer(x).square().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return {"MB": torch.cuda.max_memory_allocated() / 1e6, "ms": (time.perf_counter() - began) * 1e3}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MB": (peak - before) * 1024 / 1e6, "ms": (time.perf_counter() - began) * 1e3}


def main() -> None:
    results = {}
    for side in SIDES:
        for name, case in CASES.items():
            command = [sys.executable, __file__, str(side), json.dumps(case)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = results[f"{side} {name}"] = json.loads(done.stdout)
            tokens = (side // 8) ** 2
            print(f"{side} x {side}, {tokens} places, {name:<20} {found['MB']:8.0f} MB {found['ms']:8.0f} ms", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(int(sys.argv[1]), json.loads(sys.argv[2]))))
    else:
        main()
