"""Products of one or two tokens, or of single pairs with their experts, with weights in e4m3 or
e2m1, by multiply-adds, at the speed of the memory bus.

As gemm/gemv.py: a program has a few rows of the weight, which go from memory to its registers, the
next tile already on its way while it works on this one, and the first before the inputs are there.

Threads read words of codes, and the values of x that belong to them: none go through shared memory.
A code of e2m1 has the bits of a float32 that is 2^-126 of its value (decode.py); x is made 2^80
times as large, so that sums stay in the middle of the range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.launch import INTERPRETED, launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.decode import float_pair, fp8_floats, wide_pair
from quire.kernels.triton.quantized.operands import instructions
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.rows import row_stride

EIGHT_BITS, FOUR_BITS = ("fp8", "fp8_block"), ("nvfp4", "mxfp4")
# Four-bit codes of a second token take more instructions than the matrix instruction does.
MAX_TOKENS = {"fp8": 2, "fp8_block": 2, "nvfp4": 1, "mxfp4": 1}
# Words that a thread has of each row, for which there is one scale. Of e4m3, four codes each, two:
# as many values of x are 16 bytes. Of e2m1, eight codes each, four.
EIGHT_BIT_WORDS, FOUR_BIT_WORDS = tl.constexpr(2), tl.constexpr(4)
_LARGE = tl.constexpr(2.0**80)
# What is left to multiply sums of e2m1 with: 2^46 over the factor in the rows' scales (pack.py).
_NVFP4_REST, _MXFP4_REST = tl.constexpr(2.0**39), tl.constexpr(2.0**-18)


@triton.jit
def _tile(
    code_rows, scale_rows, scale_stride, start, words, COLUMNS: tl.constexpr, FORMAT: tl.constexpr
):
    """(int32 words of codes [.., ROWS, COLUMNS] from word `start` on, zero past the last of
    `words`; the scales of each thread's words, or 1.0 where scales are of whole rows)."""
    EIGHT: tl.constexpr = FORMAT == "fp8" or FORMAT == "fp8_block"
    WORDS: tl.constexpr = EIGHT_BIT_WORDS if EIGHT else FOUR_BIT_WORDS
    word = start + tl.max_contiguous(tl.arange(0, COLUMNS), [WORDS])[None, None, :]
    codes = tl.load(code_rows + word, mask=word < words, other=0)
    scale = 1.0
    if scale_rows is not None:
        first = start + (tl.arange(0, COLUMNS // WORDS) * WORDS)[None, None, :]
        block = first // (32 if EIGHT else 16)
        scale = tl.load(scale_rows + block * scale_stride, mask=first < words, other=0)
        if FORMAT == "nvfp4":
            scale = scale >> (first // 8 % 2 * 8)
    return codes, scale


@triton.jit
def _add_eight_bits(sums, x_rows, codes, scale, start, units, CAST: tl.constexpr):
    """x_rows: bfloat16 by fours as int64."""
    shape: tl.constexpr = [sums.shape[0], sums.shape[1], sums.shape[2], EIGHT_BIT_WORDS]
    word = start + tl.arange(0, codes.shape[2])[None, None, :]
    x = tl.load(x_rows + word, mask=word < units, other=0)
    x_a, x_b = wide_pair(x.to(tl.uint32))
    x_c, x_d = wide_pair((x >> 32).to(tl.uint32))
    a, b, c, d = fp8_floats(codes, CAST)
    part = tl.fma(d, x_d, tl.fma(c, x_c, tl.fma(b, x_b, a * x_a)))
    return sums + tl.sum(tl.reshape(part, shape), axis=3) * scale


@triton.jit
def _by_fours(words):
    """The four tensors of the first, second, third and fourth of every four words, as uint32."""
    shape: tl.constexpr = words.shape[:-1] + [words.shape[-1] // 4, 2, 2]  # noqa: RUF005
    even, odd = tl.split(tl.reshape(words.to(tl.uint32, bitcast=True), shape))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _add_pair(part, word, x, D: tl.constexpr):
    """part + the products of codes D of both halves of `word` with a pair of x."""
    a, b = wide_pair(float_pair(word, D))
    x_a, x_b = wide_pair(x)
    return tl.fma(b, x_b * _LARGE, tl.fma(a, x_a * _LARGE, part))


@triton.jit
def _add_four_bits(sums, x_rows, codes, scale, start, units, FORMAT: tl.constexpr):
    """x_rows: bfloat16 by twos as int32."""
    word = start + tl.arange(0, codes.shape[2])[None, None, :]
    first, second, third, fourth = _by_fours(codes)
    for d in tl.static_range(4):
        place = word // 16 * 64 + 16 * d + word % 16
        x = _by_fours(tl.load(x_rows + place, mask=place < units, other=0))
        part = _add_pair(tl.zeros_like(sums), first, x[0], d)
        part = _add_pair(part, second, x[1], d)
        part = _add_pair(part, third, x[2], d)
        part = _add_pair(part, fourth, x[3], d)
        if FORMAT == "nvfp4":  # 8 * (exponent + 10) + mantissa
            bits = ((scale >> (16 * d)).to(tl.uint32) & 0xFF) * 0x00100000 + 0x3A800000
        else:
            bits = ((scale >> (8 * d)).to(tl.uint32) & 0xFF) << 23
        sums += part * bits.to(tl.float32, bitcast=True)
    return sums


@triton.jit
def _sum_products(
    x_rows, code_rows, codes, scale_rows, scale, scale_stride, words, units,
    T: tl.constexpr, FORMAT: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """[T, ROWS] of whole rows, whose first tile [T or 1, ROWS, COLUMNS] has been loaded. x_rows
    [T, 1, 1]: of `units` elements."""
    ROWS: tl.constexpr = codes.shape[1]
    COLUMNS: tl.constexpr = codes.shape[2]
    EIGHT: tl.constexpr = FORMAT == "fp8" or FORMAT == "fp8_block"
    WORDS: tl.constexpr = EIGHT_BIT_WORDS if EIGHT else FOUR_BIT_WORDS
    sums = tl.zeros([T, ROWS, COLUMNS // WORDS], tl.float32)
    for start in range(0, words, COLUMNS):
        following, following_scale = _tile(
            code_rows, scale_rows, scale_stride, start + COLUMNS, words, COLUMNS, FORMAT
        )
        if EIGHT:
            sums = _add_eight_bits(sums, x_rows, codes, scale, start, units, CAST)
        else:
            sums = _add_four_bits(sums, x_rows, codes, scale, start, units, FORMAT)
        codes, scale = following, following_scale
    y = tl.sum(sums, axis=2)
    if not EIGHT:
        y *= _NVFP4_REST if FORMAT == "nvfp4" else _MXFP4_REST
    return y


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    x, ids, codes, scales, row_scales, bias, out, tokens, n, words, units, x_stride, code_stride,
    scale_stride, scale_size, out_stride,
    T: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, CAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As skinny_kernel, with `words` of codes in a row of the weight, and `units` of x in one of a
    token. With `ids`, out is [pairs, n]: of each pair's token times its expert's weight."""
    let_next_start(PDL)
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * (ROWS if ACTIVATION == "" else ROWS // 2)
    rows = weight_rows(first, n, ROWS, ACTIVATION)
    one = group
    if ids is not None:
        wait_for_inputs(PDL)
        one = tl.load(ids + group).to(tl.int64)
    height = n if ACTIVATION == "" else 2 * n
    code_rows = codes + ((one * height + rows) * code_stride)[None, :, None]
    scale_rows = None
    if scales is not None:
        scale_row = rows
        if FORMAT == "fp8_block":
            # All rows of a program are of one block where they are not of a gate and an up.
            scale_row = rows // 128 if ACTIVATION != "" else first // 128 + tl.zeros([1], tl.int32)
        scale_rows = scales + (one * scale_size + scale_row)[None, :, None]
    tile, scale = _tile(code_rows, scale_rows, scale_stride, 0, words, COLUMNS, FORMAT)
    row_scale = 1.0
    if row_scales is not None:
        row_scale = tl.load(row_scales + one * height + rows)[None, :]
    if ids is None:
        wait_for_inputs(PDL)
    token = tl.minimum(tl.arange(0, T), tokens - 1)[:, None, None]
    x_rows = x + group // SLOTS * units + token * x_stride
    y = _sum_products(
        x_rows, code_rows, tile, scale_rows, scale, scale_stride, words, units, T, FORMAT, CAST
    )
    if bias is not None:
        bias += one * height
    store_product(y * row_scale, bias, rows, out + group * n, first, tokens, n, out_stride, T, ROWS,
                  ACTIVATION, LIMIT)  # fmt: skip


@triton.jit
def down_gemv_kernel(
    h, ids, weights, codes, scales, row_scales, bias, out, n, words, units, code_stride,
    scale_stride, scale_size,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, n]: the weighted sum over a token's slots. PARTS: SLOTS or more, a power of
    two."""
    let_next_start(PDL)
    token = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    row = tl.minimum(first + tl.arange(0, ROWS), n - 1)[None, :]
    slot = tl.arange(0, PARTS)[:, None]
    wait_for_inputs(PDL)
    # Slots past the last one are the last one's again, with a weight of zero.
    pair = token * SLOTS + tl.minimum(slot, SLOTS - 1)
    expert = tl.load(ids + pair).to(tl.int64)
    share = tl.load(weights + pair, mask=slot < SLOTS, other=0.0)
    code_rows = codes + ((expert * n + row) * code_stride)[:, :, None]
    scale_rows = None
    if scales is not None:
        scale_row = first // 128 if FORMAT == "fp8_block" else row
        scale_rows = scales + (expert * scale_size + scale_row)[:, :, None]
    tile, scale = _tile(code_rows, scale_rows, scale_stride, 0, words, COLUMNS, FORMAT)
    x_rows = h + (pair * units)[:, :, None]
    y = _sum_products(
        x_rows, code_rows, tile, scale_rows, scale, scale_stride, words, units, PARTS, FORMAT, CAST
    )
    if row_scales is not None:
        y *= tl.load(row_scales + expert * n + row)
    if bias is not None:
        y += tl.load(bias + expert * n + row)
    # A product that is not a number is its slot's alone.
    y = tl.sum(tl.where(slot < SLOTS, y * share, 0.0), axis=0)
    column = first + tl.arange(0, ROWS)
    tl.store(out + token * n + column, y.to(out.dtype.element_ty), mask=column < n)


def gemv_tiles(format: str, k: int, experts: bool) -> dict[str, int]:
    """Rows (those of gate and up together) and columns, in words, of a tile, and warps. Those of
    eight bits were measured on an H200 with benchmarks/gpu/quantized.py."""
    if format in FOUR_BITS:
        columns = 128 if k <= 1024 else 256
        return {"ROWS": 8, "COLUMNS": columns, "num_warps": columns // 128}
    if k <= (2048 if experts else 1024):
        return {"ROWS": 8, "COLUMNS": 128, "num_warps": 2}
    return {"ROWS": 2 if k >= 8192 else 4, "COLUMNS": 256, "num_warps": 4}


def down_tiles(format: str, slots: int) -> dict[str, int]:
    """Of down_gemv_kernel. As gemv_tiles."""
    columns = 128 if format in FOUR_BITS else 64
    parts = int(triton.next_power_of_2(slots))
    return {"PARTS": parts, "ROWS": 4, "COLUMNS": columns, "num_warps": 8}


def gemv_serves(tokens: int, weight: PackedQuantized, device: torch.device) -> bool:
    """Whether a weight is one for `gemv`, and faster so than by the matrix instruction."""
    return (
        tokens <= MAX_TOKENS.get(weight.format, 0)
        and weight.k % 4 == 0
        and (weight.format in FOUR_BITS or INTERPRETED or instructions(device)["CAST"])
    )


def aligned(x: torch.Tensor) -> bool:
    """Whether rows of bfloat16 begin at multiples of 8 bytes."""
    return x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0


def gemv(
    x: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kind: str,
    limit: float,
    *,
    ids: torch.Tensor | None = None,
    tiles: dict[str, int] | None = None,
) -> None:
    """What `skinny` computes, and `skinny_groups`, into `out`, where gemv_serves. `x`: its rows
    begin at multiples of 8 bytes.

    With `ids` int32 [T, SLOTS], contiguous x and experts, out [T * SLOTS, ..] is of every pair's
    token and expert. `tiles`: other sizes than gemv_tiles'.
    """
    groups = 1 if weight.experts is None else weight.experts
    tokens, n = x.shape[0], out.shape[1] // groups
    slots = 1
    if ids is not None:
        groups, tokens, n, slots = ids.numel(), 1, out.shape[1], ids.shape[1]
    tiles = tiles or gemv_tiles(weight.format, weight.k, ids is not None)
    x_units, codes, scales = _units(x, weight), weight.codes.view(torch.int32), weight.scales
    launch(
        gemv_kernel,
        (triton.cdiv(n, tiles["ROWS"] // (1 if kind == "" else 2)), groups),
        x.device,
        x_units,
        ids,
        codes,
        scales,
        weight.row_scales,
        bias,
        out,
        tokens,
        n,
        codes.shape[-1],
        x_units.shape[1] // (1 if weight.experts is None or ids is not None else groups),
        row_stride(x_units, "x"),
        codes.shape[-1],
        *_scale_strides(scales),
        row_stride(out, "out"),
        T=triton.next_power_of_2(tokens),
        SLOTS=slots,
        FORMAT=weight.format,
        ACTIVATION=kind,
        LIMIT=limit,
        CAST=instructions(x.device)["CAST"],
        **tiles,
    )


def down_gemv(
    h: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    down: PackedQuantized,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tiles: dict[str, int] | None = None,
) -> None:
    """out [T, N] = the sum over slots of weights [T, SLOTS] times down of h [T * SLOTS, K]."""
    (tokens, slots), n = ids.shape, out.shape[1]
    tiles = tiles or down_tiles(down.format, slots)
    h_units, codes, scales = _units(h, down), down.codes.view(torch.int32), down.scales
    launch(
        down_gemv_kernel,
        (triton.cdiv(n, tiles["ROWS"]), tokens),
        h.device,
        h_units,
        ids,
        weights,
        codes,
        scales,
        down.row_scales,
        bias,
        out,
        n,
        codes.shape[-1],
        h_units.shape[1],
        codes.shape[-1],
        *_scale_strides(scales),
        SLOTS=slots,
        FORMAT=down.format,
        CAST=instructions(h.device)["CAST"],
        **tiles,
    )


def _units(x: torch.Tensor, weight: PackedQuantized) -> torch.Tensor:
    return x.view(torch.int64 if weight.format in EIGHT_BITS else torch.int32)


def _scale_strides(scales: torch.Tensor | None) -> tuple[int, int]:
    if scales is None:
        return 0, 0
    return scales.shape[-1], scales.shape[-2] * scales.shape[-1]
