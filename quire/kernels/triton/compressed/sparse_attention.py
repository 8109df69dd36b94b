"""Attention of each token to its window and to compressed entries, which are values too."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import PackedKeys
from quire.kernels.triton.attention.latent_attention import merged_heads
from quire.kernels.triton.attention.tiles import (
    Target,
    Tiles,
    columns,
    head_tiles,
    latent_tiles,
    power_of_2,
    target_of,
)
from quire.kernels.triton.compressed.attend import merge_states_kernel, sparse_attention_kernel
from quire.kernels.triton.compressed.stored import converts_e4m3
from quire.kernels.triton.launch import launch, num_sms

MAX_SPLITS = 32  # parts that a token's keys are divided into at most


def sparse_tiles(
    group: int, itemsize: int, target: Target, deterministic: bool, packed: bool
) -> Tiles:
    """Those of latents for plain keys.

    Packed keys pass through registers on their way to the matrix instruction. On Hopper 128 of
    each thread's are the state of 64 heads, so there are 32 keys at a time: 192 KiB of shared
    memory with three stages. Elsewhere, and deterministic, 16 heads and 16 keys, for 48 KiB and
    24 more for every further stage: as many as let two programs share a multiprocessor.
    """
    tiles = latent_tiles(group, itemsize, target, deterministic)
    if not packed or itemsize == 4 or target.amd:
        return tiles
    if tiles.keys == 64:
        return replace(tiles, keys=32, piece=32, stages=3)
    stages = 1 + (target.shared // 2 - 48 * 1024) // (24 * 1024)
    return replace(tiles, keys=16, piece=16, stages=max(1, min(3, stages)))


def merged_at_once(heads: int, most: int) -> int:
    """States of `heads` heads, of which there are at most `most`, that a program of
    merge_states_kernel reads at a time: of one head 20, those of a window of 128 tokens and 512
    entries by tiles of 32. They are in registers, 80 of a thread's where D is 512, or 64."""
    return min(most, 20 if heads == 1 else 4)


