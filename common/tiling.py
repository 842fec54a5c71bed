"""Convolutions over a volume that does not fit in memory, tile by tile, equal to the whole where the network allows it.

A latent cell covers `factor` voxels along each axis. A tile is computed with a halo of neighbouring cells, which is cut off
again: with a halo as wide as the network sees, and no layer that looks at the whole volume (group norm does), no seam can
exist and the result is that of the whole volume."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Cells = tuple[int, int, int]


def pad_to_cells(volume: Tensor, factor: Cells) -> Tensor:
    """(..., X, Y, Z) with its last planes repeated until whole cells are full."""
    for axis, step in zip((-3, -2, -1), factor, strict=True):
        side = volume.shape[axis]
        if side % step:
            places = torch.arange(side + -side % step, device=volume.device).clamp(max=side - 1)
            volume = volume.index_select(axis, places)  # F.pad cannot repeat integers
    return volume


@torch.no_grad()
def reach(network: nn.Module, channels: int, factor: Cells, *, upward: bool) -> Cells | None:
    """Cells on each side of a place that its value depends on, along each axis; None when it depends on all of them.

    Measured with a NaN, which spreads as far as the network looks, in a volume of one cell's thickness. `upward`: the
    network makes voxels of cells, as a decoder does."""
    home, dtype = next(network.parameters()).device, torch.float32
    found = []
    for axis, step in enumerate(factor):
        for half in (24, 96, 384):
            count = 2 * half + 1
            cells = [1, 1, 1]
            cells[axis] = count
            shape = cells if upward else [n * f for n, f in zip(cells, factor, strict=True)]
            furthest = 0
            for phase in range(1 if upward else step):  # the voxels of a cell differ in what they reach
                probe = torch.zeros(1, channels, *shape, device=home, dtype=dtype)
                probe.select(2 + axis, half if upward else half * step + phase).fill_(torch.nan)
                touched = network(probe).isnan().movedim(2 + axis, 0).flatten(1).any(1).nonzero()[:, 0]
                if upward:
                    touched = touched.div(step, rounding_mode="floor")
                furthest = max([furthest, *(touched - half).abs().tolist()])
            if furthest < half:
                found.append(furthest)
                break
        else:
            return None
    return tuple(found)


def _windows(cells: Sequence[int], tile: Cells, halo: Cells) -> Iterator[tuple[list[slice], list[slice], list[slice]]]:
    """For each tile: the cells it computes from, the cells it keeps, and where these lie in what it computed."""
    starts = [range(0, side, step) for side, step in zip(cells, tile, strict=True)]
    for corner in itertools.product(*starts):
        keep = [slice(a, min(a + t, n)) for a, t, n in zip(corner, tile, cells, strict=True)]
        read = [slice(max(k.start - h, 0), min(k.stop + h, n)) for k, h, n in zip(keep, halo, cells, strict=True)]
        yield read, keep, [slice(k.start - r.start, k.stop - r.start) for k, r in zip(keep, read, strict=True)]


def _scaled(slices: Sequence[slice], factor: Cells) -> tuple:
    return (..., *(slice(s.start * f, s.stop * f) for s, f in zip(slices, factor, strict=True)))


def tiled(
    function: Callable[[Tensor], Tensor],
    volume: Tensor,
    *,
    tile: Cells,
    halo: Cells,
    reads: Cells = (1, 1, 1),
    writes: Cells = (1, 1, 1),
    device: torch.device | None = None,
) -> Tensor:
    """`function` of a volume (..., X, Y, Z), computed in tiles of `tile` cells on `device`; the result stays where the
    volume is. A cell is `reads` voxels of the volume and `writes` voxels of the result: an encoder reads and a decoder
    writes several. Memory grows with the tile and its halo, not with the volume."""
    cells = [side // step for side, step in zip(volume.shape[-3:], reads, strict=True)]
    result = None
    for read, keep, inner in _windows(cells, tile, halo):
        part = function(volume[_scaled(read, reads)].to(device or volume.device))[_scaled(inner, writes)]
        if result is None:
            shape = [side * step for side, step in zip(cells, writes, strict=True)]
            result = torch.empty(*part.shape[:-3], *shape, dtype=part.dtype, device=volume.device)
        result[_scaled(keep, writes)] = part.to(volume.device)
    return result
