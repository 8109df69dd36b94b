"""What a layer gave written to the streams, and the streams' product with a small matrix.

A program has some channels of all streams of some tokens: they get the layer's result, are stored,
and are multiplied with their part of the matrix. K is split by a constant number of channels, which
gives one token's product to many programs. Who reads the parts adds them in their order.

A part's bits depend on nothing but the token: its product is one chain of the matrix instruction's
own depth in ascending order, on mma.sync whatever the number of tokens, since Hopper's wgmma takes
64 rows of the matrix and there are fewer; sums of squares are added in pairs that are written out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Mix
from quire.kernels.triton.gemm.multiply import multiply_add
from quire.kernels.triton.gemm.prefetch import prefetch_rows
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride

# Channels of a program. Flash's 4,096 give one token to 64 programs, Pro's 7,168 to 112.
CHANNELS = 64
# Up to here tokens are taken 8 at a time, the fewest of the instruction, above that 32: the matrix
# comes out of L2 once for each such number.
FEW_TOKENS = 64


@triton.jit
def _sum_pairs(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Sums [ROWS] over the 2 ** LEVELS columns of x, neighbours first, whatever x's layout."""
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (ROWS, 1 << (LEVELS - 1 - level), 2)), axis=2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def _no_tiles():
    """The tuple that tiles are added to, of a type that only the compiler knows."""
    return ()


@triton.jit
def _write(
    given, origins, writes, passes, token, inside, stream, N: tl.constexpr,
    STREAM_STRIDE: tl.constexpr,
):  # fmt: skip
    """A stream with what it gets, in `given`'s dtype."""
    share = tl.load(writes + token * N + stream)
    total = share[:, None] * given.to(tl.float32)
    for origin in tl.static_range(N):
        before = tl.load(origins + origin * STREAM_STRIDE, mask=inside, other=0.0)
        share = tl.load(passes + (token * N + origin) * N + stream)
        share = tl.broadcast_to(share[:, None], total.shape)
        total = tl.fma(share, before.to(tl.float32), total)
    return total.to(given.dtype)


@triton.jit
def _once(x):
    """x in bfloat16, computed once: without this the compiler computes it again, from memory on, in
    the layout that products take it in. For NVIDIA's GPUs."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def _multiply_add(matrix, x, sums, EXACT: tl.constexpr):
    """sums [M, T] + matrix [M, K] in float32 times x [T, K]. bfloat16 tokens are multiplied with
    three bfloat16 values whose sum a value of the matrix is: that rounds only sums. EXACT: by
    float32 multiply-adds instead."""
    if EXACT:
        sums = multiply_add(matrix, x.to(tl.float32).T, sums)
    else:
        high = matrix.to(tl.bfloat16)
        rest = matrix - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums = multiply_add(low, x.T, sums)
        sums = multiply_add(middle, x.T, sums)
        sums = multiply_add(high, x.T, sums)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def write_streams_kernel(
    streams, y, writes, passes, matrix, out, parts, tokens,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
    STREAM_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`y` or none: what is written before, to `out`. `matrix` or none: float32 [M, N * D], whose
    products with the streams go to columns 0.. of `parts` float32 [tokens, parts of D, BLOCK_M],
    the sum of the streams' squares to column M."""
    let_next_start(PDL)
    part = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    token = tl.minimum(token, tokens - 1).to(tl.int64)
    channel = part * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channel < D)[None, :]
    row = tl.arange(0, BLOCK_M)[:, None]
    sums = tl.zeros((BLOCK_M, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS, CHANNELS), tl.float32)
    # A few tokens' time is that of loads that wait for each other, and no load passes a store: all
    # are asked for before the first store, and the matrix, which no earlier kernel writes, before
    # the wait. Many tokens have no registers for that, and other programs to wait with.
    EARLY: tl.constexpr = PDL and TOKENS == 8 and not EXACT
    AT_ONCE: tl.constexpr = N if EARLY else 1
    origins = streams + token[:, None] * TOKEN_STRIDE + channel[None, :]
    matrix_tiles = _no_tiles()
    if matrix is not None:
        tile = matrix + row * (N * D) + channel[None, :]
        kept = (row < M) & inside
        if PDL:
            rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
            for stream in tl.static_range(N):
                prefetch_rows(matrix, rows, stream * D + part * CHANNELS, N * D, CHANNELS)
        if EARLY:
            for stream in tl.static_range(N):
                weight = tl.load(tile + stream * D, mask=kept, other=0.0)
                matrix_tiles += (weight,)
    wait_for_inputs(PDL)
    if y is not None:
        given = tl.load(y + token[:, None] * Y_STRIDE + channel[None, :], mask=inside, other=0.0)
    for first in tl.static_range(0, N, AT_ONCE):
        totals, xs = _no_tiles(), _no_tiles()
        for stream in tl.static_range(first, first + AT_ONCE):
            if y is None:
                x = tl.load(origins + stream * STREAM_STRIDE, mask=inside, other=0.0)
            else:
                x = _write(
                    given, origins, writes, passes, token, inside, stream, N, STREAM_STRIDE
                )  # fmt: skip
            totals += (x,)
        for stream in tl.static_range(first, first + AT_ONCE):
            x = totals[stream - first]
            if y is not None:
                if PDL and not EXACT:
                    x = _once(x)
                places = out + (token * N + stream)[:, None] * D + channel[None, :]
                tl.store(places, x, mask=inside & there[:, None])
            xs += (x,)
        if matrix is not None:
            for stream in tl.static_range(first, first + AT_ONCE):
                if EARLY:
                    weight = matrix_tiles[stream]
                else:
                    weight = tl.load(tile + stream * D, mask=kept, other=0.0)
                x = xs[stream - first]
                sums = _multiply_add(weight, x, sums, EXACT)
                value = x.to(tl.float32)
                squares = tl.fma(value, value, squares)
    if matrix is not None:
        square = _sum_pairs(squares, TOKENS, LEVELS)
        sums = tl.where(row == M, square[None, :], sums)
        target = parts + (token * tl.num_programs(0) + part) * BLOCK_M
        tl.store(target[None, :] + row, sums, mask=there[None, :])


