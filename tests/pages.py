"""What README.md and scripts/README.md say, as tests compare it with what the scripts do."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, SCRIPTS = ROOT / "README.md", ROOT / "scripts" / "README.md"
RESULTS = ROOT / "docs" / "results.json"

# ---------------------------------------------------------------------------------------------------------------------
# logged keys


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", SCRIPTS.read_text(), re.M | re.S)[1]


def keys_of(title: str) -> list[str]:
    """The first column of a section's tables that begin with "key": `val/<task>/f1` and so on."""
    tables = re.findall(r"^\| key \|.*\n\|-.*\n((?:\|.*\n)+)", section(title), re.M)
    return [key for table in tables for line in table.splitlines() for key in re.findall(r"`([^`]+)`", line.split("|")[1])]


def explains(pattern: str, key: str) -> bool:
    """Whether a key of the page is this one: <name> stands for anything, and a `val/` key for those of the test sets."""
    parts = re.sub(r"<[^>]+>", "[^/]+", pattern)
    return bool(re.fullmatch(re.sub(r"^val/", "(val|test(/[^/]+)?)/", parts), key))


def assert_explained(job: str, *folders: Path, unseen: Collection[str] = ()) -> None:
    """Each key that these runs of a script logged is in its tables, and each of the tables is logged, except `unseen`."""
    lines = [line for folder in folders for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in json.loads(line)}
    shared, own = keys_of("What every script logs"), keys_of(f"train_{job}.py")
    unexplained = {key for key in logged if not any(explains(pattern, key) for pattern in [*shared, *own])}
    assert not unexplained, f"scripts/README.md does not explain {sorted(unexplained)}"
    never = {pattern for pattern in [*shared, *own] if not any(explains(pattern, key) for key in logged)}
    assert never == set(unseen), f"scripts/README.md explains what nobody logs: {sorted(never ^ set(unseen))}"


# ---------------------------------------------------------------------------------------------------------------------
# measured runs

# The command of a run, its main number and what stands beside it; of a demo also the rows of its own table. A name with a
# slash is a key of metrics.jsonl, another one a line of report.txt.
DEMOS: dict[str, dict] = {
    "quantumgrav": {
        "command": "python scripts/train_quantumgrav.py --demo",
        "first": ("accuracy", "test/manifold_like/accuracy", 3),
        "beside": {
            "boosting on classical observables": "boosting on all classical observables",
            "the commonest answer": "the commonest answer",
        },
        "rows": {
            "accuracy, 300 test sets of 40 to 80 atoms": ("test/manifold_like/accuracy", 3),
            "area under the ROC curve": ("test/manifold_like/auc", 4),
            "accuracy, 300 sets of 120 to 160 atoms, never trained on": ("test/transfer/manifold_like/accuracy", 3),
            "boosting on all classical observables": ("boosting on all classical observables", 3),
            "boosting on these and the network's misfits": ("boosting on all of them and the network's misfits", 3),
            "boosting on the ordering fraction and size": ("boosting on the ordering fraction and size", 3),
            "the commonest answer": ("the commonest answer", 3),
        },
    },
    "student": {
        "command": "python scripts/train_student.py --demo",
        "first": ("PSNR in dB", "test/held-out/psnr", 2),
        "beside": {"the input": "test/held-out/input_psnr", "grey-world": "test/held-out/grey_world_psnr"},
        "rows": {
            "PSNR of 24 held-out images, dB": ("test/held-out/psnr", 2),
            "PSNR of their inputs; of grey-world": ("test/held-out/input_psnr", 2, "test/held-out/grey_world_psnr", 2),
            "SSIM": ("test/held-out/ssim", 3),
            "SSIM of the inputs; of grey-world": ("test/held-out/input_ssim", 3, "test/held-out/grey_world_ssim", 3),
        },
    },
    "ultimate": {
        "command": "python scripts/train_ultimate.py --demo",
        "first": ("IoU", "test/camouflage/iou", 3),
        "beside": {"boosted texture features": "boosted texture features", "colour threshold": "colour threshold"},
        "rows": {
            "IoU per image, 80 held-out pictures": ("test/camouflage/iou", 3),
            "boosted trees on texture features": ("boosted texture features", 3),
            "best colour threshold": ("colour threshold", 3),
            "S-measure": ("test/camouflage/sm", 3),
            "weighted F-measure": ("test/camouflage/wfm", 3),
            "mean absolute error": ("test/camouflage/mae", 4),
        },
    },
    "vqgan": {
        "command": "python scripts/train_vqgan.py --demo",
        "first": ("PSNR in dB", "test/psnr", 2),
        "beside": {"a resize to as many bits": "test/resize_psnr"},
        "rows": {
            "PSNR of the scans of 4 held-out patients, dB": ("test/psnr", 2),
            "in the body; in the lungs": ("test/psnr_body", 2, "test/psnr_lung", 2),
            "PSNR of a resize to as many bits": ("test/resize_psnr", 2),
            "in the body; in the lungs, resized": ("test/resize_psnr_body", 2, "test/resize_psnr_lung", 2),
            "RMSE; of the resize, HU": ("test/hu_rmse", 1, "test/resize_hu_rmse", 1),
            "SSIM; of the resize": ("test/ssim", 3, "test/resize_ssim", 3),
            "share of the codes in use; perplexity": ("test/codes_used", 2, "test/code_perplexity", 0),
        },
    },
}
CSETS = "python -m common.demo_data.causal_sets --out data/csets --count 10000"
ON_CSETS = "python scripts/train_quantumgrav.py --dataset-path data/csets --split 0.6 0.2 0.2 --num-workers 0"
DIMENSION = {
    "command": f"{ON_CSETS} --tasks dimension --epochs 8",
    "first": ("accuracy", "test/dimension/accuracy", 3),
    "beside": {
        "boosting on all classical observables": "boosting on all classical observables",
        "boosting on Myrheim-Meyer and midpoint dimension": "boosting on Myrheim-Meyer and midpoint dimension",
    },
}
# Runs beyond the demos, named as results.py takes them; `data` makes what they train on.
FURTHER: dict[str, dict] = {
    "zoo": {
        "data": f"{CSETS} --preset zoo",
        "command": f"{ON_CSETS} --epochs 8",
        "first": ("accuracy", "test/manifold_like/accuracy", 3),
        "beside": {
            "boosting on all classical observables and the network's misfits": (
                "boosting on all of them and the network's misfits"
            ),
            "on all classical observables": "boosting on all classical observables",
            "on interval abundances": "boosting on interval abundances",
            "on the ordering fraction and size": "boosting on the ordering fraction and size",
            "the commonest answer": "the commonest answer",
        },
    },
    "gcn": {
        "data": f"{CSETS} --preset zoo",
        "command": f"{ON_CSETS} --model gcn --epochs 10",
        "first": ("accuracy of QuantumGrav's one-layer GCN on link degrees", "test/manifold_like/accuracy", 3),
        "beside": {"the commonest answer": "the commonest answer"},
    },
    "dimension-16": {"data": f"{CSETS} --preset dimension --n-min 16 --n-max 16", **DIMENSION},
    "dimension-32": {"data": f"{CSETS} --preset dimension --n-min 32 --n-max 32", **DIMENSION},
    "student-alone": DEMOS["student"] | {"command": "python scripts/train_student.py --demo --pseudo-root None"},
    "vqgan-alone": DEMOS["vqgan"] | {"command": "python scripts/train_vqgan.py --demo --discriminator-iter-start -1"},
}
RUNS = DEMOS | FURTHER


