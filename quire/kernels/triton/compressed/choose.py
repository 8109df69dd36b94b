"""The best of each token's scores, exactly, without sorting them.

Scores are compared by int32 keys, smaller is better (sampling/likely.py). A cut is searched: the
least key that as many entries as wanted do not exceed. For that a program holds TILE keys in
registers. Of a token with more entries it holds the best of every TILE-th one: at least as many
entries as wanted are as good as the cut among these, and hardly more. Those are listed, and the cut
is searched among them. Counts are integers, so nothing depends on an order of additions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.launch import let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.likely import raw_key

_ABSENT = tl.constexpr(2**31 - 1)
_BEFORE_ALL = tl.constexpr(-(2**31) - 1)


@triton.jit
def _keys(scores_ptr, index, visible):
    """Keys of the scores `index`; those of NaN are of -inf, those past `visible` behind all."""
    score = tl.load(scores_ptr + index, mask=index < visible, other=0.0)
    key = raw_key(tl.where(score != score, float("-inf"), score))
    return tl.where(index < visible, key, _ABSENT)


@triton.jit
def _narrow(low, high, few, many, middle, found, COUNT: tl.constexpr):
    """The bracket after `found` keys were counted up to its middle: of its ends, and of how many
    keys are up to them, `few` < COUNT <= `many`."""
    reached = found >= COUNT
    high = tl.where(reached, middle, high)
    many = tl.where(reached, found, many)
    low = tl.where(reached, low, middle)
    few = tl.where(reached, few, found)
    return low, high, few, many


@triton.jit
def _ties(few, many, COUNT: tl.constexpr):
    """How many keys that equal the cut are chosen."""
    return tl.where(many == COUNT, COUNT, COUNT - few)


@triton.jit
def _search(keys, high, many, COUNT: tl.constexpr):
    """Of keys in registers, of which `many` are up to `high`: (the cut, how many of those that
    equal it are chosen)."""
    low, few = tl.min(keys).to(tl.int64) - 1, many * 0
    while (high - low > 1) & (many != COUNT):
        middle = (low + high) >> 1
        found = tl.sum((keys <= middle.to(tl.int32)).to(tl.int32))
        low, high, few, many = _narrow(low, high, few, many, middle, found, COUNT)
    return high.to(tl.int32), _ties(few, many, COUNT)


@triton.jit
def _append(chosen_ptr, key, entry, cut, ties, better_before, ties_before):
    """Write the chosen among entries [N], which are in ascending order: keys before the cut, and
    the first `ties` of those that equal it. Returns how many of both kinds there were."""
    better, tie = (key < cut).to(tl.int32), (key == cut).to(tl.int32)
    counts = tl.cumsum(better + (tie << 16), 0)  # both at once
    better_to, ties_to = better_before + (counts & 0xFFFF), ties_before + (counts >> 16)
    place = better_to + tl.minimum(ties_to, ties) - 1
    chosen = (better > 0) | ((tie > 0) & (ties_to <= ties))
    tl.store(chosen_ptr + place, entry, mask=chosen)
    return better_before + tl.sum(better), ties_before + tl.sum(tie)


@triton.jit
def _choose_listed(
    chosen_ptr, scores_ptr, list_key_ptr, list_entry_ptr, visible, bound,
    COUNT: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The choice among scores of more than a tile, by a list of those with keys up to `bound`."""
    each = tl.arange(0, TILE)
    listed = visible * 0
    for start in range(0, visible, TILE):
        key = _keys(scores_ptr, start + each, visible)
        wanted = (key <= bound).to(tl.int32)
        more = tl.sum(wanted)
        if more > 0:
            place = listed + tl.cumsum(wanted, 0) - 1
            kept = (wanted > 0) & (place < LISTED)
            tl.store(list_key_ptr + place, key, mask=kept)
            tl.store(list_entry_ptr + place, start + each, mask=kept)
        listed += more
    tl.debug_barrier()  # the list is read by other threads than wrote it
    if listed <= LISTED:
        place = tl.arange(0, LISTED)
        key = tl.load(list_key_ptr + place, mask=place < listed, other=_ABSENT)
        entry = tl.load(list_entry_ptr + place, mask=place < listed, other=0)
        cut, ties = _search(key, bound.to(tl.int64), listed, COUNT)
        _append(chosen_ptr, key, entry, cut, ties, 0, 0)
    else:  # more of one score than there is room for
        low, high = tl.full([], _BEFORE_ALL, tl.int64), bound.to(tl.int64)
        few, many = visible * 0, listed
        while (high - low > 1) & (many != COUNT):
            middle = (low + high) >> 1
            found = visible * 0
            for start in range(0, visible, TILE):
                key = _keys(scores_ptr, start + each, visible)
                found += tl.sum((key <= middle.to(tl.int32)).to(tl.int32))
            low, high, few, many = _narrow(low, high, few, many, middle, found, COUNT)
        ties = _ties(few, many, COUNT)
        better_before, ties_before = visible * 0, visible * 0
        for start in range(0, visible, TILE):
            key = _keys(scores_ptr, start + each, visible)
            better_before, ties_before = _append(
                chosen_ptr, key, start + each, high.to(tl.int32), ties, better_before, ties_before
            )


@triton.jit(do_not_specialize=["first_token", "score_stride"])
def choose_kernel(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    list_key_ptr,
    list_entry_ptr,
    chosen_ptr,
    first_token,
    score_stride,
    RATIO: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The COUNT best entries of one token, or all: int32 [WIDTH] in ascending order, then -1.
    LISTED: entries that its list has room for; 0 where no token has more than TILE entries."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64)
    token = first_token + at
    chosen_ptr += token * WIDTH
    row = tl.load(rows_ptr + token)
    position = tl.load(positions_ptr + token)
    visible = tl.where(row >= 0, (position + 1) // RATIO, 0).to(tl.int32)
    if visible <= COUNT:
        column = tl.arange(0, COLUMNS)
        tl.store(chosen_ptr + column, tl.where(column < visible, column, -1), mask=column < WIDTH)
    else:
        scores_ptr += at * score_stride
        each = tl.arange(0, TILE)
        best = _keys(scores_ptr, each, visible)
        if LISTED:
            for start in range(TILE, visible, TILE):
                best = tl.minimum(best, _keys(scores_ptr, start + each, visible))
        worst = tl.max(tl.where(best < _ABSENT, best, -(2**31))).to(tl.int64)
        cut, ties = _search(best, worst, tl.minimum(visible, TILE), COUNT)
        if visible <= TILE:
            _append(chosen_ptr, best, each, cut, ties, 0, 0)
        elif LISTED:
            _choose_listed(
                chosen_ptr, scores_ptr, list_key_ptr + at * LISTED, list_entry_ptr + at * LISTED,
                visible, cut, COUNT, TILE, LISTED,
            )  # fmt: skip
