"""What the loop costs beyond the mathematics: a script against a bare PyTorch loop of the same model, data and optimizer.

    python tests/benchmarks/loop_overhead.py [quantumgrav] [student] [ultimate] [vqgan]

Both train in one process and take turns at every step, A B A B ..., since machines are noisy; ten steps of each are a pair.
CPU time of the one thread counts, since nothing is waited for. Goals: at least 0.98 of the bare loop's speed at steps of
50 ms and more, at most 0.4 ms more per step at small ones.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import small_jobs
import timing

CASES = {  # flags, and pairs
    "quantumgrav": {
        "small steps": (["--width", "8", "--layers", "1", "--batch-size", "8"], 40),
        "large steps": (["--width", "48", "--batch-size", "64"], 8),
    },
    "student": {
        "small steps": (["--width", "8", "--blocks", "1", "1", "1", "--img-size", "32", "--batch-size", "2"], 20),
        "large steps": (["--width", "24", "--blocks", "1", "1", "2", "--img-size", "96", "--batch-size", "4"], 8),
    },
    "ultimate": {
        "small steps": (["--width", "16", "--img-size", "64", "--batch-size", "2", "--num-experts", "3"], 20),
        "large steps": (["--width", "48", "--img-size", "96", "--batch-size", "4"], 8),
    },
    "vqgan": {
        "small steps": (["--patch-size", *["16"] * 3, "--width", "4", "--disc-width", "4", "--batch-size", "1"], 20),
        "large steps": (["--patch-size", *["32"] * 3, "--width", "8", "--disc-width", "8", "--batch-size", "2"], 8),
    },
}
BLOCK = 10  # steps in a pair, of which one writes a log row
SMALL, LARGE = 0.4, 0.98  # ms more at most, and share of the bare loop's speed at least
# Whether freed pages go back to the system hangs on what ran before: a loop of vqgan that gave them back had four times as
# many page faults and was 8 % slower. Here both keep what they have.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}


# ---- the bare loops: (data, collate, update), written as in a tutorial


def one_network(model, groups, config, loss_of: Callable, betas=(0.9, 0.999), after: Callable | None = None) -> Callable:
    import torch

    from common import training

    ema = training.EMA(model, config.ema_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, betas=betas, fused=True)

    def update(batch, step: int) -> None:
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

    return update


def quantumgrav(config, accelerator):
    from common.causal_sets import Store
    from scripts import train_quantumgrav as job

    store = Store(config.dataset_path)
    train = job.CausalSets(store, job.split_ids(store, config)[0], config)
    tasks = job.Tasks.of(store, train.ids, config.tasks)
    model = job.CausalNet(config, tasks.outputs())

    def loss_of(model, batch):
        return sum(values.mean() for values in tasks.losses(model(batch), batch).values())

    return train, job.collate, one_network(model, model.parameters(), config, loss_of)


def student(config, accelerator):
    import torch

    from scripts import train_student as job

    parts = job.prepare_data(config, accelerator)
    model = job.Student(config, parts.audit.classes, parts.audit.code_size).to(memory_format=torch.channels_last)

    def loss_of(model, batch):
        terms = job.loss_terms(config, job.forward(model, batch), batch, None)
        return sum(values.mean() * getattr(config, f"{name}_weight") for name, values in terms.items())

    return parts.train, None, one_network(model, model.parameters(), config, loss_of, (0.9, 0.99))


def ultimate(config, accelerator):
    import torch

    from common.backbones import make_backbone
    from scripts import train_ultimate as job

    train = job.prepare_data(config, accelerator).train
    model = job.Segmenter(config, make_backbone(config.backbone, "none", scratch=True)).to(memory_format=torch.channels_last)
    weights = {"structure": 1.0} | {name: getattr(config, f"{name}_weight") for name in ("deep", "edge", "balance", "z")}

    def loss_of(model, batch):
        answer = model(batch["image"])
        terms = job.loss_terms(config, model, answer, batch["mask"].float())
        choices = config.top_k * config.batch_size
        for key, mixture in model.mixtures.items():
            load, logits = answer["picked"][key] / choices, answer["logits"][key].detach().mean(0)
            following.append(partial(mixture.follow, load.tolist(), logits.tolist()))
        return sum(values.mean() * weights[name] for name, values in terms.items())

    following: list[Callable[[], None]] = []
    # with the script's rates its routers choose the same experts, which do not all cost the same
    groups = [{**group, "lr": config.stage2_lr * group["scale"]} for group in job.parameter_groups(model, config)]
    adam = one_network(model, groups, config, loss_of)

    def update(batch, step: int) -> None:
        adam(batch, step)
        for follow in following:
            follow()
        following.clear()

    return train, None, update


def vqgan(config, accelerator):
    """Autoencoder and discriminators in turn, each with its Adam."""
    import torch

    from common import training
    from scripts import train_vqgan as job

    train = job.prepare_data(config, accelerator).train
    model, disc = job.VQGAN(config).to(memory_format=torch.channels_last_3d), job.Discriminators(config)
    ema = training.EMA(model, config.ema_decay)
    networks = {
        network: torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.9), fused=True)
        for network, lr in ((model, config.lr), (disc, config.disc_lr))
    }

    def update(batch, step: int) -> None:
        output = model(batch["volume"], batch["picks"])
        disc.requires_grad_(False)
        terms = job.reconstruction_terms(output, batch, None) | job.generator_terms(disc, output, batch, config)
        job.weighted({name: values.mean() for name, values in terms.items()}, config).backward()
        disc.requires_grad_(True)
        judged, _ = job.discriminator_terms(disc, output, batch, {})
        sum(values.mean() for values in judged.values()).backward()
        for network, optimizer in networks.items():
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
        model.quantizer.update(accelerator)
        ema.update(step)

    return train, None, update


def bare_loop(job: str, config, accelerator) -> Iterator[None]:
    """The same samples in the same steps from the same weights; one step at each `next`."""
    import torch

    from common import data

    torch.manual_seed(config.seed)
    train, collate, update = {"quantumgrav": quantumgrav, "student": student, "ultimate": ultimate, "vqgan": vqgan}[job](
        config, accelerator
    )
    sampler = data.StepSampler(len(train), config, accelerator)
    for step, batch in enumerate(torch.utils.data.DataLoader(train, batch_sampler=sampler, collate_fn=collate)):
        update(batch, step)
        yield


# ---- the turns


def take_turns(job: str, pairs: int, flags: list[str]) -> list[tuple[float, float]]:
    """Milliseconds per step of the script and of the bare loop, pair by pair."""
    clock = time.process_time
    ours: list[float] = []
    theirs: list[float] = []
    bare: Iterator[None] = iter(())
    resumed = 0.0

    def visit(step: int, config, accelerator) -> None:
        nonlocal bare, resumed
        stopped = clock()
        if step == 0:
            bare = bare_loop(job, config, accelerator)
        elif step > BLOCK:  # the first ten only warm up
            ours.append(stopped - resumed)
        if len(ours) == pairs * BLOCK:
            raise small_jobs.Finished
        began = clock()
        next(bare)
        if step >= BLOCK:
            theirs.append(clock() - began)
        resumed = clock()

    small_jobs.train(job, flags, visit)
    return list(zip(*(map(in_blocks, (ours, theirs))), strict=True))


def in_blocks(seconds: list[float]) -> list[float]:
    return [sum(seconds[i : i + BLOCK]) / BLOCK * 1e3 for i in range(0, len(seconds), BLOCK)]


def measure(jobs: tuple[str, ...] = small_jobs.JOBS) -> Iterator[timing.Result]:
    for job in jobs:
        for name, (flags, pairs) in CASES[job].items():
            words = [*small_jobs.data_flags(job), *flags, *small_jobs.output(job)]
            started = small_jobs.python(__file__, "turns", job, str(pairs), *words, **KEEP_PAGES)
            found = timing.summary(json.loads(small_jobs.answer(started)))
            bare = found["theirs"]
            goal = LARGE if name == "large steps" else bare / (bare + SMALL)
            yield timing.Result(f"train_{job}.py, {name}", "bare PyTorch loop", unit="ms", goal=goal, **found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["turns"]:
        print(json.dumps(take_turns(sys.argv[2], int(sys.argv[3]), sys.argv[4:])))
    else:
        timing.show(measure(tuple(sys.argv[1:]) or small_jobs.JOBS))
