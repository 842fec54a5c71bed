"""Causal sets: a compact store on disk, a check that a set is one, and the classical observables of the field.

A causal set of N elements is a strict partial order, held as a boolean matrix C with C[i, j] true when i precedes j.
C is transitively closed, and the stores keep the elements in a linear extension, so C is strictly upper triangular.
That stored order carries information (the generators sort by time): shuffle the elements before a network sees them.

Everything here is numpy. Counts go through float32 matrix products, exact up to 2^24 and 40 times faster than integer
products, which have no BLAS (measured at N = 256: 0.33 against 13.6 ms).

A store is a directory. 100,000 sets of 256 elements take 0.8 GB, and reading a random one takes 0.04 ms (as zarr
groups of QuantumGrav: 1.9 million files and 10 ms a read):

    relations.bin      C of every set, one after another, each row packed to ceil(N / 8) bytes by np.packbits
    offsets.npy        int64 (count + 1), where each set starts in relations.bin, in bytes
    sizes.npy          int32 (count), N of each set
    signatures.npy     uint64 (count), equal for sets that differ only in how their elements are numbered
    label_<name>.npy   one array per label: int64 with -1 for missing, or float64 with NaN for missing
    meta.json          format, count, class names, label names, where the sets come from, sha256 of relations.bin
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from common.files import made_whole

FORMAT = 1

# QuantumGrav's `cset_type` is 1 + the position in this tuple.
QUANTUMGRAV_CLASSES = (
    "polynomial",
    "complex_topology",
    "destroyed",
    "merged",
    "grid",
    "layered",
    "random",
    "merged_ambiguous",
    "destroyed_ambiguous",
)

# ---------------------------------------------------------------------------------------------------------------------
# Orders


def closure(relation: np.ndarray) -> np.ndarray:
    """The transitive closure: squares until nothing is new, so about log2(longest chain) matrix products."""
    closed = relation.astype(np.float32)
    while True:
        longer = np.minimum(closed + closed @ closed, 1)
        if np.array_equal(longer, closed):
            return closed.astype(bool)
        closed = longer


def intervals(C: np.ndarray) -> np.ndarray:
    """int32 (N, N): how many elements lie strictly between i and j. Zero where i does not precede j."""
    relation = C.astype(np.float32)
    return (relation @ relation).astype(np.int32)


def links(C: np.ndarray) -> np.ndarray:
    """The transitive reduction (Hasse diagram) of a closed relation: the related pairs with nothing in between."""
    return C & (intervals(C) == 0)


def heights(C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longest chain, counted in steps, that ends at each element (from below) and that starts at it (from above).

    Works on any acyclic relation, closed or not. On a cyclic one the count stops at N, which no order reaches.
    """

    def depth(relation: np.ndarray) -> np.ndarray:
        reached = np.ones(len(C), np.float32)
        total = np.zeros(len(C), np.int64)
        # After k rounds `reached` marks the elements at the top of a chain of k steps; a chain has at most N - 1.
        for _ in range(len(C)):
            reached = (reached @ relation > 0).astype(np.float32)
            if not reached.any():
                break
            total += reached > 0
        return total

    relation = C.astype(np.float32)
    return depth(relation), depth(relation.T)


