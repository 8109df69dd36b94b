"""Which compressed entries each token attends to: the best by the indexer's scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import PackedIndex
from quire.kernels.triton.attention.tiles import columns, power_of_2
from quire.kernels.triton.compressed.choose import choose_kernel
from quire.kernels.triton.compressed.index_scores import index_scores_kernel
from quire.kernels.triton.compressed.stored import converts_e4m3
from quire.kernels.triton.launch import launch, num_sms


@dataclass(frozen=True)
class Sizes:
    """`tokens` that a program scores one after another, with one look at the keys; `programs` for
    each multiprocessor, that divide the keys; `tile`: keys that a program choosing has in
    registers, `listed`: candidates that it has room for where a token has more entries than that;
    both powers of two.

    Estimates for an H200, to be measured (benchmarks/gpu/sparse.py): 32 tokens read as much of
    queries as 17 KB of packed keys are read once for; 16 programs for each multiprocessor because
    most may find nothing to do; 8,192 keys are 16 for each thread.
    """

    tokens: int = 32
    programs: int = 16
    tile: int = 8192
    listed: int = 4096


SIZES = Sizes()


def select_entries(
    queries_THD: torch.Tensor,
    weights_TH: torch.Tensor,
    tokens: StepTokens,
    keys: Paged,
    ratio: int,
    count: int,
    *,
    scratch: torch.Tensor,
    sizes: Sizes = SIZES,
) -> torch.Tensor:
    """The `count` best entries that each token may see, one for each `ratio` tokens before it:
    int32 [T, at most count] in ascending order, then -1; of equal scores the earlier is better.

    queries [T, H, D], weights [T, H]; positions of a request's tokens ascend by one. `keys` plain,
    of the queries' dtype or bfloat16 under float32, or PackedIndex. `scratch` float32 has room for
    scratch_of entries of one token at least; with more, fewer launches do. Bits do not depend on
    the step. Raises ValueError for what does not fit.
    """
    total, heads, size = queries_THD.shape
    packed = isinstance(keys.entries, PackedIndex)
    _check(queries_THD, weights_TH, keys, packed)
    device = queries_THD.device
    longest = keys.block_tables.shape[1] * keys.per_block
    width = min(count, longest)
    chosen = torch.empty((total, width), dtype=torch.int32, device=device)
    if not total or not width:
        return chosen
    tile = max(sizes.tile, power_of_2(count))
    listed = sizes.listed if longest > tile else 0
    each = scratch_of(longest, count, sizes)
    piece = scratch.numel() // each
    if piece < 1:
        raise ValueError(f"scratch: {scratch.numel()} numbers, {each} needed")
    room = torch.split(scratch[: piece * each], [piece * longest, piece * listed, piece * listed])
    scores, list_key, list_entry = room[0], room[1].view(torch.int32), room[2].view(torch.int32)

    exact = queries_THD.dtype == torch.float32
    per_tile = 32 if exact else 128
    blocks = -(-longest // per_tile)
    together = max(1, min(sizes.tokens, total // max(1, len(tokens.context_len))))
    for first in range(0, total, piece):
        end = min(first + piece, total)
        if longest > count:
            tiles = -(-(end - first) // together)
            parts = max(1, min(blocks, num_sms(device) * sizes.programs // tiles))
            launch(
                index_scores_kernel, (tiles, parts), device, queries_THD, weights_TH,
                tokens.positions, tokens.rows, tokens.query_start, keys.memory,
                keys.memory.view(torch.float32) if packed else None, keys.block_tables, scores,
                first, end, together, keys.block_tables.stride(0), longest,
                QUERY_STRIDE=queries_THD.stride(0), WEIGHT_STRIDE=weights_TH.stride(0),
                HEADS=heads, D=size, WIDTH=keys.entries.width, PER_BLOCK=keys.per_block,
                RATIO=ratio, COUNT=count, NATIVE=converts_e4m3(device), KEYS=per_tile,
                HEAD_COLUMNS=columns(heads), D_COLUMNS=columns(size), num_warps=4, num_stages=2,
            )  # fmt: skip
        launch(
            choose_kernel, (end - first,), device, scores, tokens.positions, tokens.rows, list_key,
            list_entry, chosen, first, longest, RATIO=ratio, COUNT=count, WIDTH=width,
            COLUMNS=power_of_2(width), TILE=tile, LISTED=listed, num_warps=16,
        )  # fmt: skip
    return chosen


def scratch_of(longest: int, count: int, sizes: Sizes = SIZES) -> int:
    """Numbers of scratch for one token of up to `longest` entries."""
    listed = sizes.listed if longest > max(sizes.tile, power_of_2(count)) else 0
    return longest + 2 * listed


def _check(queries_THD: torch.Tensor, weights_TH: torch.Tensor, keys: Paged, packed: bool) -> None:
    total, heads, size = queries_THD.shape
    if queries_THD.stride()[1:] != (size, 1):
        raise ValueError("queries: expected contiguous heads")
    if weights_TH.shape != (total, heads) or weights_TH.stride(1) != 1:
        raise ValueError(f"weights: expected contiguous rows [{total}, {heads}]")
    stored = {torch.uint8} if packed else {queries_THD.dtype}
    if stored == {torch.float32}:
        stored.add(torch.bfloat16)
    if keys.memory.dtype not in stored or not keys.memory.is_contiguous():
        raise ValueError(f"keys: expected contiguous {stored}, not {keys.memory.dtype}")
    if keys.entries.size != size or keys.memory.shape[1] != keys.entries.width or size % 4:
        raise ValueError(f"keys: of {keys.entries.size} values for queries of {size}")
    if keys.block_tables.stride(1) != 1:
        raise ValueError("block_tables: expected contiguous rows")
