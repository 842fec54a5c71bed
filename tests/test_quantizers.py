"""A codebook that is exact, survives a checkpoint, cannot die out and is the same on any number of processes; finite scalar
quantization whose indices and codes are each other's inverse."""

import inspect
import math
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import free_port, peak_memory
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.quantizers import FSQ, CodeUse, EMACodebook, lots
from common.training import EMA


@pytest.fixture(scope="module")
def alone() -> Accelerator:
    return Accelerator(cpu=True)


def maps(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picks(seed: int, samples: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 1]).random((samples, count)))


def book(codes: int = 40, dim: int = 5, *, seed: int = 0, **options) -> EMACodebook:
    torch.manual_seed(seed)
    return EMACodebook(codes, dim, **{"restart_below": 0.1} | options)


def place(codebook: EMACodebook, codes: Tensor) -> EMACodebook:
    """As if it had found these codes, used equally."""
    codebook.codes.copy_(F.normalize(codes, dim=1))
    codebook.sums.copy_(codebook.codes)
    codebook.sizes.fill_(1)
    return codebook


def as_map(tokens: Tensor) -> Tensor:
    return tokens.t()[None].contiguous()


def clusters(seed: int, count: int = 40, tokens: int = 800, spread: float = 0.02) -> Tensor:
    """Tokens around `count` directions, the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, count, (tokens,), generator=generator)
    return as_map(F.normalize(maps(99, count, 8), dim=1)[which] + spread * maps(seed + 1, tokens, 8))


def state(codebook: EMACodebook) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in codebook.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], *, tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: name + m)


# ---------------------------------------------------------------------------------------------------------------------
# the nearest code


@pytest.mark.parametrize("codes", [1, 7, 128, 300])
def test_nearest_codes_are_those_of_brute_force_in_float64(codes):
    codebook, z = book(codes), 10 * maps(1, 3, 5, 4, 6, 5)
    out = codebook(z)
    unit = F.normalize(z.double(), dim=1)
    cosine = torch.einsum("bcxyz,kc->bxyzk", unit, codebook.codes.double())
    assert out.indices.shape == (3, 4, 6, 5) and out.indices.dtype == torch.int64
    assert torch.equal(out.indices, cosine.argmax(-1))
    assert torch.equal(out.quantized, codebook.decode(out.indices))
    torch.testing.assert_close(out.quantized.movedim(1, -1), F.normalize(codebook.codes, dim=1)[out.indices])
    torch.testing.assert_close(out.commitment.double(), (2 - 2 * cosine.amax(-1)).mean((1, 2, 3)))


def test_tokens_may_lie_in_any_number_of_dimensions():
    codebook, z = book(), maps(1, 2, 5, 24)
    flat = codebook(z)
    for shape in ((4, 6), (2, 3, 4), (1, 2, 3, 4)):
        out = codebook(z.view(2, 5, *shape))
        assert torch.equal(out.indices.flatten(1), flat.indices) and out.indices.shape == (2, *shape)
        assert torch.equal(out.quantized.flatten(2), flat.quantized)


@pytest.mark.parametrize("chunk", [1, 17, 4096])
def test_how_many_tokens_are_compared_at_a_time_does_not_matter(chunk, alone):
    whole, parts = book(300, restart_below=0.5), book(300, restart_below=0.5, chunk=chunk)
    for step in range(3):
        z, where = maps(step, 2, 5, 90), picks(step, 2, 8)
        for mine, theirs in zip(whole(z, where), parts(z, where), strict=True):
            assert torch.equal(mine, theirs)
        whole.update(alone), parts.update(alone)
    assert_same(state(whole), state(parts))


class Products(TorchDispatchMode):
    """The kinds of matrix product that were asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket is torch.ops.aten.mm:
            self.seen.append((args[0].dtype, torch.get_float32_matmul_precision()))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_tf32_do_not_change_the_search(low, monkeypatch):
    codebook, z = book(300), maps(1, 2, 5, 200).to(low)
    plain = codebook(z.float())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", low), Products() as products:
            mixed = codebook(z)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(products.seen) == {(torch.float32, "highest")}
    for mine, theirs in zip(mixed, plain, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_gradients_pass_straight_through_the_codes():
    codebook, z, weight = book(), maps(1, 2, 5, 3, 4).requires_grad_(), maps(2, 2, 5, 3, 4)
    through = torch.autograd.grad((codebook(z).quantized * weight).sum(), z)[0]
    torch.testing.assert_close(through, torch.autograd.grad((F.normalize(z, dim=1) * weight).sum(), z)[0])
    assert not list(codebook.parameters())


def test_the_commitment_draws_features_to_their_codes():
    codebook, z = book(), maps(1, 2, 5, 3, 4).requires_grad_()
    out = codebook(z)
    gradient = torch.autograd.grad(out.commitment.mean(), z)[0]
    cosine = (F.normalize(z, dim=1) * codebook.decode(out.indices)).sum(1)
    torch.testing.assert_close(gradient, torch.autograd.grad((2 - 2 * cosine).mean(), z)[0])
    moved = codebook(z - 5 * gradient)
    assert moved.commitment.mean() < 0.9 * out.commitment.mean()


# ---------------------------------------------------------------------------------------------------------------------
# learning


def test_an_update_is_the_average_of_the_tokens(alone):
    codebook = place(book(3, 5, decay=0.9, restart_below=0), torch.eye(5)[:3])
    tokens = F.normalize(torch.eye(5)[[0, 0, 0, 1]] + 0.1 * maps(1, 4, 5).abs(), dim=1)
    codebook(as_map(tokens))
    codebook.update(alone)
    counts = torch.tensor([3.0, 1.0, 0.0]) / (4 / 3)
    sums = 0.9 * torch.eye(5)[:3] + 0.1 * torch.stack([tokens[:3].sum(0), tokens[3], torch.zeros(5)]) / (4 / 3)
    torch.testing.assert_close(codebook.sizes, 0.9 + 0.1 * counts)
    torch.testing.assert_close(codebook.sums, sums)
    torch.testing.assert_close(codebook.codes, F.normalize(sums, dim=1))


def test_forward_and_evaluation_leave_the_codebook_alone(alone):
    codebook = book(restart_below=0.9)
    before = state(codebook)
    codebook(maps(1, 2, 5, 30), picks(1, 2, 4))
    assert_same(before, state(codebook))
    codebook.discard()
    codebook.eval()
    codebook(maps(1, 2, 5, 30), picks(1, 2, 4))
    with pytest.raises(RuntimeError, match="training mode"):
        codebook.update(alone)
    assert_same(before, state(codebook))


def test_a_skipped_step_leaves_no_trace(alone):
    one, other = book(restart_below=0.9), book(restart_below=0.9)
    one(torch.full((2, 5, 30), math.nan), picks(5, 2, 4))
    one(maps(6, 2, 5, 30), picks(6, 2, 4))
    one.discard()
    for codebook in (one, other):
        codebook(maps(1, 2, 5, 30), picks(1, 2, 4))
        codebook.update(alone)
    assert_same(state(one), state(other))


def test_codes_that_nothing_uses_do_not_shrink_away(alone):
    codebook = place(book(2, 5, decay=0.5, restart_below=0), torch.eye(5)[:2])
    for _ in range(300):  # the average of the second one's tokens is 0 to the last bit
        codebook(as_map(torch.eye(5)[:1]))
        codebook.update(alone)
    assert codebook.sums[1].norm() == 0
    assert torch.equal(codebook.codes, torch.eye(5)[:2])


def test_a_resumed_codebook_continues_to_the_bit(alone, tmp_path):
    def train(codebook: EMACodebook, steps: range) -> None:
        for step in steps:
            codebook(maps(step, 2, 5, 60), picks(step, 2, 3))
            codebook.update(alone)

    whole = book(restart_below=0.5)
    whole.start(alone, [maps(50, 2, 5, 60)], seed=3)
    train(whole, range(4))
    torch.save(whole.state_dict(), tmp_path / "state")
    resumed = book(restart_below=0.5, seed=1)
    assert not resumed.started and not torch.equal(resumed.codes, whole.codes)
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    assert resumed.started
    train(whole, range(4, 9)), train(resumed, range(4, 9))
    assert_same(state(whole), state(resumed))


def test_averaged_codes_are_used_as_directions(alone):
    model = nn.ModuleList([book(restart_below=0), nn.Conv3d(1, 5, 1)])
    average = EMA(model, 0.9)
    place(model[0], -model[0].codes + 0.1)
    average.update(10)
    copy = average.module[0]
    assert copy.codes.norm(dim=1).max() < 0.99
    out = copy(maps(1, 2, 5, 50))
    torch.testing.assert_close(out.quantized.norm(dim=1), torch.ones(2, 50))
    cosine = torch.einsum("bcn,kc->bnk", F.normalize(maps(1, 2, 5, 50), dim=1), F.normalize(copy.codes, dim=1))
    assert torch.equal(out.indices, cosine.argmax(-1))


# ---------------------------------------------------------------------------------------------------------------------
# codes that would die out


def test_the_least_used_code_takes_the_picked_token_and_keeps_it(alone):
    codes, found = torch.eye(8)[:4], F.normalize(torch.tensor([[1.0, 0, 0, 0, 2, 0, 0, 0]]))
    codebook = place(book(4, 8), codes)
    codebook.sizes.copy_(torch.tensor([1.0, 0.02, 0.05, 1.0]))
    codebook(as_map(torch.cat([codes[:1].repeat(7, 1), found])), torch.tensor([[0.95]]))  # the eighth of eight tokens
    codebook.update(alone)
    torch.testing.assert_close(codebook.codes[1], found[0])
    torch.testing.assert_close(codebook.codes[2:], codes[2:])
    codebook.sizes[2] = 1
    tokens = as_map(torch.cat([codes[[0, 2, 3]], found]))
    for step in range(60):
        out = codebook(tokens, picks(step, 1, 2))
        codebook.update(alone)
        assert out.indices.tolist() == [[0, 2, 3, 1]] and codebook.codes[1] @ found[0] > 0.9999, step


def test_the_worst_represented_of_the_picked_tokens_goes_first(alone):
    for seed in range(10):
        codebook = place(book(3, 8), torch.eye(8)[:3])
        codebook.sizes[2] = 0.01
        where = torch.tensor([0.0, 1, 2, 3]) / 4 + picks(seed, 1, 4) / 4  # each token once
        codebook(as_map(torch.eye(8)[[0, 5, 1, 1]]), where)
        codebook.update(alone)
        torch.testing.assert_close(codebook.codes[2], torch.eye(8)[5])


def spoiled() -> Tensor:
    """All codes in one corner, far from most tokens."""
    return torch.ones(40, 8) + 0.05 * maps(7, 40, 8)


@pytest.mark.parametrize(("restart_below", "least", "most"), [(0.1, 1.0, 1.0), (0.0, 0.0, 0.5)])
def test_dead_codes_come_alive(restart_below, least, most, alone):
    codebook = place(book(40, 8, decay=0.9, restart_below=restart_below), spoiled())
    for step in range(150):
        codebook(clusters(step), picks(step, 1, 16))
        codebook.update(alone)
    use = CodeUse(40)
    use.add(codebook.eval()(clusters(1000, tokens=4000)).indices)
    assert least <= use.used <= most


def test_restarted_codes_are_drawn_by_squared_distance():
    nearness, draws = torch.tensor([0.9, 0.7, 1.0, 1.0]), 4000  # weights 1 and 3, and two that have their code already
    first = torch.stack(
        [lots(torch.rand(4, generator=torch.Generator().manual_seed(n)), nearness).argmax() for n in range(draws)]
    )
    share = torch.bincount(first, minlength=4) / draws
    torch.testing.assert_close(share, torch.tensor([0.25, 0.75, 0, 0]), atol=0.03, rtol=0)


def inertia(codebook: EMACodebook, z: Tensor) -> float:
    return codebook.eval()(z).commitment.mean().item()


def test_the_start_by_k_means_is_better_than_random_tokens(alone):
    z = maps(1, 1, 4, 4000)
    begun, tokens = book(64, 4), F.normalize(z, dim=1)[0].t()
    begun.start(alone, [z], seed=1)
    chosen = [
        place(book(64, 4), tokens[torch.randperm(4000, generator=torch.Generator().manual_seed(n))[:64]]) for n in range(5)
    ]
    assert inertia(begun, maps(2, 1, 4, 4000)) < 0.85 * min(inertia(c, maps(2, 1, 4, 4000)) for c in chosen)
    torch.testing.assert_close(begun.codes, F.normalize(begun.sums, dim=1))
    assert begun.sizes.sum().item() == pytest.approx(64) and begun.sizes.min() > 0 and begun.started
    again, else_where = book(64, 4, seed=5), book(64, 4)
    again.start(alone, [z], seed=1), else_where.start(alone, [z], seed=2)
    assert_same(state(begun), state(again))
    assert not torch.equal(begun.codes, else_where.codes)


def test_the_start_finds_what_is_rare(alone):
    """Air is nine tenths of the tokens, all the same: random tokens would give it nine tenths of the codes."""
    tokens = clusters(1, tokens=4000)
    tokens[..., :3600] = torch.ones(8)[:, None]
    codebook = book(41, 8)
    codebook.start(alone, [tokens], seed=1)
    use = CodeUse(41)
    use.add(codebook.eval()(tokens).indices)
    assert use.used == 1


def test_fewer_tokens_than_codes_are_repeated(alone):
    codebook, z = book(40, 5), maps(1, 1, 5, 7)
    codebook.start(alone, [z], seed=1)
    assert torch.isfinite(codebook.codes).all() and len(codebook.codes.unique(dim=0)) == 40
    cosine = codebook.codes @ F.normalize(z[0], dim=0)
    assert cosine.amax(1).min() > 0.99  # each code lies at a token,
    assert torch.bincount(cosine.argmax(1), minlength=7).min() >= 5  # and each token has its share


# ---------------------------------------------------------------------------------------------------------------------
# processes and accumulation: the same global batches of four samples, dealt in several ways

STEPS, SAMPLES = 6, 4


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Clusters that move on, so that codes die."""
    towards = F.normalize(maps(step // 2, 1, 6, 1), dim=1)
    return maps(100 + step, SAMPLES, 6, 30) + 3 * towards, picks(step, SAMPLES, 5)


def learn(accelerator: Accelerator, parts: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """The codebook after all steps, the use of its codes as all processes know it, and how often one was restarted."""
    codebook = EMACodebook(24, 6, decay=0.7, restart_below=0.3)
    use, restarts = CodeUse(24), 0

    def mine(batch: Tensor) -> list[Tensor]:
        return list(batch.chunk(parts)[accelerator.process_index :: accelerator.num_processes])

    codebook.start(accelerator, mine(global_batch(50)[0]), seed=4)
    for step in range(STEPS):
        for z, where in zip(*map(mine, global_batch(step)), strict=True):
            use.add(codebook(z, where).indices)
        codebook.update(accelerator)
        restarts += int((codebook.sizes == torch.tensor(0.6)).sum())
    use.merge(accelerator)
    return state(codebook), use.counts, restarts


def one_rank(rank: int, port: int, folder: Path) -> None:
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()})
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # a different codebook on each, until it has started
    torch.save(learn(Accelerator(cpu=True), 4), folder / str(rank))
    torch.distributed.destroy_process_group()


def test_accumulation_and_processes_do_not_change_the_codebook(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common.quantizers"])
    port = free_port()
    ranks = [context.Process(target=one_rank, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    whole, counts, restarts = learn(alone, 1)
    assert restarts > 10 and counts.sum() == STEPS * SAMPLES * 30
    for parts in (2, 4):
        accumulated, same_counts, _ = learn(alone, parts)
        assert_same(whole, accumulated, tolerance=1e-5)
        assert torch.equal(counts, same_counts)
    for process in ranks:
        process.join(100)
        process.kill()
    (one, *first), (other, *second) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert_same(one, other)
    assert_same(whole, one, tolerance=1e-5)
    for seen, times in (first, second):
        assert torch.equal(seen, counts) and times == restarts


# ---------------------------------------------------------------------------------------------------------------------
# memory


def test_a_step_of_32768_tokens_and_8192_codes_fits_in_less_than_300_mb(alone):
    codebook, z = book(8192, 8), maps(1, 1, 8, 32, 32, 32).requires_grad_()

    def step() -> None:
        out = codebook(z, picks(1, 1, 64))
        (out.quantized.square().sum() + out.commitment.sum()).backward()
        codebook.update(alone)

    scores = peak_memory(lambda: z.detach().flatten(2)[0].t() @ codebook.codes.t())
    assert scores > 1e9  # what is measured is there
    assert peak_memory(step) < 0.3e9


# ---------------------------------------------------------------------------------------------------------------------
# finite scalar quantization


def test_every_code_of_fsq_has_its_index():
    fsq = FSQ([8, 8, 8, 6, 5])
    indices = torch.arange(15360)
    codes = fsq.decode(indices)
    assert fsq.count == 15360 and codes.shape == (15360, 5) == (15360, fsq.dim)
    assert len(codes.unique(dim=0)) == 15360
    for feature, levels in enumerate([8, 8, 8, 6, 5]):
        half = levels // 2
        assert torch.equal(codes[:, feature].unique(), (torch.arange(levels) - half) / half)
    # features that are bounded to each code, by the inverse of the published formula
    levels = torch.tensor([8, 8, 8, 6, 5])
    reach, offset, half = (levels - 1) * 1.001 / 2, torch.tensor([0.5, 0.5, 0.5, 0.5, 0]), levels // 2
    features = (((codes.double() * half + offset) / reach).atanh() - (offset / reach).atanh()).float()
    out = fsq(features[:, :, None])
    assert torch.equal(out.indices[:, 0], indices) and torch.equal(out.quantized[..., 0], codes)


def test_fsq_rounds_to_the_nearest_level_and_passes_gradients():
    fsq, z = FSQ([8, 5, 3]), (3 * maps(1, 2, 3, 4, 5, 6)).requires_grad_()
    out = fsq(z)
    assert out.indices.shape == (2, 4, 5, 6) and (out.commitment == 0).all()
    assert torch.equal(out.quantized, fsq.decode(out.indices))
    levels = torch.tensor([8, 5, 3]).view(3, 1, 1, 1)
    reach, offset, half = (levels - 1) * 1.001 / 2, torch.tensor([0.5, 0, 0]).view(3, 1, 1, 1), levels // 2
    bounded = ((z + (offset / reach).atanh()).tanh() * reach - offset) / half
    assert (out.quantized - bounded).abs().mul(half).max() <= 0.5 + 1e-5
    weight = maps(2, *z.shape)
    mine = torch.autograd.grad((out.quantized * weight).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad((bounded * weight).sum(), z)[0])
    assert torch.equal(fsq(torch.zeros(1, 3, 1)).quantized, torch.zeros(1, 3, 1))
    for extreme in (-1e4, 1e4):
        assert torch.equal(
            fsq(fsq(torch.full((1, 3, 1), extreme)).quantized * 100).indices, fsq(torch.full((1, 3, 1), extreme)).indices
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsq(z.bfloat16()).indices, fsq(z.bfloat16().float()).indices)


def test_fsq_can_stand_in_for_the_codebook(alone):
    fsq, codebook = FSQ([8, 5, 5, 5]), book(8)
    for name in ("forward", "decode", "update", "discard", "start"):
        assert inspect.signature(getattr(fsq, name)) == inspect.signature(getattr(codebook, name)), name
    fsq.start(alone, [maps(1, 2, 4, 9)], seed=1)
    fsq(maps(1, 2, 4, 9), picks(1, 2, 3))
    fsq.update(alone), fsq.discard()
    assert fsq.started and not fsq.state_dict()
    assert fsq.bits_per_token == math.log2(1000) and codebook.bits_per_token == 3


# ---------------------------------------------------------------------------------------------------------------------
# use of the codes


def test_code_use_counts_a_whole_set():
    use = CodeUse(10)
    use.add(torch.tensor([[0, 1], [2, 3]]))
    assert use.used == 0.4 and use.perplexity == pytest.approx(4)
    use.add(torch.full((3, 4), 3))
    share = np.array([1, 1, 1, 13]) / 16
    assert use.used == 0.4 and use.perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()))
