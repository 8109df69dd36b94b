"""One token per row, chosen as quire/runner/sampler.py chooses, for state on the device."""

from __future__ import annotations

import torch
import triton

from quire.kernels.device_state import DeviceState
from quire.kernels.sampling import CANDIDATES, SUBTILE, TILE, SampleOutputs, Scratch, num_tiles
from quire.kernels.triton.launch import launch
from quire.kernels.triton.rows import row_stride
from quire.kernels.triton.sampling.adjust import adjust_tiles_kernel
from quire.kernels.triton.sampling.logprobs_of import report_logprobs
from quire.kernels.triton.sampling.select import (
    cut_rows_kernel,
    finish_kernel,
    list_or_pick_kernel,
)
from quire.kernels.triton.sampling.tiles import pick_tiles_kernel


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    state: DeviceState,
    variant: str,
    out: SampleOutputs,
    scratch: Scratch,
    logprobs: bool = False,
    append: bool = True,
) -> None:
    """Choose a token for each row of `logits` [B, V] whose row of `rows` int32 [B, 4] has a slot
    and RowFlag.SAMPLE, and append it to the slot's history.

    `variant`: "greedy" where all these slots are plain greedy, "plain" where temperature and noise
    are all they ask for, "full" for everything (quire.runner.diffs.variant). A row's token has
    the same bits in each variant that serves it, and in every batch. `logprobs`: also report the
    log-probabilities of slots that ask for them. Noise is keyed by (seed, choice, length).
    Rows may be behind drafts of their slot (RowFlag), which lie behind its history; each is sampled
    as if those before it were output. Then `append` must be False, and `accept` says what stands.
    `scratch` has at least B rows. Raises ValueError for an unknown variant or shapes that do not
    belong together.
    """
    count, vocab_size = logits.shape
    if variant not in ("greedy", "plain", "full"):
        raise ValueError(f"variant: {variant!r} is not one of greedy, plain, full")
    if vocab_size != state.layout.vocab_size or scratch.logits.shape[1] != vocab_size:
        raise ValueError(
            f"logits: {vocab_size} tokens, where the state has {state.layout.vocab_size} "
            f"and the scratch {scratch.logits.shape[1]}"
        )
    if min(rows.shape[0], out.tokens.shape[0], scratch.count.shape[0]) < count:
        raise ValueError(
            f"logits: {count} rows, for {rows.shape[0]} rows of the step, {out.tokens.shape[0]} "
            f"of the outputs, {scratch.count.shape[0]} of the scratch"
        )
    if variant == "full":
        _adjust_and_list(logits, rows, state, scratch)
    else:
        launch(
            pick_tiles_kernel,
            (num_tiles(vocab_size), count),
            logits.device,
            logits,
            rows,
            state.scalars,
            scratch.tile_max,
            scratch.pick,
            scratch.pick_id,
            RECORD=state.layout.record,
            V=vocab_size,
            STRIDE=row_stride(logits, "logits"),
            NOISE=variant == "plain",
            TILE=TILE,
            num_warps=8 if variant == "plain" else 4,
        )
    _finish(count, rows, state, variant == "full", append, out, scratch)
    if logprobs:
        report_logprobs(
            logits,
            scratch.wanted,
            out.tokens,
            scratch,
            out.logprob,
            out.rank,
            out.top_ids,
            out.top_logprobs,
        )


def _adjust_and_list(
    logits: torch.Tensor, rows: torch.Tensor, state: DeviceState, scratch: Scratch
) -> None:
    count, vocab_size = logits.shape
    tiles = num_tiles(vocab_size)
    subtiles = tiles * (TILE // SUBTILE)
    record = state.layout.record
    launch(
        adjust_tiles_kernel,
        (tiles, count),
        logits.device,
        logits,
        rows,
        state.scalars,
        state.history,
        state.ends,
        state.bias_ids,
        state.bias_values,
        state.word_starts,
        state.word_tokens,
        state.allowed,
        state.counts,
        scratch.logits,
        scratch.tile_max,
        scratch.subtile_max,
        RECORD=record,
        V=vocab_size,
        STRIDE=row_stride(logits, "logits"),
        TILE=TILE,
        SUBTILE=SUBTILE,
        num_warps=8,
    )
    launch(
        cut_rows_kernel,
        (count,),
        logits.device,
        rows,
        state.scalars,
        scratch.subtile_max,
        scratch.largest,
        scratch.count,
        scratch.cut,
        RECORD=record,
        V=vocab_size,
        SUBTILES=subtiles,
        BLOCK=triton.next_power_of_2(subtiles),
        num_warps=4,
    )
    launch(
        list_or_pick_kernel,
        (tiles, count),
        logits.device,
        rows,
        state.scalars,
        scratch.logits,
        scratch.largest,
        scratch.cut,
        scratch.count,
        scratch.list_key,
        scratch.list_id,
        scratch.tile_mass,
        scratch.pick,
        scratch.pick_id,
        RECORD=record,
        V=vocab_size,
        CANDIDATES=CANDIDATES,
        TILE=TILE,
        num_warps=8,
    )


def _finish(
    count: int,
    rows: torch.Tensor,
    state: DeviceState,
    full: bool,
    append: bool,
    out: SampleOutputs,
    scratch: Scratch,
) -> None:
    layout = state.layout
    tiles = num_tiles(layout.vocab_size)
    launch(
        finish_kernel,
        (count,),
        state.device,
        rows,
        state.scalars,
        state.history,
        state.counts,
        scratch.logits,
        scratch.tile_max,
        scratch.pick,
        scratch.pick_id,
        scratch.tile_mass,
        scratch.largest,
        scratch.cut,
        scratch.count,
        scratch.list_key,
        scratch.list_id,
        out.tokens,
        out.status,
        scratch.wanted,
        RECORD=layout.record,
        HISTORY=layout.max_len + 1,
        V=layout.vocab_size,
        TILES=tiles,
        BLOCK_TILES=triton.next_power_of_2(tiles),
        CANDIDATES=CANDIDATES,
        BLOCK=512,  # with 8 warps 110 registers: two programs on a multiprocessor
        FULL=full,
        APPEND=append,
        num_warps=8 if full else 4,
    )