def problem(matrix: np.ndarray, links: np.ndarray | None = None) -> str | None:
    """Why this matrix (or these links) is not a strict partial order, or None. The part before ':' names the kind."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        return f"not square: the shape is {matrix.shape}"
    if len(matrix) == 0:
        return "empty: the set has no elements"
    C = matrix.astype(bool)
    if C.diagonal().any():
        return f"diagonal set: element {C.diagonal().argmax()} precedes itself"
    # One triangle alone cannot hold a cycle, and that is the common case.
    if np.triu(C).any() and np.tril(C).any():
        looping = heights(C)[0] == len(C)
        if looping.any():
            return f"cyclic: element {looping.argmax()} lies on or after a cycle"
    between = intervals(C)
    missing = (between > 0) & ~C
    if missing.any():
        i, k = np.argwhere(missing)[0]
        j = (C[i] & C[:, k]).argmax()
        return f"not transitive: {i} precedes {j} and {j} precedes {k}, but {i} does not precede {k}"
    if links is not None:
        if links.shape != C.shape:
            return f"wrong links: their shape is {links.shape}, that of the relation is {C.shape}"
        wrong = links.astype(bool) != (C & (between == 0))
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            return f"wrong links: the entry {i}, {j} differs from the transitive reduction"
    return None


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64), so that sums of them rarely collide."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def signature(C: np.ndarray) -> bytes:
    """16 bytes that do not depend on how the elements are numbered: equal sets, equal signatures.

    Each element starts from its counts (past, future, links, heights, elements in the intervals it bounds) and is then
    refined three times by the multiset of its neighbours, as in Weisfeiler and Leman's test. Different sets could
    share a signature only if that test cannot tell them apart, or by a 64-bit accident.
    """
    C = C.astype(bool)
    between = intervals(C)
    hasse = C & (between == 0)
    counts = [C.sum(0), C.sum(1), hasse.sum(0), hasse.sum(1), *heights(C), between.sum(0), between.sum(1)]
    element = np.zeros(len(C), np.uint64)
    for count in counts:
        element = _mix(element + count.astype(np.uint64))
    neighbours = [matrix.astype(np.uint64) for matrix in (C.T, C, hasse.T, hasse)]
    for _ in range(3):
        views = [matrix @ element for matrix in neighbours]
        for view in views:
            element = _mix(element + view)
    histogram = np.bincount(between[C]).astype(np.int64)
    digest = hashlib.blake2b(np.sort(element).tobytes(), digest_size=16)
    digest.update(histogram.tobytes())
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Observables: numbers a physicist computes before training anything. A network has to beat these.

_INTERVALS, _DEGREES, _SPECTRUM = 12, 16, 17
_DIMENSIONS = np.linspace(1, 10, 1801)
# E[ordering fraction] = 2 f(d) in an interval of d-dimensional Minkowski space, falling from 1 (a chain).
_LOGS = [math.lgamma(d + 1) + math.lgamma(d / 2) - math.lgamma(1.5 * d) for d in _DIMENSIONS]
_FRACTIONS = np.exp(_LOGS) / 2

OBSERVABLE_GROUPS: dict[str, tuple[str, ...]] = {
    "ordering_fraction": ("log_size", "ordering_fraction"),
    "dimension": ("myrheim_meyer_dimension", "midpoint_dimension"),
    "chains": ("height", "mean_height", "links_per_element", "minimal_fraction", "maximal_fraction"),
    "intervals": tuple(f"interval_{k}" for k in range(_INTERVALS)),
    "degrees": tuple(f"degree_{k}" for k in range(_DEGREES)),
    "spectrum": tuple(f"spectrum_{k}" for k in range(_SPECTRUM)),
}
OBSERVABLES: tuple[str, ...] = tuple(name for group in OBSERVABLE_GROUPS.values() for name in group)
OBSERVABLE_GROUPS["all"] = OBSERVABLES


def ordering_fraction(C: np.ndarray) -> float:
    """The share of pairs that are related (Myrheim 1978, CERN TH-2538)."""
    n = len(C)
    return 2 * np.count_nonzero(C) / max(n * (n - 1), 1)


def myrheim_meyer_dimension(C: np.ndarray) -> float:
    """The dimension whose Minkowski interval has this ordering fraction (Meyer, PhD thesis, MIT 1988), from 1 to 10.

    Unbiased only for a sprinkling into one causal interval: in a box it reads 2.7 for d = 3 and 3.3 for d = 4.
    """
    return float(np.interp(ordering_fraction(C), _FRACTIONS[::-1], _DIMENSIONS[::-1]))


def midpoint_dimension(C: np.ndarray) -> float:
    """log2(N / M), M the size of the smaller half at the best midpoint (Bombelli, PhD thesis, Syracuse 1987).

    In d dimensions halving the proper time divides the volume by 2^d. Biased upwards for small sets.
    """
    half = np.minimum(C.sum(0), C.sum(1)).max()
    return math.log2(len(C) / max(half, 1))


def interval_abundances(C: np.ndarray, between: np.ndarray | None = None) -> np.ndarray:
    """The share of related pairs with 0, 1, ... 11 elements in between (Glaser and Surya 2013, arXiv:1309.3403)."""
    between = intervals(C) if between is None else between
    counts = np.bincount(between[C], minlength=_INTERVALS)
    return counts[:_INTERVALS] / max(counts.sum(), 1)


def laplacian_spectrum(hasse: np.ndarray) -> np.ndarray:
    """Eigenvalues of the normalised Laplacian of the symmetrised Hasse diagram, all between 0 and 2 (Chung 1997).

    With link degrees and interval abundances this separates classes of causal sets (arXiv:2605.27514). An element
    without links counts as a component of its own, eigenvalue 0.
    """
    graph = (hasse | hasse.T).astype(np.float64)
    degree = graph.sum(0)
    scale = 1 / np.sqrt(np.maximum(degree, 1))
    return np.linalg.eigvalsh(np.diag((degree > 0).astype(float)) - scale[:, None] * graph * scale)


def observables(C: np.ndarray) -> dict[str, float]:
    """Every observable of one set by name, in the order of OBSERVABLES. 0.4 ms at N = 60, 3.5 ms at N = 256."""
    return dict(zip(OBSERVABLES, _observable_row(C).tolist(), strict=True))


def _observable_row(C: np.ndarray) -> np.ndarray:
    n = len(C)
    between = intervals(C)
    hasse = C & (between == 0)
    past, future = C.sum(0), C.sum(1)
    below = heights(C)[0]
    degrees = np.minimum(hasse.sum(0) + hasse.sum(1), _DEGREES - 1)
    # 0, 1 and 2 sit in the middle of a bin: 1 is a frequent and multiple eigenvalue, and on an edge it would fall to
    # either side with the rounding.
    spectrum = np.histogram(laplacian_spectrum(hasse), bins=_SPECTRUM, range=(-1 / 16, 2 + 1 / 16))[0]
    return np.concatenate(
        [
            [math.log(n), ordering_fraction(C), myrheim_meyer_dimension(C), midpoint_dimension(C)],
            # The longest chain of a d-dimensional interval grows as N^(1/d) (Brightwell and Gregory 1991).
            [math.log(below.max() + 1) / math.log(n + 1), below.mean() / (below.max() + 1)],
            [hasse.sum() / n, np.count_nonzero(past == 0) / n, np.count_nonzero(future == 0) / n],
            interval_abundances(C, between),
            np.bincount(degrees, minlength=_DEGREES) / n,
            spectrum / n,
        ]
    )


def observable_table(
    store: Store, indices: Sequence[int] | None = None, *, workers: int = 0, progress: bool = True
) -> tuple[tuple[str, ...], np.ndarray]:
    """The observables of many sets of a store: their names and a float64 array (sets, observables)."""
    indices = range(len(store)) if indices is None else [int(i) for i in indices]
    rows = _ordered_map(partial(_stored_row, store), indices, workers, progress, "observables")
    return OBSERVABLES, np.array(list(rows)).reshape(len(indices), len(OBSERVABLES))


def _stored_row(store: Store, index: int) -> np.ndarray:
    return _observable_row(store.matrix(index))


# ---------------------------------------------------------------------------------------------------------------------
# The store

_TREE = """{path}/
    relations.bin  offsets.npy  sizes.npy  signatures.npy  label_<name>.npy ...  meta.json"""


class Store:
    """Random access to the causal sets of a directory. Safe to fork, and to pickle: only the path travels."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        if not (self.path / "meta.json").is_file():
            what = "is not a finished store" if self.path.exists() else "does not exist"
            raise ValueError(
                f"{path} {what}: expected the tree below, which `python -m common.demo_data.causal_sets --out {path}` "
                f"makes from nothing and common.causal_sets.convert_zarr makes from QuantumGrav's zarr files.\n"
                + _TREE.format(path=path)
            )
        self.meta: dict = json.loads((self.path / "meta.json").read_text())
        if self.meta["format"] != FORMAT:
            raise ValueError(f"{path} has format {self.meta['format']}, this code reads {FORMAT}: make it again.")
        files = [
            "relations.bin",
            "offsets.npy",
            "sizes.npy",
            "signatures.npy",
            *(f"label_{name}.npy" for name in self.meta["labels"]),
        ]
        absent = [name for name in files if not (self.path / name).is_file()]
        if absent:
            raise ValueError(f"{path} is damaged, {absent[0]} is missing: copy it again or make it again.")
        self.classes: tuple[str, ...] = tuple(self.meta["classes"])
        self.sizes: np.ndarray = np.load(self.path / "sizes.npy")
        self.signatures: np.ndarray = np.load(self.path / "signatures.npy")
        self.labels: dict[str, np.ndarray] = {n: np.load(self.path / f"label_{n}.npy") for n in self.meta["labels"]}
        self._offsets = np.load(self.path / "offsets.npy")
        self._bytes: np.ndarray | None = None
        written, expected = (self.path / "relations.bin").stat().st_size, int(self._offsets[-1])
        if written != expected:
            raise ValueError(
                f"{path} is damaged, relations.bin has {written} bytes instead of {expected}: copy it again or make "
                "it again."
            )
        lengths = {len(self._offsets) - 1, len(self.sizes), len(self.signatures), *map(len, self.labels.values())}
        if lengths != {self.meta["count"]}:
            raise ValueError(
                f"{path} is damaged, its arrays differ in length ({sorted(lengths)} for {self.meta['count']} sets): "
                "copy it again or make it again."
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self):
        return Store, (self.path,)

    def label(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float64, NaN where there is none; a store may have a negative number there, but for a curvature."""
        labels = self.labels.get(name, np.full(len(self), np.nan))[ids].astype(np.float64)
        return labels if name == "curvature" else np.where(labels >= 0, labels, np.nan)

    def packed(self, index: int) -> np.ndarray:
        """uint8 (N, ceil(N / 8)): a read-only view of the file."""
        if self._bytes is None:  # opened late, so that the store can be handed to workers for nothing
            self._bytes = np.asarray(np.memmap(self.path / "relations.bin", np.uint8, mode="r"))
        index = range(len(self))[index]  # IndexError past the end, as a sequence has it
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].reshape(int(self.sizes[index]), -1)

    def matrix(self, index: int) -> np.ndarray:
        """bool (N, N): a fresh copy, entry i, j true when i precedes j."""
        packed = self.packed(index)
        return np.unpackbits(packed, axis=1, count=len(packed)).view(bool)


class StoreWriter:
    """Writes a store one set at a time, in memory that does not grow with the size of the sets.

    Everything goes into a hidden directory beside the destination, renamed when the `with` block ends well: a run that
    was killed leaves nothing that looks like a store.
    """

    def __init__(self, path: str | Path, *, classes: Sequence[str] = (), source: dict | None = None):
        self.path = Path(path).absolute()
        self.classes = tuple(classes)
        self.source = source or {}
        if self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise ValueError(f"{path} exists already: choose another path or delete it first.")
        self._sizes: list[int] = []
        self._signatures: list[int] = []
        self._labels: dict[str, list] = {}

    def __enter__(self) -> StoreWriter:
        self._open = ExitStack()
        self._folder = self._open.enter_context(made_whole(self.path))
        self._file = self._open.enter_context(open(self._folder / "relations.bin", "wb"))
        self._hash = hashlib.sha256()
        return self

    def append(self, matrix: np.ndarray, labels: dict[str, int | float] | None = None) -> None:
        """Add one set. A label left out of `labels` counts as missing for this set."""
        self.append_packed(*_packed(matrix), labels)

    def append_packed(self, packed: np.ndarray, signature: int, labels: dict[str, int | float] | None = None) -> None:
        data = packed.tobytes()
        self._file.write(data)
        self._hash.update(data)
        for name, value in (labels or {}).items():
            # A label first seen now was missing from all the sets before.
            self._labels.setdefault(name, [None] * len(self._sizes)).append(value)
        self._sizes.append(len(packed))
        self._signatures.append(signature)
        for column in self._labels.values():
            column.extend([None] * (len(self._sizes) - len(column)))

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self._open.__exit__(kind, error, traceback)
            return
        with self._open:
            self._finish()

    def _finish(self) -> None:
        if not self._sizes:
            raise ValueError(f"no causal set was written to {self.path}: a store holds at least one.")
        self._file.flush()
        os.fsync(self._file.fileno())
        sizes = np.array(self._sizes, np.int64)
        np.save(self._folder / "offsets.npy", np.concatenate([[0], np.cumsum(sizes * -(-sizes // 8))]))
        np.save(self._folder / "sizes.npy", sizes.astype(np.int32))
        np.save(self._folder / "signatures.npy", np.array(self._signatures, np.uint64))
        for name, column in self._labels.items():
            np.save(self._folder / f"label_{name}.npy", _label_array(column))
        meta = {
            "format": FORMAT,
            "count": len(sizes),
            "classes": self.classes,
            "labels": sorted(self._labels),
            "source": self.source,
            "sha256": self._hash.hexdigest(),
        }
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _label_array(column: list) -> np.ndarray:
    if any(isinstance(value, (float, np.floating)) for value in column):
        return np.array([math.nan if value is None else value for value in column], np.float64)
    return np.array([-1 if value is None else value for value in column], np.int64)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """For processes started inside: W workers with a BLAS pool as wide as the machine each would fight over it."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _ordered_map(function: Callable, indices: Sequence[int], workers: int, progress: bool, title: str) -> Iterator:
    """function(i) for each index, in order, whatever the number of worker processes."""
    from tqdm import tqdm

    bar = partial(tqdm, total=len(indices), desc=title, unit=" sets", disable=not progress)
    if workers == 0:
        yield from bar(map(function, indices))
        return
    # Spawned, not forked: the caller may hold CUDA or BLAS threads, which do not survive a fork.
    with _one_blas_thread():
        pool = multiprocessing.get_context("spawn").Pool(workers)
    with pool:
        yield from bar(pool.imap(function, indices, chunksize=64))


def create(
    path: str | Path,
    make: Callable[[int], tuple[np.ndarray, dict[str, int | float]]],
    count: int,
    *,
    classes: Sequence[str] = (),
    source: dict | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Store:
    """Fill a store from `make(index) -> (matrix, labels)`. The files are the same for any number of workers.

    `make` has to be picklable when there are workers: a function of a module, or a functools.partial of one.
    """
    with StoreWriter(path, classes=classes, source=source) as writer:
        for packed, mark, labels in _ordered_map(partial(_made, make), range(count), workers, progress, "generate"):
            writer.append_packed(packed, mark, labels)
    return Store(path)


def _packed(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    # 64 bits of the signature will do: a million different sets collide with a chance of 3e-8.
    return np.packbits(matrix, axis=1), int.from_bytes(signature(matrix)[:8], "little")


def _made(make: Callable, index: int) -> tuple[np.ndarray, int, dict]:
    matrix, labels = make(index)  # packed in the worker: an eighth of the bytes to send
    return *_packed(matrix), labels


# ---------------------------------------------------------------------------------------------------------------------
# QuantumGrav's zarr stores


def convert_zarr(
    sources: str | Path | Iterable[str | Path], destination: str | Path, progress: bool = True
) -> dict[str, list[str]]:
    """Convert zarr stores written by QuantumGrav.jl into one store, and return the sets left out, by reason.

    A source is one zarr directory with the groups cset_1, cset_2, ... or a folder of such directories. `adj` is needed
    in each group; `linkmat` is checked where it exists; `cset_type`, `manifold_like`, `dimension` and the Ricci scalar
    become labels where they exist. A set that is no strict partial order is left out and reported; a diagonal that is
    set is an error of the data (QuantumGrav's is zero), so it is reported, not cleared.
    """
    from tqdm import tqdm

    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    groups = [group for source in sources for group in _zarr_groups(Path(source))]
    if not groups:
        raise ValueError(
            f"no causal set found under {', '.join(map(str, sources))}: expected groups cset_1, cset_2, ... as "
            "QuantumGrav writes them, or a folder of *.zarr directories that hold them."
        )
    bad: dict[str, list[str]] = {}
    source = {"zarr": [str(path) for path in sources], "left_out": bad}
    with StoreWriter(destination, classes=QUANTUMGRAV_CLASSES, source=source) as writer:
        for group in tqdm(groups, desc="convert", unit=" sets", disable=not progress):
            matrix, labels, trouble = _read_zarr_group(group)
            if trouble is None:
                writer.append(matrix, labels)
            else:
                kind, _, detail = trouble.partition(": ")
                bad.setdefault(kind, []).append(f"{group.parent.name}/{group.name} ({detail})")
        report = [f"{len(groups)} causal sets read, {len(groups) - sum(map(len, bad.values()))} kept"]
        report += [f"  {len(names)} left out, {kind}: {'; '.join(names[:3])}" for kind, names in bad.items()]
        if len(groups) == sum(map(len, bad.values())):
            raise ValueError("none of the sets is a causal set, so nothing was converted.\n" + "\n".join(report))
    print("\n".join(report), file=sys.stderr)
    return bad


def _zarr_groups(source: Path) -> list[Path]:
    """The cset_* directories of a zarr store, or of the zarr stores in a folder, in numeric order."""

    def numbered(folder: Path) -> list[Path]:
        found = [path for path in folder.glob("cset_*") if path.name[5:].isdigit() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    if not source.is_dir():
        raise ValueError(f"{source} is not a directory: give a zarr directory store or a folder of them.")
    return numbered(source) or [g for folder in sorted(source.iterdir()) if folder.is_dir() for g in numbered(folder)]


def _read_zarr_group(group: Path) -> tuple[np.ndarray | None, dict, str | None]:
    """(matrix, labels, None) of one group, or (None, {}, why not)."""
    import zarr

    # Each array is opened by its own path: QuantumGrav does not promise a root group, and it skips two lookups.
    def read(name: str) -> np.ndarray | None:
        return zarr.open_array(group / name, mode="r")[...] if (group / name).is_dir() else None

    matrix, hasse = read("adj"), read("linkmat")
    if matrix is None:
        return None, {}, f"no adj: the group holds {sorted(p.name for p in group.iterdir())}"
    matrix = matrix.astype(bool)
    if matrix.ndim == 2 and not matrix.any():
        # A chunk that was never written reads as zeros, and an order without any relation says nothing anyway.
        return None, {}, f"no relation: adj of shape {matrix.shape} is all zero"
    # Julia is column-major, so its arrays arrive here transposed. QuantumGrav sorts by time, so an upper triangular
    # matrix is one that somebody has turned back already.
    if np.tril(matrix, -1).any():
        matrix, hasse = matrix.T, None if hasse is None else hasse.T
    trouble = problem(matrix, hasse)
    if trouble is not None:
        return None, {}, trouble
    if np.tril(matrix).any():  # not time-sorted: i before j has the smaller past, so the size of the past is an order
        order = np.argsort(matrix.sum(0), kind="stable")
        matrix = matrix[np.ix_(order, order)]
    labels: dict[str, int | float] = {}
    kinds = {"cset_type": "class", "manifold_like": "manifold_like", "dimension": "dimension"}
    for name, label in {**kinds, "ricci_scalar": "curvature", "ricci_scalars": "curvature"}.items():
        value = read(name)
        if value is not None:
            labels[label] = float(value.mean()) if label in ("dimension", "curvature") else int(value.flat[0])
    if "class" in labels:
        labels["class"] -= 1
        if not 0 <= labels["class"] < len(QUANTUMGRAV_CLASSES):
            return None, {}, f"unknown class: cset_type is {labels['class'] + 1}, expected 1 to 9"
    return matrix, labels, None
