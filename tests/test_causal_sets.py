"""Causal sets: the orders are orders, the formulas are right, the store is what it says, and bad data is named."""

import math
import multiprocessing
import pickle
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common import causal_sets
from common.causal_sets import Store, StoreWriter
from common.demo_data import causal_sets as generator

ROOT = Path(__file__).resolve().parents[1]


def sample(name: str, count: int, size: int | tuple[int, int] = (40, 80), seed: int = 0, **settings) -> list:
    low, high = (size, size) if isinstance(size, int) else size
    make = partial(generator.make_set, seed=seed, preset=name, n_min=low, n_max=high, **settings)
    return [make(index) for index in range(count)]


def random_dag(n: int, probability: float, seed: int = 0) -> np.ndarray:
    return np.triu(np.random.default_rng(seed).random((n, n)) < probability, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def test_closure_links_and_heights_agree_with_paths_followed_one_by_one():
    dag = random_dag(30, 0.12)
    reach, longest = dag.copy(), np.where(dag, 1, 0)
    for k in range(30):  # Warshall for the closure, the same loop with max-plus for the longest chain
        reach |= reach[:, k : k + 1] & reach[k]
        joined = (longest[:, k : k + 1] > 0) & (longest[k] > 0)
        longest = np.where(joined, np.maximum(longest, longest[:, k : k + 1] + longest[k]), longest)
    C = causal_sets.closure(dag)
    assert np.array_equal(C, reach)
    hasse = causal_sets.links(C)
    assert np.array_equal(causal_sets.closure(hasse), C)
    for i, j in np.argwhere(hasse):  # a reduction has no link to spare
        fewer = hasse.copy()
        fewer[i, j] = False
        assert not causal_sets.closure(fewer)[i, j]
    below, above = causal_sets.heights(C)
    assert np.array_equal(below, longest.max(0)) and np.array_equal(above, longest.max(1))
    assert np.array_equal(causal_sets.heights(dag)[0], below)  # the relation need not be closed
    assert causal_sets.intervals(C)[C].tolist() == [(C[i] & C[:, j]).sum() for i, j in np.argwhere(C)]


def test_problem_names_what_is_wrong():
    chain = np.triu(np.ones((5, 5), bool), 1)
    assert causal_sets.problem(chain) is None
    assert causal_sets.problem(chain, causal_sets.links(chain)) is None
    assert causal_sets.problem(np.zeros((3, 3))) is None  # an antichain is an order
    assert causal_sets.problem(chain[:, :4]).startswith("not square: ")
    assert causal_sets.problem(np.zeros((0, 0))).startswith("empty: ")
    reflexive = chain.copy()
    reflexive[2, 2] = True
    assert causal_sets.problem(reflexive) == "diagonal set: element 2 precedes itself"
    ring = np.zeros((6, 6), bool)
    ring[[1, 3, 4], [3, 4, 1]] = True
    assert causal_sets.problem(ring).startswith("cyclic: element ")
    gap = chain.copy()
    gap[1, 3] = False
    assert causal_sets.problem(gap) == "not transitive: 1 precedes 2 and 2 precedes 3, but 1 does not precede 3"
    wrong = causal_sets.links(chain)
    wrong[0, 4] = True
    assert causal_sets.problem(chain, wrong).startswith("wrong links: the entry 0, 4")
    # The order of the elements does not matter to the check.
    shuffle = np.random.default_rng(0).permutation(5)
    assert causal_sets.problem(chain[np.ix_(shuffle, shuffle)]) is None
    assert causal_sets.problem(gap[np.ix_(shuffle, shuffle)]).startswith("not transitive: ")


@pytest.mark.parametrize("name", generator.CLASSES)
def test_signature_and_observables_do_not_depend_on_the_numbering(name):
    rng = np.random.default_rng(0)
    sets = [C for C, _ in sample(name, 6, 40)]
    for C in sets:
        shuffle = rng.permutation(len(C))
        shuffled = C[np.ix_(shuffle, shuffle)]
        assert causal_sets.signature(shuffled) == causal_sets.signature(C)
        one, other = causal_sets.observables(C), causal_sets.observables(shuffled)
        assert np.allclose(list(one.values()), list(other.values()), atol=1e-12)
    assert len({causal_sets.signature(C) for C in sets}) == len(sets)


def test_signature_sees_a_single_relation():
    (C, _), *_ = sample("polynomial", 1, 60)
    changed = C.copy()
    i, j = np.argwhere(causal_sets.links(C))[10]
    changed[i, j] = False  # taking a link out leaves an order
    assert causal_sets.problem(changed) is None
    assert causal_sets.signature(changed) != causal_sets.signature(C)
    assert causal_sets.signature(C.T) != causal_sets.signature(C)


def test_signature_sees_more_than_counts():
    def fences(*sizes: int) -> np.ndarray:
        """Zigzags a < b > c < d > e ..., side by side."""
        C = np.zeros((sum(sizes), sum(sizes)), bool)
        for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
            for top in range(start + 1, start + size, 2):
                C[[top - 1, top + 1], top] = True
        return C

    # Every element has the same counts in both, only the company it keeps differs.
    assert np.array_equal(*(np.sort([C.sum(0) * 10 + C.sum(1)]) for C in (fences(3, 7), fences(5, 5))))
    assert causal_sets.signature(fences(3, 7)) != causal_sets.signature(fences(5, 5))
    assert causal_sets.signature(fences(3, 7)) == causal_sets.signature(fences(7, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Observables


def test_observables_of_sets_known_by_heart():
    chain = np.triu(np.ones((10, 10), bool), 1)
    seen = causal_sets.observables(chain)
    assert tuple(seen) == causal_sets.OBSERVABLES == causal_sets.OBSERVABLE_GROUPS["all"]
    assert seen["ordering_fraction"] == 1 and seen["myrheim_meyer_dimension"] == pytest.approx(1)
    assert seen["height"] == pytest.approx(math.log(10) / math.log(11)) and seen["links_per_element"] == 0.9
    assert seen["minimal_fraction"] == seen["maximal_fraction"] == 0.1
    assert [seen[f"interval_{k}"] for k in range(9)] == pytest.approx([(9 - k) / 45 for k in range(9)])
    assert seen["degree_2"] == 0.8 and seen["degree_1"] == 0.2
    # The Laplacian of a path of n vertices has the eigenvalues 1 - cos(pi k / (n - 1)).
    spectrum = causal_sets.laplacian_spectrum(causal_sets.links(chain))
    assert np.allclose(spectrum, 1 - np.cos(np.pi * np.arange(10) / 9))
    antichain = causal_sets.observables(np.zeros((10, 10), bool))
    assert antichain["ordering_fraction"] == 0 and antichain["spectrum_0"] == 1 and antichain["degree_0"] == 1
    assert np.isfinite(list(antichain.values())).all()


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_myrheim_meyer_dimension_of_diamonds(dimension):
    rng = np.random.default_rng(dimension)
    sets = [generator.minkowski_relation(*generator.sprinkle_diamond(rng, 100, dimension)) for _ in range(100)]
    found = [causal_sets.myrheim_meyer_dimension(C) for C in sets]
    assert np.mean(found) == pytest.approx(dimension, abs=0.1)
    assert np.mean([causal_sets.midpoint_dimension(C) for C in sets]) == pytest.approx(dimension, abs=0.5)


def test_ordering_fractions_of_the_literature():
    rng = np.random.default_rng(0)
    for dimension, expected in {2: 1 / 2, 3: 8 / 35, 4: 1 / 10}.items():
        sets = [generator.minkowski_relation(*generator.sprinkle_diamond(rng, 80, dimension)) for _ in range(150)]
        assert np.mean([causal_sets.ordering_fraction(C) for C in sets]) == pytest.approx(expected, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# The generator


@pytest.mark.parametrize("name", generator.CLASSES)
def test_every_set_is_a_time_sorted_strict_order_with_labels(name):
    for size, count in (((8, 16), 40), ((40, 80), 25), (128, 3)):
        for C, labels in sample(name, count, size):
            assert C.dtype == bool and causal_sets.problem(C) is None and not np.tril(C).any()
            low, high = (size, size) if isinstance(size, int) else size
            assert low <= len(C) <= high
            assert list(labels) == ["class", "manifold_like", "dimension", "curvature", "hardness"]
            assert generator.CLASSES[labels["class"]] == name
            assert labels["manifold_like"] == (name in generator.MANIFOLD_LIKE)
            assert np.isfinite(labels["dimension"]) == np.isfinite(labels["curvature"]) == labels["manifold_like"]
            assert (0 < labels["hardness"] < 1) if name in ("destroyed", "merged") else math.isnan(labels["hardness"])
    assert len({causal_sets.signature(C) for C, _ in sample(name, 20, 50)}) == 20


def test_a_set_depends_on_seed_and_index_only():
    for index in (0, 3, 1000):
        C, labels = generator.make_set(index, seed=7)
        again, same = generator.make_set(index, seed=7)
        assert np.array_equal(C, again) and str(labels) == str(same)
        for other in (generator.make_set(index, seed=8)[0], generator.make_set(index + 1, seed=7)[0]):
            assert causal_sets.signature(other) != causal_sets.signature(C)


def test_presets_hold_what_they_promise():
    zoo = [labels for _, labels in sample("zoo", 600)]
    assert {generator.CLASSES[labels["class"]] for labels in zoo} == set(generator.ZOO)
    assert np.mean([labels["manifold_like"] for labels in zoo]) == pytest.approx(0.5, abs=0.07)
    assert {labels["dimension"] for _, labels in sample("dimension", 60, dimensions=(3, 5))} == {3.0, 5.0}
    curvature = [labels["curvature"] for _, labels in sample("curvature", 200)]
    assert -4 < min(curvature) < -3.5 and 3.5 < max(curvature) < 4
    with pytest.raises(ValueError, match="unknown preset 'zo': choose one of zoo, "):
        generator.make_set(0, seed=0, preset="zo")
    with pytest.raises(ValueError, match="need 8 <= n_min <= n_max"):
        generator.make_set(0, seed=0, n_min=90)


def test_ricci_scalar_of_a_series_matches_finite_differences_and_de_sitter():
    def box(w, t, x, h=1e-3):  # R = -2 exp(-2w) (-d_tt + d_xx) w for ds^2 = exp(2w) (-dt^2 + dx^2)
        return (w(t, x + h) + w(t, x - h) - w(t + h, x) - w(t - h, x)) / h**2

    rng = np.random.default_rng(0)
    coefficients = 0.3 ** np.add.outer(np.arange(6), np.arange(6)) * rng.standard_normal((6, 6))
    coefficients[0, 0] = 3  # f stays away from zero
    t, x = rng.uniform(-0.9, 0.9, (2, 50))

    def w(t, x):
        return np.log(generator._series(coefficients, t, x))

    expected = -2 * np.exp(-2 * w(t, x)) * box(w, t, x)
    assert np.allclose(generator.ricci_scalar(coefficients, t, x), expected, rtol=1e-4, atol=1e-5)
    # de Sitter space, f = 1 / (H (t + 3)): R = 2 H^2 everywhere
    series = np.zeros((25, 25))
    series[:, 0] = np.polynomial.chebyshev.chebinterpolate(lambda t: 1 / (0.7 * (t + 3)), 24)
    assert np.allclose(generator.ricci_scalar(series, t, x), 2 * 0.7**2, rtol=1e-6)


def test_constant_curvature_points_fill_the_volume_and_curvature_shows():
    rng = np.random.default_rng(0)
    for ricci in (-4.0, 0.0, 4.0):
        sets = [generator.constant_curvature(rng, 60, ricci)[0] for _ in range(200)]
        k = -ricci / 8
        # The expected ordering fraction is twice the chance that u1 < u2 and v1 < v2: the density, summed on a grid.
        grid = (np.arange(60) + 0.5) / 30 - 1
        weight = 1 / (1 + k * grid[:, None] * grid[None, :]) ** 2
        below = np.cumsum(np.cumsum(weight, 0), 1) - np.cumsum(weight, 0) / 2 - np.cumsum(weight, 1) / 2 + weight / 4
        expected = 2 * (weight * below).sum() / weight.sum() ** 2
        assert np.mean([causal_sets.ordering_fraction(C) for C in sets]) == pytest.approx(expected, abs=0.012)


def test_polynomial_points_follow_the_volume():
    rng = np.random.default_rng(5)
    t, x, coefficients = generator._sprinkle_polynomial(rng, 20_000)
    cells = (np.arange(80) + 0.5) / 40 - 1
    tt, xx = np.meshgrid(cells, cells, indexing="ij")
    density = generator._series(coefficients, tt.ravel(), xx.ravel()).reshape(80, 80) ** 2
    assert density.mean() == pytest.approx(1, abs=0.02)  # the box keeps the volume of flat space
    expected = density.reshape(8, 10, 8, 10).sum((1, 3)) / density.sum()
    found = np.histogram2d(t, x, bins=8, range=[[-1, 1], [-1, 1]])[0] / 20_000
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / 20_000)


def crossing(p: np.ndarray, q: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Does the straight piece p-q meet the segment `cut`? Solved for the two parameters, unlike in the generator."""
    d, e = q - p, cut[1] - cut[0]
    det = d[..., 0] * e[1] - d[..., 1] * e[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        along = ((cut[0, 0] - p[..., 0]) * e[1] - (cut[0, 1] - p[..., 1]) * e[0]) / det
        across = ((cut[0, 0] - p[..., 0]) * d[..., 1] - (cut[0, 1] - p[..., 1]) * d[..., 0]) / det
    return (along > 0) & (along < 1) & (across > 0) & (across < 1)


@pytest.mark.parametrize("seed", range(4))
def test_cuts_stop_signals_exactly(seed):
    # Against signals that hop over 600 random places: none may reach what the exact rule denies, and as the places get
    # dense they find nearly everything that it allows.
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (40, 2))
    points = points[np.argsort(points[:, 0])]
    cuts = rng.uniform(-1, 1, (4, 2, 2))
    cuts[:2, 1, 0], cuts[:2, 1, 1] = 1, cuts[:2, 0, 1]
    exact = generator.relation_with_cuts(points[:, 0], points[:, 1], cuts)
    places = np.concatenate([points, rng.uniform(-1, 1, (600, 2))])
    step = places[None] - places[:, None]
    hop = step[..., 0] > np.abs(step[..., 1])
    free = hop.copy()
    for cut in cuts:
        free &= ~crossing(places[:, None], places[None], cut)
    dense = causal_sets.closure(free)[:40, :40]
    assert not (dense & ~exact).any()
    assert not (exact & ~hop[:40, :40]).any()
    assert dense.sum() > 0.93 * exact.sum()
    assert exact.sum() < 0.97 * hop[:40, :40].sum()  # the cuts do cut
    # Where nothing is cut the order is that of flat space.
    flat = generator.relation_with_cuts(points[:, 0], points[:, 1], np.zeros((0, 2, 2)))
    assert np.array_equal(flat, hop[:40, :40])


def test_a_signal_passes_before_a_branch_point_but_not_after():
    cut = np.array([[[0.0, 0.0], [1.0, 0.0]]])  # the universe splits at x = 0 from t = 0 on
    left, late, early = [0.1, -0.1], [0.9, 0.1], [-0.5, -0.1]
    t, x = np.array([left, late]).T
    assert not generator.relation_with_cuts(t, x, cut).any()
    t, x = np.array([early, late]).T
    assert generator.relation_with_cuts(t, x, cut)[0, 1]


def test_quasicrystal_comes_from_an_integer_lattice():
    coordinates = generator._quasicrystal_coordinates()
    metric = np.diag([-1.0, 1, 1, 1])
    # u and v are null, the internal plane is Euclidean and orthogonal to both.
    product = coordinates @ metric @ coordinates.T
    assert np.allclose(product, [[0, product[0, 1], 0, 0], [product[0, 1], 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert product[0, 1] < 0
    # No point inside the limits is missed.
    for window in (0.7, 1.5):
        limits, shift = np.array([4.0, 3.0, window, window]), np.array([[0.3], [0.9], [0.1], [0.6]])
        every = np.stack(np.meshgrid(*[np.arange(-12, 13)] * 4)).reshape(4, -1) + shift
        found = generator._lattice_points(coordinates, limits, shift)
        every, found = (p[:, (np.abs(coordinates @ p).T <= limits).all(1)] for p in (every, found))
        assert found.shape[1] > 50 and {tuple(p) for p in found.T} == {tuple(p) for p in every.T}


def test_random_orders_are_matched_in_their_share_of_relations():
    fractions = [causal_sets.ordering_fraction(C) for C, _ in sample("random", 120, 60)]
    assert np.mean(fractions) == pytest.approx(0.4998, abs=0.025)
    assert np.std(fractions) == pytest.approx(0.0696, abs=0.02)


def test_destroyed_sets_are_changed_sets(monkeypatch):
    spacetime, _ = generator.polynomial(np.random.default_rng(0), 40)
    broken, labels = generator.destroyed(np.random.default_rng(0), 40)
    assert (broken != spacetime).any() and 4 / 780 <= labels["hardness"] <= 80 / 780
    # Closing undoes about one draw of flips in a thousand: here it undoes the first two.
    closed = [spacetime, spacetime, broken]
    monkeypatch.setattr(generator, "closure", lambda relation: closed.pop(0))
    assert generator.destroyed(np.random.default_rng(0), 40)[0] is broken


def test_zoo_has_no_shortcut_and_is_learnable():
    ensemble = pytest.importorskip("sklearn.ensemble")
    sets = sample("zoo", 2500)
    X = np.array([list(causal_sets.observables(C).values()) for C, _ in sets])
    y = np.array([labels["manifold_like"] for _, labels in sets])

    def accuracy(group: str) -> float:
        columns = [causal_sets.OBSERVABLES.index(name) for name in causal_sets.OBSERVABLE_GROUPS[group]]
        model = ensemble.HistGradientBoostingClassifier(max_iter=60, random_state=0).fit(X[:1800, columns], y[:1800])
        return model.score(X[1800:, columns], y[1800:])

    assert accuracy("ordering_fraction") < 0.75
    assert 0.85 < accuracy("all") < 0.97


def test_speed():
    sample("zoo", 10)
    start = time.process_time()
    sets = sample("zoo", 300)
    assert 300 / (time.process_time() - start) > 250
    start = time.process_time()
    for C, _ in sets[:100]:
        causal_sets.observables(C)
    assert (time.process_time() - start) / 100 < 6e-3


# ---------------------------------------------------------------------------------------------------------------------
# The store


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Store:
    return generator.write(tmp_path_factory.mktemp("stores") / "zoo", 150, seed=3, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip(zoo):
    assert len(zoo) == 150 and zoo.classes == generator.CLASSES and zoo.meta["source"]["seed"] == 3
    for index in range(150):
        C, labels = generator.make_set(index, seed=3)
        assert np.array_equal(zoo.matrix(index), C) and zoo.sizes[index] == len(C)
        assert zoo.signatures[index] == int.from_bytes(causal_sets.signature(C)[:8], "little")
        for name, value in labels.items():
            assert np.array_equal(zoo.labels[name][index], value, equal_nan=True)
    assert zoo.packed(5).shape == (zoo.sizes[5], -(-zoo.sizes[5] // 8)) and not zoo.packed(5).flags.writeable
    assert np.array_equal(zoo.matrix(-1), zoo.matrix(149))
    with pytest.raises(IndexError):
        zoo.matrix(150)


def test_store_is_the_same_for_any_number_of_workers(zoo, tmp_path):
    with_workers = generator.write(tmp_path / "parallel", 150, seed=3, workers=2, progress=False)
    assert contents(with_workers.path) == contents(zoo.path)
    names, table = causal_sets.observable_table(zoo, [7, 3, 99], workers=2, progress=False)
    assert names == causal_sets.OBSERVABLES and table.shape == (3, len(names)) and table.dtype == np.float64
    assert np.array_equal(table, causal_sets.observable_table(zoo, [7, 3, 99], progress=False)[1])
    assert np.array_equal(table[1], list(causal_sets.observables(zoo.matrix(3)).values()))


def test_store_travels_to_processes(zoo):
    expected = zoo.matrix(11).sum()  # the memory map is open by now
    assert len(pickle.dumps(zoo)) < 500
    assert pickle.loads(pickle.dumps(zoo)).matrix(11).sum() == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(Store.matrix, (zoo, 11)).sum() == expected


def test_missing_labels(tmp_path):
    C = np.triu(np.ones((9, 9), bool), 1)
    with StoreWriter(tmp_path / "s") as writer:
        writer.append(C)
        writer.append(C[:3, :3], {"class": 4, "curvature": 0.5})
        writer.append(C, {"class": 2})
    labels = Store(tmp_path / "s").labels
    assert labels["class"].dtype == np.int64 and labels["class"].tolist() == [-1, 4, 2]
    assert np.array_equal(labels["curvature"], [np.nan, 0.5, np.nan], equal_nan=True)


def test_what_is_no_store_says_so(zoo, tmp_path):
    with pytest.raises(ValueError, match="does not exist: expected the tree.*demo_data.*convert_zarr") as error:
        Store(tmp_path / "nothing")
    assert "relations.bin" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a finished store"):
        Store(tmp_path / "empty")
    for name in contents(zoo.path):
        copy = tmp_path / f"without-{name}"
        copy.mkdir()
        for other, data in contents(zoo.path).items():
            if other != name:
                (copy / other).write_bytes(data)
        with pytest.raises(ValueError, match="is not a finished store|is damaged, .* is missing"):
            Store(copy)
        (copy / name).write_bytes(contents(zoo.path)[name])
        assert len(Store(copy)) == 150
    with open(copy / "relations.bin", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="is damaged, relations.bin has 1000 bytes instead of"):
        Store(copy)
    with pytest.raises(ValueError, match="exists already"):
        StoreWriter(zoo.path)
    with pytest.raises(ValueError, match="no causal set was written"):
        generator.write(tmp_path / "none", 0, seed=0, progress=False)
    assert not (tmp_path / "none").exists()


def test_a_killed_or_failed_writer_leaves_no_store(tmp_path):
    code = (
        "import os, signal, sys, numpy as np\nfrom common.causal_sets import StoreWriter\n"
        "with StoreWriter(sys.argv[1]) as writer:\n"
        "    writer.append(np.triu(np.ones((9, 9), bool), 1))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "s"], cwd=ROOT)
    assert result.returncode == -9 and not (tmp_path / "s").exists()
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s"):
        raise RuntimeError
    assert not (tmp_path / "s").exists()
    with StoreWriter(tmp_path / "s") as writer:  # what the killed one left behind is in nobody's way
        writer.append(np.zeros((2, 2), bool))
    assert len(Store(tmp_path / "s")) == 1


def test_read_speed(tmp_path):
    store = generator.write(tmp_path / "s", 20, seed=0, preset="grid", n_min=256, n_max=256, progress=False)
    store.matrix(0)
    start = time.process_time()
    for k in range(200):
        store.matrix(k * 7 % 20)
    assert (time.process_time() - start) / 200 < 1e-3


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "common.demo_data.causal_sets", "--out", tmp_path / "s", "--count", "12"]
    result = subprocess.run(
        [*command, "--preset", "dimension", "--dimensions", "2", "5"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("12 causal sets in ") and "12/12" in result.stderr
    assert set(Store(tmp_path / "s").labels["dimension"]) == {2.0, 5.0}


# ---------------------------------------------------------------------------------------------------------------------
# QuantumGrav's zarr stores


def rewrite(path: Path, array: np.ndarray) -> None:
    import zarr

    zarr.create_array(path, data=np.ascontiguousarray(array), overwrite=True, zarr_format=2)


def test_zarr_round_trip(tmp_path, capsys):
    zarr = pytest.importorskip("zarr")
    generator.write_zarr(tmp_path / "raw" / "a.zarr", 12, seed=1)
    first = tmp_path / "raw" / "a.zarr" / "cset_1"
    # The layout is QuantumGrav's: no group at the root, arrays transposed as Julia leaves them.
    assert (first / ".zgroup").is_file() and not (tmp_path / "raw" / "a.zarr" / ".zgroup").exists()
    assert np.array_equal(zarr.open_array(first / "adj")[...], generator.make_set(0, seed=1)[0].T)
    # Turned back by somebody, and not sorted by time: both are read all the same.
    rewrite(first / "adj", generator.make_set(0, seed=1)[0])
    rewrite(first / "linkmat", causal_sets.links(generator.make_set(0, seed=1)[0]))
    second, shuffle = generator.make_set(1, seed=1)[0], np.random.default_rng(0).permutation(80)
    order = shuffle[shuffle < len(second)]
    rewrite(first.with_name("cset_2") / "adj", second[np.ix_(order, order)].T)
    rewrite(first.with_name("cset_2") / "linkmat", causal_sets.links(second)[np.ix_(order, order)].T)
    rewrite(first.with_name("cset_3") / "dimension", np.array([2]))
    rewrite(first.with_name("cset_3") / "ricci_scalars", np.array([1.0, 2.0]))

    bad = causal_sets.convert_zarr(tmp_path / "raw", tmp_path / "s", progress=False)
    assert bad == {} and "12 causal sets read, 12 kept" in capsys.readouterr().err
    store = Store(tmp_path / "s")
    assert len(store) == 12  # in numeric order: cset_2 before cset_10
    for index in range(12):
        C, labels = generator.make_set(index, seed=1)
        if index == 1:
            assert causal_sets.signature(store.matrix(1)) == causal_sets.signature(C)
            assert not np.tril(store.matrix(1)).any()
        else:
            assert np.array_equal(store.matrix(index), C)
        name = generator.CLASSES[labels["class"]]
        if name in store.classes:
            assert store.classes[store.labels["class"][index]] == name
        else:
            assert store.labels["class"][index] == -1
        assert store.labels["manifold_like"][index] == labels["manifold_like"]
    assert store.labels["dimension"][2] == 2 and store.labels["curvature"][2] == 1.5
    assert np.isnan(store.labels["curvature"][[0, 1, *range(3, 12)]]).all()


def test_zarr_bad_sets_are_left_out_and_named(tmp_path, capsys):
    pytest.importorskip("zarr")
    raw = tmp_path / "b.zarr"
    generator.write_zarr(raw, 7, seed=2, preset="polynomial")
    C = [generator.make_set(index, seed=2, preset="polynomial")[0] for index in range(7)]
    cyclic, gap = C[1].copy(), C[2].copy()
    cyclic[[0, 1, 2], [1, 2, 0]] = True
    i, j = np.argwhere(gap & ~causal_sets.links(gap))[0]
    gap[i, j] = False
    rewrite(raw / "cset_2" / "adj", cyclic.T)
    rewrite(raw / "cset_3" / "adj", gap.T)
    rewrite(raw / "cset_4" / "adj", (C[3] | np.eye(len(C[3]), dtype=bool)).T)
    rewrite(raw / "cset_5" / "linkmat", C[4].T)
    rewrite(raw / "cset_6" / "adj", np.zeros((9, 9), np.uint8))
    rewrite(raw / "cset_7" / "cset_type", np.array([12]))
    bad = causal_sets.convert_zarr([raw], tmp_path / "s", progress=False)
    kinds = ["cyclic", "not transitive", "diagonal set", "wrong links", "no relation", "unknown class"]
    assert list(bad) == kinds and all(len(names) == 1 for names in bad.values())
    assert bad["not transitive"][0].startswith("b.zarr/cset_3 (")
    report = capsys.readouterr().err
    assert "7 causal sets read, 1 kept" in report and "1 left out, cyclic: b.zarr/cset_2" in report
    store = Store(tmp_path / "s")
    assert len(store) == 1 and np.array_equal(store.matrix(0), C[0]) and store.meta["source"]["left_out"] == bad


def test_zarr_without_a_causal_set_is_an_error(tmp_path):
    pytest.importorskip("zarr")
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match=r"no causal set found under .*: expected groups cset_1, cset_2, \.\.\. "):
        causal_sets.convert_zarr(tmp_path / "raw", tmp_path / "s")
    with pytest.raises(ValueError, match="is not a directory"):
        causal_sets.convert_zarr(tmp_path / "absent", tmp_path / "s")
    generator.write_zarr(tmp_path / "raw" / "a.zarr", 1, seed=0)
    rewrite(tmp_path / "raw" / "a.zarr" / "cset_1" / "adj", np.ones((5, 5)))
    with pytest.raises(ValueError, match="none of the sets is a causal set") as error:
        causal_sets.convert_zarr(tmp_path / "raw", tmp_path / "s", progress=False)
    assert "1 left out, diagonal set" in str(error.value) and not (tmp_path / "s").exists()
