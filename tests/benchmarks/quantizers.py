"""One training step of a codebook (forward, backward, update) against vector-quantize-pytorch and MONAI: 32^3 tokens of 8
features, 8192 codes.

    pip install --no-deps vector-quantize-pytorch torch-einops-utils einops einx frozendict loguru monai
    python tests/benchmarks/quantizers.py

One thread, one process, alternating A B A B; medians of the paired ratios, with the smallest and largest, of CPU time, which
other programs disturb least. All must choose the same codes first. Memory is what a process of its own grows by in one step,
at most.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from test_quantizers import maps, peak_memory, picks
from torch import Tensor

from common.quantizers import FSQ, EMACodebook

ROUNDS, CODES, DIM, SIDE = 5, 8192, 8, 32
OURS = "EMACodebook"


def ema() -> Callable[[Tensor], Tensor]:
    accelerator, codebook = Accelerator(cpu=True), EMACodebook(CODES, DIM, restart_below=0.1)
    codebook.codes.copy_(start())
    codebook.sums.copy_(start())

    def step(z: Tensor) -> Tensor:
        out = codebook(z, picks(0, 1, 64))
        (out.quantized.square().sum() + out.commitment.sum()).backward()
        codebook.update(accelerator)
        return out.indices

    return step


def fsq() -> Callable[[Tensor], Tensor]:
    quantizer = FSQ([8, 8, 8, 4, 4])

    def step(z: Tensor) -> Tensor:
        out = quantizer(z[:, :5])
        out.quantized.square().sum().backward()
        return out.indices

    return step


def lucidrains(cosine: bool) -> Callable[[Tensor], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        DIM, codebook_size=CODES, decay=0.99, use_cosine_sim=cosine, accept_3d_fmap=True, threshold_ema_dead_code=0.1
    )
    quantizer._codebook.embed.data.copy_(start()[None])
    quantizer._codebook.embed_avg.data.copy_(start()[None])

    def step(z: Tensor) -> Tensor:
        quantized, indices, commitment = quantizer(z)
        (quantized.square().sum() + commitment.sum()).backward()
        return indices

    return step


def monai() -> Callable[[Tensor], Tensor]:
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    quantizer = EMAQuantizer(spatial_dims=3, num_embeddings=CODES, embedding_dim=DIM)
    quantizer.embedding.weight.data.copy_(start())
    quantizer.ema_w.data.copy_(start())

    def step(z: Tensor) -> Tensor:
        quantized, commitment, indices = quantizer(z)
        (quantized.square().sum() + commitment).backward()
        return indices

    return step


QUANTIZERS = {
    OURS: ema,
    "vector-quantize-pytorch, cosine": lambda: lucidrains(True),
    "vector-quantize-pytorch, Euclidean": lambda: lucidrains(False),
    "MONAI EMAQuantizer": monai,
    "FSQ": fsq,
}


def start() -> Tensor:
    """The same codes for all, on the sphere, where the smallest distance is the largest cosine."""
    return F.normalize(torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(3)), dim=1)


def tokens() -> Tensor:
    return F.normalize(maps(1, 1, DIM, SIDE, SIDE, SIDE), dim=1).requires_grad_()


def timed(step: Callable[[Tensor], Tensor], z: Tensor) -> float:
    began = time.process_time()
    step(z)
    return time.process_time() - began


def paired(name: str) -> dict[str, float]:
    ours, theirs, z = ema(), QUANTIZERS[name](), tokens()
    mine, other = ours(z), theirs(z)  # warm, too
    agree = (mine.flatten() == other.flatten()).float().mean().item()
    assert name == "FSQ" or agree > 0.999, f"{name} chooses other codes for {1 - agree:.1%} of the tokens"
    pairs = [(timed(ours, z), timed(theirs, z)) for _ in range(ROUNDS)]
    ratios = sorted(b / a for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "ours_s": mine,
        "theirs_s": other,
        "faster": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }


def memory(name: str) -> float:
    """In GB, of a process by itself."""
    found = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1]) / 1e9


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        step, z = QUANTIZERS[sys.argv[1]](), tokens()
        QUANTIZERS[OURS]()(tokens()[..., :2].detach().requires_grad_())  # loads what all need
        print(peak_memory(lambda: step(z)))
        return
    results = {name: paired(name) | {"memory_gb": memory(name)} for name in QUANTIZERS if name != OURS}
    print(f"{OURS}: {memory(OURS):.3f} GB")
    print(f"{'':36}{'ours':>9}{'theirs':>9}{'times as fast':>26}{'theirs':>12}")
    for name, r in results.items():
        spread = f"{r['faster']:.2f} [{r['least']:.2f}, {r['most']:.2f}]"
        print(f"{name:36}{r['ours_s']:7.2f} s{r['theirs_s']:7.2f} s{spread:>26}{r['memory_gb']:9.2f} GB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
