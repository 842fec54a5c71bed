"""Networks on causal sets: is it a spacetime, which kind, which dimension, which curvature.

Demo on a CPU (makes its own causal sets, about a minute):
    python scripts/train_quantumgrav.py --demo

One GPU:
    accelerate launch --config_file accelerate_configs/1xgpu.yaml scripts/train_quantumgrav.py --dataset-path data/csets

Three GPUs:
    accelerate launch --config_file accelerate_configs/3xgpu.yaml scripts/train_quantumgrav.py --dataset-path data/csets
"""

import json
import logging
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.cli import RunConfig, UserError, parse, sentences

# ---------------------------------------------------------------------------------------------------------------------
# Config

TASKS = ("manifold_like", "class", "dimension", "curvature")
DEMO_SETS = 3000


@dataclass
class Config(RunConfig):
    """Train a network on causal sets. Missing labels are left out of the loss."""

    DEMO: ClassVar[dict[str, object]] = {
        "dataset_path": "data/demo/causal_sets",
        "output_dir": "runs/quantumgrav-demo",
        "epochs": 6,
        "num_workers": 0,
        "eval_every": 75,
        "transfer_path": "data/demo/causal_sets_large",
        "tracker": "none",
    }

    # shared flags with other defaults
    output_dir: Path = Path("runs/quantumgrav")
    epochs: int = 30
    batch_size: int = 64
    lr: float = 3e-3

    # data
    dataset_path: Path = Path("data/causal_sets")
    """A folder of packed causal sets, or QuantumGrav's *.zarr stores, which are converted once into <path>/packed."""
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of training, validation and test; a set and its duplicates fall into one part."""
    transfer_path: Path | None = None
    """Further sets, e.g. larger ones, on which the best model is tested at the end too."""
    baseline_sets: int = 6000
    """Training sets given to the classical baselines that the report puts beside the network; 0: none."""
    node_budget: int = 0
    """Sum of squared atom numbers per process and micro-batch, instead of --batch-size sets; 0: off."""
    time_reversal: bool = True
    """Turn half of the training sets upside down; no label changes under time reversal."""
    coarse_grain: float = 0.0
    """Remove up to this share of a training set's atoms at random; manifold-likeness and dimension survive it."""

    # model
    tasks: tuple[Literal["manifold_like", "class", "dimension", "curvature"], ...] = ("manifold_like",)
    """What to predict; one head each."""
    model: Literal["relations", "transformer", "gcn"] = "relations"
    """Message passing over links, relations and misfits; attention biased by the relation; QuantumGrav's one-layer GCN."""
    width: int = 48
    """Channels per atom."""
    layers: int = 3
    """Message-passing rounds or attention blocks."""
    heads: int = 4
    """Attention heads of the transformer."""
    dropout: float = 0.0
    """Share of the readout's features that are zeroed. This noise depends on the number of processes; nothing else does."""

    # optimization
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up before the cosine."""
    clip: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema_decay: float = 0.99
    """Decay of the averaged weights, which are what is evaluated and exported."""

    # early stopping, with QuantumGrav's meaning per task
    early_stop_metrics: tuple[str, ...] = ("loss",)
    """Validation metrics that count, e.g. loss, manifold_like/accuracy (those of losses and errors are minimised)."""
    early_stop_mode: Literal["any", "all"] = "any"
    """Whether any or all of the metrics must improve."""
    early_stop_delta: float = 0.0
    """Least change of the metric that counts as an improvement."""
    early_stop_grace: int = 0
    """Evaluations before patience may run out."""
    early_stop_initial: float | None = None
    """Score that the first evaluation has to beat."""
    early_stop_window: int = 1
    """Evaluations over which a metric is averaged first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.split) != 3 or min(self.split) <= 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"--split {self.split}: give three positive shares that add up to 1, e.g. 0.8 0.1 0.1.")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks: name each task once, from {', '.join(TASKS)}.")
        if self.model == "transformer" and self.width % self.heads:
            raise ValueError(f"--width {self.width} must be a multiple of --heads {self.heads}.")
        if not 0 <= self.coarse_grain < 1:
            raise ValueError(f"--coarse-grain is {self.coarse_grain}: give a share between 0 and 1.")
        for metric in self.early_stop_metrics:
            if metric != "loss" and metric.partition("/")[0] not in self.tasks:
                raise ValueError(
                    f"--early-stop-metrics {metric}: only loss and metrics of --tasks {' '.join(self.tasks)} exist."
                )


