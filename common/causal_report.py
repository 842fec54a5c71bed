"""What a physicist asks of a network on causal sets: what the classical observables reach on the same split, where the
errors are (class, size, hardness), whether its confidence can be trusted."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.causal_sets import OBSERVABLE_GROUPS, Store, observable_table
from common.metrics import calibration, confusion
from common.pictures import save, subplots

BINS = 8


def shortcut(store: Store, ids: np.ndarray, labels: np.ndarray, limit: int = 4000) -> dict[str, float]:
    """Accuracy of one number alone: each of 40 quantile bins of it answers with the commonest label of the first half of
    the sets, counted on the second half."""
    ids, labels = ids[:limit], labels[:limit].astype(int)
    sizes = store.sizes[ids].astype(float)
    related = np.array([np.bitwise_count(store.packed(int(i))).sum() for i in ids], float)
    numbers = {"the number of atoms": sizes, "the ordering fraction": 2 * related / np.maximum(sizes * (sizes - 1), 1)}
    half = len(ids) // 2
    scores = {}
    for name, values in numbers.items():
        bins = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, 41)[1:-1])), values)
        votes = confusion(bins[:half], labels[:half], max(int(bins.max()), int(labels.max())) + 1)
        scores[name] = float((votes.argmax(1)[bins[half:]] == labels[half:]).mean())
    return scores


def classical_baselines(
    store: Store,
    train: np.ndarray,
    test: np.ndarray,
    targets: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    limit: int,
    seed: int,
    further: Callable[[np.ndarray], np.ndarray],
) -> dict[str, dict[str, float]]:
    """Per task, what boosting and logistic regression on classical observables reach on the same split: accuracy, or R2
    for the curvature. `targets` maps a task to the labels of `train` and of `test`; missing ones are NaN. `further(ids)`
    gives more columns, those that the network computes for itself."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pick = np.random.default_rng(seed).permutation(len(train))[:limit]
    names, x_train = observable_table(store, train[pick], progress=False)
    _, x_test = observable_table(store, test, progress=False)
    names = [*names, *(f"further_{i}" for i in range(further(test[:1]).shape[1]))]
    x_train, x_test = np.hstack([x_train, further(train[pick])]), np.hstack([x_test, further(test)])
    groups = OBSERVABLE_GROUPS | {"all and misfits": tuple(names)}
    methods = {
        "boosting on the ordering fraction and size": ("ordering_fraction", "boosting"),
        "boosting on Myrheim-Meyer and midpoint dimension": ("dimension", "boosting"),
        "logistic regression on interval abundances": ("intervals", "linear"),
        "boosting on interval abundances": ("intervals", "boosting"),
        "boosting on all classical observables": ("all", "boosting"),
        "boosting on all of them and the network's misfits": ("all and misfits", "boosting"),
    }
    scores: dict[str, dict[str, float]] = {}
    for task, (y_train, y_test) in targets.items():
        y_train = y_train[pick]
        fit, check = np.isfinite(y_train), np.isfinite(y_test)
        scores[task] = {}
        for title, (group, kind) in methods.items():
            columns = [names.index(name) for name in groups[group]]
            if task == "curvature":
                if kind == "linear":
                    continue
                model = HistGradientBoostingRegressor(random_state=seed)
            elif kind == "linear":
                model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
            else:
                model = HistGradientBoostingClassifier(random_state=seed)
            target = y_train[fit] if task == "curvature" else y_train[fit].astype(int)
            model.fit(x_train[fit][:, columns], target)
            scores[task][title] = float(model.score(x_test[check][:, columns], y_test[check]))
        if task == "dimension":
            nearest = np.rint(x_test[check, names.index("myrheim_meyer_dimension")])
            scores[task]["Myrheim-Meyer dimension, nearest integer"] = float((nearest == y_test[check]).mean())
    return scores


def probabilities(task: str, outputs: np.ndarray) -> np.ndarray:
    """One column per possible answer; columns 0 and 1 are no and yes for manifold_like."""
    scores = np.stack([np.zeros(len(outputs)), outputs[:, 0]], 1) if task == "manifold_like" else outputs
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def compare(
    names: tuple[str, ...],
    store: Store,
    train: np.ndarray,
    test: np.ndarray,
    metrics: dict[str, dict[str, float]],
    limit: int,
    seed: int,
    further: Callable[[np.ndarray], np.ndarray],
) -> str:
    """A table per task: the network, the classical baselines on the same split, the commonest answer.

    `metrics` holds the network's under "test" and, of a test on further sets, under "transfer"; `limit` 0 leaves the
    baselines out."""
    targets = {task: (store.label(task, train), store.label(task, test)) for task in names}
    baselines = classical_baselines(store, train, test, targets, limit=limit, seed=seed, further=further) if limit else {}
    lines = []
    for task in names:
        key = "r2" if task == "curvature" else "accuracy"
        titles = {"test": "network", "transfer": "network on the sets of --transfer-path"}
        rows = [(titles[part], values[f"{task}/{key}"]) for part, values in metrics.items() if f"{task}/{key}" in values]
        rows += baselines.get(task, {}).items()
        rows.append(
            ("the mean" if task == "curvature" else "the commonest answer", metrics["test"].get(f"{task}/majority", 0.0))
        )
        lines += [f"{task}: {key} on {len(test):,} test sets", *(f"  {value:6.3f}  {name}" for name, value in rows)]
    return "\n".join(lines)


