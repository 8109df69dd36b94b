"""Hidden states of a step's tokens, for those that a module for multi-token prediction reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

BLOCK_H = 1024


@triton.jit(do_not_specialize=["num_rows"])
def take_hidden_kernel(
    kept_ptr,
    rows_ptr,
    query_start_ptr,
    out_ptr,
    num_rows,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    token = tl.program_id(0)
    # The row that the token is of: as many rows end before it.
    index = tl.arange(0, BLOCK_B)
    inside = index < num_rows
    end = tl.load(query_start_ptr + 1 + index, mask=inside, other=2147483647)
    row = tl.sum((end <= token).to(tl.int32), axis=0)
    begin = tl.load(query_start_ptr + row)
    taken = tl.load(rows_ptr + 4 * index, mask=inside, other=-1) >= 0
    count = tl.load(rows_ptr + 4 * index + 2, mask=taken & (index < row), other=0)
    place = (tl.sum(count, axis=0) + token - begin).to(tl.int64)
    # What lies behind the last row's tokens is padding.
    width = tl.where(token < tl.load(query_start_ptr + num_rows), H, 0)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        x = tl.load(kept_ptr + place * H + column, mask=column < width, other=0.0)
        tl.store(out_ptr + token.to(tl.int64) * H + column, x, mask=column < H)


def take_hidden(
    kept: torch.Tensor, rows: torch.Tensor, query_start: torch.Tensor, out: torch.Tensor
) -> None:
    """Set `out` [T, H] to the hidden states of the first tokens of each row of a step.

    `kept` [>= tokens of the step, H] has those of all its tokens, row by row, of which `rows` int32
    [B, 4] has the numbers (third column; rows without a slot have none). `query_start` int32
    [B + 1]: where the tokens of each row begin in `out`; what lies behind the last becomes 0. Both
    contiguous and of one dtype.
    """
    t, h = out.shape
    launch(
        take_hidden_kernel,
        (t,),
        out.device,
        kept,
        rows,
        query_start,
        out,
        rows.shape[0],
        H=h,
        BLOCK_B=triton.next_power_of_2(max(rows.shape[0], 1)),
        BLOCK_H=min(BLOCK_H, triton.next_power_of_2(h)),
        num_warps=4,
    )
