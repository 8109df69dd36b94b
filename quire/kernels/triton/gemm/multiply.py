"""The matrix instruction as all products here use it."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.launch import INTERPRETED

# Triton's interpreter multiplies the bit patterns of bfloat16 values.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def multiply_add(a, b, sums):
    """sums + a b in float32; float32 operands are multiplied as such, not as TF32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
