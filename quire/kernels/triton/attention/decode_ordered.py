"""Decode in deterministic mode: a state for every piece of keys, merged in order.

As decode.py, but a state is left for every piece, never for several merged, and merging follows
tile.py, so that the runs of line.py may be cut anywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.fp8_cache import SCALE_BYTES, scales_at
from quire.kernels.triton.attention.line import head_of, last_to_arrive, leave, run_of, write
from quire.kernels.triton.attention.tile import merge, piece_state
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _merged(
    values_ptr, sums_ptr, states, head_unit, factor,
    GROUP: tl.constexpr, D: tl.constexpr, GROUP_ROWS: tl.constexpr, D_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The states of a KV head's pieces as one, by the formula that merges them in registers. They
    are read past L1, which other programs' stores do not reach."""
    row = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, D_COLUMNS)
    m = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, D_COLUMNS], tl.float32)
    for first in range(0, states, 4):
        for i in tl.static_range(4):  # unrolled, so that loads overlap
            slot = (head_unit + first + i).to(tl.int64)
            kept = row < tl.where(first + i < states, GROUP, 0)
            values = values_ptr + slot * (GROUP * D) + row[:, None] * D + d[None, :]
            sums = sums_ptr + slot * (2 * GROUP) + row
            inside = kept[:, None] & (d < D)[None, :]
            acc_i = tl.load(values, mask=inside, other=0.0, cache_modifier=".cg")
            m_i = tl.load(sums, mask=kept, other=float("-inf"), cache_modifier=".cg")
            weight_i = tl.load(sums + GROUP, mask=kept, other=0.0, cache_modifier=".cg")
            m, weight, acc = merge(m, weight, acc, m_i, weight_i, acc_i, factor)
    return m, weight, acc


@triton.jit(do_not_specialize=["rows", "table_stride", "capacity"])
def decode_ordered_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    query_start_ptr,
    context_len_ptr,
    sinks_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    arrived_ptr,
    rows,
    table_stride,
    capacity,
    factor,
    inner_scale,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,
    CAST: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece is a tile of TILE keys."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    run, unit, end, row, row_unit = run_of(
        tl.program_id(0), tl.num_programs(0), rows, context_len_ptr, query_start_ptr,
        KV_HEADS, ONE_QUERY, ONE_ROW, WINDOW, TILE, SEARCH,
    )  # fmt: skip
    d = tl.arange(0, D_COLUMNS)
    member = tl.arange(0, TILE_ROWS)
    in_head = d < D
    q_inside = (member < GROUP)[:, None] & in_head[None, :]
    key = tl.arange(0, TILE)
    inner = (key % BLOCK * D)[:, None] + d[None, :]
    while unit < end:
        row, row_unit, head, head_unit, pieces, skipped, length = head_of(
            unit, row, row_unit, rows, context_len_ptr, query_start_ptr,
            KV_HEADS, ONE_QUERY, WINDOW, TILE,
        )  # fmt: skip
        begin, stop = unit - head_unit, tl.minimum(end - head_unit, pieces)
        next_unit = head_unit + stop
        # Scratch too small for this head: whoever has its first piece does all of it.
        alone = head_unit + pieces > capacity
        stop = tl.where(alone, tl.where(begin == 0, pieces, begin), stop)
        shared = ((begin > 0) | (stop < pieces)) & (alone == 0)

        token = row if ONE_QUERY else tl.load(query_start_ptr + row)
        q_row = q_ptr + token.to(tl.int64) * Q_STRIDE + head * (GROUP * D)
        q = tl.load(q_row + member[:, None] * D + d[None, :], mask=q_inside, other=0.0)
        table_ptr = tables_ptr + row.to(tl.int64) * table_stride
        k_head = k_ptr + head * (BLOCK * (D + (SCALE_BYTES if FP8 else 0)))
        v_head = v_ptr + head * (BLOCK * (D + (SCALE_BYTES if FP8 else 0)))
        if FP8:
            k_scales = scales_at(k_ptr, head, D, BLOCK) + key % BLOCK
            v_scales = scales_at(v_ptr, head, D, BLOCK) + key % BLOCK
        oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
        first_key = (skipped + begin) * TILE
        last_key = tl.minimum((skipped + stop) * TILE, length)

        m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
        seen = (first_key + key >= oldest) & (first_key + key < last_key)
        # Block numbers are read one tile ahead: keys must not wait for them.
        block = tl.load(table_ptr + (first_key + key) // BLOCK, mask=seen, other=0)
        for at in range(first_key, last_key, TILE):
            seen = (at + key >= oldest) & (at + key < last_key)
            inside = seen[:, None] & in_head[None, :]
            places = block.to(tl.int64)
            k = tl.load(k_head + ((places * K_STRIDE)[:, None] + inner), mask=inside, other=0)
            v = tl.load(v_head + ((places * V_STRIDE)[:, None] + inner), mask=inside, other=0)
            k_scale = None
            v_scale = None
            if FP8:
                k_places = places * (K_STRIDE // SCALE_BYTES)
                v_places = places * (V_STRIDE // SCALE_BYTES)
                k_scale = tl.load(k_scales + k_places, mask=seen, other=0.0)
                v_scale = tl.load(v_scales + v_places, mask=seen, other=0.0)
            after = at + TILE + key
            block = tl.load(table_ptr + after // BLOCK, mask=after < last_key, other=0)
            m_piece, weight_piece, acc_piece = piece_state(
                q, k, v, seen[None, :], factor, inner_scale, True, SOFTCAP, PRECISION,
                k_scale=k_scale, v_scale=v_scale,
                PACKED=PACKED, CAST=CAST,
            )  # fmt: skip
            kept = member < tl.where(shared, GROUP, 0)
            slot = head_unit + at // TILE - skipped
            leave(values_ptr, sums_ptr, slot, m_piece, weight_piece, acc_piece, kept, GROUP, D)
            m, weight, acc = merge(m, weight, acc, m_piece, weight_piece, acc_piece, factor)

        out_head = out_ptr + token.to(tl.int64) * OUT_STRIDE + head * (GROUP * D)
        if shared:
            sharing = (head_unit + pieces - 1) // run - head_unit // run + 1
            if last_to_arrive(arrived_ptr + row * KV_HEADS + head, sharing):
                m_all, weight_all, acc_all = _merged(
                    values_ptr, sums_ptr, pieces, head_unit, factor,
                    GROUP, D, GROUP_ROWS, D_COLUMNS,
                )  # fmt: skip
                every = tl.arange(0, GROUP_ROWS) < GROUP
                write(
                    out_head, sinks_ptr, head, m_all, weight_all, acc_all, every, factor,
                    GROUP, D, HAS_SINKS,
                )  # fmt: skip
        else:
            written = member < tl.where(stop > begin, GROUP, 0)
            write(out_head, sinks_ptr, head, m, weight, acc, written, factor, GROUP, D, HAS_SINKS)
        unit = next_unit