if __name__ == "__main__":
    CONFIG = parse(Config)  # before torch is imported: --help and typos are answered at once

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from torch import Tensor, nn

from common import data, launch, training
from common.causal_report import compare, describe, probabilities, shortcut
from common.causal_sets import Store, convert_zarr
from common.checkpoints import RunFolder
from common.demo_data.causal_sets import write
from common.logs import RunLog
from common.metrics import auc, confusion, weighted_f1

logger = logging.getLogger("run")

# ---------------------------------------------------------------------------------------------------------------------
# Data


class CausalSets(torch.utils.data.Dataset):
    """Sets of one part of the split. Keys are (epoch, index) in training, when they are augmented, else index."""

    def __init__(self, store: Store, ids: np.ndarray, config: Config):
        self.store, self.ids, self.config = store, ids, config
        self.sizes = store.sizes[ids]
        self.labels = {task: store.label(task, ids) for task in TASKS}

    def __len__(self) -> int:
        return len(self.ids)

    def counts(self, indices: np.ndarray) -> dict[str, int]:
        """How many of these sets have a label for each of --tasks, at least 1."""
        return {task: max(int(np.isfinite(self.labels[task][indices]).sum()), 1) for task in self.config.tasks}

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        sample = int(self.ids[index])
        relations = self.store.matrix(sample)
        rng = np.random.default_rng([self.config.seed, sample, 0 if epoch is None else epoch + 1])
        order = rng.permutation(len(relations))  # the stored order is that of time: positions must tell nothing
        if epoch is not None:
            if self.config.coarse_grain:
                order = order[: math.ceil(len(order) * (1 - self.config.coarse_grain * rng.random()))]
            if self.config.time_reversal and rng.random() < 0.5:
                relations = relations.T
        labels = {task: values[index] for task, values in self.labels.items()}
        return {"id": sample, "relations": relations[np.ix_(order, order)], **labels}


def collate(samples: list[dict]) -> dict[str, Tensor]:
    """Pad to the largest set of the batch. Padding atoms have no relations; `real` marks the others."""
    sizes = [len(sample["relations"]) for sample in samples]
    relations = torch.zeros(len(samples), max(sizes), max(sizes), dtype=torch.bool)
    for row, sample in zip(relations, samples, strict=True):
        n = len(sample["relations"])
        row[:n, :n] = torch.from_numpy(sample["relations"])
    batch = {"relations": relations, "sizes": torch.tensor(sizes), "id": torch.tensor([s["id"] for s in samples])}
    batch["real"] = torch.arange(max(sizes)) < batch["sizes"][:, None]
    for task in TASKS:
        batch[task] = torch.tensor([s[task] for s in samples], dtype=torch.float32)
    return batch


def split_ids(store: Store, config: Config) -> list[np.ndarray]:
    """Training, validation and test ids: a function of (seed, sample) alone. A duplicate follows its first copy."""
    count = len(store)
    _, first, group = np.unique(store.signatures, return_index=True, return_inverse=True)
    order = np.random.default_rng([config.seed, 0x5EED]).permutation(count)
    place = np.empty(count)
    place[order] = np.arange(count)
    share = (place[first][group] + 0.5) / count
    bounds = np.cumsum(config.split)[:2]
    part = np.searchsorted(bounds, share)
    ids = [np.flatnonzero(part == p) for p in range(3)]
    for name, mine in zip(("training", "validation", "test"), ids, strict=True):
        if len(mine) == 0:
            raise UserError(f"--split leaves no {name} set of {count} causal sets: change --split or use more data.")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# Model


ATOM_FEATURES, MISFIT_FEATURES = 8, 6


