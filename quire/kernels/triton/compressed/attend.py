"""Attention of each token to keys of its own, which are values too: a window of the tokens before
it, and compressed entries.

A program has one token and a tile of its heads, and goes through the token's keys tile by tile:
first the window's, then the entries'. Which keys make a tile, and their order, depends on the token
alone. Where tokens are few the tiles are divided among programs, whose states merge_states_kernel
puts together (attention/tile.py has the arithmetic).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.line import leave
from quire.kernels.triton.attention.tile import extend, merge, normalised
from quire.kernels.triton.compressed.stored import load_keys, slots_of
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _places(
    tile, window_tiles, window_table_ptr, entry_table_ptr, chosen_ptr, oldest, in_window, entries,
    RATIO: tl.constexpr, WINDOW_BLOCK: tl.constexpr, ENTRY_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(slots of a tile's keys, which of them exist)."""
    within = tl.arange(0, TILE)
    index = tile * TILE + within
    wanted = index < in_window
    slot = slots_of(window_table_ptr, oldest + index, wanted, WINDOW_BLOCK)
    if RATIO > 0:
        key = (tile - window_tiles) * TILE + within
        is_entry = (key >= 0) & (key < entries)
        if chosen_ptr is not None:
            key = tl.load(chosen_ptr + key, mask=is_entry, other=-1).to(tl.int32)
            is_entry = key >= 0
        slot_of_entry = slots_of(entry_table_ptr, key, is_entry, ENTRY_BLOCK)
        slot = tl.where(tile < window_tiles, slot, slot_of_entry)
        wanted = wanted | is_entry
    return slot, wanted


@triton.jit
def _entries_of(position, chosen_ptr, RATIO: tl.constexpr, CHOSEN: tl.constexpr,
                CHOSEN_COLUMNS: tl.constexpr):  # fmt: skip
    """How long a token's list of entries is: to the last that is one."""
    count = position * 0
    if RATIO > 0:
        count = (position + 1) // RATIO
        if chosen_ptr is not None:
            place = tl.arange(0, CHOSEN_COLUMNS)
            chosen = tl.load(chosen_ptr + place, mask=place < CHOSEN, other=-1)
            count = tl.where(position >= 0, tl.max(tl.where(chosen >= 0, place + 1, 0)), 0)
    return count


