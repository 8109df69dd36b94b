"""Runs of queries: prompts, chunks of them, drafts to verify (FlashAttention-2, Dao 2023).

A tile's rows are the query heads of one KV head for some tokens, so keys are loaded once for all
of them and even 4 tokens fill an MMA. Keys and values come through the block table. With latents
(REST > 0) a token's one row of the cache has D values and REST more: all are its key, the first D
its value, for every head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.fp8_cache import SCALE_BYTES, scales_at
from quire.kernels.triton.attention.tile import extend, merge, normalised, piece_state
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _load(pointers, readable, inside, MASKED: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of the cache, where MASKED those that are `readable`; WHOLE: all columns are inside."""
    if MASKED:
        rows = tl.load(pointers, mask=readable[:, None] & inside, other=0)
    elif WHOLE:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=inside, other=0)
    return rows


@triton.jit
def _span(
    m, weight, acc, q, q_rest, position, table_ptr, k_head, v_head, k_scales, v_scales,
    begin, end, oldest, newest, factor, inner_scale,
    MASKED: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    D: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,
    CAST: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The state after keys begin to end - 1 too, both multiples of TILE.

    MASKED: not every row sees all of them, and only keys oldest to newest may be read.
    """
    d = tl.arange(0, D_COLUMNS)
    key = tl.arange(0, TILE)
    rest = tl.arange(0, REST_COLUMNS)
    token = (key % BLOCK * (D + REST))[:, None]
    inner = token + d[None, :]
    in_head = (d < D)[None, :]
    # Block numbers are read one tile ahead: keys must not wait for them.
    last = tl.minimum(newest, end - 1)
    readable = (begin + key >= oldest) & (begin + key <= last)
    block = tl.load(table_ptr + (begin // BLOCK + key // BLOCK), mask=readable, other=0)
    for at in range(begin, end, TILE):
        places = block.to(tl.int64)
        k_ptrs = k_head + ((places * K_STRIDE)[:, None] + inner)
        v_ptrs = v_head + ((places * V_STRIDE)[:, None] + inner)
        visible = position[:, None] >= 0
        if MASKED:
            keys = at + key
            readable = (keys >= oldest) & (keys <= newest)
            visible = keys[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (keys[None, :] > position[:, None] - WINDOW)
        k = _load(k_ptrs, readable, in_head, MASKED, D == D_COLUMNS)
        k_rest = None
        if REST:
            v = k
            rest_ptrs = k_head + ((places * K_STRIDE)[:, None] + token + (D + rest)[None, :])
            in_rest = (rest < REST)[None, :]
            k_rest = _load(rest_ptrs, readable, in_rest, MASKED, REST == REST_COLUMNS)
        else:
            v = _load(v_ptrs, readable, in_head, MASKED, D == D_COLUMNS)
        k_scale = None
        v_scale = None
        if FP8:
            k_ptrs = k_scales + (places * (K_STRIDE // SCALE_BYTES) + key % BLOCK)
            v_ptrs = v_scales + (places * (V_STRIDE // SCALE_BYTES) + key % BLOCK)
            if MASKED:
                k_scale = tl.load(k_ptrs, mask=readable, other=0.0)
                v_scale = tl.load(v_ptrs, mask=readable, other=0.0)
            else:
                k_scale, v_scale = tl.load(k_ptrs), tl.load(v_ptrs)
        after = at + TILE
        if MASKED:
            more = (after + key >= oldest) & (after + key <= last)
            block = tl.load(table_ptr + (after // BLOCK + key // BLOCK), mask=more, other=0)
        else:
            # The last time, any block that exists will do.
            ahead = tl.minimum(after, end - TILE)
            block = tl.load(table_ptr + (ahead // BLOCK + key // BLOCK))
        if DETERMINISTIC:
            m_piece, weight_piece, acc_piece = piece_state(
                q, k, v, visible, factor, inner_scale, MASKED, SOFTCAP, PRECISION,
                q_rest, k_rest, k_scale, v_scale, PACKED, CAST,
            )  # fmt: skip
            m, weight, acc = merge(m, weight, acc, m_piece, weight_piece, acc_piece, factor)
        else:
            m, weight, acc = extend(
                q, k, v, visible, m, weight, acc, factor, inner_scale, MASKED, SOFTCAP, PRECISION,
                q_rest, k_rest, k_scale, v_scale, PACKED, CAST,
            )  # fmt: skip
    return m, weight, acc


@triton.jit(do_not_specialize=["rows", "table_stride"])
def varlen_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    query_start_ptr,
    context_len_ptr,
    sinks_ptr,
    out_ptr,
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
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8: tl.constexpr,
    PACKED: tl.constexpr,
    CAST: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    REST_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    TOKENS: tl.constexpr = TILE_ROWS // GROUP
    # A request's last tile of queries sees the most keys: those start first, for all heads.
    head = tl.program_id(0) % KV_HEADS
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS

    # Request b's tiles start at query_start[b] // TOKENS + b, at or after the end of those before,
    # so the grid needs no lengths. Counted over all requests at once: a binary search would wait
    # for memory at each of its steps.
    row = tl.full([], -1, tl.int32)
    for first_row in range(0, rows, SEARCH):
        index = first_row + tl.arange(0, SEARCH)
        start = tl.load(query_start_ptr + index, mask=index < rows, other=0)
        row += tl.sum(((start // TOKENS + index <= tile) & (index < rows)).to(tl.int32), 0)
    first_query = tl.load(query_start_ptr + row)
    queries = tl.load(query_start_ptr + row + 1) - first_query
    length = tl.load(context_len_ptr + row)
    first_token = (tile - (first_query // TOKENS + row)) * TOKENS
    if (queries < 2) | (first_token >= queries) | (length == 0):
        return

    member = tl.arange(0, TILE_ROWS)
    token = first_token + member // GROUP
    position = length - queries + token
    d = tl.arange(0, D_COLUMNS)
    exists = (member < TOKENS * GROUP) & (token < queries)
    inside = exists[:, None] & (d < D)[None, :]
    heads = head * GROUP + member % GROUP
    row_of = (first_query + token).to(tl.int64)
    q_rows = q_ptr + (row_of * Q_STRIDE + heads * (D + REST))[:, None]
    q = tl.load(q_rows + d[None, :], mask=inside, other=0.0)
    q_rest = None
    if REST:
        rest = tl.arange(0, REST_COLUMNS)
        in_rest = exists[:, None] & (rest < REST)[None, :]
        q_rest = tl.load(q_rows + (D + rest)[None, :], mask=in_rest, other=0.0)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    k_head, v_head = k_ptr, v_ptr
    k_scales = None
    v_scales = None
    if not REST:
        k_head += head * (BLOCK * (D + (SCALE_BYTES if FP8 else 0)))
        v_head += head * (BLOCK * (D + (SCALE_BYTES if FP8 else 0)))
        if FP8:
            k_scales, v_scales = scales_at(k_ptr, head, D, BLOCK), scales_at(v_ptr, head, D, BLOCK)

    # Some row of the tile sees keys oldest to newest; all rows see all_from to all_to - 1.
    first_position = length - queries + first_token
    newest = tl.minimum(first_position + TOKENS, length) - 1
    end = (newest // TILE + 1) * TILE
    oldest, all_from = 0, 0
    if WINDOW:
        oldest = tl.maximum(first_position - WINDOW + 1, 0)
        all_from = tl.cdiv(tl.maximum(newest - WINDOW + 1, 0), TILE) * TILE
    begin = oldest // TILE * TILE
    all_from = tl.minimum(all_from, end)
    all_to = tl.maximum((first_position + 1) // TILE * TILE, all_from)

    m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
    if WINDOW:
        m, weight, acc = _span(
            m, weight, acc, q, q_rest, position, table_ptr, k_head, v_head, k_scales, v_scales,
            begin, all_from, oldest, newest, factor, inner_scale, True,
            K_STRIDE, V_STRIDE, D, REST, BLOCK, WINDOW, SOFTCAP, FP8, PACKED, CAST,
            DETERMINISTIC, PRECISION, TILE, D_COLUMNS, REST_COLUMNS,
        )  # fmt: skip
    m, weight, acc = _span(
        m, weight, acc, q, q_rest, position, table_ptr, k_head, v_head, k_scales, v_scales,
        all_from, all_to, oldest, newest, factor, inner_scale, False,
        K_STRIDE, V_STRIDE, D, REST, BLOCK, WINDOW, SOFTCAP, FP8, PACKED, CAST,
        DETERMINISTIC, PRECISION, TILE, D_COLUMNS, REST_COLUMNS,
    )  # fmt: skip
    m, weight, acc = _span(
        m, weight, acc, q, q_rest, position, table_ptr, k_head, v_head, k_scales, v_scales,
        all_to, end, oldest, newest, factor, inner_scale, True,
        K_STRIDE, V_STRIDE, D, REST, BLOCK, WINDOW, SOFTCAP, FP8, PACKED, CAST,
        DETERMINISTIC, PRECISION, TILE, D_COLUMNS, REST_COLUMNS,
    )  # fmt: skip

    sinks = m
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + heads, mask=exists, other=0.0)
    result = normalised(m, weight, acc, sinks, factor, HAS_SINKS)
    tl.store(
        out_ptr + (row_of * OUT_STRIDE + heads * D)[:, None] + d[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
