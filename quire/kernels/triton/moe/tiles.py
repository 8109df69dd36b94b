"""Tiles of the grouped GEMM, chosen from shapes and the target's shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """A program's tile of the output, [rows, columns], and the `depth` of a step over K. A gated
    product has `columns` columns of the gate and as many of up. `weight_tall`: the weight fills the
    tall side of the matrix instruction (64 on Hopper) and the tokens its narrow one."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    weight_tall: bool = False


# Hopper, 16-bit values: (gate and up, down) by rows. Weights are read from memory once per block
# of rows, so low tiles want many bytes in flight (two programs of about 100 KB on each
# multiprocessor) and high ones much arithmetic for each byte that they move to shared memory.
TILES = {
    16: (Tile(16, 64, 64, 4, 5, True), Tile(16, 128, 64, 4, 5, True)),
    32: (Tile(32, 64, 64, 4, 5, True), Tile(32, 128, 64, 4, 5, True)),
    64: (Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)),
    128: (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3)),
}
# Deterministic mode has no other path for so few pairs, whose tiles of full width would not occupy
# all multiprocessors. Width changes no sum: the order over K and the instruction's depth stay.
FEW_PAIRS = 32
# IEEE float32 products run on the plain arithmetic units: one small tile, correct rather than fast.
FLOAT32 = (Tile(32, 32, 32, 4, 2), Tile(32, 64, 32, 4, 2))


@cache
def has_tensor_maps(device: torch.device) -> bool:
    """The bulk tensor copy engine (TMA) of Hopper and later; the interpreter knows its meaning."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def fit(tile: Tile, gated: bool, itemsize: int, shared: int) -> Tile:
    """The tile with fewer stages, then fewer columns, until its stages fit in shared memory."""
    while True:
        stage = (tile.rows + tile.columns * (1 + gated)) * tile.depth * itemsize
        # 4 KB for barriers and what the epilogue's change of layout may need beyond the stages.
        if stage * tile.stages + 4096 <= shared:
            return tile
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            tile = replace(tile, columns=tile.columns // 2)


def tiles(
    pairs: int, experts: int, dtype: torch.dtype, *, deterministic: bool, shared: int
) -> tuple[Tile, Tile]:
    """The tiles for gate and up, and for down, of `pairs` pairs over `experts` experts.

    Both have the same rows, since both work on the same blocks: enough that with tokens spread
    evenly few experts need a second block, which would read the weights again. Deterministic mode
    starts at 64 rows, where Hopper has one instruction with the tokens on its tall side: lower
    tiles take another, or this one the other way round, and their sums may differ in the last
    bit. 128 rows are the same instruction in two warp groups.
    """
    expected = pairs / experts
    if expected <= 8 and not deterministic:
        rows = 16
    elif expected <= 20 and not deterministic:
        rows = 32
    elif expected <= 64:
        rows = 64
    else:
        rows = 128
    gate_up, down = TILES[rows]
    if deterministic and pairs <= FEW_PAIRS:
        gate_up = replace(gate_up, columns=gate_up.columns // 2)
        down = replace(down, columns=down.columns // 2)
    if dtype == torch.float32:
        gate_up, down = FLOAT32
    return (
        fit(gate_up, True, dtype.itemsize, shared),
        fit(down, False, dtype.itemsize, shared),
    )