def sizes(tokens: int, itemsize: int) -> dict[str, int]:
    """Tokens of a program, and warps: few tokens wait for the matrix, for many more warps would do
    the same products again. float32 has one size, as the order of its multiply-adds might follow
    it. Estimates, from the instructions that are compiled."""
    if itemsize == 4:
        return {"TOKENS": 16, "num_warps": 4}
    few = tokens <= FEW_TOKENS
    return {"TOKENS": 8 if few else 32, "num_warps": 4 if few else 2}


def part_width(rows: int) -> int:
    """Values of a part: the products with `rows` rows of a matrix, the sum of squares, and room."""
    return max(16, int(triton.next_power_of_2(rows + 1)))


def write_and_multiply(
    streams_TND: torch.Tensor,
    written: tuple[torch.Tensor, Mix] | None,
    matrix_MK: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the streams with what was `written`, [T, n, D] contiguous, or the streams given; parts of
    their product with `matrix_MK` float32 [M, n D], float32 [T, parts of D, part_width(M)]: M
    products and a sum of squares, or None).

    Streams may lie apart, or in one place. Raises ValueError for what does not go together.
    """
    (tokens, n, d), device = streams_TND.shape, streams_TND.device
    if streams_TND.stride(2) != 1 and d > 1:
        raise ValueError("streams: their channels are not contiguous")
    rows = 0 if matrix_MK is None else matrix_MK.shape[0]
    if matrix_MK is not None:
        _check("matrix", matrix_MK, torch.float32, (rows, n * d))
    parts = None
    if matrix_MK is not None:
        shape = (tokens, triton.cdiv(d, CHANNELS), part_width(rows))
        parts = torch.empty(shape, dtype=torch.float32, device=device)
    arguments: dict[str, Any] = {"Y_STRIDE": 0}
    y = out = writes = passes = None
    if written is not None:
        y, writes, passes = written[0], written[1].writes, written[1].matrix
        if y.shape != (tokens, d) or y.dtype != streams_TND.dtype:
            raise ValueError(f"y: {y.dtype} {list(y.shape)} does not go with the streams")
        _check("writes", writes, torch.float32, (tokens, n))
        _check("mix", passes, torch.float32, (tokens, n, n))
        out = torch.empty((tokens, n, d), dtype=y.dtype, device=device)
        arguments["Y_STRIDE"] = row_stride(y, "y")
    size = sizes(tokens, streams_TND.element_size())
    launch(
        write_streams_kernel,
        (triton.cdiv(d, CHANNELS), triton.cdiv(tokens, size["TOKENS"])),
        device,
        streams_TND,
        y,
        writes,
        passes,
        matrix_MK,
        out,
        parts,
        tokens,
        N=n,
        D=d,
        M=rows,
        TOKEN_STRIDE=streams_TND.stride(0),
        STREAM_STRIDE=streams_TND.stride(1),
        BLOCK_M=part_width(rows),
        CHANNELS=CHANNELS,
        LEVELS=CHANNELS.bit_length() - 1,
        EXACT=streams_TND.dtype != torch.bfloat16,
        **arguments,
        **size,
    )
    return streams_TND if out is None else out, parts


def write_streams(y_TD: torch.Tensor, streams_TND: torch.Tensor, mix: Mix) -> torch.Tensor:
    """The streams after a layer that gave y, [T, n, D] in their dtype, rounded once: stream j is
    writes[j] * y + the sum over i of matrix[i, j] * stream i.

    bfloat16, float16 or float32; `mix` float32, contiguous. Raises ValueError for what does not go
    together.
    """
    return write_and_multiply(streams_TND, (y_TD, mix), None)[0]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {dtype} {list(shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)}"
        )
