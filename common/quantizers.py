"""Vector quantizers of a VQ-GAN, for feature maps (B, C, ...) of any number of spatial dimensions: a codebook that follows
its tokens, and finite scalar quantization, which has nothing to learn. A token is the C features of one position."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

# Scores that are held at a time. 32^3 tokens against 8192 codes take 0.16 CPU seconds in blocks that stay in the cache (the
# product alone 0.10), 0.30 in blocks of 4096 tokens; a GPU wants few large blocks, and 128 MB of them.
SCORES_ON_CPU, SCORES_ON_GPU = 2**20, 2**25
FOLD = 128
TOKENS_PER_CODE = 64  # k-means looks at no more


class Quantized(NamedTuple):
    quantized: Tensor
    """(B, C, ...) float32, exactly what `decode(indices)` gives; gradients pass straight through to the input."""
    indices: Tensor
    """(B, ...) int64."""
    commitment: Tensor
    """(B,) squared distance of a sample's tokens to their codes, which the encoder pays for."""


@contextmanager
def true_float32() -> Iterator[None]:
    """No TF32, which `launch.start` allows: it would send tokens to codes that are not the nearest."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_global_order(accelerator: Accelerator, parts: Tensor) -> Tensor:
    """(micro, n, d) of each process as one list; part micro * processes + rank of the global batch is this rank's."""
    return accelerator.gather(parts[None]).transpose(0, 1).flatten(0, -2)


def lots(chance: Tensor, nearness: Tensor) -> Tensor:
    """Sorting by these from the largest draws tokens without replacement, each with a weight of its squared distance to the
    nearest code (k-means++; the drawing is Efraimidis and Spirakis 2006). `chance` is uniform in [0, 1)."""
    return chance.log() / (1 - nearness).clamp_min(1e-9)


