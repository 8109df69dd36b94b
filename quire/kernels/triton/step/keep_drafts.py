"""Drafts that were just sampled, to where the next ones follow them and to where the host reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import DeviceState, Scalar
from quire.kernels.sampling import Status
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.slots import row_behind, sampling_slot

_LENGTH = tl.constexpr(int(Scalar.LENGTH))
_OK = tl.constexpr(int(Status.OK))


@triton.jit(do_not_specialize=["behind"])
def keep_drafts_kernel(
    rows_ptr,
    scalars_ptr,
    history_ptr,
    tokens_ptr,
    status_ptr,
    kept_ptr,
    behind,
    RECORD: tl.constexpr,
    HISTORY: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    token = tl.full([], -1, dtype=tl.int32)
    if (slot >= 0) & (row_behind(rows_ptr, row) == behind):
        if tl.load(status_ptr + row) == _OK:
            token = tl.load(tokens_ptr + row)
        at = tl.load(scalars_ptr + slot * RECORD + _LENGTH) + behind
        tl.store(history_ptr + slot * RECORD + at, tl.maximum(token, 0), mask=at < HISTORY)
    tl.store(kept_ptr + row, token)


def keep_drafts(
    state: DeviceState,
    rows: torch.Tensor,
    behind: int,
    tokens: torch.Tensor,
    status: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Of rows int32 [B, 4] that are `behind` so many drafts: put their `tokens` int32 [B] behind
    these in the slots' histories, and into `kept` int32 [B]; there -1 for all other rows and where
    `status` (quire.kernels.sampling) is an error. Something valid lies in the history even then."""
    layout = state.layout
    launch(
        keep_drafts_kernel,
        (rows.shape[0],),
        state.device,
        rows,
        state.scalars,
        state.history,
        tokens,
        status,
        kept,
        behind,
        RECORD=layout.record,
        HISTORY=layout.max_len + 1,
        num_warps=1,
    )
