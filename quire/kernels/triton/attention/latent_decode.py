"""Decode over latents (multi-head latent attention, DeepSeek-V2), absorbed: one query per request.

As decode.py and decode_ordered.py, with two differences. All query heads read the same rows of the
cache, so what stands for a KV head in line.py is a tile of query heads. And a state of 64 heads is
128 KiB, too much for one program to merge those of many: a second kernel does it, whose programs
take a head or some of a request each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.line import head_of, leave, pieces_of, run_of, write
from quire.kernels.triton.attention.tile import extend, merge, normalised, piece_state
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _slot(program, head_unit, run):
    """As in decode.py."""
    return 2 * program + (head_unit > program * run).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "table_stride", "capacity"])
def latent_decode_kernel(
    q_ptr,
    cache_ptr,
    tables_ptr,
    query_start_ptr,
    context_len_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    marks_ptr,
    rows,
    table_stride,
    capacity,
    factor,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    CACHE_STRIDE: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDERED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece is a tile of TILE keys. ORDERED: a state is left for every piece. marks_ptr: where
    latent_merge_kernel finds how the line was cut: the units of a run, then the first unit of each
    request's tiles of heads."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    run, unit, end, row, row_unit = run_of(
        program, tl.num_programs(0), rows, context_len_ptr, query_start_ptr,
        HEAD_TILES, ONE_QUERY, ONE_ROW, 0, TILE, SEARCH,
    )  # fmt: skip
    if program == 0:
        tl.store(marks_ptr, run)
    d = tl.arange(0, D_COLUMNS)
    rest = tl.arange(0, REST_COLUMNS)
    member = tl.arange(0, TILE_ROWS)
    in_group, in_head = member < GROUP, (d < D)[None, :]
    in_rest = (rest < REST)[None, :]
    key = tl.arange(0, TILE)
    inner = (key % BLOCK * (D + REST))[:, None]
    while unit < end:
        row, row_unit, head, head_unit, pieces, _, length = head_of(
            unit, row, row_unit, rows, context_len_ptr, query_start_ptr,
            HEAD_TILES, ONE_QUERY, 0, TILE,
        )  # fmt: skip
        begin, stop = unit - head_unit, tl.minimum(end - head_unit, pieces)
        next_unit = head_unit + stop
        shared = (begin > 0) | (stop < pieces)
        if begin == 0:
            tl.store(marks_ptr + 1 + row * HEAD_TILES + head, head_unit)
        if ORDERED:
            # Scratch too small for this head: whoever has its first piece does all of it.
            alone = head_unit + pieces > capacity
            stop = tl.where(alone, tl.where(begin == 0, pieces, begin), stop)
            shared = shared & (alone == 0)

        token = row if ONE_QUERY else tl.load(query_start_ptr + row)
        q_head = q_ptr + token.to(tl.int64) * Q_STRIDE + head * (GROUP * (D + REST))
        q_rows = q_head + member[:, None] * (D + REST)
        q = tl.load(q_rows + d[None, :], mask=in_group[:, None] & in_head, other=0.0)
        q_rest = tl.load(q_rows + (D + rest)[None, :], mask=in_group[:, None] & in_rest, other=0.0)
        table_ptr = tables_ptr + row.to(tl.int64) * table_stride
        first_key, last_key = begin * TILE, tl.minimum(stop * TILE, length)

        m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
        # Block numbers are read one tile ahead: keys must not wait for them.
        seen = first_key + key < last_key
        block = tl.load(table_ptr + (first_key + key) // BLOCK, mask=seen, other=0)
        for at in range(first_key, last_key, TILE):
            seen = at + key < last_key
            latents = cache_ptr + ((block.to(tl.int64) * CACHE_STRIDE)[:, None] + inner)
            k = tl.load(latents + d[None, :], mask=seen[:, None] & in_head, other=0.0)
            k_rest = tl.load(latents + (D + rest)[None, :], mask=seen[:, None] & in_rest, other=0.0)
            after = at + TILE + key
            block = tl.load(table_ptr + after // BLOCK, mask=after < last_key, other=0)
            if ORDERED:
                m_piece, weight_piece, acc_piece = piece_state(
                    q, k, k, seen[None, :], factor, 1.0, True, False, PRECISION, q_rest, k_rest
                )
                kept = member < tl.where(shared, GROUP, 0)
                slot = head_unit + at // TILE
                leave(values_ptr, sums_ptr, slot, m_piece, weight_piece, acc_piece, kept, GROUP, D)
                m, weight, acc = merge(m, weight, acc, m_piece, weight_piece, acc_piece, factor)
            else:
                m, weight, acc = extend(
                    q, k, k, seen[None, :], m, weight, acc, factor, 1.0, True, False, PRECISION,
                    q_rest, k_rest,
                )  # fmt: skip

        if shared and not ORDERED:
            slot = _slot(program, head_unit, run)
            leave(values_ptr, sums_ptr, slot, m, weight, acc, in_group, GROUP, D)
        written = member < tl.where((shared == 0) & (stop > begin), GROUP, 0)
        out_head = out_ptr + token.to(tl.int64) * OUT_STRIDE + head * (GROUP * D)
        write(out_head, context_len_ptr, head, m, weight, acc, written, factor, GROUP, D, False)
        unit = next_unit


@triton.jit(do_not_specialize=["capacity"])
def latent_merge_kernel(
    query_start_ptr,
    context_len_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    marks_ptr,
    capacity,
    factor,
    OUT_STRIDE: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ORDERED: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    ROUND: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS heads of one request: the states that programs of latent_decode_kernel left as one;
    nothing where none did. ROUND: states that are read at a time."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS % HEAD_TILES
    row = tl.program_id(0) // (PARTS * HEAD_TILES)
    pieces, _, _ = pieces_of(row, row >= 0, context_len_ptr, query_start_ptr, ONE_QUERY, 0, TILE)
    if pieces == 0:
        return
    run = tl.load(marks_ptr)
    head_unit = tl.load(marks_ptr + 1 + row * HEAD_TILES + tile)
    first_program = head_unit // run
    states = (head_unit + pieces - 1) // run - first_program + 1
    if states == 1:
        return
    if ORDERED:
        if head_unit + pieces > capacity:
            return
        states = pieces

    head = part * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, D_COLUMNS)
    m = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, D_COLUMNS], tl.float32)
    for first in range(0, states, ROUND):
        for i in tl.static_range(ROUND):  # unrolled, so that loads overlap
            slot = (
                head_unit + first + i
                if ORDERED
                else _slot(first_program + first + i, head_unit, run)
            )
            slot = slot.to(tl.int64)
            kept = head < tl.where(first + i < states, GROUP, 0)
            values = values_ptr + slot * (GROUP * D) + head[:, None] * D + d[None, :]
            sums = sums_ptr + slot * (2 * GROUP) + head
            acc_i = tl.load(values, mask=kept[:, None] & (d < D)[None, :], other=0.0)
            m_i = tl.load(sums, mask=kept, other=float("-inf"))
            weight_i = tl.load(sums + GROUP, mask=kept, other=0.0)
            m, weight, acc = merge(m, weight, acc, m_i, weight_i, acc_i, factor)

    token = row if ONE_QUERY else tl.load(query_start_ptr + row)
    result = normalised(m, weight, acc, m, factor, False).to(out_ptr.dtype.element_ty)
    out_heads = out_ptr + token.to(tl.int64) * OUT_STRIDE + (tile * GROUP + head)[:, None] * D
    tl.store(out_heads + d[None, :], result, mask=(head < GROUP)[:, None] & (d < D)[None, :])
