"""Windows of tokens pooled into entries of a cache, and the rows that open windows will need.

Two launches: the first reads the state that the second writes, where its rows of this step may
take the places of rows that a window still needs. Each program of the second waits for the whole
of the first (quire/kernels/triton/launch.py), so programmatic dependent launch does not let them
race. Only where a step has so few tokens that no request can have a row in the way, one launch
does both (one_launch_does).

A window's sums are always made from the same tiles in the same order, wherever its rows come from:
however a sequence is cut, entries have the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.triton.compressed.rotate_pairs import turn_pairs
from quire.kernels.triton.compressed.store_entry import entry_constants, store_entry
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.norm.rms_norm import _normalise


@triton.jit
def _keep_row(
    rows_ptr, places_ptr, ring_ptr, token, position,
    STRIDE: tl.constexpr, W: tl.constexpr, RATIO: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A token's values, and its logits with those of its place, into its request's state."""
    column = tl.arange(0, BLOCK_W)
    inside = column < W
    from_ptr = rows_ptr + token * STRIDE + column
    to_ptr = ring_ptr + position % LENGTH * (2 * W) + column
    values = tl.load(from_ptr, mask=inside, other=0.0).to(tl.float32)
    logits = tl.load(from_ptr + W, mask=inside, other=0.0).to(tl.float32)
    logits += tl.load(places_ptr + position % RATIO * W + column, mask=inside, other=0.0)
    tl.store(to_ptr, values, mask=inside)
    tl.store(to_ptr + W, logits, mask=inside)


