"""Graphs per second of the default network against what a user would build with torch-geometric on the same relations, and
reading from the packed store against QuantumGrav's zarr groups.

    pip install torch-geometric && python tests/benchmarks/causal_sets.py

Everything in one process, alternating A B A B; medians of the paired ratios, with the smallest and largest.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import timing
import torch
from torch import nn

from common import causal_sets
from common.demo_data.causal_sets import make_set, write, write_zarr
from scripts import train_quantumgrav as job

WIDTH, LAYERS, BATCH, ATOMS = 48, 3, 32, 60
paired = partial(timing.paired, rounds=7, clock=time.perf_counter)  # waiting for files counts


def geometric_network(kind: str) -> nn.Module:
    from torch_geometric.nn import DirGNNConv, GATv2Conv, SAGEConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, WIDTH)
            make = {"DirGNN-SAGE": lambda: DirGNNConv(SAGEConv(WIDTH, WIDTH)), "GATv2": lambda: GATv2Conv(WIDTH, WIDTH)}[
                kind
            ]
            self.layers = nn.ModuleList(make() for _ in range(LAYERS))
            self.out = nn.Linear(WIDTH, 1)

        def forward(self, batch) -> torch.Tensor:
            x = self.embed(batch.x)
            for layer in self.layers:
                x = x + torch.nn.functional.gelu(layer(x, batch.edge_index))
            return self.out(global_mean_pool(x, batch.batch))

    return Net()


def network_speed() -> dict[str, dict[str, float]]:
    from torch_geometric.data import Batch, Data

    made = [make_set(i, seed=0, n_min=ATOMS, n_max=ATOMS) for i in range(BATCH)]
    labels = {task: 0.0 for task in job.TASKS}
    batch = job.collate(
        [{"id": i, "relations": m} | labels | {"manifold_like": float(i % 2)} for i, (m, _) in enumerate(made)]
    )
    target = batch["manifold_like"][:, None]
    config = job.Config(width=WIDTH, layers=LAYERS)
    net = job.CausalNet(config, {"manifold_like": 1})
    criterion = nn.BCEWithLogitsLoss()

    def ours():
        criterion(net(batch)["manifold_like"], target).backward()

    graphs = []
    for matrix, _ in made:  # the full relations, as the network here sees them; degrees as atom features
        links = causal_sets.links(matrix)
        features = np.stack([matrix.sum(0), matrix.sum(1), links.sum(0), links.sum(1)], 1).astype(np.float32)
        edges = torch.from_numpy(np.stack(np.nonzero(matrix)))
        graphs.append(Data(x=torch.from_numpy(np.log1p(features)), edge_index=edges))
    theirs_batch = Batch.from_data_list(graphs)
    results = {}
    for kind in ("DirGNN-SAGE", "GATv2"):
        other = geometric_network(kind)
        results[kind] = paired(ours, lambda other=other: criterion(other(theirs_batch), target).backward(), times=5)
    return results


def reading_speed(folder: Path) -> dict[str, float]:
    import zarr

    write(folder / "packed", 200, seed=0, preset="zoo", n_min=256, n_max=256, progress=False)
    write_zarr(folder / "q.zarr", 200, seed=0, n_min=256, n_max=256)
    store = causal_sets.Store(folder / "packed")
    draws = np.random.default_rng(0).integers(0, 200, 10_000).tolist()
    pick = iter(draws * 10)
    groups = [causal_sets._zarr_groups(folder / "q.zarr")[i] for i in range(200)]
    return paired(
        lambda: store.matrix(next(pick)),
        lambda: np.asarray(zarr.open_group(groups[next(pick)], mode="r")["adj"][:]),
        times=50,
    )


def main() -> None:
    results = {f"forward and backward of {BATCH} sets of {ATOMS} atoms, against {k}": v for k, v in network_speed().items()}
    with tempfile.TemporaryDirectory() as folder:
        results["one random set of 256 atoms, against zarr groups"] = reading_speed(Path(folder))
    for name, r in results.items():
        print(
            f"{name}: {r['ours_ms']:.3f} ms against {r['theirs_ms']:.3f} ms,"
            f" {r['faster']:.2f} times as fast [{r['least']:.2f}, {r['most']:.2f}]"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