def relation_matrices(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Relations C, interval sizes C @ C and links, as float32: counts beyond 256 would be rounded in bfloat16."""
    with torch.autocast(batch["relations"].device.type, enabled=False):
        relations = batch["relations"].float()
        intervals = relations @ relations
        return relations, intervals, relations * (intervals == 0)


def heights(links: Tensor) -> Tensor:
    """Length of the longest chain that ends at each atom: strip the minimal atoms until none is left."""
    left = torch.ones_like(links[:, :1])
    height = torch.zeros_like(left)
    while left.any():
        left = (left @ links > 0).to(links.dtype)  # a batched product: six times as fast as einsum
        height = height + left
    return height[:, 0]


def atom_features(relations: Tensor, links: Tensor, sizes: Tensor) -> Tensor:
    """Eight numbers per atom that no relabelling changes: degrees, past, future, heights, size."""
    size = sizes[:, None].float().expand(relations.shape[:2])
    past, future = relations.sum(1), relations.sum(2)
    columns = (
        links.sum(1),
        links.sum(2),
        past.log1p(),
        future.log1p(),
        heights(links) / size.sqrt(),
        heights(links.transpose(1, 2)) / size.sqrt(),
        (past + future) / size,
        size.log(),
    )
    return torch.stack(columns, -1)


@torch.no_grad()
def misfits(relations: Tensor, links: Tensor, real: Tensor, steps: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs contradict a drawing of the set in a plane: extra pairs, missing pairs, six numbers per atom.

    In 1 + 1 dimensions two unrelated atoms have a left and a right one, and i precedes j exactly when it comes first in
    both light-cone coordinates u and v. The sides follow from the order alone: if j and k are related and neither is to
    i, both lie on the same side of i (Golumbic's forcing). So fix one pair, let each pair take the majority of the pairs
    that force it, and read u and v off: past + those to the left, past + those to the right. The relations that (u, v)
    imply and the true ones agree for a patch of any 2D spacetime or lattice, and differ where an order was tampered with.

    All of it is sums of -1, 0 and 1, exact in float32 and in TF32, so it depends on no order of atoms and no padding.
    """
    with torch.autocast(relations.device.type, enabled=False):
        related = relations + relations.transpose(1, 2)
        unrelated = (1 - related) * (real[:, :, None] & real[:, None, :])
        unrelated.diagonal(dim1=1, dim2=2).zero_()
        past, future = relations.sum(1), relations.sum(2)
        # Left and right are a convention. A hash of the atoms sets it, which a relabelling does not change.
        linked = (past[:, None] @ links)[:, 0] * 7 + (links @ future[..., None])[..., 0] * 29
        key = (past * 37 + future * 91 + linked) % 101
        forced = torch.baddbmm(unrelated @ related, related, unrelated) * unrelated  # how many pairs force each pair
        score = unrelated * (1 + 256 * forced + key[:, :, None] + key[:, None, :])
        guess = (key[:, :, None] - key[:, None, :]).sign_() * unrelated
        side = guess * (score == score.amax((1, 2), keepdim=True))  # 1: j is right of i, -1: left, 0: not known yet
        for step in range(steps):
            votes = torch.baddbmm(torch.baddbmm(side, side, related, alpha=2), related, side, alpha=2)
            side = votes.sign_() * unrelated
            if step == steps // 2:  # parts that the first pair does not reach, such as branches after a cut
                side = side + guess * (side == 0)
        agreement = torch.baddbmm(side @ related, related, side) * side
        right, left = side.clamp(min=0).sum(2), side.clamp(max=0).sum(2).neg()
        u, v = past + left, past + right
        implied = (u[:, :, None] < u[:, None, :]) & (v[:, :, None] < v[:, None, :]) & real[:, :, None] & real[:, None, :]
        extra, missing = implied * (1 - relations), relations * ~implied
        columns = [matrix.sum(axis).log1p() for matrix in (extra, missing) for axis in (1, 2)]
        columns += [(left - right).abs() / real.sum(1, keepdim=True)]  # a mirror image changes nothing
        columns += [1 - agreement.sum(2) / forced.sum(2).clamp(min=1)]
        return extra, missing, torch.stack(columns, -1)


class Readout(nn.Module):
    """Atoms to one vector per set: mean, largest and size-normalised sum over the real atoms, then the heads' trunk."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(), nn.Dropout(dropout))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        size = real.sum(1, keepdim=True).float()
        total = (x * real[..., None]).sum(1)
        largest = x.masked_fill(~real[..., None], float("-inf")).amax(1)
        return self.trunk(torch.cat([total / size, largest, total / size.sqrt()], -1))


class RelationLayer(nn.Module):
    """Message passing along links, all relations (both directions of time) and misfits: six batched matrix products."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(7 * width, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, channels: list[Tensor]) -> Tensor:
        h = self.norm(x)
        messages = torch.cat([h, *(channel @ h for channel in channels)], -1)
        return x + self.out(F.gelu(self.mix(messages)))


class RelationNet(nn.Module):
    """The default. Links are summed (their number matters), relations and misfits averaged."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Linear(ATOM_FEATURES + MISFIT_FEATURES, config.width)
        self.layers = nn.ModuleList(RelationLayer(config.width) for _ in range(config.layers))
        self.readout = Readout(config.width, config.dropout)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        relations, _, links = relation_matrices(batch)
        extra, missing, features = misfits(relations, links, batch["real"])
        x = self.embed(torch.cat([atom_features(relations, links, batch["sizes"]), features], -1))
        averaged = [relations, relations.transpose(1, 2)] + [m + m.transpose(1, 2) for m in (extra, missing)]
        averaged = [channel / channel.sum(2, keepdim=True).clamp(min=1) for channel in averaged]
        channels = [channel.to(x.dtype) for channel in (links, links.transpose(1, 2), *averaged)]
        for layer in self.layers:
            x = layer(x, channels)
        return self.readout(x.float(), batch["real"])


class AttentionLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class RelationTransformer(nn.Module):
    """Attention over all pairs with a learned bias per relation (self, past or future, link, none) and interval size."""

    BUCKETS = 8

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Linear(ATOM_FEATURES, config.width)
        self.bias = nn.Embedding(2 * self.BUCKETS + 2, config.heads)
        self.layers = nn.ModuleList(AttentionLayer(config.width, config.heads) for _ in range(config.layers))
        self.readout = Readout(config.width, config.dropout)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        relations, intervals, links = relation_matrices(batch)
        bucket = (intervals + 1).log2().long().clamp(max=self.BUCKETS - 1) + 2  # 2 is a link, 3.. ever larger intervals
        kind = bucket * relations.long()
        kind = kind + kind.transpose(1, 2) + (self.BUCKETS * relations.transpose(1, 2)).long()  # the past has its own half
        kind = kind + torch.eye(kind.shape[1], dtype=torch.long, device=kind.device)  # 0 unrelated, 1 itself
        bias = self.bias(kind).permute(0, 3, 1, 2).masked_fill(~batch["real"][:, None, None, :], float("-inf"))
        x = self.embed(atom_features(relations, links, batch["sizes"]))
        for layer in self.layers:
            x = layer(x, bias)
        return self.readout(x.float(), batch["real"])


class LinkGCN(nn.Module):
    """The example network of QuantumGrav: one graph convolution on the link degrees, along one direction, then the mean."""

    def __init__(self, config: Config):
        super().__init__()
        self.convolution, self.out = nn.Linear(2, 32), nn.Linear(32, 2 * config.width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        _, _, links = relation_matrices(batch)
        degrees = torch.stack([links.sum(1), links.sum(2)], -1)
        adjacency = links + torch.eye(links.shape[1], device=links.device)
        norm = adjacency.sum(1).rsqrt()
        mixed = norm[..., None] * (adjacency.transpose(1, 2) @ (norm[..., None] * degrees))
        x = F.relu(self.convolution(mixed)) * batch["real"][..., None]
        return self.out(x.sum(1) / batch["sizes"][:, None])


BODIES = {"relations": RelationNet, "transformer": RelationTransformer, "gcn": LinkGCN}


class CausalNet(nn.Module):
    """A body and one linear head per task. Every head takes part in every forward pass, so DDP sees no unused parameter."""

    def __init__(self, config: Config, outputs: dict[str, int]):
        super().__init__()
        self.body = BODIES[config.model](config)
        self.heads = nn.ModuleDict({task: nn.Linear(2 * config.width, size) for task, size in outputs.items()})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.body(batch)
        return {task: head(features).float() for task, head in self.heads.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: targets, losses and metrics


@dataclass
class Tasks:
    """What the labels mean: class names, the dimensions that occur, the scale of the curvature. Stored with the model."""

    names: tuple[str, ...]
    classes: tuple[str, ...]
    dimensions: tuple[float, ...]
    curvature: tuple[float, float]

    @classmethod
    def of(cls, store: Store, train: np.ndarray, names: tuple[str, ...]) -> "Tasks":
        labels = {name: store.label(name, train) for name in TASKS}
        known = {name: values[np.isfinite(values)] for name, values in labels.items()}
        for name in names:
            kinds = len(np.unique(known[name]))
            if kinds < 2:
                raise UserError(
                    f"--tasks {name}: the training sets hold {kinds} different labels, so there is nothing to learn."
                )
        curvature = known["curvature"] if len(known["curvature"]) else np.zeros(1)
        scale = (float(curvature.mean()), float(curvature.std()) or 1.0)
        return cls(tuple(names), tuple(store.classes), tuple(np.unique(known["dimension"]).tolist()), scale)

    def outputs(self) -> dict[str, int]:
        sizes = {"manifold_like": 1, "class": len(self.classes), "dimension": len(self.dimensions), "curvature": 1}
        return {name: sizes[name] for name in self.names}

    def target(self, task: str, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(target, known): a missing label is NaN, and its target 0."""
        if task == "dimension":
            match = labels[:, None] == torch.tensor(self.dimensions, device=labels.device)
            return match.float().argmax(1), match.any(1)
        known = labels.isfinite()
        if task == "curvature":
            labels = (labels - self.curvature[0]) / self.curvature[1]
        labels = torch.where(known, labels, 0.0)
        return (labels.long() if task == "class" else labels), known

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One loss per set and task, 0 where the label is missing."""
        losses = {}
        for task in self.names:
            target, known = self.target(task, batch[task])
            if task == "manifold_like":
                loss = F.binary_cross_entropy_with_logits(outputs[task][:, 0], target, reduction="none")
            elif task == "curvature":
                loss = F.mse_loss(outputs[task][:, 0], target, reduction="none")
            else:
                loss = F.cross_entropy(outputs[task], target, reduction="none")
            losses[task] = loss * known
        return losses


def metrics_of(tasks: Tasks, table: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics over a whole set, each sample once; "majority" is what always answering the commonest label would score."""
    values: dict[str, float] = {}
    total = 0.0
    for task in tasks.names:
        known = table[f"{task}/known"].astype(bool)
        target, loss = table[f"{task}/target"][known], table[f"{task}/loss"][known].astype(np.float64)
        if not len(target):
            continue
        values[f"{task}/loss"] = loss.mean()
        total += loss.mean()
        outputs = table[f"{task}/output"][known].astype(np.float64)
        if task == "curvature":
            error = (outputs[:, 0] - target) * tasks.curvature[1]
            spread = (target - target.mean()) * tasks.curvature[1]
            values[f"{task}/mae"] = np.abs(error).mean()
            values[f"{task}/r2"] = 1 - (error**2).sum() / max((spread**2).sum(), 1e-12)
            continue
        answer = probabilities(task, outputs).argmax(1)
        values[f"{task}/accuracy"] = (answer == target).mean()
        values[f"{task}/f1"] = weighted_f1(confusion(target, answer, max(outputs.shape[1], 2)))
        if task == "manifold_like":
            values[f"{task}/auc"] = auc(target, outputs[:, 0])
        values[f"{task}/majority"] = np.unique(target, return_counts=True)[1].max() / len(target)
    return {"loss": total, **{key: float(value) for key, value in values.items()}}


def standard_error(tasks: Tasks, table: dict[str, np.ndarray]) -> float:
    """Of the summed loss: of every task's mean over its labelled sets."""
    losses = [table[f"{task}/loss"][table[f"{task}/known"].astype(bool)].astype(np.float64) for task in tasks.names]
    return math.sqrt(sum(loss.var() / len(loss) for loss in losses if len(loss)))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate


@torch.no_grad()
def evaluate(model: nn.Module, tasks: Tasks, loader, accelerator) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics over the whole set, equal on every rank and for any number of processes, and the table behind them."""
    rows = []
    for batch in loader:
        batch = send_to_device(batch, accelerator.device)
        with accelerator.autocast():
            outputs = model(batch)
        losses = tasks.losses(outputs, batch)
        row = {"id": batch["id"], "size": batch["sizes"]}
        for task in tasks.names:
            target, known = tasks.target(task, batch[task])
            row |= {
                f"{task}/output": outputs[task],
                f"{task}/target": target,
                f"{task}/known": known,
                f"{task}/loss": losses[task],
            }
        rows.append(row)
    table = data.gather_samples(accelerator, rows, loader.batch_sampler.size)
    return metrics_of(tasks, table), table


# ---------------------------------------------------------------------------------------------------------------------
# Data and model for main


def try_batch(model: nn.Module, tasks: Tasks, dataset: CausalSets, count: int) -> None:
    """Forward and backward on `count` copies of the largest set: what --find-batch-size asks whether it fits."""
    largest = dataset[int(dataset.sizes.argmax())]
    batch = send_to_device(collate([largest] * count), next(model.parameters()).device)
    sum(loss.sum() for loss in tasks.losses(model(batch), batch).values()).backward()
    model.zero_grad()


def open_store(path: Path, name: str, accelerator) -> Store:
    """A store, or a folder of QuantumGrav's zarr stores, which rank 0 converts once."""
    try:
        sources = [path] if path.suffix == ".zarr" else sorted(path.glob("*.zarr"))
        if sources:
            path = path.with_suffix(".packed") if path.suffix == ".zarr" else path / "packed"
            data.made_by_main(accelerator, path, partial(convert_zarr, sources, path))
        return Store(path)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def prepare_data(config: Config, accelerator) -> tuple[Store, Store | None]:
    """The training store and the one for the transfer test. The demo makes its own, as files like anybody's."""
    if config.demo:
        make = partial(write, config.dataset_path, DEMO_SETS, seed=0, preset="zoo")
        data.made_by_main(accelerator, config.dataset_path, make)
        if config.transfer_path:
            make = partial(write, config.transfer_path, DEMO_SETS // 10, seed=1, preset="zoo", n_min=120, n_max=160)
            data.made_by_main(accelerator, config.transfer_path, make)
    store = open_store(config.dataset_path, "--dataset-path", accelerator)
    transfer = config.transfer_path and open_store(config.transfer_path, "--transfer-path", accelerator)
    if transfer and transfer.classes != store.classes:
        raise UserError(
            f"--transfer-path {config.transfer_path} has other class names than --dataset-path: convert both alike."
        )
    return store, transfer


def warn_of_shortcuts(store: Store, train: np.ndarray, tasks: Tasks) -> None:
    """One number that explains the label means that the network need not learn anything about causal sets."""
    for task in tasks.names:
        labels = store.label(task, train)
        known = np.isfinite(labels)
        if task == "curvature" or known.sum() < 200:
            continue
        for name, accuracy in shortcut(store, train[known], labels[known]).items():
            if accuracy > 0.9:
                logger.warning(
                    "Shortcut: %s alone predicts %s with accuracy %.2f; a high score will prove little", name, task, accuracy
                )


@torch.no_grad()
def misfit_totals(store: Store, ids: np.ndarray, config: Config) -> np.ndarray:
    """Misfits per set, so that the baselines can be given what the network is given: extra and missing pairs per atom, and
    the atom with most of either."""
    sets = CausalSets(store, ids, config)
    rows = []
    for start in range(0, len(sets), 64):
        batch = collate([sets[i] for i in range(start, min(start + 64, len(sets)))])
        relations, _, links = relation_matrices(batch)
        pairs = misfits(relations, links, batch["real"])[:2]
        rows.append(
            torch.stack([t for m in pairs for t in (m.sum((1, 2)) / batch["sizes"], (m.sum(1) + m.sum(2)).amax(1))], 1)
        )
    return torch.cat(rows).double().numpy()


def early_stopping(config: Config) -> training.EarlyStopping:
    rules = [
        training.Rule(
            metric=f"val/{name}",
            mode="min" if name.rpartition("/")[2] in ("loss", "mae") else "max",
            delta=config.early_stop_delta,
            grace=config.early_stop_grace,
            initial=config.early_stop_initial,
            window=config.early_stop_window,
        )
        for name in config.early_stop_metrics
    ]
    return training.EarlyStopping(rules, config.early_stop_patience, config.early_stop_mode)


MODEL_FLAGS = ("model", "width", "layers", "heads", "dropout")


def load_model(folder: Path) -> tuple[CausalNet, Tasks, dict]:
    """The exported model of a run: what `model/` holds. Used by predict_quantumgrav.py."""
    saved = json.loads((folder / "config.json").read_text())
    tasks = Tasks(**{key: tuple(value) for key, value in saved["tasks"].items()})
    model = CausalNet(Config(**saved["config"]), tasks.outputs())
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), tasks, saved


# ---------------------------------------------------------------------------------------------------------------------
# Main


def main(config: Config) -> None:
    accelerator = launch.start(config)
    store, transfer = prepare_data(config, accelerator)
    parts = [CausalSets(store, ids, config) for ids in split_ids(store, config)]
    train_set, val_set, test_set = parts
    tasks = Tasks.of(store, train_set.ids, config.tasks)

    def build() -> nn.Module:
        torch.manual_seed(config.seed)  # the same weights on every rank
        return CausalNet(config, tasks.outputs())

    # Time goes with the atoms, memory with their squares. Of 2, 3 and 8 processes with 32 sets of 40 to 80 atoms the slowest
    # took 50, 49, 47 ms for a step when atoms were dealt evenly, 58, 59, 55 by atoms squared, 61, 60, 61 by sets.
    cost = train_set.sizes.astype(np.float64) ** (2 if config.node_budget else 1)
    if config.find_batch_size:
        training.find_batch_size(accelerator, config, partial(try_batch, build().to(accelerator.device), tasks, train_set))
    budget = float(config.node_budget) or None
    sampler = data.StepSampler(len(train_set), config, accelerator, costs=cost, budget=budget)
    contents = [np.append(store.signatures[part.ids], np.uint64(0)) for part in parts]  # which sets, not just which numbers
    split_hash = data.fingerprint(np.concatenate(contents))
    folder = RunFolder(
        config, accelerator, {"samples per step": sampler.size_of_step, "seed": config.seed, "data split": split_hash}
    )
    if folder.finished(sampler.total_steps):
        logger.info("%s has reached its end already: nothing to do", config.output_dir)
        accelerator.end_training()
        return
    folder.describe()

    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    raw = accelerator.unwrap_model(model)
    ema = training.EMA(raw, config.ema_decay)
    guard = training.FiniteGuard(raw, config.max_skipped_steps, accelerator.scaler)
    stopper = early_stopping(config)
    modules, optimizers = {"model": raw, "ema": ema.module}, {"optimizer": optimizer}

    state = {"step": 0, "evaluated": 0, "ended": False}
    if found := folder.resume(modules, optimizers):
        state = found
        guard.load_state_dict(state["guard"])
        stopper.load_state_dict(state["stopper"])
    step = sampler.start = state["step"]
    saved = (step, state["evaluated"])
    log = RunLog(config, accelerator, project="quantumgrav", step=step, total_steps=sampler.total_steps, unit="sets")
    logger.info(
        "Data split complete: training %s validation %s test %s, split %s", *(f"{len(p):,}" for p in parts), split_hash
    )
    warn_of_shortcuts(store, train_set.ids, tasks)
    logger.info(
        "%d processes x batch %s x accumulation %d = %s sets per step, %d steps per epoch, %d in all; %s parameters",
        accelerator.num_processes, config.batch_size, config.accumulation_steps, sampler.size_of_step,
        sampler.steps_per_epoch, sampler.total_steps, f"{sum(p.numel() for p in raw.parameters()):,}",
    )  # fmt: skip

    def eval_loader(part: CausalSets, batches: int | None = None) -> torch.utils.data.DataLoader:
        size = min(config.batch_size, 64) if config.node_budget else config.batch_size
        dealt = data.EvalSampler(len(part), size, accelerator, costs=part.sizes, batches=batches)
        return data.make_loader(part, dealt, config, collate)

    def export() -> None:
        flags = {name: getattr(config, name) for name in MODEL_FLAGS}
        folder.export(ema.module, {"config": flags, "tasks": vars(tasks), "step": step})

    val_loader = eval_loader(val_set)
    evaluate(ema.module, tasks, eval_loader(val_set, batches=2), accelerator)  # a wrong shape or metric surfaces now
    steps = data.StepLoader(data.make_loader(train_set, sampler, config, collate), accelerator)
    eval_every = config.eval_every or sampler.steps_per_epoch
    save_every = config.save_every or sampler.steps_per_epoch
    stopping = False
    parameters = list(raw.parameters())  # once: the walk through the modules takes 0.1 to 0.4 ms

    while True:
        # ---- once in a while: evaluate, save, stop
        epoch = (step - 1) // sampler.steps_per_epoch
        last = step == sampler.total_steps
        better, score = False, None
        if step > state["evaluated"] and (step % eval_every == 0 or last) and not stopping:
            ema.share_buffers()
            values, table = evaluate(ema.module, tasks, val_loader, accelerator)
            log.evaluation(step, epoch, {f"val/{name}": value for name, value in values.items()})
            logger.info("Validation: loss=%.3f ± %.3f", values["loss"], standard_error(tasks, table))
            better, state["ended"] = stopper.update(accelerator, {f"val/{name}": value for name, value in values.items()})
            rule = stopper.rules[0]
            score = values[rule.metric.removeprefix("val/")] * (1 if rule.mode == "max" else -1)
            state["evaluated"] = step
            if better:
                logger.info("Found better model at epoch %d.", epoch)
                export()
            stopping = training.agree_to_stop(accelerator)
        due = step % save_every == 0 or last or stopping or better or state["ended"] or folder.wants(state, score)
        if due and saved != (step, state["evaluated"]):
            saved = (step, state["evaluated"])
            logger.info("Saving checkpoint at step %d.", step)
            log.sync()
            state |= {"step": step, "guard": guard.state_dict(), "stopper": stopper.state_dict()}
            folder.save(state, modules, optimizers, score=score, best=better)
            log.resume_clock(step, steps.waited)
        if stopping or last or state["ended"]:
            break

        # ---- one optimizer step
        if step % sampler.steps_per_epoch == 0:
            logger.info("Starting training epoch %d.", step // sampler.steps_per_epoch)
        training.set_lr(optimizer, config.lr * training.cosine(step, sampler.total_steps, warmup=config.warmup_steps))
        batches = next(steps)
        counts = train_set.counts(sampler.global_batch(step))  # one denominator for the global batch
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            training.seed_step(config.seed, step, micro, accelerator.process_index)
            with accelerator.accumulate(model):
                terms = tasks.losses(model(batch), batch)
                terms = {name: term.sum() / counts[name] for name, term in terms.items()}
                loss = sum(terms.values())
                accelerator.backward(loss * sampler.parts)  # undoes DDP's mean and the division by accumulation
            training.add(totals, {"loss": loss, **terms})
        norm = accelerator.clip_grad_norm_(parameters, config.clip)
        verdict = training.agree(accelerator, totals, norm)
        finite = guard.passes(verdict, step + 1)
        if finite or accelerator.scaler:  # the fp16 scaler skips by itself, and must see the step to lower its scale
            optimizer.step()
        if finite:
            ema.update(step)
        optimizer.optimizer.zero_grad()  # accelerate's own inspects its signature in every step, 0.1 ms
        step += 1
        stopping = verdict.stop
        if step % config.log_every == 0 or step == sampler.total_steps:
            values = {
                **verdict.terms,
                "grad_norm": verdict.grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                "skipped": guard.total,
            }
            perf = dict(zip(("padding_waste", "imbalance"), sampler.balance(step - 1), strict=True))
            samples = len(sampler.global_batch(step - 1))
            log.train(step, (step - 1) // sampler.steps_per_epoch, values, samples=samples, waited=steps.waited, perf=perf)
        if step % sampler.steps_per_epoch == 0:
            training.check_replicas(accelerator, raw, f"after step {step}")

    if stopping and not last:
        logger.info("Stopped by a signal at step %d; continue with --resume-from auto", step)
        log.close()
        return

    logger.info("Training process completed. Starting testing phase.")
    if "best" not in state:
        logger.warning("No evaluation was better than --early-stop-initial: testing the last averaged weights")
        export()
    ema.module.load_state_dict(folder.exported())
    sets = {"test": test_set}
    if transfer:
        sets["transfer"] = CausalSets(transfer, np.arange(len(transfer)), config)
    results = {name: evaluate(ema.module, tasks, eval_loader(part), accelerator) for name, part in sets.items()}
    for name, (values, _) in results.items():
        prefix = "test" if name == "test" else f"test/{name}"
        log.evaluation(step, epoch, {f"{prefix}/{key}": value for key, value in values.items()})
    if accelerator.is_main_process:  # no collective from here on: the others may leave
        for name, (_, table) in results.items():
            describe(tasks, table, sets[name].store, config.output_dir, name)
        scores = {name: values for name, (values, _) in results.items()}
        further = partial(misfit_totals, store, config=config)
        summary = compare(
            tasks.names, store, train_set.ids, test_set.ids, scores, config.baseline_sets, config.seed, further
        )
        (config.output_dir / "report.txt").write_text(summary + "\n")
        logger.info("Testing phase completed, see %s and its samples:\n%s", config.output_dir / "report.txt", summary)
        for picture in sorted((config.output_dir / "samples").glob("*.png")):
            log.image(picture.stem, picture, step)
    folder.finish(step, sampler.total_steps)
    log.close()


if __name__ == "__main__":
    with sentences():
        main(CONFIG)
