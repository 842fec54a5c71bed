"""Tiles with a halo: what a network reaches is measured rightly, and with such a halo tiles equal the whole volume."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from common.tiling import pad_to_cells, reach, tiled
from scripts import train_vqgan as job


def conv(kernel, stride=1, padding=None, inputs=2, outputs=2) -> nn.Conv3d:
    padding = tuple(k // 2 for k in kernel) if padding is None else padding
    return nn.Conv3d(inputs, outputs, kernel, stride, padding, padding_mode="replicate")


def up(stride) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(2, 2, tuple(4 if step == 2 else 3 for step in stride), stride, 1)


def analysed(layers: list[nn.Module], factor: tuple[int, int, int], *, upward: bool) -> tuple[int, ...]:
    """Cells that cell 0 depends on, from the last layer's places back to the first layer's."""
    found = []
    for axis, step in enumerate(factor):
        low, high = 0, step - 1 if upward else 0
        for layer in reversed([layer for layer in layers if hasattr(layer, "kernel_size")]):
            kernel, stride, padding = (value[axis] for value in (layer.kernel_size, layer.stride, layer.padding))
            if isinstance(layer, nn.ConvTranspose3d):
                low, high = math.ceil((low + padding - kernel + 1) / stride), (high + padding) // stride
            else:
                low, high = low * stride - padding, high * stride - padding + kernel - 1
        cell = 1 if upward else step
        found.append(max(-(low // cell), high // cell))
    return tuple(found)


STACKS = {
    "kernels": ([conv((3, 3, 3)), nn.SiLU(), conv((5, 3, 1)), conv((3, 1, 1))], (1, 1, 1), False, (4, 2, 1)),
    "one voxel": ([conv((1, 1, 1))], (1, 1, 1), False, (0, 0, 0)),
    "stride": ([conv((4, 4, 4), 2, 1), conv((3, 3, 3))], (2, 2, 2), False, (2, 2, 2)),
    "skipped voxels": ([conv((1, 1, 1), 2)], (2, 2, 2), False, (0, 0, 0)),  # some reach nothing at all
    "anisotropic": ([conv((4, 4, 3), (2, 2, 1), 1), conv((4, 3, 3), (2, 1, 1), 1)], (4, 2, 1), False, (1, 2, 2)),
    "beyond the first guess": ([conv((61, 1, 1))], (1, 1, 1), False, (30, 0, 0)),
    "upward": ([conv((3, 3, 3)), up((2, 2, 2)), conv((3, 3, 3))], (2, 2, 2), True, (2, 2, 2)),
    "upward anisotropic": ([up((2, 1, 2)), up((2, 2, 1)), conv((9, 1, 3))], (4, 2, 2), True, (2, 2, 2)),
}


@pytest.mark.parametrize("layers, factor, upward, wanted", STACKS.values(), ids=STACKS)
def test_reach_is_what_analysis_gives(layers, factor, upward, wanted):
    found = reach(nn.Sequential(*layers), 2, factor, upward=upward)
    assert found == analysed(layers, factor, upward=upward) == wanted


def test_a_layer_that_looks_at_everything_has_no_reach():
    assert reach(nn.Sequential(conv((3, 3, 3)), nn.GroupNorm(1, 2)), 2, (1, 1, 1), upward=False) is None
    assert reach(nn.Sequential(nn.GroupNorm(1, 2), up((2, 2, 2))), 2, (2, 2, 2), upward=True) is None


# ---------------------------------------------------------------------------------------------------------------------
# the network of train_vqgan


FACTOR, DIM = (4, 4, 2), 8


def network(part: str, norm: str) -> nn.Module:
    """A small encoder or decoder that is no longer as it begins: its blocks, which begin as the identity, do something, its
    weights are large enough that the outermost cells of what it sees count, and its running statistics are not 0 and 1."""
    config = job.Config(norm=norm, downsample=FACTOR, width=4, blocks=1)
    made = (job.Encoder if part == "encoder" else job.Decoder)(config, DIM).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                module.weight.normal_(std=1.5 / math.sqrt(module.weight[0].numel()), generator=rng)
                module.bias.normal_(std=0.1, generator=rng)
            elif isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(std=0.3, generator=rng)
                module.running_var.uniform_(0.3, 2, generator=rng)
    return made


def sizes(part: str) -> dict:
    return {"reads": FACTOR} if part == "encoder" else {"writes": FACTOR}


def halo_of(made: nn.Module, part: str) -> tuple[int, int, int] | None:
    return reach(made, 1 if part == "encoder" else DIM, FACTOR, upward=part == "decoder")


def volume_of(part: str, cells: tuple[int, int, int]) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    if part == "decoder":
        return torch.randn(1, DIM, *cells, generator=rng)
    return torch.rand(1, 1, *(side * step for side, step in zip(cells, FACTOR, strict=True)), generator=rng) * 2 - 1


def difference(made: nn.Module, part: str, cells, tile, halo) -> float:
    """Largest between tiles and the whole, in units of the result's spread."""
    volume = volume_of(part, cells)
    with torch.no_grad():
        whole = made(volume)
        parts = tiled(made, volume, tile=tile, halo=halo, **sizes(part))
    assert parts.shape == whole.shape and parts.dtype == whole.dtype
    return float((parts - whole).abs().max() / whole.std())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("norm", ["rms", "batch"])
