"""Causal attention over a paged cache of latents, for any mix of requests."""

from __future__ import annotations

import math
from typing import Any

import torch

from quire.kernels.triton.attention.latent_decode import latent_decode_kernel, latent_merge_kernel
from quire.kernels.triton.attention.scratch import Scratch, decode_programs
from quire.kernels.triton.attention.tiles import columns, head_tiles, latent_tiles, target_of
from quire.kernels.triton.attention.varlen import varlen_kernel
from quire.kernels.triton.launch import launch
from quire.kernels.triton.rows import row_stride

BLOCK = 16  # tokens of a cache block
# What the kernels hold of a latent in registers: its values, and what only keys have besides.
MAX_RANK, MAX_REST = 512, 128


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    rank: int,
    *,
    decode: bool,
    deterministic: bool,
    scratch: Scratch,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries q [T, heads * W] to their requests' latents: [T, heads * rank].

    cache [blocks, 1, 16, W], of q's dtype or bfloat16 under float32, blocks contiguous: a row is
    the key of all heads, its first `rank` values their value. All else as in paged_attention.
    Raises ValueError for shapes that do not fit, and a scratch for fewer requests.
    """
    rows, width = context_len.shape[0], cache.shape[3]
    heads, target = q.shape[1] // width, target_of(q.device)
    _check(q, cache, block_tables, rank, decode, rows)
    if not scale > 0:
        raise ValueError("scale: must be positive")
    if out is None:
        out = torch.empty((q.shape[0], heads * rank), dtype=q.dtype, device=q.device)
    if not q.shape[0] or not rows or not block_tables.shape[1]:
        return out

    count = head_tiles(heads, target, deterministic)
    group = heads // count
    if scratch.marks.numel() < 1 + rows * count:
        raise ValueError(f"scratch: allocated for fewer than {rows} rows of {heads} heads")
    device, factor = q.device, scale * math.log2(math.e)
    tiles = latent_tiles(group, q.dtype.itemsize, target, deterministic)
    shared: dict[str, Any] = {
        "Q_STRIDE": row_stride(q, "q"),
        "OUT_STRIDE": row_stride(out, "out"),
        "GROUP": group,
        "D": rank,
        "REST": width - rank,
        "BLOCK": BLOCK,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "TILE": tiles.keys,
        "TILE_ROWS": tiles.rows,
        "D_COLUMNS": columns(rank),
        "REST_COLUMNS": columns(width - rank),
        "SEARCH": 32 if rows <= 32 and decode else 256,
    } | tiles.meta
    capacity = scratch.capacity(group, rank)
    most = rows * count * -(-block_tables.shape[1] * BLOCK // tiles.keys)
    programs = min(decode_programs(tiles, device), most)
    if not deterministic:
        programs = max(1, min(programs, capacity // 2))
    handed = scratch.values, scratch.sums, scratch.marks
    launch(
        latent_decode_kernel, (programs,), device, q, cache, block_tables, query_start, context_len,
        out, *handed, rows, block_tables.stride(0), capacity, factor,
        CACHE_STRIDE=cache.stride(0), HEAD_TILES=count, ORDERED=deterministic, ONE_QUERY=decode,
        ONE_ROW=decode and rows == 1, **shared,
    )  # fmt: skip
    part = merged_heads(rows if decode else 256, group)
    launch(
        latent_merge_kernel, (rows * count * -(-group // part),), device, query_start, context_len,
        out, *handed, capacity, factor, OUT_STRIDE=shared["OUT_STRIDE"], HEAD_TILES=count,
        GROUP=group, D=rank, ORDERED=deterministic, ONE_QUERY=decode, TILE=tiles.keys, HEADS=part,
        ROUND=MERGED_AT_ONCE, D_COLUMNS=columns(rank), num_warps=4,
    )  # fmt: skip
    if decode:
        return out

    launch(
        varlen_kernel,
        ((q.shape[0] // (tiles.rows // group) + rows) * count,),
        device, q, cache, cache, block_tables, query_start, context_len, context_len, out, rows,
        block_tables.stride(0), factor, 1.0, DETERMINISTIC=deterministic, KV_HEADS=count,
        K_STRIDE=cache.stride(0), V_STRIDE=cache.stride(0), WINDOW=0, SOFTCAP=False,
        HAS_SINKS=False, FP8=False, PACKED=False, CAST=False, **shared,
    )  # fmt: skip
    return out


# States that a program of latent_merge_kernel has in flight.
MERGED_AT_ONCE = 4


def merged_heads(rows: int, group: int) -> int:
    """Heads that a program of latent_merge_kernel takes: one of few requests, so that one long
    request is merged by as many programs as it has heads."""
    return 1 if rows <= 8 or group < 4 else 4


def _check(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    rank: int,
    decode: bool,
    rows: int,
) -> None:
    """ValueError where shapes or number formats do not go together."""
    _, one, block, width = cache.shape
    if (one, block) != (1, BLOCK) or not cache[0].is_contiguous():
        raise ValueError(f"cache: expected contiguous blocks [1, {BLOCK}, W], not {cache.shape}")
    if not 0 < rank <= MAX_RANK or not 0 < width - rank <= MAX_REST:
        raise ValueError(
            f"cache: latents of {rank} values and {width - rank} more; at most {MAX_RANK} and "
            f"{MAX_REST}"
        )
    if q.dim() != 2 or not q.shape[1] or q.shape[1] % width:
        raise ValueError(f"q: {list(q.shape)} has no heads of {width}")
    if cache.dtype != q.dtype and (q.dtype, cache.dtype) != (torch.float32, torch.bfloat16):
        raise ValueError(f"cache: cannot serve queries of {q.dtype} from {cache.dtype}")
    if block_tables.shape[0] != rows or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables: expected {rows} contiguous rows")
    if decode and q.shape[0] != rows:
        raise ValueError(f"decode: {q.shape[0]} queries for {rows} requests")