def sparse_attention(
    q_THD: torch.Tensor,
    tokens: StepTokens,
    sinks_H: torch.Tensor,
    scale: float,
    window: Paged,
    size: int,
    compressed: Paged | None = None,
    ratio: int = 0,
    chosen_TE: torch.Tensor | None = None,
    *,
    deterministic: bool,
    scratch: torch.Tensor,
    cos_sin: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D]: each token attends to the last `size` tokens in `window`, itself among them, and
    to the `compressed` entries that are `chosen` (integers, -1: none), or to all that it may see,
    one for each `ratio` tokens before it. sinks float32. Tokens of no row get zeros.

    Both caches plain, of q's dtype or bfloat16 under float32, or PackedKeys. With `cos_sin` as in
    rotate_pairs the last values are rotated back. Few tokens are divided among programs, for as
    many parts as `scratch` float32 has room (states_of); deterministic, never: then a token's bits
    do not depend on the step. Raises ValueError for what does not fit.
    """
    total, heads, d = q_THD.shape
    _check(q_THD, sinks_H, window, compressed, ratio, chosen_TE)
    if out is None:
        out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if not total:
        return out
    device, factor = q_THD.device, scale * math.log2(math.e)
    target = target_of(device)
    count = head_tiles(heads, target, deterministic)
    group = heads // count
    packed = isinstance(window.entries, PackedKeys)
    tiles = sparse_tiles(group, q_THD.dtype.itemsize, target, deterministic, packed)
    entries = window if compressed is None else compressed
    chosen = 0 if chosen_TE is None else chosen_TE.shape[1]
    longest = chosen or entries.block_tables.shape[1] * entries.per_block if ratio else 0
    most = -(-size // tiles.keys) + -(-longest // tiles.keys)
    splits = 1
    if not deterministic:
        splits = min(
            num_sms(device) // (total * count), most, MAX_SPLITS,
            scratch.numel() // (total * heads * (d + 2)),
        )  # fmt: skip
    states = max(1, splits) * total * heads if splits > 1 else 0
    values, sums = torch.split(scratch[: states * (d + 2)], [states * d, 2 * states])
    shared = {
        "OUT_STRIDE": out.stride(0), "HEAD_TILES": count, "GROUP": group, "D": d,
        "ROTARY": 0 if cos_sin is None else cos_sin.shape[1], "D_COLUMNS": columns(d),
    }  # fmt: skip
    launch(
        sparse_attention_kernel, (total * count, max(1, splits)), device, q_THD, tokens.positions,
        tokens.rows, window.memory, _turned(window), window.block_tables, entries.memory,
        _turned(entries), entries.block_tables, chosen_TE if chosen else None, sinks_H, cos_sin,
        out, values, sums, window.block_tables.stride(0), entries.block_tables.stride(0), splits,
        factor, Q_STRIDE=q_THD.stride(0),
        FIXED=window.entries.fixed if isinstance(window.entries, PackedKeys) else 0,
        WIDTH=window.entries.width, SIZE=size, WINDOW_BLOCK=window.per_block,
        ENTRY_BLOCK=entries.per_block, RATIO=ratio if longest else 0, CHOSEN=chosen,
        CHOSEN_STRIDE=chosen_TE.stride(0) if chosen_TE is not None else 0,
        CHOSEN_COLUMNS=power_of_2(max(1, chosen)), SPLIT=splits > 1,
        NATIVE=converts_e4m3(device),
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32", TILE=tiles.keys,
        TILE_ROWS=tiles.rows, **shared, **tiles.meta,
    )  # fmt: skip
    if splits > 1:
        part = merged_heads(total, group)
        launch(
            merge_states_kernel, (total * count * -(-group // part),), device, tokens.positions,
            sinks_H, cos_sin, out, values, sums, splits, factor, HEADS=part,
            ROUND=merged_at_once(part, most), num_warps=4, **shared,
        )  # fmt: skip
    return out


def states_of(heads: int, size: int, device: torch.device) -> int:
    """Numbers of scratch that are enough for every step."""
    return num_sms(device) * heads * (size + 2)


def _turned(cache: Paged) -> torch.Tensor | None:
    packed = isinstance(cache.entries, PackedKeys)
    return cache.memory.view(torch.bfloat16) if packed else None


def _check(
    q_THD: torch.Tensor,
    sinks_H: torch.Tensor,
    window: Paged,
    compressed: Paged | None,
    ratio: int,
    chosen_TE: torch.Tensor | None,
) -> None:
    total, heads, d = q_THD.shape
    if q_THD.stride()[1:] != (d, 1):
        raise ValueError("q: expected contiguous heads")
    if sinks_H.shape != (heads,) or sinks_H.dtype != torch.float32:
        raise ValueError(f"sinks: expected float32 [{heads}]")
    if (compressed is None) != (ratio == 0) or (chosen_TE is not None and not ratio):
        raise ValueError("compressed: entries have a ratio, and chosen ones are entries")
    for name, cache in (("window", window), ("compressed", compressed or window)):
        stored = {torch.uint8} if isinstance(cache.entries, PackedKeys) else {q_THD.dtype}
        if stored == {torch.float32}:
            stored.add(torch.bfloat16)
        if cache.memory.dtype not in stored or not cache.memory.is_contiguous():
            raise ValueError(f"{name}: expected contiguous {stored}, not {cache.memory.dtype}")
        if cache.entries != window.entries or cache.entries.size != d:
            raise ValueError(f"{name}: of other vectors than the window, or than {d} values")
        if cache.memory.shape[1] != cache.entries.width or cache.block_tables.stride(1) != 1:
            raise ValueError(f"{name}: expected rows of {cache.entries.width}, contiguous tables")
    if isinstance(window.entries, PackedKeys) and window.entries.fixed % 2:
        raise ValueError("window: an odd number of packed values")
    if chosen_TE is not None and (len(chosen_TE) != total or chosen_TE.stride(1) != 1):
        raise ValueError(f"chosen: expected {total} contiguous rows")
