"""Manifold-constrained hyper-connections: what a layer reads of the streams, normed, and how its
result goes back to them; and the sum of the streams that the head reads.

Two launches: write_streams.py writes the result of the layer before and multiplies the streams with
the layer's matrix in parts; here the parts are added, in one order for every number of tokens. Some
programs have one token's streams and read them, others make the mixes of a few tokens each, which
takes as long: many steps of sums over four values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.compressed import Mix, StreamWeights
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import empty_rows
from quire.kernels.triton.streams.write_streams import write_and_multiply

# Tokens whose mixes a program makes.
MIX_TOKENS = 4


@triton.jit
def _divide(x, y, PDL: tl.constexpr):
    """x / y for y from 1e-30 to 1e30, to 2 ulp on NVIDIA's GPUs in either form: the steps of a mix
    wait for each other's divisions, and the compiler's takes twice the steps for any y."""
    y = tl.broadcast_to(y, x.shape)
    if PDL:
        result = tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1
        )
    else:
        result = x / y
    return result


@triton.jit
def _mix(
    parts, base, scale, writes, passes, first, tokens, eps, stream_eps,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    MIX_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """How much of a layer's result each stream gets, and how streams pass into each other, for
    tokens from `first` on (reference/streams/mixing.py)."""
    stream = tl.arange(0, BLOCK_N)
    exists = stream < N
    pair_exists = exists[:, None] & exists[None, :]
    pair = 2 * N + stream[:, None] * N + stream[None, :]
    write_base = tl.load(base + N + stream, mask=exists, other=0.0)
    pair_base = tl.load(base + pair, mask=pair_exists, other=0.0)
    write_scale, pair_scale = tl.load(scale + 1), tl.load(scale + 2)
    token = first + tl.arange(0, MIX_TOKENS)
    there = token < tokens
    token = token.to(tl.int64)
    wait_for_inputs(PDL)
    split = tl.arange(0, BLOCK_SPLITS)
    rows = parts + (token[:, None] * SPLITS + split[None, :]) * WIDTH
    inside = there[:, None] & (split < SPLITS)[None, :]
    pair_logits = tl.load(
        rows[:, :, None, None] + pair[None, None],
        mask=inside[:, :, None, None] & pair_exists[None, None],
        other=0.0,
    )
    write_logits = tl.load(
        rows[:, :, None] + (N + stream)[None, None],
        mask=inside[:, :, None] & exists[None, None],
        other=0.0,
    )
    square = tl.load(rows + M, mask=inside, other=0.0)
    # Else the compiler adds the squares before it asks for the rest, and waits twice.
    tl.debug_barrier()
    square = tl.sum(square, axis=1)
    inverse = tl.rsqrt(square / (N * D) + eps)
    write_logits = tl.sum(write_logits, axis=1) * inverse[:, None]
    share = 2.0 * tl.sigmoid(write_logits * write_scale + write_base[None, :])
    places = writes + token[:, None] * N + stream[None, :]
    tl.store(places, share, mask=there[:, None] & exists[None, :])

    logits = tl.sum(pair_logits, axis=1) * inverse[:, None, None] * pair_scale + pair_base[None]
    # Through memory, so that a warp has whole matrices: the sums above leave them over several.
    between = stream[:, None] * N + stream[None, :]
    places = passes + token[:, None, None] * (N * N) + between[None]
    kept = there[:, None, None] & pair_exists[None]
    tl.store(places, logits, mask=kept)
    tl.debug_barrier()
    logits = tl.load(places, mask=kept, other=0.0)
    logits = tl.where(exists[None, None, :], logits, -float("inf"))
    matrix = tl.exp(logits - tl.max(logits, axis=2)[:, :, None])
    matrix = _divide(matrix, tl.sum(matrix, axis=2)[:, :, None], PDL) + stream_eps
    matrix = tl.where(pair_exists[None], matrix, 0.0)
    matrix = _divide(matrix, tl.sum(matrix, axis=1)[:, None, :] + stream_eps, PDL)
    for _ in range(STEPS - 1):
        matrix = _divide(matrix, tl.sum(matrix, axis=2)[:, :, None] + stream_eps, PDL)
        matrix = _divide(matrix, tl.sum(matrix, axis=1)[:, None, :] + stream_eps, PDL)
    tl.store(places, matrix, mask=kept)


@triton.jit
def _read(
    parts, base, scale, streams, norm, out, token, eps, stream_eps, norm_eps,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, STREAM_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What is read of one token's streams, normed where there is a `norm`."""
    stream = tl.arange(0, BLOCK_N)
    exists = stream < N
    channel = tl.arange(0, BLOCK_D)
    read_base = tl.load(base + stream, mask=exists, other=0.0)
    read_scale = tl.load(scale)
    if norm is not None:
        weight = tl.load(norm + channel, mask=channel < D, other=0.0)
    token = token.to(tl.int64)
    wait_for_inputs(PDL)
    x = tl.load(
        streams + token * TOKEN_STRIDE + stream[:, None] * STREAM_STRIDE + channel[None, :],
        mask=exists[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    split = tl.arange(0, BLOCK_SPLITS)
    rows = parts + (token * SPLITS + split) * WIDTH
    inside = split < SPLITS
    logits = tl.load(
        rows[:, None] + stream[None, :], mask=inside[:, None] & exists[None, :], other=0.0
    )
    square = tl.load(rows + M, mask=inside, other=0.0)
    # Else the compiler adds the squares before it asks for the streams, and waits twice.
    tl.debug_barrier()
    square = tl.sum(square, axis=0)
    inverse = tl.rsqrt(square / (N * D) + eps)
    reads = tl.sigmoid(tl.sum(logits, axis=0) * inverse * read_scale + read_base) + stream_eps
    y = tl.sum(x.to(tl.float32) * reads[:, None], axis=0)
    if norm is not None:
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / D + norm_eps) * weight
    tl.store(out + token * D + channel, y.to(out.dtype.element_ty), mask=channel < D)


@triton.jit(do_not_specialize=["tokens"])
def mix_streams_kernel(
    parts, base, scale, streams, norm, out, writes, passes, tokens, eps, stream_eps, norm_eps,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    STEPS: tl.constexpr, TOKEN_STRIDE: tl.constexpr, STREAM_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    MIX_TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`parts` as write_and_multiply gives them, `out` [tokens, D]. No `writes`: no mixes, as for
    the head; else programs for those come before the ones that read."""
    let_next_start(PDL)
    program = tl.program_id(0)
    mixing = 0
    if writes is not None:
        mixing = tl.cdiv(tokens, MIX_TOKENS)
    if program >= mixing:
        _read(
            parts, base, scale, streams, norm, out, program - mixing, eps, stream_eps, norm_eps,
            N, D, M, WIDTH, SPLITS, TOKEN_STRIDE, STREAM_STRIDE, BLOCK_N, BLOCK_D, BLOCK_SPLITS,
            PDL,
        )  # fmt: skip
    else:
        if writes is not None:
            _mix(
                parts, base, scale, writes, passes, program * MIX_TOKENS, tokens, eps, stream_eps,
                N, D, M, WIDTH, SPLITS, STEPS, BLOCK_N, BLOCK_SPLITS, MIX_TOKENS, PDL,
            )  # fmt: skip


def block_sizes(n: int, d: int, splits: int) -> dict[str, int]:
    """Tile and warps, which decide the order of a token's sums and depend on nothing else: 128
    values a thread, since every warp more does the steps of the mixes again."""
    block_n, block_d = triton.next_power_of_2(n), triton.next_power_of_2(d)
    return {
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_SPLITS": triton.next_power_of_2(splits),
        "num_warps": min(16, max(1, block_n * block_d // 4096)),
    }


def _read_streams(
    streams_TND: torch.Tensor,
    parts: torch.Tensor,
    weights: StreamWeights,
    norm_D: torch.Tensor | None,
    norm_eps: float,
    mix: Mix | None,
) -> torch.Tensor:
    """What is read, [T, D]; `mix` is filled where it is given."""
    tokens, n, d = streams_TND.shape
    out = empty_rows(tokens, d, streams_TND.dtype, streams_TND.device)
    splits, width = parts.shape[1], parts.shape[2]
    programs = tokens + (0 if mix is None else triton.cdiv(tokens, MIX_TOKENS))
    launch(
        mix_streams_kernel,
        (programs,),
        streams_TND.device,
        parts,
        weights.base,
        weights.scale,
        streams_TND,
        norm_D,
        out,
        None if mix is None else mix.writes,
        None if mix is None else mix.matrix,
        tokens,
        weights.eps,
        weights.stream_eps,
        norm_eps,
        N=n,
        D=d,
        M=weights.matrix.shape[0],
        WIDTH=width,
        SPLITS=splits,
        STEPS=weights.steps,
        TOKEN_STRIDE=streams_TND.stride(0),
        STREAM_STRIDE=streams_TND.stride(1),
        MIX_TOKENS=MIX_TOKENS,
        **block_sizes(n, d, splits),
    )
    return out


def mix_streams(
    streams_TND: torch.Tensor,
    written: tuple[torch.Tensor, Mix] | None,
    weights: StreamWeights,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, Mix]:
    """(streams, the norm [T, D] of what the next layer reads of them, how its result goes back).
    `written`: a layer's result y [T, D] and its mix, which the streams get first.

    Streams and y bfloat16, float16 or float32, streams as far apart as one likes, or in one place;
    the norm's weight and `weights` float32. All arithmetic is float32; the streams are rounded as
    they are stored, and what is read once it is normed. A token's bits depend on nothing but the
    token. Raises ValueError for what does not go together.
    """
    tokens, n, _ = streams_TND.shape
    rows = n * (n + 2)
    _check_weights(weights, n, rows, 3)
    streams_TND, parts = write_and_multiply(streams_TND, written, weights.matrix)
    assert parts is not None
    device = streams_TND.device
    mix = Mix(
        torch.empty((tokens, n), dtype=torch.float32, device=device),
        torch.empty((tokens, n, n), dtype=torch.float32, device=device),
    )
    return streams_TND, _read_streams(streams_TND, parts, weights, norm_D, eps, mix), mix


def collapse_streams(streams_TND: torch.Tensor, weights: StreamWeights) -> torch.Tensor:
    """The sum of the streams that the head reads: [T, D] in their dtype. As in mix_streams."""
    _check_weights(weights, streams_TND.shape[1], streams_TND.shape[1], 1)
    _, parts = write_and_multiply(streams_TND, None, weights.matrix)
    assert parts is not None
    return _read_streams(streams_TND, parts, weights, None, 0.0, None)


def _check_weights(weights: StreamWeights, streams: int, rows: int, scales: int) -> None:
    if weights.streams != streams or weights.matrix.shape[0] != rows:
        raise ValueError(
            f"weights: of {weights.streams} streams and {weights.matrix.shape[0]} logits, "
            f"not {streams} and {rows}"
        )
    for name, tensor, size in (("base", weights.base, rows), ("scale", weights.scale, scales)):
        if tensor.shape != (size,) or tensor.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 [{size}]")
