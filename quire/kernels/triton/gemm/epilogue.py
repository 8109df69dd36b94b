"""Gated feed-forward layers in one product: which rows a tile takes, and what becomes of them.

A gated weight is [2 I, K], the gate's rows first. A tile of R rows takes R / 2 of the gate and
the R / 2 of up that belong to them, so that one product has both and the activation needs no
memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Activations of the product by name; the empty one leaves it as it is. "swiglu_oai" is gpt-oss's:
# (up + 1) * gate * sigmoid(1.702 * gate).
ACTIVATIONS = ("", "silu", "gelu_tanh", "swiglu_oai")


@triton.jit
def weight_rows(first, n, ROWS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rows of the weight, int32 [ROWS], for the outputs from `first` on; past n the last one."""
    local = tl.arange(0, ROWS)
    if ACTIVATION == "":
        return tl.minimum(first + local, n - 1)
    HALF: tl.constexpr = ROWS // 2
    return tl.minimum(first + local % HALF, n - 1) + local // HALF * n


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr = 0.0):
    """act(gate) * up in float32 (Shazeer 2020). With a LIMIT above 0 the gate is clamped from
    above and up from both sides before that (gpt-oss, DeepSeek V4); NaN stays."""
    if LIMIT > 0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if ACTIVATION == "swiglu_oai":
        activated = gate * tl.sigmoid(1.702 * gate)
        up += 1.0
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (g + 0.044715 g^3).
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    return activated * up


@triton.jit
def store_product(
    y, bias, rows, out, first, tokens, n, out_stride,
    T: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr = 0.0,
):  # fmt: skip
    """Store a product y [T, ROWS] of the weight's `rows` in out [tokens, n] from column `first`,
    after bias and activation."""
    if bias is not None:
        y += tl.load(bias + rows)[None, :]
    WIDTH: tl.constexpr = ROWS if ACTIVATION == "" else ROWS // 2
    if ACTIVATION != "":
        gate, up = tl.split(tl.permute(tl.reshape(y, (T, 2, WIDTH)), (0, 2, 1)))
        y = activate(gate, up, ACTIVATION, LIMIT)
    token = tl.arange(0, T)
    column = first + tl.arange(0, WIDTH)
    tl.store(
        out + token[:, None] * out_stride + column[None, :],
        y.to(out.dtype.element_ty),
        mask=(token < tokens)[:, None] & (column < n)[None, :],
    )