def binned(values: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy in bins of equal count: mean value, accuracy, standard error."""
    order = np.argsort(values, kind="stable")
    groups = [g for g in np.array_split(order, min(BINS, max(1, len(order) // 10))) if len(g)]
    share = np.array([correct[g].mean() for g in groups])
    error = np.sqrt(share * (1 - share) / np.array([len(g) for g in groups]))
    return np.array([values[g].mean() for g in groups]), share, error


def write_predictions(path: Path, ids: np.ndarray, sizes: np.ndarray, columns: dict[str, np.ndarray]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "atoms", *columns])
        writer.writerows(zip(ids.tolist(), sizes.tolist(), *(c.tolist() for c in columns.values()), strict=True))


def draw_classification(
    picture: Path, title: str, names: list[str], target: np.ndarray, probability: np.ndarray, sizes: np.ndarray,
    kinds: tuple[list[str], np.ndarray] | None, hardness: dict[str, np.ndarray],
) -> None:  # fmt: skip
    """Confusion matrix, accuracy per kind of set, against size, against hardness, and calibration.

    `kinds` is (names, code per set); `hardness` maps a kind to its hardness, NaN for the other sets."""
    answer = probability.argmax(1)
    correct = answer == target
    figure, [axes] = subplots(1, *((5, 22) if kinds else (4, 17)), 4.2)
    panels = iter(axes)

    axis = next(panels)
    counts = confusion(target, answer, len(names))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    small = len(names) > 5
    for (i, j), count in np.ndenumerate(counts):
        if count:
            axis.text(
                j,
                i,
                str(count),
                ha="center",
                va="center",
                fontsize=7 if small else 10,
                color="white" if share[i, j] > 0.5 else "black",
            )
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7 if small else 9)
    axis.set_yticks(range(len(names)), names, fontsize=7 if small else 9)
    axis.set(xlabel="answer", ylabel="truth", title=f"{title}: {correct.mean():.1%} of {len(target):,} right")

    if kinds:
        axis = next(panels)
        present = [k for k in range(len(kinds[0])) if (kinds[1] == k).any()]
        accuracy = [correct[kinds[1] == k].mean() for k in present]
        bars = axis.barh([f"{kinds[0][k]} ({(kinds[1] == k).sum()})" for k in present], accuracy, color="tab:blue")
        axis.bar_label(bars, [f"{a:.2f}" for a in accuracy], padding=3, fontsize=8)
        axis.set(xlim=(0, 1.12), xlabel="accuracy", title="by kind of set")
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()

    axis = next(panels)
    axis.errorbar(*binned(sizes.astype(float), correct), fmt="o-", capsize=3)
    axis.set(xlabel="atoms", ylabel="accuracy", title="against size", ylim=(None, 1.02))

    axis = next(panels)
    for name, values in hardness.items():
        known = np.isfinite(values)
        if known.sum() >= 10:
            axis.errorbar(*binned(values[known], correct[known]), fmt="o-", capsize=3, label=name)
    if axis.has_data():
        axis.set_xscale("log")
        axis.legend(fontsize=8)
    axis.set(xlabel="share flipped or merged in", ylabel="accuracy", title="against hardness", ylim=(None, 1.02))

    axis = next(panels)
    error, table = calibration(correct, probability.max(1))
    used = table[:, 2] > 0
    axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axis.plot(table[used, 0], table[used, 1], "o-")
    axis.set(
        xlabel="confidence", ylabel="accuracy", title=f"calibration error {error:.3f}", xlim=(0.0, 1.02), ylim=(0, 1.02)
    )
    for axis in axes[1:]:
        axis.grid(alpha=0.3)
    save(figure, picture, 100)


def describe(tasks, table: dict[str, np.ndarray], store: Store, folder: Path, name: str) -> None:
    """Predictions of every set as CSV, and a picture per task."""
    columns: dict[str, np.ndarray] = {}
    ids = table["id"]
    if "class" in store.labels:
        columns["kind"] = np.array([*store.classes, ""])[store.labels["class"][ids]]
    hardness = store.labels.get("hardness", np.full(len(store), np.nan))[ids]
    for task in tasks.names:
        known, target = table[f"{task}/known"].astype(bool), table[f"{task}/target"]
        outputs = table[f"{task}/output"].astype(np.float64)
        if task == "curvature":
            columns["curvature"] = np.where(known, target * tasks.curvature[1] + tasks.curvature[0], np.nan)
            columns["curvature_answer"] = outputs[:, 0] * tasks.curvature[1] + tasks.curvature[0]
            continue
        answers = {
            "manifold_like": ["no", "yes"],
            "class": list(tasks.classes),
            "dimension": [f"{d:g}" for d in tasks.dimensions],
        }[task]
        share = probabilities(task, outputs)
        columns[task] = np.where(known, np.array(answers)[target.astype(int)], "")
        columns[f"{task}_answer"] = np.array(answers)[share.argmax(1)]
        columns[f"{task}_confidence"] = share.max(1)
        if known.any():
            kind = store.labels["class"][ids] if "class" in store.labels else None
            kinds = None if kind is None or task == "class" else (list(store.classes), kind[known])
            hard = {}
            if kind is not None:
                hard = {
                    store.classes[k]: np.where(kind == k, hardness, np.nan)[known]
                    for k in np.unique(kind[np.isfinite(hardness) & (kind >= 0)])
                }
            draw_classification(
                folder / "samples" / f"{name}_{task}.png", f"{name} {task}", answers,
                target[known].astype(int), share[known], table["size"][known], kinds, hard,
            )  # fmt: skip
    write_predictions(folder / f"{name}.csv", ids, table["size"], columns)
