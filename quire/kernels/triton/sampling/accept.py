"""Which drafts stand, and their appending: of the tokens that were sampled behind them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import DeviceState
from quire.kernels.sampling import SampleOutputs, Status
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.slots import (
    FLAGS,
    HAS_PENALTIES,
    LENGTH,
    count_once,
    row_behind,
    row_drafts,
    sampling_slot,
)

_OK = tl.constexpr(int(Status.OK))


@triton.jit
def accept_kernel(
    rows_ptr,
    scalars_ptr,
    history_ptr,
    counts_ptr,
    tokens_ptr,
    status_ptr,
    RECORD: tl.constexpr,
    HISTORY: tl.constexpr,
    V: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    if (slot >= 0) & (row_behind(rows_ptr, row) == 0):
        scalars_ptr += slot * RECORD
        history_ptr += slot * RECORD
        length = tl.load(scalars_ptr + LENGTH)
        penalised = tl.load(scalars_ptr + FLAGS) & HAS_PENALTIES != 0
        last = row_drafts(rows_ptr, row)
        taken = tl.zeros([], dtype=tl.int32)
        goes_on = tl.load(status_ptr + row) == _OK
        while goes_on:
            token = tl.load(tokens_ptr + row + taken)
            at = length + taken
            drafted = (taken < last) & (at < HISTORY)
            draft = tl.load(history_ptr + at, mask=drafted, other=-1)
            tl.store(history_ptr + at, token, mask=at < HISTORY)
            if penalised:
                count_once(counts_ptr + slot * V + token)
            taken += 1
            goes_on = drafted & (draft == token)
            if goes_on:
                goes_on = tl.load(status_ptr + row + taken) == _OK
        tl.store(scalars_ptr + LENGTH, length + taken)


def accept(rows: torch.Tensor, state: DeviceState, out: SampleOutputs) -> None:
    """Append to each slot its tokens of `out` (quire.kernels.sampling) up to the first that is not
    the draft in its place, that one too; an error ends them. `rows` int32 [B, 4] as for `sample`.
    """
    layout = state.layout
    launch(
        accept_kernel,
        (rows.shape[0],),
        state.device,
        rows,
        state.scalars,
        state.history,
        state.counts,
        out.tokens,
        out.status,
        RECORD=layout.record,
        HISTORY=layout.max_len + 1,
        V=layout.vocab_size,
        num_warps=1,
    )
