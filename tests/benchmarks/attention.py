"""What --attn-chunk-size saves: peak memory and time of one attention layer, forward and backward.

    python tests/benchmarks/attention.py

"Kept" is the usual chunking, which saves little in training: every chunk's softmax waits for the backward pass. Memory is
the peak of a process of its own above what it had before.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from helpers import peak_memory
from timing import Result, fresh, paired, show
from torch import Tensor

from scripts import train_student as job
from scripts.train_student import attend, attention

PLACES = {"memory": 64, "time": 48}  # per side: an image of 512 and of 384
PLAIN = "no chunks"
CASES = {
    PLAIN: attend,
    "fused": lambda q, k, v: attention(q, k, v, 0),
    "chunks of 1024": lambda q, k, v: attention(q, k, v, 1024),
    "chunks of 256": lambda q, k, v: attention(q, k, v, 256),
    "chunks of 256, kept": lambda q, k, v: torch.cat([attend(part, k, v) for part in q.split(256, 2)], 2),
}


def layer(places: int, name: str) -> Callable[[], Tensor]:
    """Forward and backward, to the gradient at its input."""
    torch.manual_seed(0)
    config = job.Config()
    module = job.Attention(4 * config.width, config)
    torch.nn.init.normal_(module.out.weight, std=0.1)  # from its zeros no gradient would reach the attention
    x = torch.randn(1, 4 * config.width, places, places, requires_grad=True)

    def step() -> Tensor:
        with patch.object(job, "attention", lambda q, k, v, chunk: CASES[name](q, k, v)):
            out = module(x)
        return torch.autograd.grad(out.square().sum(), x)[0]

    return step


def memory(name: str) -> float:
    layer(4, name)()  # what PyTorch needs once is no layer's memory
    return peak_memory(layer(PLACES["memory"], name)) / 1e6


def measure() -> Iterator[Result]:
    what, plain = f"attention of {PLACES['memory']} x {PLACES['memory']} places, memory", fresh(memory, PLAIN)
    for name in list(CASES)[1:]:
        ours = fresh(memory, name)
        yield Result(f"{what}, {name}", PLAIN, ours, plain, "MB", plain / ours, goal=1)
    what, plain = f"attention of {PLACES['time']} x {PLACES['time']} places", layer(PLACES["time"], PLAIN)
    for name in list(CASES)[1:]:
        ours = layer(PLACES["time"], name)
        torch.testing.assert_close(ours(), plain())
        goal = 1 if name == "fused" else None  # the others pay for memory with time
        yield Result(f"{what}, {name}", PLAIN, unit="ms", goal=goal, **paired(ours, plain))


if __name__ == "__main__":
    show(measure())