@triton.jit
def _turn_of(cos_sin_ptr, position, D: tl.constexpr, ROTARY: tl.constexpr, COLUMNS: tl.constexpr):
    """(cosine, sine) [COLUMNS / 2] of the angle that each pair of values has turned by."""
    pair = tl.arange(0, COLUMNS // 2) - (D - ROTARY) // 2
    turns = (pair >= 0) & (pair < ROTARY // 2)
    table_ptr = cos_sin_ptr + position * ROTARY + pair
    cosine = tl.load(table_ptr, mask=turns, other=1.0)
    sine = tl.load(table_ptr + ROTARY // 2, mask=turns, other=0.0)
    return cosine, sine


@triton.jit
def _write(
    out_ptr, sinks, turn, head, kept, m, weight, acc, factor,
    D: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The result of the heads `kept` of a token; its last ROTARY values are rotated back by
    `turn`."""
    COLUMNS: tl.constexpr = acc.shape[1]
    result = normalised(m, weight, acc, sinks, factor, True)
    if ROTARY > 0:
        cosine, sine = turn[0][None, :], turn[1][None, :]
        a, b = tl.split(tl.reshape(result, (acc.shape[0], COLUMNS // 2, 2)))
        turned = tl.join(a * cosine + b * sine, b * cosine - a * sine)
        result = tl.reshape(turned, (acc.shape[0], COLUMNS))
    d = tl.arange(0, COLUMNS)
    out = out_ptr + head[:, None] * D + d[None, :]
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=kept[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["window_stride", "entry_stride", "splits"])
def sparse_attention_kernel(
    q_ptr,
    positions_ptr,
    rows_ptr,
    window_ptr,
    window_turned_ptr,
    window_tables_ptr,
    entries_ptr,
    entries_turned_ptr,
    entry_tables_ptr,
    chosen_ptr,
    sinks_ptr,
    cos_sin_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    window_stride,
    entry_stride,
    splits,
    factor,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    ENTRY_BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_STRIDE: tl.constexpr,
    CHOSEN_COLUMNS: tl.constexpr,
    ROTARY: tl.constexpr,
    SPLIT: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """GROUP heads of one token, all its keys or, with SPLIT, one of `splits` parts of them. SIZE:
    tokens of the window. RATIO: tokens of an entry, 0 where there are no entries."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    head_tile = tl.program_id(0) % HEAD_TILES
    token = tl.program_id(0) // HEAD_TILES
    member = tl.arange(0, TILE_ROWS)
    d = tl.arange(0, D_COLUMNS)
    in_group = member < GROUP
    head = head_tile * GROUP + member
    inside = in_group[:, None] & (d < D)[None, :]
    inner = head[:, None] * D + d[None, :]
    m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
    out_token = out_ptr + token.to(tl.int64) * OUT_STRIDE
    row = tl.load(rows_ptr + token)
    if not SPLIT and row < 0:
        tl.store(out_token + inner, acc.to(out_ptr.dtype.element_ty), mask=inside)
        return

    # Few tokens, which are divided, take as long as the chain of reads to the first key. So theirs
    # of row, position and choice are issued together: padding has no branch, but no key.
    position = tl.where(row >= 0, tl.load(positions_ptr + token), -1).to(tl.int32)
    oldest = tl.maximum(position - (SIZE - 1), 0)
    in_window = position - oldest + 1
    if chosen_ptr is not None:
        chosen_ptr += token.to(tl.int64) * CHOSEN_STRIDE
    entries = _entries_of(position, chosen_ptr, RATIO, CHOSEN, CHOSEN_COLUMNS)
    window_tiles = tl.cdiv(in_window, TILE)
    begin, end = window_tiles * 0, window_tiles + tl.cdiv(entries, TILE)
    if SPLIT:
        part = tl.cdiv(end, splits)
        begin = tl.program_id(1) * part
        end = tl.minimum(begin + part, end)
        state = tl.program_id(0) * splits + tl.program_id(1)
        if begin >= end:
            # A sum of 0 tells that there is no state.
            tl.store(sums_ptr + state.to(tl.int64) * (2 * GROUP) + GROUP + member, weight, in_group)
            return

    window_table_ptr = window_tables_ptr + row * window_stride
    entry_table_ptr = entry_tables_ptr + row * entry_stride
    # Where keys lie is read one tile ahead: they must not wait for it.
    slot, wanted = _places(
        begin, window_tiles, window_table_ptr, entry_table_ptr, chosen_ptr, oldest, in_window,
        entries, RATIO, WINDOW_BLOCK, ENTRY_BLOCK, TILE,
    )  # fmt: skip
    # After the reads that lead to keys: they pass to shared memory, which waits for them.
    q = tl.load(q_ptr + token.to(tl.int64) * Q_STRIDE + inner, mask=inside, other=0.0)
    # One loop for both kinds of keys: in a second one the state would not fit the registers.
    for tile in range(begin, end):
        memory_ptr, turned_ptr = window_ptr, window_turned_ptr
        if RATIO > 0:
            memory_ptr = tl.where(tile < window_tiles, window_ptr, entries_ptr)
            if window_turned_ptr is not None:
                turned_ptr = tl.where(tile < window_tiles, window_turned_ptr, entries_turned_ptr)
        k = load_keys(memory_ptr, turned_ptr, slot, wanted, D, FIXED, WIDTH, D_COLUMNS, NATIVE)
        seen = wanted[None, :]
        slot, wanted = _places(
            tile + 1, window_tiles, window_table_ptr, entry_table_ptr, chosen_ptr, oldest,
            in_window, entries, RATIO, WINDOW_BLOCK, ENTRY_BLOCK, TILE,
        )  # fmt: skip
        m, weight, acc = extend(q, k, k, seen, m, weight, acc, factor, 1.0, True, False, PRECISION)
    if SPLIT:
        leave(values_ptr, sums_ptr, state, m, weight, acc, in_group, GROUP, D)
    else:
        sinks = tl.load(sinks_ptr + head, mask=in_group, other=0.0)
        turn = None
        if ROTARY > 0:
            turn = _turn_of(cos_sin_ptr, tl.load(positions_ptr + token), D, ROTARY, D_COLUMNS)
        _write(out_token, sinks, turn, head, in_group, m, weight, acc, factor, D, ROTARY)


@triton.jit(do_not_specialize=["splits"])
def merge_states_kernel(
    positions_ptr,
    sinks_ptr,
    cos_sin_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    splits,
    factor,
    OUT_STRIDE: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of one token: the states that sparse_attention_kernel left, as one. ROUND:
    states that are read at a time."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    unit = tl.program_id(0) // PARTS
    token = unit // HEAD_TILES
    position = tl.load(positions_ptr + token)
    head_of_token = unit % HEAD_TILES * GROUP + head
    sinks = tl.load(sinks_ptr + head_of_token, mask=head < GROUP, other=0.0)
    turn = None
    if ROTARY > 0:
        turn = (tl.zeros([D_COLUMNS // 2], tl.float32), tl.zeros([D_COLUMNS // 2], tl.float32))
    d = tl.arange(0, D_COLUMNS)
    inside = tl.minimum(head, GROUP - 1)
    m = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D_COLUMNS], tl.float32)
    for first in range(0, splits, ROUND):
        # A round takes as long as one read: none waits for another to tell whether there is a
        # state, so that what is not one, maybe NaN, is read too and dropped, and past the last the
        # last is read again. Without the barrier ptxas moves the reads of values to their merges,
        # to save registers; it cannot while what they are merged with is read after the barrier.
        values = ()  # type: tuple[tl.tensor, ...]
        for i in tl.static_range(ROUND):
            slot = unit.to(tl.int64) * splits + tl.minimum(first + i, splits - 1)
            place = values_ptr + slot * (GROUP * D) + inside[:, None] * D + d[None, :]
            values += (tl.load(place, mask=(d < D)[None, :], other=0.0),)
        if ROTARY > 0:
            turn = _turn_of(cos_sin_ptr, position, D, ROTARY, D_COLUMNS)
        tl.debug_barrier()
        sums = ()  # type: tuple[tuple[tl.tensor, tl.tensor], ...]
        for i in tl.static_range(ROUND):
            slot = unit.to(tl.int64) * splits + tl.minimum(first + i, splits - 1)
            place = sums_ptr + slot * (2 * GROUP) + inside
            sums += ((tl.load(place), tl.load(place + GROUP)),)
        for i in tl.static_range(ROUND):
            m_i, weight_i = sums[i]
            # Padding has no states, and so zeros.
            is_state = (weight_i != 0.0) & (first + i < splits)
            m_i = tl.where(is_state, m_i, float("-inf"))
            weight_i = tl.where(is_state, weight_i, 0.0)
            acc_i = tl.where(is_state[:, None], values[i], 0.0)
            m, weight, acc = merge(m, weight, acc, m_i, weight_i, acc_i, factor)
    _write(
        out_ptr + token.to(tl.int64) * OUT_STRIDE, sinks, turn, head_of_token, head < GROUP, m,
        weight, acc, factor, D, ROTARY,
    )  # fmt: skip