@triton.jit
def _pool(
    rows_ptr, places_ptr, ring_ptr, token, position, before,
    STRIDE: tl.constexpr, D: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entry [1, BLOCK] that a token completes, `before` tokens of its request lying before it
    in this step: values weighted by a softmax over the window, each channel by itself."""
    SPAN: tl.constexpr = 2 * RATIO if OVERLAP else RATIO
    W: tl.constexpr = 2 * D if OVERLAP else D
    column = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    largest = tl.full([ROWS, BLOCK], -3e38, tl.float32)  # finite, so that no difference is NaN
    weights = tl.zeros([ROWS, BLOCK], tl.float32)
    totals = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, SPAN, ROWS):
        place = first + tl.arange(0, ROWS)[:, None]
        back = SPAN - 1 - place
        # What would lie before the sequence's beginning does not count.
        exists = (back >= 0) & (back <= position)
        here = exists & (back <= before) & (column < D)
        there = exists & (back > before) & (column < D)
        half = place // RATIO * (W - D)  # a product, so that loads are known to be aligned
        row_ptrs = rows_ptr + (token - back) * STRIDE + half + column
        ring_ptrs = ring_ptr + (position - back) % LENGTH * (2 * W) + half + column
        place_ptrs = places_ptr + place % RATIO * W + half + column
        new_logits = tl.load(row_ptrs + W, mask=here, other=0.0).to(tl.float32)
        new_logits += tl.load(place_ptrs, mask=here, other=0.0)
        old_logits = tl.load(ring_ptrs + W, mask=there, other=0.0)
        new_values = tl.load(row_ptrs, mask=here, other=0.0).to(tl.float32)
        old_values = tl.load(ring_ptrs, mask=there, other=0.0)
        logits = tl.where(here, new_logits, old_logits)
        values = tl.where(here, new_values, old_values)
        logits = tl.where(exists, logits, largest)
        # One exponential serves, whichever of the two is the larger.
        smaller = tl.where(exists, tl.exp(-tl.abs(logits - largest)), 0.0)
        grows = logits > largest
        old_factor, new_factor = tl.where(grows, smaller, 1.0), tl.where(grows, 1.0, smaller)
        weights = weights * old_factor + new_factor
        totals = totals * old_factor + values * new_factor
        largest = tl.maximum(largest, logits)
    factors = tl.exp(largest - tl.max(largest, axis=0, keep_dims=True))
    total = tl.sum(totals * factors, axis=0, keep_dims=True)
    return total / tl.sum(weights * factors, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["tokens", "each"])
def pool_kernel(
    rows_ptr,
    places_ptr,
    state_ptr,
    norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    request_ptr,
    query_start_ptr,
    state_slots_ptr,
    slots_ptr,
    cache_ptr,
    tokens,
    each,
    eps,
    STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    LENGTH: tl.constexpr,
    KEEP: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Entries of `each` neighbouring tokens; most complete none."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    W: tl.constexpr = 2 * D if OVERLAP else D
    begin = tl.program_id(0) * each
    for index in range(begin, tl.minimum(begin + each, tokens)):
        token = tl.cast(index, tl.int64)
        request = tl.load(request_ptr + token)
        position = tl.load(positions_ptr + token).to(tl.int32)
        slot = tl.load(slots_ptr + token)
        state_slot = tl.load(state_slots_ptr + request, mask=request >= 0, other=-1)
        if state_slot >= 0:
            ring_ptr = state_ptr + state_slot.to(tl.int64) * STATE_STRIDE
            if KEEP:
                _keep_row(
                    rows_ptr, places_ptr, ring_ptr, token, position,
                    STRIDE, W, RATIO, LENGTH, 2 * BLOCK if OVERLAP else BLOCK,
                )  # fmt: skip
            if (position % RATIO == RATIO - 1) & (slot >= 0):
                before = (token - tl.load(query_start_ptr + request)).to(tl.int32)
                y = _pool(
                    rows_ptr, places_ptr, ring_ptr, token, position, before,
                    STRIDE, D, RATIO, OVERLAP, LENGTH, ROWS, BLOCK,
                )  # fmt: skip
                column = tl.arange(0, BLOCK)[None, :]
                norm = tl.load(norm_ptr + column, mask=column < D, other=0.0)
                y = _normalise(y, norm, eps, D)
                table_ptr = cos_sin_ptr + (position - (RATIO - 1)).to(tl.int64) * ROTARY
                y = turn_pairs(y, table_ptr, D - ROTARY, ROTARY // 2, False)
                store_entry(y, cache_ptr, slot // RATIO, KIND, D, ROTARY, WIDTH)


@triton.jit
def keep_kernel(
    rows_ptr,
    places_ptr,
    state_ptr,
    positions_ptr,
    request_ptr,
    context_len_ptr,
    state_slots_ptr,
    STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr,
    W: tl.constexpr,
    RATIO: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last LENGTH rows of each request, so that no two have the same place."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + token)
    position = tl.load(positions_ptr + token).to(tl.int32)
    state_slot = tl.load(state_slots_ptr + request, mask=request >= 0, other=-1)
    end = tl.load(context_len_ptr + request, mask=request >= 0, other=0)
    if (state_slot >= 0) & (position >= end - LENGTH):
        ring_ptr = state_ptr + state_slot.to(tl.int64) * STATE_STRIDE
        _keep_row(
            rows_ptr, places_ptr, ring_ptr, token, position,
            STRIDE, W, RATIO, LENGTH, BLOCK_W,
        )  # fmt: skip


def tile_sizes(span: int, block: int) -> dict[str, int]:
    """Rows of a window that are pooled at once, and warps. They decide the order of sums, so they
    depend on nothing else.

    16 values a thread: with logits, and both of where they can come from, as many as keep the bus
    busy without spilling; 16 warps are the most that AMD's 64 lanes allow.
    """
    rows = min(triton.next_power_of_2(span), max(1, 8192 // block))
    return {"ROWS": rows, "num_warps": min(16, max(1, rows * block // 512))}


def one_launch_does(tokens: int, span: int, length: int) -> bool:
    """Whether a step's rows cannot take the places of those that its windows need. A request's new
    rows lie at its first position and at most `tokens` - 1 behind; a window that needs rows from
    before begins at most `span` - 1 before it; and positions less than the state's `length` apart
    have different places there."""
    return tokens + span - 1 <= length


def tokens_each(tokens: int, ratio: int) -> int:
    """Tokens of a program, at most about 256 programs in steps that are not long, since one that
    looks at a token and leaves costs less than another program. In long steps they are mostly
    neighbours of one request, of which one in `ratio` completes an entry."""
    return min(ratio, 16, max(1, tokens // 256))


def compress(
    rows_T2W: torch.Tensor,
    positions_RW: torch.Tensor,
    state_SR2W: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    tokens: StepTokens,
    slots_T: torch.Tensor,
    cache: Paged,
    ratio: int,
    overlap: bool,
) -> None:
    """Pool the windows that the step's tokens complete into entries of the cache, normed and
    rotated by the position of their first token, and keep the step's rows in `state`
    (quire/kernels/reference/compressed/compress.py).

    rows float32 or bfloat16, tokens as far apart as one likes: values and logits of each token, to
    whose logits `positions` float32 [ratio, W] are added by place in the window. state float32,
    requests as far apart as one likes. slots int64 [T]: those of the tokens, of which an entry has
    `ratio`; where one is negative, no entry is written. Computed in float32 and rounded once, in
    the cache. Raises ValueError for another layout, a state shorter than what an entry pools, or a
    cache for other vectors.
    """
    count, _, width = rows_T2W.shape
    size, length = len(norm_D), state_SR2W.shape[1]
    span = 2 * ratio if overlap else ratio
    if width != (2 * size if overlap else size) or positions_RW.shape != (ratio, width):
        raise ValueError(
            f"rows {list(rows_T2W.shape)}, positions {list(positions_RW.shape)} and a norm of "
            f"{size} do not fit together"
        )
    if state_SR2W.shape[2:] != (2, width) or length < span:
        raise ValueError(f"state: {list(state_SR2W.shape)} has not {span} rows [2, {width}]")
    if (count and rows_T2W.stride()[1:] != (width, 1)) or not positions_RW.is_contiguous():
        raise ValueError("rows of tokens, or of positions, are not contiguous")
    if state_SR2W.stride()[1:] != (2 * width, width, 1):
        raise ValueError("state: rows of a request are not contiguous")
    constants = entry_constants(cache, size, cos_sin.shape[1])
    shared = {
        "STRIDE": rows_T2W.stride(0), "STATE_STRIDE": state_SR2W.stride(0), "RATIO": ratio,
        "LENGTH": length,
    }  # fmt: skip
    at_once = one_launch_does(count, span, length)
    each = tokens_each(count, ratio)
    launch(
        pool_kernel,
        (triton.cdiv(count, each),),
        rows_T2W.device,
        rows_T2W,
        positions_RW,
        state_SR2W,
        norm_D,
        cos_sin,
        tokens.positions,
        tokens.rows,
        tokens.query_start,
        tokens.state_slots,
        slots_T,
        cache.memory,
        count,
        each,
        eps,
        OVERLAP=overlap,
        KEEP=at_once,
        **shared,
        **constants,
        **tile_sizes(span, constants["BLOCK"]),
    )
    if not at_once:
        block = triton.next_power_of_2(width)
        launch(
            keep_kernel,
            (count,),
            rows_T2W.device,
            rows_T2W,
            positions_RW,
            state_SR2W,
            tokens.positions,
            tokens.rows,
            tokens.context_len,
            tokens.state_slots,
            W=width,
            BLOCK_W=block,
            num_warps=min(8, max(1, block // 256)),
            **shared,
        )
