"""Tile sizes of the attention kernels, by head size, number format and GPU.

What Triton makes of `stages`, which these numbers count on: with n > 1 a loop has n - 1 tiles of
keys and values in shared memory, n where the MMA reads them from there (wgmma), and the copy of a
tile starts after the computation n - 1 tiles before it. So 2 stages overlap nothing within a
program; it takes 3, or several programs on a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton

HOPPER = (9, 0)


@dataclass(frozen=True)
class Target:
    """What tile sizes depend on: bytes of shared memory that a program can have, and whether MMAs
    are Hopper's wgmma or AMD's."""

    shared: int
    wgmma: bool = False
    amd: bool = False


@dataclass(frozen=True)
class Tiles:
    """`rows` of the MMA (queries x heads of a group), `keys` of a step of the inner loop, `piece`:
    tokens of a unit of decode's work, in deterministic mode the same as `keys`; `together`:
    programs that a multiprocessor holds at once, by shared memory; `registers`: a thread's, where
    the compiler must be told so that they are as many."""

    rows: int
    keys: int
    piece: int
    warps: int
    stages: int
    together: int = 1
    registers: int | None = None

    @property
    def meta(self) -> dict[str, int]:
        """Options to launch with."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


@cache
def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(shared=166912)
    index = torch.cuda.current_device() if device.index is None else device.index
    found = triton.runtime.driver.active.utils.get_device_properties(index)
    if torch.version.hip is not None:
        return Target(shared=found["max_shared_mem"], amd=True)
    capability = torch.cuda.get_device_capability(device)
    return Target(shared=found["max_shared_mem"], wgmma=capability == HOPPER)


def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def columns(head_size: int) -> int:
    """A head's values in a tile: MMAs want a power of two, of 16 at least."""
    return max(16, power_of_2(head_size))


def _deterministic_keys(head_size: int) -> int:
    """A piece is a tile of 128 keys: fewer would merge more often, more do not fit registers beside
    two accumulators. Half of it for heads above 128, for shared memory."""
    return 128 if columns(head_size) <= 128 else 64


def decode_tiles(
    group: int, head_size: int, itemsize: int, target: Target, deterministic: bool, cached: int = 0
) -> Tiles:
    """Tiles of the decode kernels. `cached`: bytes of a value in the cache where they are not
    `itemsize`, those of queries: more programs fit then, each with a tile of decoded values more.

    One warp and tiles of 8 KiB of keys and as much of values, three of them in flight: four
    programs fill a Hopper multiprocessor's shared memory. With four warps and tiles twice as large
    one request of 3,000 tokens took 18 us a layer on an H200, with one warp 12: warps wait for each
    other in every tile. Pieces of 64 tokens, so that one request occupies many programs.

    Deterministic: 64 rows and 4 warps, one wgmma of Hopper, as the varlen kernel has (elsewhere
    one shape for both). A tile is too large for three stages, so it has one, and other programs on
    the multiprocessor read while this one computes.

    fp32 is for tests: its products are scalar, and small tiles compile sooner.
    """
    rows = max(16, power_of_2(group))
    width = columns(head_size) * itemsize
    if itemsize == 4:
        return Tiles(rows, 32, 32 if deterministic else 64, 4 if deterministic else 1, 1)
    if deterministic:
        keys = _deterministic_keys(head_size)
        rows = max(64, rows)
        together = min(3, max(1, target.shared // ((2 * keys + rows) * width + 4096)))
        registers = 168 if together == 3 and not target.amd else None  # 65,536 for 3 x 128 threads
        return Tiles(rows, keys, keys, 4, 1, together, registers)
    keys = min(128, max(16, 8192 // width))
    stages = 1 if target.amd else 4
    buffered = 2 * keys * max(1, stages - 1)
    taken = buffered * columns(head_size) * (cached or itemsize) + rows * width
    taken += keys * width if 0 < cached < itemsize else 0
    together = min(8, max(1, target.shared // (taken + 1024)))
    return Tiles(rows, keys, max(64, keys), 1, stages, together)


def head_tiles(heads: int, target: Target, deterministic: bool) -> int:
    """How many equal tiles the query heads that share a latent are cut into, each with as many as
    latent_tiles has rows for."""
    most = 64 if target.wgmma and not deterministic else 16
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= most)


def latent_tiles(group: int, itemsize: int, target: Target, deterministic: bool) -> Tiles:
    """Tiles of the kernels for latents, of up to 512 values and some more: decode and varlen have
    the same.

    Hopper: 64 rows, which two warpgroups share by columns of values, and 64 keys, of which two
    tiles of 72 KiB fit beside 72 KiB of queries. Elsewhere 16 rows, for which every MMA will do;
    deterministic, too, as a state of 64 rows that is left for every piece passes through 128 KiB of
    shared memory.
    """
    rows = max(16, power_of_2(group))
    if itemsize == 4:
        return Tiles(rows, 32, 32, 4, 1)
    if target.wgmma and not deterministic:
        return Tiles(max(64, rows), 64, 64, 8, 2)
    if target.amd:
        return Tiles(rows, 16, 16, 4, 1)
    # 88 KiB with two stages; registers allow two programs, too.
    together = max(1, min(2, target.shared // 92_000))
    return Tiles(rows, 32, 32, 4, 2 if target.shared > 110_000 else 1, together)


def varlen_tiles(
    group: int, head_size: int, itemsize: int, target: Target, deterministic: bool, small: bool
) -> Tiles:
    """Tiles of the varlen kernel. `small`: so few queries that tall tiles leave multiprocessors
    idle.

    On Hopper 128 rows are two warpgroups with 64 rows each: one's MMAs run beside the other's
    softmax. 128 keys where shared memory and registers allow; 64 for heads up to 64, of which then
    two programs fit, since exponentials, not MMAs, are their bottleneck. Deterministic: height is
    free, as a warpgroup's MMA is the same, and keys are decode's.

    Elsewhere: a tile that fits; deterministic, decode's, as layouts follow the shape.
    """
    fixed = decode_tiles(group, head_size, itemsize, target, True)
    if itemsize == 4 or (deterministic and not target.wgmma):
        return fixed
    width = columns(head_size) * itemsize
    least = power_of_2(group)
    rows = max(64 if small else 128, least)
    if target.wgmma:
        keys = fixed.keys if deterministic else 64 if small or width <= 128 else 128
        stages = 3
        if width > 256 and not small:
            # Queries alone take 64 KiB: 2 stages of 64 keys would fit, or 4 of 32.
            keys, stages = (keys, 2) if deterministic else (32, 4)
        return Tiles(rows, keys, keys, rows // 16, stages)
    keys = 64 if width <= 256 else 32
    if target.amd:
        return Tiles(rows, keys, keys, 4, 1)
    rows = rows if target.shared > 110_000 else max(64, least)
    stages = 3 if (4 * keys + rows) * width + 4096 <= target.shared else 2
    return Tiles(rows, keys, keys, rows // 16, stages)
