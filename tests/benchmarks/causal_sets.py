"""Forward and backward of the default network against torch-geometric: the same network with the same weights, whose edges
and features are made beforehand, and two usual ones on all relations. And reading from the packed store against
QuantumGrav's zarr groups.

    python tests/benchmarks/causal_sets.py
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from timing import Result, optional, paired, show
from torch import Tensor, nn

from common import causal_sets
from common.demo_data.causal_sets import make_set, write, write_zarr
from scripts import train_quantumgrav as job

CONFIG, BATCH, ATOMS = job.Config(dropout=0), 32, 60
SETS, READ_ATOMS = 200, 256


def make_batch() -> dict[str, Tensor]:
    made = [make_set(i, seed=0, n_min=ATOMS, n_max=ATOMS) for i in range(BATCH)]
    labels = dict.fromkeys(job.TASKS, 0.0)
    return job.collate(
        [{"id": i, "relations": m} | labels | {"manifold_like": float(i % 2)} for i, (m, _) in enumerate(made)]
    )


def edges(matrices: Tensor) -> Tensor:
    """What atom i gets from atom j where [i, j] is not 0, for torch-geometric's batches."""
    which, to, start = matrices.nonzero(as_tuple=True)
    return torch.stack([which * ATOMS + start, which * ATOMS + to])


class Twin(nn.Module):
    """The default network in terms of torch-geometric."""

    def __init__(self, net: job.CausalNet, batch: dict[str, Tensor]):
        from torch_geometric.nn import SimpleConv

        super().__init__()
        self.net, self.sum, self.mean = net, SimpleConv("sum"), SimpleConv("mean")
        relations, _, links = job.relation_matrices(batch)
        extra, missing, found = job.misfits(relations, links, batch["real"])
        self.atoms = torch.cat([job.atom_features(relations, links, batch["sizes"]), found], -1).flatten(0, 1)
        self.links = [edges(links), edges(links.mT)]
        self.averaged = [edges(m) for m in (relations, relations.mT, extra + extra.mT, missing + missing.mT)]
        self.which = torch.arange(BATCH).repeat_interleave(ATOMS)

    def forward(self) -> Tensor:
        from torch_geometric.nn import global_add_pool, global_max_pool

        body = self.net.body
        x = body.embed(self.atoms)
        for layer in body.layers:
            h = layer.norm(x)
            messages = [h, *(self.sum(h, way) for way in self.links), *(self.mean(h, way) for way in self.averaged)]
            x = x + layer.out(F.gelu(layer.mix(torch.cat(messages, -1))))
        total = global_add_pool(x, self.which, BATCH)
        pooled = [total / ATOMS, global_max_pool(x, self.which, BATCH), total / ATOMS**0.5]
        return self.net.heads["manifold_like"](body.readout.trunk(torch.cat(pooled, -1)))


class Usual(nn.Module):
    """What one would build: convolutions on all relations, degrees as features."""

    def __init__(self, kind: str, batch: dict[str, Tensor]):
        from torch_geometric.nn import DirGNNConv, GATv2Conv, SAGEConv

        super().__init__()
        width = CONFIG.width
        make = {"DirGNN-SAGE": lambda: DirGNNConv(SAGEConv(width, width)), "GATv2": lambda: GATv2Conv(width, width)}[kind]
        self.embed, self.out = nn.Linear(4, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(make() for _ in range(CONFIG.layers))
        relations, _, links = job.relation_matrices(batch)
        degrees = [relations.sum(1), relations.sum(2), links.sum(1), links.sum(2)]
        self.atoms, self.edges = torch.stack(degrees, -1).log1p().flatten(0, 1), edges(relations.mT)
        self.which = torch.arange(BATCH).repeat_interleave(ATOMS)

    def forward(self) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.embed(self.atoms)
        for layer in self.layers:
            x = x + F.gelu(layer(x, self.edges))
        return self.out(global_mean_pool(x, self.which, BATCH))


def networks() -> Iterator[Result]:
    import torch_geometric  # noqa: F401  # from here on it is there

    batch = make_batch()
    torch.manual_seed(0)
    net = job.CausalNet(CONFIG, {"manifold_like": 1})
    twin = Twin(net, batch)

    def gradients(answer: Tensor) -> list[Tensor]:
        net.zero_grad()
        F.binary_cross_entropy_with_logits(answer, batch["manifold_like"][:, None]).backward()
        return [parameter.grad for parameter in net.parameters()]

    torch.testing.assert_close(net(batch)["manifold_like"], twin(), rtol=1e-4, atol=1e-5)
    for mine, other in zip(gradients(net(batch)["manifold_like"]), gradients(twin()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    what = f"forward and backward of {BATCH} sets of {ATOMS} atoms"
    for name, other, goal in (
        ("torch-geometric, the same network", twin, 1),
        ("torch-geometric, GATv2", Usual("GATv2", batch), 1),
        ("torch-geometric, DirGNN-SAGE, without misfits", Usual("DirGNN-SAGE", batch), None),  # a smaller network
    ):
        found = paired(
            lambda: gradients(net(batch)["manifold_like"]), lambda other=other: gradients(other()), times=5, rounds=7
        )
        yield Result(what, name, unit="ms", goal=goal, **found)


def reading() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"seed": 0, "n_min": READ_ATOMS, "n_max": READ_ATOMS}
        write(f"{folder}/packed", SETS, progress=False, **settings)
        write_zarr(f"{folder}/q.zarr", SETS, **settings)
        store = causal_sets.Store(f"{folder}/packed")

        def read_zarr(index: int) -> np.ndarray:
            return np.asarray(zarr.open_group(f"{folder}/q.zarr/cset_{index + 1}", mode="r")["adj"][:])

        for index in range(0, SETS, 20):
            np.testing.assert_array_equal(store.matrix(index), read_zarr(index).T)
        draws = cycle(np.random.default_rng(0).integers(0, SETS, 10_000).tolist())
        wall = partial(paired, clock=time.perf_counter)  # waiting for files counts
        found = wall(lambda: store.matrix(next(draws)), lambda: read_zarr(next(draws)), times=50, rounds=7)
        yield Result(f"a random set of {READ_ATOMS} atoms from disk", "zarr groups", unit="ms", goal=1, **found)


def measure() -> Iterator[Result]:
    yield from reading()
    yield from optional("torch_geometric", networks())


if __name__ == "__main__":
    show(measure())
