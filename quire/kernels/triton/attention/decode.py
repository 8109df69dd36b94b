"""Decode: one query per request, keys and values split over programs (Flash-Decoding, Dao 2023).

Programs take the line of work of line.py. A program is one warp: with more, each tile's largest
scores, sums and weights would have to pass between warps, which takes longer than the tile itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.fp8_cache import SCALE_BYTES, scales_at
from quire.kernels.triton.attention.line import head_of, last_to_arrive, leave, run_of, write
from quire.kernels.triton.attention.tile import extend, finite
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _slot(program, head_unit, run):
    """Where a program leaves its state of a head. A run can share two: the one it starts in, at
    2 * program, and the one it ends in."""
    return 2 * program + (head_unit > program * run).to(tl.int32)


@triton.jit
def _merged(
    values_ptr, sums_ptr, states, head_unit, first_program, run, factor,
    GROUP: tl.constexpr, D: tl.constexpr, GROUP_ROWS: tl.constexpr, D_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The states that `states` programs left for one KV head as one, many at a time: this is what
    one long request waits for. They are read past L1, which other programs' stores do not reach."""
    # 64 values a thread in flight.
    ROUND: tl.constexpr = max(1, min(16, 2048 // (GROUP_ROWS * D_COLUMNS)))
    row = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, D_COLUMNS)
    m = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, D_COLUMNS], tl.float32)
    for first in range(0, states, ROUND):
        state = first + tl.arange(0, ROUND)
        slot = _slot(first_program + state, head_unit, run).to(tl.int64)
        kept = (state < states)[:, None] & (row < GROUP)[None, :]
        values = values_ptr + ((slot * (GROUP * D))[:, None] + row[None, :] * D)[:, :, None]
        sums = sums_ptr + (slot * (2 * GROUP))[:, None] + row[None, :]
        acc_i = tl.load(
            values + d[None, None, :],
            mask=kept[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        m_i = tl.load(sums, mask=kept, other=float("-inf"), cache_modifier=".cg")
        weight_i = tl.load(sums + GROUP, mask=kept, other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(m_i, 0))
        reference = finite(top)
        shrink = tl.exp2((m - reference) * factor)
        share = tl.exp2((m_i - reference[None, :]) * factor)
        weight = weight * shrink + tl.sum(weight_i * share, 0)
        acc = acc * shrink[:, None] + tl.sum(acc_i * share[:, :, None], 0)
        m = top
    return m, weight, acc


@triton.jit(do_not_specialize=["rows", "table_stride"])
def decode_kernel(
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
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    run, unit, end, row, row_unit = run_of(
        program, tl.num_programs(0), rows, context_len_ptr, query_start_ptr,
        KV_HEADS, ONE_QUERY, ONE_ROW, WINDOW, PIECE, SEARCH,
    )  # fmt: skip
    d = tl.arange(0, D_COLUMNS)
    member = tl.arange(0, TILE_ROWS)
    in_group, in_head = member < GROUP, d < D
    q_inside = in_group[:, None] & in_head[None, :]
    key = tl.arange(0, TILE)
    inner = (key % BLOCK * D)[:, None] + d[None, :]
    while unit < end:
        row, row_unit, head, head_unit, pieces, skipped, length = head_of(
            unit, row, row_unit, rows, context_len_ptr, query_start_ptr,
            KV_HEADS, ONE_QUERY, WINDOW, PIECE,
        )  # fmt: skip
        begin, stop = unit - head_unit, tl.minimum(end - head_unit, pieces)
        shared = (begin > 0) | (stop < pieces)

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
        first_key = (skipped + begin) * PIECE
        last_key = tl.minimum((skipped + stop) * PIECE, length)

        m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
        if WINDOW:
            first_key = tl.maximum(first_key, oldest // TILE * TILE)
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
            m, weight, acc = extend(
                q, k, v, seen[None, :], m, weight, acc, factor, inner_scale,
                True, SOFTCAP, PRECISION, k_scale=k_scale, v_scale=v_scale,
                PACKED=PACKED, CAST=CAST,
            )  # fmt: skip

        out_head = out_ptr + token.to(tl.int64) * OUT_STRIDE + head * (GROUP * D)
        if shared:
            slot = _slot(program, head_unit, run)
            leave(values_ptr, sums_ptr, slot, m, weight, acc, in_group, GROUP, D)
            first_program = head_unit // run
            sharing = (head_unit + pieces - 1) // run - first_program + 1
            if last_to_arrive(arrived_ptr + row * KV_HEADS + head, sharing):
                m_all, weight_all, acc_all = _merged(
                    values_ptr, sums_ptr, sharing, head_unit, first_program, run, factor,
                    GROUP, D, GROUP_ROWS, D_COLUMNS,
                )  # fmt: skip
                every = tl.arange(0, GROUP_ROWS) < GROUP
                write(
                    out_head, sinks_ptr, head, m_all, weight_all, acc_all, every, factor,
                    GROUP, D, HAS_SINKS,
                )  # fmt: skip
        else:
            write(out_head, sinks_ptr, head, m, weight, acc, in_group, factor, GROUP, D, HAS_SINKS)
        unit = head_unit + stop
