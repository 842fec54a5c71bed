"""How the cost of a step grows with image side, patch side, atoms and experts: forward, losses and backward of the demos'
networks, CPU time of one thread.

    python tests/benchmarks/growth.py

Beside each size stands what it would cost in proportion to the smallest: to pixels, voxels, pairs of atoms. Experts are
compared with the fewest, since each image is sent to --top-k of them however many there are. All sizes are measured in turn.
"""

import time
from collections.abc import Callable, Iterator

import small_jobs  # noqa: F401 - first: threads are set before torch is imported
import timing
import torch

from common.backbones import make_backbone
from common.cli import parse
from common.demo_data.causal_sets import make_set
from scripts import train_quantumgrav, train_student, train_ultimate, train_vqgan

ROUNDS = 5
SIDES, PATCHES, ATOMS, EXPERTS = (64, 128, 256), (16, 32, 48), (32, 64, 128, 256), (3, 7, 14)


def student(side: int) -> Callable[[], None]:
    config = parse(train_student.Config, ["--demo"])
    model = train_student.Student(config, 10, 0).to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, side, side)
    batch = {"image": image, "target": image.flip(0), "thumbnail": train_student.thumbnail(image)}

    def step() -> None:
        terms = train_student.loss_terms(config, train_student.forward(model, batch), batch, None)
        sum(term.sum() for term in terms.values()).backward()

    return step


def ultimate(side: int, experts: int = 7) -> Callable[[], None]:
    config = parse(train_ultimate.Config, ["--demo", "--num-experts", str(experts)])
    model = train_ultimate.Segmenter(config, make_backbone(config.backbone, "none", scratch=True))
    model = model.to(memory_format=torch.channels_last)
    image = torch.rand(4, 3, side, side)
    mask = (image[:, 0] > 0.5).float()

    def step() -> None:
        terms = train_ultimate.loss_terms(config, model, model(image), mask)
        sum(term.sum() for term in terms.values()).backward()

    return step


def vqgan(side: int) -> Callable[[], None]:
    config = parse(train_vqgan.Config, ["--demo"])
    model, disc = train_vqgan.VQGAN(config).to(memory_format=torch.channels_last_3d), train_vqgan.Discriminators(config)
    batch = {"volume": torch.rand(1, 1, side, side, side), "slices": torch.rand(1, 3, config.slices)}

    def step() -> None:
        output = model(batch["volume"])
        model.quantizer.discard()
        terms = train_vqgan.reconstruction_terms(output, batch, None)
        terms |= train_vqgan.generator_terms(disc, output, batch, config)
        terms |= train_vqgan.discriminator_terms(disc, output, batch, {})[0]
        sum(term.sum() for term in terms.values()).backward()

    return step


def quantumgrav(atoms: int) -> Callable[[], None]:
    model = train_quantumgrav.CausalNet(parse(train_quantumgrav.Config, ["--demo"]), {"manifold_like": 1})
    sets = [make_set(i, seed=0, n_min=atoms, n_max=atoms)[0] for i in range(8)]
    labels = dict.fromkeys(train_quantumgrav.TASKS, 0.0)
    batch = train_quantumgrav.collate([{"id": i, "relations": relations, **labels} for i, relations in enumerate(sets)])

    def step() -> None:
        model(batch)["manifold_like"].sum().backward()

    return step


def grown(
    what: str, sizes: tuple[int, ...], make: Callable[[int], Callable[[], None]], power: int
) -> Iterator[timing.Result]:
    """Against `power` of the size times the cost of the first."""
    steps = [make(size) for size in sizes]
    for step in steps:
        step()
    rounds = []
    for _ in range(ROUNDS):
        spent = []
        for step in steps:
            began = time.process_time()
            step()
            spent.append((time.process_time() - began) * 1e3)
        rounds.append(spent)
    for number, size in enumerate(sizes):
        factor = (size / sizes[0]) ** power
        against = f"{factor:.3g} times the cost of {sizes[0]}" if number else ""
        found = timing.summary([(spent[number], spent[0] * factor) for spent in rounds])
        if number:
            yield timing.Result(what.format(size), against, unit="ms", **found)
        else:
            yield timing.Result(what.format(size), against, found["ours"], None, "ms")


def measure() -> Iterator[timing.Result]:
    torch.manual_seed(0)
    yield from grown("train_student.py, 2 crops, side {}", SIDES, student, 2)
    yield from grown("train_ultimate.py, 4 images, side {}", SIDES, ultimate, 2)
    yield from grown("train_ultimate.py, 4 images of side 96, {} experts", EXPERTS, lambda n: ultimate(96, n), 0)
    yield from grown("train_vqgan.py, 1 patch, side {}", PATCHES, vqgan, 3)
    yield from grown("train_quantumgrav.py, 8 sets, {} atoms", ATOMS, quantumgrav, 2)


if __name__ == "__main__":
    timing.show(measure())