class EMACodebook(nn.Module):
    """Codes on the unit sphere, each the exponential average of the directions of the tokens that it is nearest to.

    Tokens and codes are normalised (Yu et al. 2022: 100 % of the codes used where plain ones have 1 %), so the nearest code
    has the largest dot product, and averages need no division by counts that may be zero. A code's size is its averaged use,
    1 being the mean over the codes; one that falls below `restart_below` takes the place of a token.

    `forward` in training mode only collects; `update` once per optimizer step, or `discard`, does the rest. What survives a
    checkpoint is in the buffers, `started` included: a codebook that was resumed is not begun anew.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        restart_below: float,
        chunk: int | None = None,
    ):
        super().__init__()
        self.count, self.dim = codes, dim
        self.decay, self.restart_below = decay, restart_below
        self.chunk = chunk  # tokens that are compared with all codes at a time; None suits the device
        self.register_buffer("codes", F.normalize(torch.randn(codes, dim), dim=1))
        self.register_buffer("sizes", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("started", torch.tensor(False))
        self.discard()

    @property
    def bits_per_token(self) -> float:
        return math.log2(self.count)

    @property
    def directions(self) -> Tensor:
        """The codes, on the sphere again where `training.EMA` has averaged them."""
        return F.normalize(self.codes, dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.directions).movedim(-1, 1)

    def forward(self, z: Tensor, picks: Tensor | None = None) -> Quantized:
        """`picks` (B, R), uniform in [0, 1), are places in each sample whose tokens may replace unused codes: drawn by the
        dataset from the sample's own seed, they do not depend on how samples are dealt to processes."""
        unit = F.normalize(z.float(), dim=1, eps=1e-6)
        tokens = unit.detach().movedim(1, -1)
        nearest, nearness = self._nearest(tokens.flatten(0, -2))
        if self.training:
            self._collect(tokens.flatten(1, -2), nearest, nearness, picks)
        indices = nearest.view(tokens.shape[:-1])
        codes = self.decode(indices)
        commitment = (unit - codes).square().sum(1).flatten(1).mean(1)
        return Quantized(unit - unit.detach() + codes, indices, commitment)

    @torch.no_grad()
    def _nearest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The code of each of (N, C) tokens and its dot product.

        Finding the largest of a row with its place takes PyTorch's CPU twice as long as the product. So a row is folded to
        FOLD columns, whose maxima are fast, and only the best column is searched; the first codes, once more, fill it up."""
        filled = torch.arange(-(-self.count // FOLD) * FOLD, device=tokens.device) % self.count
        codes = self.directions[filled].t().contiguous()
        held = SCORES_ON_CPU if tokens.device.type == "cpu" else SCORES_ON_GPU
        rows = min(self.chunk or max(1, held // len(filled)), len(tokens))
        scores = tokens.new_empty(rows, len(filled))  # once: with one per block the heap grew by 0.8 GB now and then
        indices, nearness = filled.new_empty(len(tokens)), tokens.new_empty(len(tokens))
        with true_float32():  # and autocast leaves products alone that have an `out`
            for part, index, near in zip(tokens.split(rows), indices.split(rows), nearness.split(rows), strict=True):
                folded = torch.mm(part, codes, out=scores[: len(part)]).view(len(part), -1, FOLD)
                column = folded.amax(1).argmax(1)
                best = folded[torch.arange(len(part), device=part.device), :, column].max(1)
                index.copy_(filled[best.indices * FOLD + column])
                near.copy_(best.values)
        return indices, nearness

    def _tally(self, tokens: Tensor, indices: Tensor) -> Tensor:
        """(codes, C + 1): the sum of the tokens of each code, and how many they are."""
        counted = F.pad(tokens, (0, 1), value=1.0)
        return counted.new_zeros(self.count, counted.shape[1]).index_add_(0, indices, counted)

    def _relative(self, tally: Tensor) -> tuple[Tensor, Tensor]:
        """Sums and counts, divided by the mean count: steps of any number of tokens weigh the same."""
        tally = tally / tally[:, -1].mean()
        return tally[:, :-1], tally[:, -1]

    def _turn(self, sums: Tensor, counts: Tensor) -> None:
        """Codes without tokens stay: their sums shrink until they have no direction."""
        self.codes.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), self.codes))

    def _collect(self, tokens: Tensor, nearest: Tensor, nearness: Tensor, picks: Tensor | None) -> None:
        tally = self._tally(tokens.flatten(0, 1), nearest)
        self._collected = tally if self._collected is None else self._collected + tally
        if picks is not None:
            samples, size, _ = tokens.shape
            place = (picks * size).long().clamp_max(size - 1)
            sample = torch.arange(samples, device=tokens.device)[:, None]
            lot = lots(picks * size - place, nearness.view(samples, size)[sample, place])  # of the digits not used so far
            self._candidates.append(torch.cat([tokens[sample, place], lot[..., None].float()], -1).flatten(0, 1))

    def discard(self) -> None:
        """Forget what was collected, e.g. by a step that is skipped."""
        self._collected: Tensor | None = None
        self._candidates: list[Tensor] = []

    @torch.no_grad()
    def update(self, accelerator: Accelerator) -> None:
        """One step of the codebook with what `forward` has collected on all processes, which all end with the same codes."""
        if self._collected is None:
            raise RuntimeError("Nothing was collected for this update: forward has not been called in training mode.")
        sums, counts = self._relative(accelerator.reduce(self._collected, "sum"))
        self.sizes.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self._turn(self.sums, counts)
        if self._candidates and (self.sizes < self.restart_below).any():  # else nobody need hear of the candidates
            self._restart(in_global_order(accelerator, torch.stack(self._candidates)))
        self.discard()

    def _restart(self, candidates: Tensor) -> None:
        """The least used code takes the first drawn candidate, and so on. Sums and size follow: with the old ones the code
        would return to its place in the next update. At twice the threshold it has 70 updates (decay 0.99) to find tokens;
        at the mean size a codebook with a bad start needed 600 updates where this needs 400."""
        order = candidates[:, -1].argsort(descending=True, stable=True)
        least = self.sizes.argsort(stable=True)[: len(order)]
        dead = least[self.sizes[least] < self.restart_below]
        self.codes[dead] = candidates[order[: len(dead)], :-1]
        self.sums[dead] = 2 * self.restart_below * self.codes[dead]
        self.sizes[dead] = 2 * self.restart_below

    @torch.no_grad()
    def start(self, accelerator: Accelerator, maps: Sequence[Tensor], *, seed: int, iterations: int = 10) -> None:
        """Spherical k-means of this process's feature maps, one per micro-batch, and those of the others. Codes without
        tokens move to badly represented ones. Fewer tokens than codes are repeated with noise, to be parted by training."""
        generator = torch.Generator().manual_seed(seed)
        units = [F.normalize(z.float(), dim=1, eps=1e-6).movedim(1, -1).flatten(0, -2) for z in maps]
        tokens = in_global_order(accelerator, torch.stack(units))
        if len(tokens) < self.count:
            tokens = tokens.repeat(-(-self.count // len(tokens)), 1)
            noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
            tokens = F.normalize(tokens + 0.01 * noise, dim=1)
        order = torch.randperm(len(tokens), generator=generator)[: TOKENS_PER_CODE * self.count]
        tokens = tokens[order.to(tokens.device)]
        self.codes.copy_(tokens[: self.count])
        for left in reversed(range(iterations)):
            nearest, nearness = self._nearest(tokens)
            sums, counts = self._relative(self._tally(tokens, nearest))
            self._turn(sums, counts)
            if left:
                empty = (counts == 0).nonzero()[:, 0]
                chance = torch.rand(len(tokens), generator=generator).to(tokens.device)
                self.codes[empty] = tokens[lots(chance, nearness).topk(len(empty)).indices]
        self.sums.copy_(sums)
        self.sizes.copy_(counts)
        self.started.fill_(True)
        for buffer in (self.codes, self.sums, self.sizes):
            broadcast(buffer)  # GPUs add in any order, so each has its own last digits


class FSQ(nn.Module):
    """Finite scalar quantization (Mentzer et al. 2023): each feature is rounded to one of few levels in [-1, 1], and a code
    is a combination of levels. Nothing to learn, and nothing that could collapse; the interface is that of EMACodebook."""

    started = True

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.dim, self.count = len(levels), math.prod(levels)
        levels = torch.tensor(levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("strides", levels.cumprod(0) // levels, persistent=False)

    @property
    def bits_per_token(self) -> float:
        return math.log2(self.count)

    def decode(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        digits = indices[..., None] // self.strides % self.levels
        return ((digits - half) / half).movedim(-1, 1)

    def forward(self, z: Tensor, picks: Tensor | None = None) -> Quantized:
        # A little more than the outermost levels, so that they can be reached. An even number of levels has one more below
        # zero than above: moved by half a step, and zero stays zero.
        reach, half = (self.levels - 1) * 1.001 / 2, self.levels // 2
        offset = (self.levels % 2 == 0) / 2
        bounded = (z.float().movedim(1, -1) + (offset / reach).atanh()).tanh() * reach - offset
        indices = ((bounded.detach().round().long() + half) * self.strides).sum(-1)
        scaled = (bounded / half).movedim(-1, 1)
        return Quantized(scaled - scaled.detach() + self.decode(indices), indices, z.new_zeros(len(z), dtype=torch.float32))

    def discard(self) -> None:
        pass

    def update(self, accelerator: Accelerator) -> None:
        pass

    def start(self, accelerator: Accelerator, maps: Sequence[Tensor], *, seed: int, iterations: int = 10) -> None:
        pass


class CodeUse:
    """How often each code occurs in a whole set. Of single batches it would say little: they have no room for all codes."""

    def __init__(self, codes: int):
        self.counts = torch.zeros(codes, dtype=torch.int64)

    def add(self, indices: Tensor) -> None:
        self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts)).cpu()

    def merge(self, accelerator: Accelerator) -> None:
        """The counts of all processes, on each of them."""
        self.counts = accelerator.reduce(self.counts.to(accelerator.device), "sum").cpu()

    @property
    def used(self) -> float:
        """Share of the codes that occur at all."""
        return (self.counts > 0).double().mean().item()

    @property
    def perplexity(self) -> float:
        """How many codes, used equally often, would carry as much information."""
        share = self.counts.double() / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()
