"""Rotary embedding of neighbouring values at the end of each head, in place, after the head's norm
where it has one.

A program has some heads of one token. Without a norm it touches only what rotates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs


@triton.jit
def turn_pairs(x, table_ptr, START: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr):
    """float32 x [N, C] with the 2 HALF values from START on rotated. table: HALF cosines, as many
    sines. START and C are even."""
    N: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    # A pair for each row: tables then have the layout of x, and need no exchange for it.
    pair = tl.broadcast_to(tl.arange(0, PAIRS)[None, :] - START // 2, (N, PAIRS))
    turned = (pair >= 0) & (pair < HALF)
    cosine = tl.load(table_ptr + pair, mask=turned, other=1.0)
    sine = tl.load(table_ptr + HALF + pair, mask=turned, other=0.0)
    if INVERSE:
        sine = -sine
    a, b = tl.split(tl.reshape(x, (N, PAIRS, 2)))
    turned_a, turned_b = a * cosine - b * sine, a * sine + b * cosine
    both = tl.join(tl.where(turned, turned_a, a), tl.where(turned, turned_b, b))
    return tl.reshape(both, (N, 2 * PAIRS))


@triton.jit
def turn_heads(
    x_ptr, table_ptr, head, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    NORM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS of one token from `head` on, in place, by the token's row of the table."""
    FIRST: tl.constexpr = 0 if NORM else D - 2 * HALF
    column = FIRST + tl.arange(0, BLOCK)[None, :]
    heads = head + tl.arange(0, HEADS)[:, None]
    pointers = x_ptr + heads * D + column
    inside = (heads < H) & (column < D)
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x *= tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    x = turn_pairs(x, table_ptr, D - 2 * HALF - FIRST, HALF, INVERSE)
    tl.store(pointers, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_pairs_kernel(
    x_ptr,
    cos_sin_ptr,
    positions_ptr,
    eps,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    TILES: tl.constexpr = (H + HEADS - 1) // HEADS
    token = (tl.program_id(0) // TILES).to(tl.int64)
    table_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF)
    turn_heads(
        x_ptr + token * STRIDE, table_ptr, tl.program_id(0) % TILES * HEADS, eps,
        H, D, HALF, INVERSE, NORM, HEADS, BLOCK,
    )  # fmt: skip


def block_sizes(heads: int, width: int) -> dict[str, int]:
    """Heads and columns of a program that touches `width` values of each head, and warps. They
    decide the order of a norm's sum, so they depend on nothing else.

    At most 2,048 values a program, and 16 a thread: 16-byte accesses of 16-bit values, two in
    flight, and enough programs on a multiprocessor to keep the bus busy.
    """
    block = triton.next_power_of_2(width)
    tile = min(triton.next_power_of_2(heads), max(1, 2048 // block))
    return {"HEADS": tile, "BLOCK": block, "num_warps": max(1, tile * block // 512)}


def heads_stride(x: torch.Tensor, cos_sin: torch.Tensor) -> int:
    """Elements from one token of x [T, H, D] to the next. Raises ValueError unless its heads are
    contiguous and end in pairs for the table [positions, R]."""
    (_, heads, size), rotary = x.shape, cos_sin.shape[1]
    if size % 2 or rotary % 2 or not 0 < rotary <= size:
        raise ValueError(f"{rotary} of {size} values are not whole pairs at the end of pairs")
    if (heads > 1 and x.stride(1) != size) or x.stride(2) != 1 or not cos_sin.is_contiguous():
        raise ValueError(f"x with strides {list(x.stride())}, or cos_sin, is not contiguous")
    return x.stride(0)


def rotate_pairs(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    positions_T: torch.Tensor,
    inverse: bool = False,
    eps: float | None = None,
) -> torch.Tensor:
    """x [T, H, D], itself, with the last R values of each head rotated in neighbouring pairs by the
    token's position (int64 [T]), or back where `inverse`.

    With `eps` each head is first divided by its root mean square. x bfloat16, float16 or float32,
    heads contiguous, tokens as far apart as one likes; cos_sin float32 [positions, R], cosines then
    sines. Computed in float32 and rounded once. Positions past the table are not checked. Raises
    ValueError for another layout, or odd D or R.
    """
    tokens, heads, size = x.shape
    rotary = cos_sin.shape[1]
    stride = heads_stride(x, cos_sin)
    sizes = block_sizes(heads, rotary if eps is None else size)
    launch(
        rotate_pairs_kernel,
        (tokens * triton.cdiv(heads, sizes["HEADS"]),),
        x.device,
        x,
        cos_sin,
        positions_T,
        0.0 if eps is None else eps,
        STRIDE=stride,
        H=heads,
        D=size,
        HALF=rotary // 2,
        INVERSE=inverse,
        NORM=eps is not None,
        **sizes,
    )
    return x
