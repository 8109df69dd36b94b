"""The choice of each tile of the vocabulary, and its combination: greedy and plain sampling.

A tile's choice is found with scores relative to the tile's own maximum, so that one look at the
logits is enough; the tiles' choices are compared with scores relative to the row's maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.launch import let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.noise import noise_of, noise_of_tile
from quire.kernels.triton.sampling.slots import (
    FLAGS,
    INFINITY,
    IS_GREEDY,
    NO_TOKEN,
    TEMPERATURE,
    load_float,
    load_key,
    row_behind,
    sampling_slot,
    scaled,
)


@triton.jit
def _first_best(score, token):
    """The token with the largest score, the lowest of equals."""
    return tl.min(tl.where(score == tl.max(score), token, NO_TOKEN))


@triton.jit
def pick_of_tile(x, first, scalars_ptr, behind, NOISE: tl.constexpr, TILE: tl.constexpr):
    """(logit, token) chosen among the logits x [TILE // 4, 4] of the tokens from `first` on."""
    token = first + tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    score = x
    if NOISE:  # noqa: SIM102 (decided when this is compiled, the other when it runs)
        if tl.load(scalars_ptr + FLAGS) & IS_GREEDY == 0:
            temperature = load_float(scalars_ptr + TEMPERATURE)
            position, choice, low, high = load_key(scalars_ptr, behind)
            noise = noise_of_tile(first, position, choice, low, high, TILE)
            score = scaled(x, tl.max(x), temperature) + noise
    best = _first_best(score, token)
    return tl.max(tl.where(token == best, x, -INFINITY)), best


@triton.jit
def pick_of_row(x, token, largest, scalars_ptr, behind):
    """The token chosen among tiles' choices: logits x [N] of tokens [N]."""
    score = x
    if tl.load(scalars_ptr + FLAGS) & IS_GREEDY == 0:
        temperature = load_float(scalars_ptr + TEMPERATURE)
        position, choice, low, high = load_key(scalars_ptr, behind)
        score = scaled(x, largest, temperature) + noise_of(token, position, choice, low, high)
    return _first_best(score, token)


@triton.jit
def checked(x):
    """x with -inf for NaN, and its maximum, which is NaN where x holds NaN."""
    is_nan = x != x
    clean = tl.where(is_nan, -INFINITY, x)
    any_nan = tl.max(is_nan.to(tl.int32)) != 0
    return clean, tl.where(any_nan, float("nan"), tl.max(clean))


@triton.jit
def pick_tiles_kernel(
    logits_ptr,
    rows_ptr,
    scalars_ptr,
    tile_max_ptr,
    pick_ptr,
    pick_id_ptr,
    RECORD: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    NOISE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    if slot >= 0:
        first = tile * TILE
        token = first + tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        x = tl.load(logits_ptr + row * STRIDE + token, mask=token < V, other=-INFINITY)
        x, largest = checked(x.to(tl.float32))
        behind = row_behind(rows_ptr, row)
        scalars_ptr += slot * RECORD
        pick, pick_id = pick_of_tile(x, first, scalars_ptr, behind, NOISE, TILE)
        at = row * tl.num_programs(0) + tile
        tl.store(tile_max_ptr + at, largest)
        tl.store(pick_ptr + at, pick)
        tl.store(pick_id_ptr + at, pick_id)
