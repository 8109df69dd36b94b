"""Fetching weights into the L2 cache while earlier kernels still run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(weight, rows, start, k, COLUMNS: tl.constexpr):
    """Ask for columns [start, start + COLUMNS) of `rows` (int64) of a weight [N, k] to be brought
    into L2, and go on: no result, no waiting. For NVIDIA's GPUs; COLUMNS a power of two."""
    LINE: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (COLUMNS + LINE - 1) // LINE
    column = tl.minimum(start + tl.arange(0, LINES) * LINE, k - 1)
    address = weight + rows[:, None] * k + column[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