def script_of(name: str) -> str:
    """The job of a run: quantumgrav of zoo."""
    return re.search(r"scripts/train_(\w+)\.py", RUNS[name]["command"])[1]


def several(values: list[str]) -> str:
    """One value per seed, or the one that all of them have."""
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def numbers(records: list[dict], key: str, digits: int) -> list[str]:
    return [f"{record['metrics'][key]:.{digits}f}" for record in records]


def seeds(records: list[dict]) -> list[str]:
    return [str(record["seed"]) for record in records]


def alike(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def where(records: list[dict]) -> str:
    machines = alike([f"{r['cpu']}, 1 thread, torch {r['torch']}" for r in records])
    return f"{machines}, commit {alike([r['commit'] for r in records])}"


def of_run(records: list[dict], name: str) -> list[dict]:
    return sorted((r for r in records if r["run"] == name), key=lambda record: record["seed"])


def overview(records: list[dict], names: Collection[str]) -> str:
    """A line per run that has been measured."""
    lines = [
        "| command | held-out result | beside it | CPU minutes | peak memory | measured on |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        if mine := of_run(records, name):
            run = RUNS[name]
            title, key, digits = run["first"]
            makes = f"`{run['data']}`<br>" if "data" in run else ""
            cells = [
                f"{makes}`{run['command']}`, seed {', '.join(seeds(mine))}",
                f"{title} {several(numbers(mine, key, digits))}",
                "; ".join(f"{what} {several(numbers(mine, other, digits))}" for what, other in run["beside"].items()),
                several([f"{r['cpu_minutes']:.1f}" for r in mine]),
                f"{max(r['peak_mb'] for r in mine) / 1000:.1f} GB",
                where(mine),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def own_page(mine: list[dict], job: str) -> str:
    """A column per seed."""
    lines = [f"| `--demo` | {' | '.join(f'seed {seed}' for seed in seeds(mine))} |", "|---|" + "---|" * len(mine)]
    rows = DEMOS[job]["rows"] | {"CPU minutes, all included": ("cpu_minutes", 1), "peak memory, MB": ("peak_mb", 0)}
    for title, shown in rows.items():
        pairs = list(zip(shown[::2], shown[1::2], strict=True))
        flat = [{"metrics": r["metrics"] | {k: r[k] for k in ("cpu_minutes", "peak_mb")}} for r in mine]
        cells = zip(*(numbers(flat, key, digits) for key, digits in pairs), strict=True)
        lines.append(f"| {title} | {' | '.join('; '.join(cell) for cell in cells)} |")
    return "\n".join([*lines, "", f"{where(mine)}."])


def blocks(records: list[dict]) -> Iterator[tuple[Path, str, str]]:
    """(page, name, text) of what stands between <!-- results NAME --> and <!-- end -->."""
    yield README, "all", overview(records, DEMOS)
    for job in DEMOS:
        if mine := of_run(records, job):
            yield SCRIPTS, job, own_page(mine, job)
        further = [name for name in FURTHER if script_of(name) == job]
        if any(of_run(records, name) for name in further):
            yield SCRIPTS, f"{job}, further", overview(records, further)


def filled(page: str, name: str, text: str) -> str:
    before, start, rest = page.partition(f"<!-- results {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert start and end, f"the page has no block for the results of {name}"
    return f"{before}{start}{text}\n{end}{after}"
