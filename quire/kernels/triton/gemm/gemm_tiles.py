"""Tiles of the GEMM, by the number of tokens, the weight's height and the GPU. No choice here
changes a bit of the result (gemm.py says why)."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class GemmTiles:
    """`height` tokens by `width` rows of the weight (gate and up together); `halves` as in
    gemm_kernel."""

    height: int
    width: int
    num_warps: int
    num_stages: int
    halves: bool = False
    programs_per_sm: int = 1


# For Hopper, each with the share of the best one's speed that it reaches while all multiprocessors
# have work. Estimates until measured: run benchmarks/gpu/gemm.py.
LARGE = (
    (GemmTiles(128, 256, 8, 4, halves=True), 1.0),
    (GemmTiles(128, 128, 4, 3, halves=True, programs_per_sm=2), 0.85),
    (GemmTiles(64, 256, 4, 4), 0.8),
    (GemmTiles(64, 128, 4, 4, programs_per_sm=2), 0.7),
    (GemmTiles(64, 64, 4, 6, programs_per_sm=2), 0.45),
)
# Up to 64 tokens, where loading the weight is all that counts: the narrowest tile gives work to
# the most multiprocessors, wider ones load the tokens less often. By the weight's largest height.
SMALL = (
    (16384, GemmTiles(64, 32, 4, 8, programs_per_sm=2)),
    (65536, GemmTiles(64, 64, 4, 6, programs_per_sm=2)),
    (1 << 62, GemmTiles(64, 128, 4, 4, programs_per_sm=2)),
)


def block_k(itemsize: int) -> int:
    """Depth of a tile: 128 bytes, the width of the copy engine's swizzle. Never anything else."""
    return 128 // itemsize


def size_class(tokens: int) -> int:
    """The number of tokens that `tokens` choose tiles as: the next power of two, up to 2048 also
    three quarters of one.

    So few numbers of tokens use every variant of the kernel: those that steps are padded to, and
    one in each doubling above (DeviceRunner.warm), and none is compiled in between.
    """
    power = int(triton.next_power_of_2(tokens))
    between = power // 4 * 3
    return between if tokens <= between and power <= 2048 else power


def gemm_tiles(
    tokens: int,
    height: int,
    itemsize: int,
    sms: int,
    hopper: bool,
    shared: int,
    widened: bool = False,
) -> GemmTiles:
    """Tiles for a weight of `height` rows, alike for all numbers of tokens of a class.

    `shared`: bytes of shared memory a program may have. `widened`: the result is float32 and the
    operands are not, which leaves no room there for the largest tile's.
    """
    tokens = size_class(tokens)
    if itemsize == 4:  # multiply-adds: their order might follow the tile, so there is one
        return GemmTiles(64, 64, 4, 2)
    if not hopper:
        stages = 2 if shared < 98304 else 3
        return GemmTiles(64, 64, 4, stages) if tokens <= 64 else GemmTiles(128, 128, 8, stages)
    if tokens <= 64:
        return next(tiles for limit, tiles in SMALL if height <= limit)

    def cost(candidate: tuple[GemmTiles, float]) -> float:
        tiles, speed = candidate
        count = triton.cdiv(tokens, tiles.height) * triton.cdiv(height, tiles.width)
        waves = triton.cdiv(count, sms * tiles.programs_per_sm) * tiles.programs_per_sm
        return float(waves * tiles.height * tiles.width / speed)

    return min(LARGE[1:] if widened else LARGE, key=cost)[0]
