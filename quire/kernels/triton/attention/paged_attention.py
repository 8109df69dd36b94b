"""Causal attention over the paged KV cache for any mix of requests."""

from __future__ import annotations

import math
from typing import Any

import torch

from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.attention.fp8_cache import FP8_CACHE, head_size_of
from quire.kernels.triton.attention.decode import decode_kernel
from quire.kernels.triton.attention.decode_ordered import decode_ordered_kernel
from quire.kernels.triton.attention.decode_short import decode_short, serves_new, serves_short
from quire.kernels.triton.attention.scratch import Scratch, decode_programs
from quire.kernels.triton.attention.tiles import (
    columns,
    decode_tiles,
    power_of_2,
    target_of,
    varlen_tiles,
)
from quire.kernels.triton.attention.varlen import varlen_kernel
from quire.kernels.triton.launch import launch, num_sms
from quire.kernels.triton.quantized.operands import instructions
from quire.kernels.triton.rotary.rotary_cache import rotary_cache
from quire.kernels.triton.rows import empty_rows, row_stride

__all__ = ["Scratch", "paged_attention"]

BLOCK = 16  # tokens of a cache block


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    *,
    decode: bool,
    deterministic: bool,
    scratch: Scratch,
    out: torch.Tensor | None = None,
    new: NewTokens | None = None,
) -> torch.Tensor:
    """Attention of queries q [T, Hq * D] to their requests' keys and values: [T, Hq * D].

    k_cache, v_cache [blocks, Hkv, 16, D], a block's heads contiguous, of q's dtype or bfloat16
    under float32; or uint8 with D + 4 bytes: e4m3 and scales
    (quire/kernels/reference/attention/fp8_cache.py). block_tables int32 [B, max_blocks], rows
    contiguous; query_start int32 [B + 1], not decreasing; context_len int32 [B]. Request b has the
    queries query_start[b] to query_start[b + 1] - 1, which are its last positions; a query sees the
    keys up to its own position, of these the last `window` where given. scale > 0 multiplies
    logits; then `softcap`: softcap * tanh(logit / softcap). sinks float32 [Hq]: one more logit per
    head, without a value.

    Requests with context_len 0 or no queries, and rows of q beyond query_start[B], are padding:
    their rows of the result are left as they are or get something finite. Blocks that no query sees
    are not read. `decode`: request b's one query is q[b], and T = B; query_start is not read then.
    `deterministic`: a row's bits depend on nothing but its query, its keys and values and the GPU
    (tile.py says why). `scratch` serves one call at a time. q and `out` have contiguous rows.
    `new`: the tokens of the queries, which rotary_cache has not served yet: q are the first columns
    of their qkv.

    Raises ValueError for shapes or options that do not fit, and a scratch for fewer requests.
    """
    tokens, rows = q.shape[0], context_len.shape[0]
    _, kv_heads, block, width = k_cache.shape
    head_size, fp8 = head_size_of(width, k_cache.dtype), k_cache.dtype == FP8_CACHE
    heads = q.shape[1] // head_size
    _check(q, k_cache, v_cache, block_tables, sinks, decode, rows)
    if not scale > 0 or (softcap is not None and not softcap > 0):
        raise ValueError("scale and softcap: must be positive")
    if window is not None and window < 1:
        raise ValueError("window: must be at least 1")
    if scratch.arrived.numel() < rows * kv_heads:
        raise ValueError(f"scratch: allocated for fewer than {rows} rows of {kv_heads} KV heads")
    if out is None:
        out = empty_rows(q.shape[0], q.shape[1], q.dtype, q.device)
    room = block_tables.shape[1] * block
    longest, few = min(room, window or room), decode and not deterministic
    if new is not None and not (few and serves_new(q, k_cache, rows, longest, new)):
        q, new = new.written(rotary_cache, k_cache, v_cache), None
    if not tokens or not rows or not room:
        return out

    device, group = q.device, heads // kv_heads
    log2_e = math.log2(math.e)
    # Logits in log2 units are dot * factor, or tanh(dot * inner_scale) * factor.
    factor = (scale if softcap is None else softcap) * log2_e
    inner_scale = 1.0 if softcap is None else scale / softcap
    if few and serves_short(q, k_cache, rows, longest):
        decode_short(
            q, k_cache, v_cache, block_tables, context_len, factor, inner_scale, window,
            softcap is not None, sinks, out, new=new,
        )  # fmt: skip
        return out
    shared: dict[str, Any] = {
        "Q_STRIDE": row_stride(q, "q"),
        "OUT_STRIDE": row_stride(out, "out"),
        "K_STRIDE": k_cache.stride(0),
        "V_STRIDE": v_cache.stride(0),
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": head_size,
        "BLOCK": block,
        "WINDOW": window or 0,
        "SOFTCAP": softcap is not None,
        "HAS_SINKS": sinks is not None,
        "FP8": fp8,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "D_COLUMNS": columns(head_size),
        # One for all mixed steps: a variant more would compile while serving.
        "SEARCH": 32 if rows <= 32 and decode else 256,
    } | instructions(device)
    tensors = (
        q, k_cache, v_cache, block_tables, query_start, context_len,
        context_len if sinks is None else sinks, out,
    )  # fmt: skip
    sizes = (group, head_size, q.dtype.itemsize, target_of(device), deterministic)

    tiles = decode_tiles(*sizes, cached=k_cache.dtype.itemsize)
    capacity = scratch.capacity(group, head_size)
    pieces = rows * kv_heads * -(-room // tiles.piece)
    programs = min(decode_programs(tiles, device), pieces)
    one_row = decode and rows == 1
    walk: dict[str, Any] = {"ONE_QUERY": decode, "ONE_ROW": one_row, "TILE": tiles.keys}
    walk |= {"TILE_ROWS": tiles.rows, "GROUP_ROWS": power_of_2(group), **shared, **tiles.meta}
    handed = (scratch.values, scratch.sums, scratch.arrived, rows, block_tables.stride(0))
    if deterministic:
        launch(
            decode_ordered_kernel, (programs,), device, *tensors, *handed, capacity, factor,
            inner_scale, **walk,
        )  # fmt: skip
    else:
        programs = max(1, min(programs, capacity // 2))
        launch(
            decode_kernel, (programs,), device, *tensors, *handed, factor, inner_scale,
            PIECE=tiles.piece, **walk,
        )  # fmt: skip
    if decode:
        return out

    tall = varlen_tiles(*sizes, small=False)
    small = -(-tokens // (tall.rows // group)) * kv_heads < num_sms(device)
    tiles = varlen_tiles(*sizes, small=small)
    count = (tokens // (tiles.rows // group) + rows) * kv_heads
    launch(
        varlen_kernel, (count,), device, *tensors, rows, block_tables.stride(0), factor,
        inner_scale, DETERMINISTIC=deterministic, TILE=tiles.keys, TILE_ROWS=tiles.rows, REST=0,
        REST_COLUMNS=1, **shared, **tiles.meta,
    )  # fmt: skip
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    sinks: torch.Tensor | None,
    decode: bool,
    rows: int,
) -> None:
    """ValueError where shapes or number formats do not go together."""
    _, kv_heads, block, width = k_cache.shape
    head_size = head_size_of(width, k_cache.dtype)
    if block != BLOCK or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"caches: expected [blocks, heads, {BLOCK}, D] twice, not {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    if not (k_cache[0].is_contiguous() and v_cache[0].is_contiguous()):
        raise ValueError("caches: heads, tokens and values of a block must be contiguous")
    if q.dim() != 2 or q.shape[1] % (kv_heads * head_size):
        raise ValueError(f"q: {list(q.shape)} has no multiple of {kv_heads} heads of {head_size}")
    cached = {k_cache.dtype, v_cache.dtype}
    fits = cached in ({q.dtype}, {FP8_CACHE})
    if not fits and not (q.dtype == torch.float32 and cached == {torch.bfloat16}):
        raise ValueError(f"caches: cannot serve queries of {q.dtype} from {k_cache.dtype}")
    if block_tables.shape[0] != rows or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables: expected {rows} contiguous rows")
    if sinks is not None and sinks.shape != (q.shape[1] // head_size,):
        raise ValueError(f"sinks: expected one per query head, not {list(sinks.shape)}")
    if decode and q.shape[0] != rows:
        raise ValueError(f"decode: {q.shape[0]} queries for {rows} requests")
