"""How well each compressed entry fits each token: the sum over heads of weight * relu(q . key)."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.compressed.stored import slots_of, widen_e4m3
from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit(
    do_not_specialize=["first_token", "end_token", "tile_tokens", "table_stride", "score_stride"]
)
def index_scores_kernel(
    queries_ptr,
    weights_ptr,
    positions_ptr,
    rows_ptr,
    query_start_ptr,
    keys_ptr,
    scales_ptr,
    tables_ptr,
    scores_ptr,
    first_token,
    end_token,
    tile_tokens,
    table_stride,
    score_stride,
    QUERY_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    RATIO: tl.constexpr,
    COUNT: tl.constexpr,
    NATIVE: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_COLUMNS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scores of some tiles of KEYS entries for `tile_tokens` tokens from `first_token` on; none for
    tokens that see at most COUNT entries. scales_ptr: the same memory as keys_ptr as float32, where
    keys are packed.

    Keys are the rows of the matrix instruction, heads its columns, and one loop serves one token
    as it serves many: so a score has the same bits in every step.
    """
    let_next_start(PDL)
    wait_for_inputs(PDL)
    head = tl.arange(0, HEAD_COLUMNS)
    d = tl.arange(0, D_COLUMNS)
    inner = head[:, None] * D + d[None, :]
    inside = (head < HEADS)[:, None] & (d < D)[None, :]
    token = first_token + tl.program_id(0) * tile_tokens
    end = tl.minimum(token + tile_tokens, end_token)
    while token < end:  # tokens of one request at a time
        row = tl.load(rows_ptr + token).to(tl.int32)
        stop = end
        position = tl.load(positions_ptr + token).to(tl.int32)
        if row >= 0:
            stop = tl.minimum(end, tl.load(query_start_ptr + row + 1))
        visible = (position + stop - token) // RATIO  # to the last of them
        tiles = tl.where((row >= 0) & (visible > COUNT), tl.cdiv(visible, KEYS), 0)
        table_ptr = tables_ptr + row.to(tl.int64) * table_stride
        for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
            entry = tile * KEYS + tl.arange(0, KEYS)
            wanted = entry < visible
            slot = slots_of(table_ptr, entry, wanted, PER_BLOCK)
            keys = keys_ptr + (slot * WIDTH)[:, None] + d[None, :]
            k = tl.load(keys, mask=wanted[:, None] & (d < D)[None, :], other=0)
            if scales_ptr is not None:
                k = widen_e4m3(k, NATIVE)
                scales = scales_ptr + slot * (WIDTH // 4) + D // 4
                scale = tl.load(scales, mask=wanted, other=0.0)
            k = k.to(queries_ptr.dtype.element_ty)
            # The first token that sees an entry of the tile, and more than COUNT.
            least = tl.maximum(tile * KEYS, COUNT) + 1
            begin = tl.maximum(least * RATIO - 1 - position, 0)
            for past in range(begin, stop - token):
                at = token + past
                queries = queries_ptr + at.to(tl.int64) * QUERY_STRIDE + inner
                q = tl.load(queries, mask=inside, other=0.0)
                weights = weights_ptr + at.to(tl.int64) * WEIGHT_STRIDE + head
                weight = tl.load(weights, mask=head < HEADS, other=0.0).to(tl.float32)
                products = multiply_add(k, tl.trans(q), None)
                score = tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1)
                if scales_ptr is not None:
                    score *= scale
                seen = entry < (position + past + 1) // RATIO
                scores = scores_ptr + (at - first_token).to(tl.int64) * score_stride + entry
                tl.store(scores, score, mask=seen)
        token = stop
