"""Rows of the token embedding, scaled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride

# 16 bytes for each of 128 threads, 16-bit values.
BLOCK_H = 1024


@triton.jit(do_not_specialize=["vocab"])
def embedding_kernel(
    ids_ptr,
    table_ptr,
    out_ptr,
    vocab,
    scale,
    TABLE_STRIDE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    wait_for_inputs(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), vocab - 1)
    x = tl.load(table_ptr + row * TABLE_STRIDE + column, mask=column < H, other=0.0)
    y = (x.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * H + column, y, mask=column < H)


def embedding(ids_T: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Row `ids_T[t]` of `table` times `scale`, computed in float32 and rounded once.

    ids int64 [T], table [V, H] bfloat16, float16 or float32 with contiguous rows -> [T, H] in the
    table's dtype. `scale` is a value of that dtype already. An id outside the table takes its
    first or last row: a kernel cannot raise, so ids are checked before they get here. Raises
    ValueError for a table without rows or of another layout.
    """
    t, (vocab, h) = ids_T.shape[0], table.shape
    if not vocab:
        raise ValueError("table: has no rows")
    out = torch.empty((t, h), dtype=table.dtype, device=table.device)
    launch(
        embedding_kernel,
        (t * triton.cdiv(h, BLOCK_H),),
        table.device,
        ids_T,
        table,
        out,
        vocab,
        scale,
        TABLE_STRIDE=row_stride(table, "table"),
        H=h,
        BLOCK_H=BLOCK_H,
        num_warps=4,
    )
    return out
