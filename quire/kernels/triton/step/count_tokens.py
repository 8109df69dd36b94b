"""Counting the tokens of requests with penalties when they enter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import DeviceState, Flag, Scalar
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

_LENGTH = tl.constexpr(int(Scalar.LENGTH))
_NUM_PROMPT = tl.constexpr(int(Scalar.NUM_PROMPT))
_FLAGS = tl.constexpr(int(Scalar.FLAGS))
_PENALTIES = tl.constexpr(int(Flag.PENALTIES))


@triton.jit
def _occurrences(history_ptr, begin, end, first, BLOCK_V: tl.constexpr, TILE: tl.constexpr):
    """int32 [BLOCK_V]: how often tokens first, first + 1, ... are among history[begin:end]."""
    counts = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(begin, end, TILE):
        index = start + tl.arange(0, TILE)
        token = tl.load(history_ptr + index, mask=index < end, other=-1) - first
        counts += tl.histogram(token, BLOCK_V, mask=(token >= 0) & (token < BLOCK_V))
    return counts


@triton.jit
def count_tokens_kernel(
    slots_ptr,
    scalars_ptr,
    history_ptr,
    counts_ptr,
    RECORD: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    if slot >= 0:
        scalars_ptr += slot * RECORD
        if tl.load(scalars_ptr + _FLAGS) & _PENALTIES != 0:
            length = tl.load(scalars_ptr + _LENGTH)
            num_prompt = tl.load(scalars_ptr + _NUM_PROMPT)
            history_ptr += slot * RECORD
            first = tl.program_id(1) * BLOCK_V
            prompt = _occurrences(history_ptr, 0, num_prompt, first, BLOCK_V, TILE)
            output = _occurrences(history_ptr, num_prompt, length, first, BLOCK_V, TILE)
            counts = tl.minimum(output, 0x7FFF) - tl.where(prompt > 0, 0x8000, 0)
            token = first + tl.arange(0, BLOCK_V)
            tl.store(counts_ptr + slot * V + token, counts.to(tl.int16), mask=token < V)


def count_tokens(state: DeviceState, slots: torch.Tensor) -> None:
    """Count anew the tokens of `slots` int32 [N], from their history into `state.counts`. Slots
    without penalties keep what is there, and -1 is no slot."""
    layout = state.layout
    block = 2048
    launch(
        count_tokens_kernel,
        (slots.shape[0], triton.cdiv(layout.vocab_size, block)),
        state.device,
        slots,
        state.scalars,
        state.history,
        state.counts,
        RECORD=layout.record,
        V=layout.vocab_size,
        BLOCK_V=block,
        TILE=1024,
        num_warps=4,
    )
