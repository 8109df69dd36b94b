"""Log-probabilities of given tokens and of the likeliest ones, from raw logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import MAX_LOGPROBS
from quire.kernels.sampling import CANDIDATES, PICKS, SUBTILE, TILE, Scratch, num_tiles
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride
from quire.kernels.triton.sampling.likely import (
    BY_COUNT,
    BY_TOKEN,
    cut_at,
    list_candidates,
    load_candidates,
    raw_key,
    raw_of_key,
    search,
)
from quire.kernels.triton.sampling.slots import INFINITY, LARGEST
from quire.kernels.triton.sampling.tiles import checked

_MAX_LOGPROBS = tl.constexpr(MAX_LOGPROBS)


@triton.jit
def measure_tiles_kernel(
    logits_ptr,
    wanted_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    subtile_max_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(wanted_ptr + row) >= 0:
        SUBTILES: tl.constexpr = TILE // SUBTILE
        subtile = tl.arange(0, SUBTILES)
        token = tile * TILE + subtile[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
        x = tl.load(logits_ptr + row * STRIDE + token, mask=token < V, other=-INFINITY)
        x, largest = checked(x.to(tl.float32))
        at = row * tl.num_programs(0) + tile
        tl.store(tile_max_ptr + at, largest)
        tl.store(tile_sum_ptr + at, tl.sum(tl.exp(x - tl.maximum(tl.max(x), -LARGEST))))
        tl.store(subtile_max_ptr + at * SUBTILES + subtile, tl.max(x, axis=1))


@triton.jit
def measure_rows_kernel(
    wanted_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    subtile_max_ptr,
    logsumexp_ptr,
    count_ptr,
    cut_ptr,
    rank_ptr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_SUBTILES: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(wanted_ptr + row)
    if wanted >= 0:
        tile = tl.arange(0, BLOCK_TILES)
        at = row * TILES + tile
        x, largest = checked(tl.load(tile_max_ptr + at, mask=tile < TILES, other=-INFINITY))
        sums = tl.load(tile_sum_ptr + at, mask=tile < TILES, other=0.0)
        total = tl.sum(sums * tl.exp(x - tl.maximum(largest, -LARGEST)))
        finite = (largest == largest) & (tl.abs(largest) < INFINITY)
        tl.store(logsumexp_ptr + row, tl.where(finite, largest + tl.log(total), float("nan")))
        index = tl.arange(0, BLOCK_SUBTILES)
        inside = index < SUBTILES
        at = subtile_max_ptr + row * SUBTILES + index
        x = tl.load(at, mask=inside, other=-INFINITY)
        tl.store(cut_ptr + row, cut_at(x, inside, wanted))
        tl.store(count_ptr + row, 0)
        tl.store(rank_ptr + row, 1)


@triton.jit
def list_likely_kernel(
    logits_ptr,
    wanted_ptr,
    targets_ptr,
    logsumexp_ptr,
    count_ptr,
    cut_ptr,
    list_key_ptr,
    list_id_ptr,
    rank_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted = tl.load(wanted_ptr + row)
    if wanted >= 0:
        logits_ptr += row * STRIDE
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits_ptr + token, mask=token < V, other=-INFINITY)
        x, _ = checked(x.to(tl.float32))
        logsumexp = tl.load(logsumexp_ptr + row)
        chosen = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32) - logsumexp
        above = tl.sum((x - logsumexp > chosen).to(tl.int32))
        if above > 0:
            tl.atomic_add(rank_ptr + row, above)
        if wanted > 0:
            key = raw_key(x)
            likely = (token < V) & (key <= tl.load(cut_ptr + row))
            list_candidates(
                key,
                token,
                likely,
                count_ptr + row,
                list_key_ptr + row * CANDIDATES,
                list_id_ptr + row * CANDIDATES,
                CANDIDATES,
            )


@triton.jit
def report_kernel(
    logits_ptr,
    wanted_ptr,
    targets_ptr,
    logsumexp_ptr,
    count_ptr,
    cut_ptr,
    list_key_ptr,
    list_id_ptr,
    best_key_ptr,
    best_id_ptr,
    logprob_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PICKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.minimum(tl.load(wanted_ptr + row), V)
    if wanted >= 0:
        logits_ptr += row * STRIDE
        logsumexp = tl.load(logsumexp_ptr + row)
        target = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32)
        tl.store(logprob_ptr + row, target - logsumexp)
        if wanted > 0:
            count = tl.load(count_ptr + row)
            list_key_ptr += row * CANDIDATES
            list_id_ptr += row * CANDIDATES
            best_key_ptr += row * PICKS
            best_id_ptr += row * PICKS
            # Of the keys that are wanted the last may be that of more tokens than are.
            first_key = tl.full([], -(2**31) - 1, dtype=tl.int64)
            last_key = tl.load(cut_ptr + row)
            last, before = search(
                first_key, last_key, wanted, 0, count, list_key_ptr, list_id_ptr, logits_ptr,
                0.0, 1.0, BY_COUNT, V, CANDIDATES, True, BLOCK,
            )  # fmt: skip
            nothing = tl.full([], -1, dtype=tl.int32)
            everything = tl.full([], V, dtype=tl.int32)
            last_token, _ = search(
                nothing, everything, wanted - before, last, count, list_key_ptr, list_id_ptr,
                logits_ptr, 0.0, 1.0, BY_TOKEN, V, CANDIDATES, True, BLOCK,
            )  # fmt: skip
            found = tl.zeros([], dtype=tl.int32)
            for start in range(0, tl.where(count <= CANDIDATES, count, V), BLOCK):
                key, token, inside = load_candidates(
                    start, count, list_key_ptr, list_id_ptr, logits_ptr, 0.0, 1.0,
                    V, CANDIDATES, True, BLOCK,
                )  # fmt: skip
                stays = inside & ((key < last) | ((key == last) & (token <= last_token)))
                at = found + tl.cumsum(stays.to(tl.int32), axis=0) - 1
                tl.store(best_key_ptr + at, key, mask=stays)
                tl.store(best_id_ptr + at, token, mask=stays)
                found += tl.sum(stays.to(tl.int32))
            # All have been written before any is read.
            tl.debug_barrier()
            i = tl.arange(0, PICKS)
            key = tl.load(best_key_ptr + i, mask=i < wanted, other=2**31 - 1)
            token = tl.load(best_id_ptr + i, mask=i < wanted, other=2**31 - 1)
            likelier = (key[None, :] < key[:, None]) | (
                (key[None, :] == key[:, None]) & (token[None, :] < token[:, None])
            )
            to = row * _MAX_LOGPROBS + tl.sum(likelier.to(tl.int32), axis=1)
            tl.store(top_ids_ptr + to, token, mask=i < wanted)
            tl.store(top_logprobs_ptr + to, raw_of_key(key) - logsumexp, mask=i < wanted)


def report_logprobs(
    logits: torch.Tensor,
    wanted: torch.Tensor,
    targets: torch.Tensor,
    scratch: Scratch,
    logprob: torch.Tensor,
    rank: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Of the rows of `logits` [R, V] whose `wanted` int32 [R] is not negative, write what
    `logprobs_of` returns: `top_ids` and `top_logprobs` are [R, 100], and `wanted` of them are
    written."""
    rows, vocab_size = logits.shape
    device, stride = logits.device, row_stride(logits, "logits")
    tiles = num_tiles(vocab_size)
    subtiles = tiles * (TILE // SUBTILE)
    launch(
        measure_tiles_kernel,
        (tiles, rows),
        device,
        logits,
        wanted,
        scratch.tile_max,
        scratch.tile_sum,
        scratch.subtile_max,
        V=vocab_size,
        STRIDE=stride,
        TILE=TILE,
        SUBTILE=SUBTILE,
        num_warps=4,
    )
    launch(
        measure_rows_kernel,
        (rows,),
        device,
        wanted,
        scratch.tile_max,
        scratch.tile_sum,
        scratch.subtile_max,
        scratch.logsumexp,
        scratch.count,
        scratch.cut,
        rank,
        TILES=tiles,
        BLOCK_TILES=triton.next_power_of_2(tiles),
        SUBTILES=subtiles,
        BLOCK_SUBTILES=triton.next_power_of_2(subtiles),
        num_warps=4,
    )
    launch(
        list_likely_kernel,
        (tiles, rows),
        device,
        logits,
        wanted,
        targets,
        scratch.logsumexp,
        scratch.count,
        scratch.cut,
        scratch.list_key,
        scratch.list_id,
        rank,
        V=vocab_size,
        STRIDE=stride,
        CANDIDATES=CANDIDATES,
        TILE=TILE,
        num_warps=8,
    )
    launch(
        report_kernel,
        (rows,),
        device,
        logits,
        wanted,
        targets,
        scratch.logsumexp,
        scratch.count,
        scratch.cut,
        scratch.list_key,
        scratch.list_id,
        scratch.best_key,
        scratch.best_id,
        logprob,
        top_ids,
        top_logprobs,
        V=vocab_size,
        STRIDE=stride,
        CANDIDATES=CANDIDATES,
        PICKS=PICKS,
        BLOCK=512,
        num_warps=8,
    )


def logprobs_of(
    logits: torch.Tensor, targets: torch.Tensor, count: int, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` int [R] under `logits` [R, V] and of the `count` likeliest
    tokens: (logprob float32 [R], rank int32 [R], ids int32 [R, c], logprobs float32 [R, c]), with
    c the smaller of `count` and V.

    Rank 1 has no likelier token. Equally likely tokens come by their ids. A row that holds NaN, or
    whose largest logit is infinite, has log-probabilities of NaN. Raises ValueError where `count`
    is above 100 or the scratch has fewer rows than the logits.
    """
    rows, vocab_size = logits.shape
    if not 0 <= count <= MAX_LOGPROBS:
        raise ValueError(f"count: {count} is not from 0 to {MAX_LOGPROBS}")
    if scratch.count.shape[0] < rows or scratch.logits.shape[1] != vocab_size:
        raise ValueError(f"scratch: shape {list(scratch.logits.shape)} for {list(logits.shape)}")
    device = logits.device
    wanted = torch.full((rows,), count, dtype=torch.int32, device=device)
    logprob = torch.empty(rows, dtype=torch.float32, device=device)
    rank = torch.empty(rows, dtype=torch.int32, device=device)
    top_ids = torch.empty(rows, MAX_LOGPROBS, dtype=torch.int32, device=device)
    top_logprobs = torch.empty(rows, MAX_LOGPROBS, dtype=torch.float32, device=device)
    report_logprobs(
        logits, wanted, targets.to(torch.int32), scratch, logprob, rank, top_ids, top_logprobs
    )
    count = min(count, vocab_size)
    return logprob, rank, top_ids[:, :count], top_logprobs[:, :count]
