"""One training step of a codebook (forward, backward, update) against vector-quantize-pytorch and MONAI: 16^3 tokens of 8
features, 8192 codes. And finite scalar quantization of as many tokens.

    python tests/benchmarks/quantizers.py

All must choose the same codes first. Memory is what a process of its own grows by in one step, at most.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import peak_memory
from test_quantizers import maps, picks
from timing import Result, fresh, optional, paired, show
from torch import Tensor

from common.quantizers import FSQ, EMACodebook

Step = Callable[[Tensor], Tensor]
CODES, DIM, SIDE, LEVELS = 8192, 8, 16, (8, 8, 8, 4, 4)


def start() -> Tensor:
    """The same codes for all, on the sphere, where the smallest distance is the largest cosine."""
    return F.normalize(torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(3)), dim=1)


def tokens(features: int = DIM) -> Tensor:
    return F.normalize(maps(1, 1, features, SIDE, SIDE, SIDE), dim=1).requires_grad_()


def ema() -> Step:
    accelerator, codebook = Accelerator(cpu=True), EMACodebook(CODES, DIM, restart_below=0.1)
    codebook.codes.copy_(start())
    codebook.sums.copy_(start())

    def step(z: Tensor) -> Tensor:
        out = codebook(z, picks(0, 1, 64))
        (out.quantized.square().sum() + out.commitment.sum()).backward()
        codebook.update(accelerator)
        return out.indices

    return step


def lucidrains(cosine: bool) -> Step:
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


def monai() -> Step:
    from monai.networks.layers.vector_quantizer import EMAQuantizer

    quantizer = EMAQuantizer(spatial_dims=3, num_embeddings=CODES, embedding_dim=DIM)
    quantizer.embedding.weight.data.copy_(start())
    quantizer.ema_w.data.copy_(start())

    def step(z: Tensor) -> Tensor:
        quantized, commitment, indices = quantizer(z)
        (quantized.square().sum() + commitment).backward()
        return indices

    return step


def memory(make: Callable[[], Step]) -> float:
    step, z = make(), tokens()
    ema()(tokens()[..., :2, :2, :2].detach().requires_grad_())  # loads what all need
    return peak_memory(lambda: step(z)) / 1e6


def codebook(against: str, make: Callable[[], Step], megabytes: float) -> Iterator[Result]:
    what = f"codebook step, {SIDE}^3 tokens, {CODES} codes"
    ours, theirs, z = ema(), make(), tokens()
    agree = (ours(z).flatten() == theirs(z).flatten()).float().mean().item()
    assert agree > 0.999, f"{against} chooses other codes for {1 - agree:.1%} of the tokens"
    yield Result(what, against, unit="ms", goal=1, **paired(partial(ours, z), partial(theirs, z)))
    theirs = fresh(memory, make)
    yield Result(f"{what}, memory", against, megabytes, theirs, "MB", theirs / megabytes, goal=1)


def finite_scalar() -> Iterator[Result]:
    from vector_quantize_pytorch import FSQ as TheirFSQ

    ours, theirs, z = FSQ(LEVELS), TheirFSQ(list(LEVELS)), tokens(len(LEVELS))
    assert torch.equal(ours(z).indices.flatten(), theirs(z)[1].flatten().long())
    torch.testing.assert_close(ours(z).quantized, theirs(z)[0])

    def step(quantize: Step) -> None:
        torch.autograd.grad(quantize(z).square().sum(), z)

    found = paired(lambda: step(lambda z: ours(z).quantized), lambda: step(lambda z: theirs(z)[0]), times=10)
    yield Result(f"finite scalar quantization, {SIDE}^3 tokens", "vector-quantize-pytorch", unit="ms", goal=1, **found)


def measure() -> Iterator[Result]:
    megabytes = fresh(memory, ema)
    for library, against, make in (
        ("vector_quantize_pytorch", "vector-quantize-pytorch, cosine", partial(lucidrains, True)),
        ("vector_quantize_pytorch", "vector-quantize-pytorch, Euclid", partial(lucidrains, False)),
        ("monai", "MONAI EMAQuantizer", monai),
    ):
        yield from optional(library, codebook(against, make, megabytes))
    yield from optional("vector_quantize_pytorch", finite_scalar())


if __name__ == "__main__":
    show(measure())