def test_tiles_equal_the_whole(norm, part):
    """Measured: at most 2e-6."""
    made = network(part, norm)
    halo = halo_of(made, part)
    for cells, tile in [
        ((17, 2, 3), (1, 1, 1)),
        ((9, 7, 11), (2, 3, 4)),
        ((9, 7, 11), (9, 7, 3)),
        ((9, 7, 11), (50, 50, 50)),
        ((1, 2, 13), (4, 4, 4)),
    ]:
        assert difference(made, part, cells, tile, halo) < 1e-5, (cells, tile)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_narrower_halo_shows_seams(part):
    """So the halo is no wider than it must be, and the test above would notice one that is not wide enough."""
    made = network(part, "rms")
    halo = halo_of(made, part)
    for axis in range(3):
        cells, tile = ([long if place == axis else 5 for place in range(3)] for long in (17, 4))
        narrower = tuple(side - (place == axis) for place, side in enumerate(halo))
        assert difference(made, part, cells, tile, halo) < 1e-5
        assert difference(made, part, cells, tile, narrower) > 0.01, axis  # measured: 0.08 to 0.4


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_group_norm_cannot_be_tiled(part):
    made = network(part, "group")
    assert halo_of(made, part) is None
    assert difference(made, part, (12, 4, 4), (4, 4, 4), (4, 4, 4)) > 0.01


def test_each_cell_is_computed_once_and_tiles_stay_small():
    seen = []

    def watch(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[-3:])
        return part

    volume = torch.arange(2 * 7 * 10 * 9).view(2, 7, 10, 9)
    assert torch.equal(tiled(watch, volume, tile=(3, 4, 9), halo=(1, 2, 5)), volume)
    assert len(seen) == 3 * 3 * 1 and all(a <= 5 and b <= 8 and c <= 9 for a, b, c in seen)


# ---------------------------------------------------------------------------------------------------------------------
# filling up


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_the_last_planes_fill_up_the_cells(dtype):
    rng = torch.Generator().manual_seed(0)
    factor = (4, 4, 2)
    for shape in product((1, 4, 7), (5, 8), (3, 6)):
        volume = torch.randint(-1000, 1000, (1, 1, *shape), generator=rng).to(dtype)
        padded = pad_to_cells(volume, factor)
        sides = padded.shape[-3:]
        assert padded.dtype == dtype and all(side % step == 0 for side, step in zip(sides, factor, strict=True))
        assert all(0 <= new - old < step for new, old, step in zip(sides, shape, factor, strict=True))
        assert torch.equal(padded[..., : shape[0], : shape[1], : shape[2]], volume)
        for axis, side in zip((2, 3, 4), shape, strict=True):
            planes = padded.movedim(axis, 0)[side - 1 :]
            assert all(torch.equal(one, other) for one, other in pairwise(planes))
    assert pad_to_cells(volume[..., :4, :4, :2], factor).shape[-3:] == (4, 4, 2)  # nothing is added to whole cells
