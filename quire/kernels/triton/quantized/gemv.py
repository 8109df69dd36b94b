"""Products of one or two tokens, or of single pairs with their experts, with e4m3 weights, by
multiply-adds, at the speed of the memory bus.

As gemm/gemv.py: a program has a few rows of the weight, which go from memory to its registers, the
next tile already on its way while it works on this one, and the first before the inputs are there.
(Codes of four bits take 4.6 instructions each so, and 3.2 by the matrix instruction: experts of
[2048, 768] were 12% faster on an H200, those of [4096, 2048] 15% slower.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import store_product, weight_rows
from quire.kernels.triton.launch import INTERPRETED, launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.decode import fp8_floats, wide_pair
from quire.kernels.triton.quantized.operands import instructions, scale_strides
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.rows import row_stride

MAX_TOKENS = 2
# Words of four codes that a thread has of each row. As many values of x are 16 bytes: so both are
# loaded by the threads that multiply them, and none go through shared memory.
WORDS = tl.constexpr(2)


@triton.jit
def load_tile(code_rows, scale_rows, scale_stride, start, words, COLUMNS: tl.constexpr):
    """(int32 words of codes [.., ROWS, COLUMNS] from word `start` on, zero past the last of
    `words`; the scales of each WORDS of them, or 1.0 where scales are of whole rows)."""
    word = start + tl.max_contiguous(tl.arange(0, COLUMNS), [WORDS])[None, None, :]
    codes = tl.load(code_rows + word, mask=word < words, other=0)
    scale = 1.0
    if scale_rows is not None:
        first = start + (tl.arange(0, COLUMNS // WORDS) * WORDS)[None, None, :]
        scale = tl.load(scale_rows + first // 32 * scale_stride, mask=first < words, other=0.0)
    return codes, scale


@triton.jit
def _add_products(sums, x_rows, codes, scale, start, units, CAST: tl.constexpr):
    """sums [T, ROWS, COLUMNS / WORDS] + the products of a tile [T or 1, ROWS, COLUMNS] with x_rows
    [T, 1, 1], whose bfloat16 are read by fours as int64."""
    COLUMNS: tl.constexpr = codes.shape[2]
    shape: tl.constexpr = [sums.shape[0], sums.shape[1], COLUMNS // WORDS, WORDS]
    word = start + tl.arange(0, COLUMNS)[None, None, :]
    x = tl.load(x_rows + word, mask=word < units, other=0)
    x_a, x_b = wide_pair(x.to(tl.uint32))
    x_c, x_d = wide_pair((x >> 32).to(tl.uint32))
    a, b, c, d = fp8_floats(codes, CAST)
    part = tl.fma(d, x_d, tl.fma(c, x_c, tl.fma(b, x_b, a * x_a)))
    return sums + tl.sum(tl.reshape(part, shape), axis=3) * scale


@triton.jit
def _sum_products(
    x_rows, code_rows, codes, scale_rows, scale, scale_stride, words, units,
    T: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """[T, ROWS] of whole rows, whose first tile has been loaded."""
    ROWS: tl.constexpr = codes.shape[1]
    COLUMNS: tl.constexpr = codes.shape[2]
    sums = tl.zeros([T, ROWS, COLUMNS // WORDS], tl.float32)
    for start in range(0, words, COLUMNS):
        following, following_scale = load_tile(
            code_rows, scale_rows, scale_stride, start + COLUMNS, words, COLUMNS
        )
        sums = _add_products(sums, x_rows, codes, scale, start, units, CAST)
        codes, scale = following, following_scale
    return tl.sum(sums, axis=2)


@triton.jit(do_not_specialize=["tokens"])
def e4m3_gemv_kernel(
    x, ids, codes, scales, row_scales, bias, out, tokens, n, words, units, x_stride, scale_stride,
    scale_size, out_stride,
    T: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
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
    code_rows = codes + ((one * height + rows) * words)[None, :, None]
    scale_rows = None
    if scales is not None:
        # All rows of a program are of one block where they are not of a gate and an up.
        scale_row = rows // 128 if ACTIVATION != "" else first // 128 + tl.zeros([1], tl.int32)
        scale_rows = scales + (one * scale_size + scale_row)[None, :, None]
    tile, scale = load_tile(code_rows, scale_rows, scale_stride, 0, words, COLUMNS)
    row_scale = 1.0
    if row_scales is not None:
        row_scale = tl.load(row_scales + one * height + rows)[None, :]
    if ids is None:
        wait_for_inputs(PDL)
    token = tl.minimum(tl.arange(0, T), tokens - 1)[:, None, None]
    x_rows = x + group // SLOTS * units + token * x_stride
    y = _sum_products(
        x_rows, code_rows, tile, scale_rows, scale, scale_stride, words, units, T, CAST
    )
    if bias is not None:
        bias += one * height
    store_product(y * row_scale, bias, rows, out + group * n, first, tokens, n, out_stride, T, ROWS,
                  ACTIVATION, LIMIT)  # fmt: skip


@triton.jit
def e4m3_down_kernel(
    h, ids, weights, codes, scales, row_scales, bias, out, n, words, units, scale_stride,
    scale_size,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAST: tl.constexpr, PDL: tl.constexpr,
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
    code_rows = codes + ((expert * n + row) * words)[:, :, None]
    scale_rows = None
    if scales is not None:
        scale_rows = scales + (expert * scale_size + first // 128)[:, :, None]
    tile, scale = load_tile(code_rows, scale_rows, scale_stride, 0, words, COLUMNS)
    x_rows = h + (pair * units)[:, :, None]
    y = _sum_products(
        x_rows, code_rows, tile, scale_rows, scale, scale_stride, words, units, PARTS, CAST
    )
    if row_scales is not None:
        y *= tl.load(row_scales + expert * n + row)
    if bias is not None:
        y += tl.load(bias + expert * n + row)
    # A product that is not a number is its slot's alone.
    y = tl.sum(tl.where(slot < SLOTS, y * share, 0.0), axis=0)
    column = first + tl.arange(0, ROWS)
    tl.store(out + token * n + column, y.to(out.dtype.element_ty), mask=column < n)


def gemv_tiles(k: int, experts: bool) -> dict[str, int]:
    """Rows (those of gate and up together) and columns, in words, of a tile, and warps. Measured on
    an H200 with benchmarks/gpu/sweeps.py."""
    if k <= (2048 if experts else 1024):
        return {"ROWS": 8, "COLUMNS": 128, "num_warps": 2}
    return {"ROWS": 2 if k >= 8192 else 4, "COLUMNS": 256, "num_warps": 4}


def down_tiles(slots: int) -> dict[str, int]:
    """Of e4m3_down_kernel. As gemv_tiles."""
    return {"PARTS": int(triton.next_power_of_2(slots)), "ROWS": 4, "COLUMNS": 64, "num_warps": 8}


def gemv_serves(tokens: int, weight: PackedQuantized, device: torch.device) -> bool:
    """Whether a weight is one for `gemv`, and faster so than by the matrix instruction."""
    return (
        weight.format in ("fp8", "fp8_block")
        and tokens <= MAX_TOKENS
        and weight.k % 4 == 0
        and (INTERPRETED or instructions(device)["CAST"])
    )


def aligned(x: torch.Tensor) -> bool:
    """Whether rows of bfloat16 are contiguous and begin at multiples of 8 bytes."""
    return x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0


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
    tiles = tiles or gemv_tiles(weight.k, ids is not None)
    x_units, codes, scales = x.view(torch.int64), weight.codes.view(torch.int32), weight.scales
    launch(
        e4m3_gemv_kernel,
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
        weight.k // 4,
        row_stride(x_units, "x"),
        *scale_strides(scales),
        row_stride(out, "out"),
        T=triton.next_power_of_2(tokens),
        SLOTS=slots,
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
    tiles = tiles or down_tiles(slots)
    codes, scales = down.codes.view(torch.int32), down.scales
    launch(
        e4m3_down_kernel,
        (triton.cdiv(n, tiles["ROWS"]), tokens),
        h.device,
        h.view(torch.int64),
        ids,
        weights,
        codes,
        scales,
        down.row_scales,
        bias,
        out,
        n,
        codes.shape[-1],
        down.k // 4,
        *scale_strides(scales),
        SLOTS=slots,
        CAST=instructions(h.device)["CAST"],
        **tiles,
    )
