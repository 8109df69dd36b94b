"""The rows that a drafting model computes behind a step, made of the step's own on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import DeviceState, RowFlag, Scalar
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

_LENGTH = tl.constexpr(int(Scalar.LENGTH))
_SAMPLE = tl.constexpr(int(RowFlag.SAMPLE))
_DRAFTS = tl.constexpr(int(RowFlag.DRAFTS))
_BEHIND = tl.constexpr(int(RowFlag.BEHIND))
_PROPOSE = tl.constexpr(int(RowFlag.PROPOSE))


@triton.jit(do_not_specialize=["behind"])
def draft_rows_kernel(
    rows_ptr,
    scalars_ptr,
    out_ptr,
    behind,
    RECORD: tl.constexpr,
    LAGS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    rows_ptr += 4 * row
    out_ptr += 4 * row
    slot = tl.load(rows_ptr).to(tl.int64)
    start = tl.zeros([], dtype=tl.int32)
    count = tl.zeros([], dtype=tl.int32)
    flags = tl.zeros([], dtype=tl.int32)
    if slot >= 0:
        start = tl.load(rows_ptr + 1)
        count = tl.load(rows_ptr + 2)
        asked = tl.load(rows_ptr + 3)
        length = tl.load(scalars_ptr + slot * RECORD + _LENGTH)
        propose = asked // _PROPOSE
        if asked & _SAMPLE != 0:
            if LAGS:
                # Of drafts those that stand. A row that failed has no token behind.
                drafts = asked % _BEHIND // _DRAFTS
                count = tl.maximum(length - start - 1, count - drafts)
            else:
                # Of drafts those that stand; and the token behind, if drafts are to follow it.
                count = tl.maximum(length - start - tl.where(propose > 0, 0, 1), 0)
        if propose > 0:
            flags += _SAMPLE
        if behind > 0:
            if propose > 0:
                known = tl.minimum(behind, propose - 1)
                start = tl.maximum(start + count - 1, 0) + known if LAGS else length + known - 1
                flags += (_DRAFTS + _BEHIND) * known
            else:
                start = tl.maximum(start + count - 1, 0)
            count = tl.full([], 1, dtype=tl.int32)
    tl.store(out_ptr, slot.to(tl.int32))
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, count)
    tl.store(out_ptr + 3, flags)


def draft_rows(
    state: DeviceState, rows: torch.Tensor, behind: int, out: torch.Tensor, lags: bool = False
) -> None:
    """Write `out` int32 [B, 4] for rows int32 [B, 4] of a step that has been sampled.

    `behind` 0: what of each row counts, with the last token sampled where drafts are to follow;
    those rows sample (RowFlag). Else one token a row: the last of so many drafts, which lie behind
    the slot's history. A row that wants no more drafts computes a token of its own again, so that
    each has one. `lags`: the model is told with each token the one that follows (multi-token
    prediction), and so reads as many tokens as the target has, and is one behind in each pass.
    """
    launch(
        draft_rows_kernel,
        (rows.shape[0],),
        state.device,
        rows,
        state.scalars,
        out,
        behind,
        RECORD=state.layout.record,
        LAGS=lags,
        num_warps=1,
    )
