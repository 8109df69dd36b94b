"""Experts of very few tokens with quantised weights: each pair reads its expert's by itself.

Two launches at the speed of the memory bus: gate and up with the activation, in which the warps of
a program share K, and down, in which each warp has one of a token's experts and their weighted sum
is the sum over warps. Nothing is sorted. Weights in e4m3 go by multiply-adds where the GPU has an
instruction that widens them (gemv.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.triton.gemm.epilogue import activate, weight_rows
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.quantized.gemv import aligned, down_gemv, gemv, gemv_serves
from quire.kernels.triton.quantized.operands import check_experts, format_of, instructions
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.products import sum_products

T = 8  # the matrix instruction's tokens, of which one is there


@dataclass(frozen=True)
class SmallTile:
    """`rows` of a weight in a program, the matrix instruction's 16 or more; `parts` that work
    side by side, of K or, in the product down, a token's slots; `blocks` of 128 columns in a step
    of each."""

    rows: int
    parts: int
    blocks: int
    warps: int
    stages: int


@triton.jit
def scale_offset(expert, rows, groups, scale_stride, FORMAT: tl.constexpr):
    """Where the scales of an expert's `rows` begin (any shape that goes with `expert`). `groups`:
    of scales in each row."""
    row = rows
    if FORMAT == "fp8_block":
        row = rows // 128
    return expert.to(tl.int64) * (groups * scale_stride) + row


@triton.jit
def gate_up_small_kernel(
    x, ids, codes, scales, row_scales, zeros, bias, h, n, k, blocks, code_stride, scale_stride,
    groups,
    SLOTS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    BLOCKS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, CAST: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h [pairs, n]: the activation of gate and up."""
    let_next_start(PDL)
    # Pairs are the grid's fast axis: those with the same expert read its rows at the same time.
    pair = tl.program_id(0)
    HALF: tl.constexpr = ROWS // 2
    first = tl.program_id(1) * HALF
    rows = weight_rows(first, n, ROWS, KIND)
    wait_for_inputs(PDL)
    expert = tl.load(ids + pair)
    row_64 = expert.to(tl.int64) * (2 * n) + rows
    scale_at = scale_offset(expert, rows, groups, scale_stride, FORMAT)[None, :, None]
    scale_rows = scales
    zero_rows = zeros
    if scales is not None:
        scale_rows = scales + scale_at
    if zeros is not None:
        zero_rows = zeros + scale_at
    token = tl.arange(0, T)
    y = sum_products(
        tl.zeros([PARTS, ROWS, T], tl.float32),
        x + (pair // SLOTS).to(tl.int64) * k + tl.zeros([1, 1, T], tl.int32),
        (token == 0)[None, None, :],
        k, codes + (row_64 * code_stride)[None, :, None], scale_rows, zero_rows, scale_stride,
        tl.arange(0, PARTS)[:, None, None], blocks, FORMAT, GROUP, BLOCKS, PARTS, EVEN, PACKED,
        CAST,
    )  # fmt: skip
    # All tokens but the first are zero.
    y = tl.sum(tl.sum(y, axis=0), axis=1)
    if row_scales is not None:
        y *= tl.load(row_scales + row_64)
    if bias is not None:
        y += tl.load(bias + row_64)
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, HALF)), (1, 0)))
    y = activate(gate, up, KIND, LIMIT)
    column = first + tl.arange(0, HALF)
    target = h + pair.to(tl.int64) * n + column
    tl.store(target, y.to(h.dtype.element_ty), mask=column < n)


@triton.jit
def down_small_kernel(
    h, ids, weights, codes, scales, row_scales, zeros, bias, out, n, k, blocks, code_stride,
    scale_stride, groups,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PACKED: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, n]: the weighted sum over a token's slots. PARTS: SLOTS or more, a power of
    two."""
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    row = tl.minimum(first + tl.arange(0, ROWS), n - 1)
    slot = tl.arange(0, PARTS)
    wait_for_inputs(PDL)
    # Slots past the last one read the last one's weight, which costs nothing, and zeros as h.
    pair = token * SLOTS + tl.minimum(slot, SLOTS - 1)
    expert = tl.load(ids + pair)
    share = tl.load(weights + pair, mask=slot < SLOTS, other=0.0)
    row_64 = (expert.to(tl.int64) * n)[:, None] + row[None, :]
    scale_at = scale_offset(expert[:, None], row[None, :], groups, scale_stride, FORMAT)
    scale_rows = scales
    zero_rows = zeros
    if scales is not None:
        scale_rows = scales + scale_at[:, :, None]
    if zeros is not None:
        zero_rows = zeros + scale_at[:, :, None]
    column = tl.arange(0, T)[None, None, :]
    y = sum_products(
        tl.zeros([PARTS, ROWS, T], tl.float32),
        h + (pair * k)[:, None, None] + tl.zeros([1, 1, T], tl.int32),
        (slot < SLOTS)[:, None, None] & (column == 0),
        k, codes + (row_64 * code_stride)[:, :, None], scale_rows, zero_rows, scale_stride,
        tl.full([1, 1, 1], 0, tl.int32), blocks, FORMAT, GROUP, BLOCKS, 1, EVEN, PACKED, CAST,
    )  # fmt: skip
    y = tl.sum(y, axis=2)
    if row_scales is not None:
        y *= tl.load(row_scales + row_64)
    if bias is not None:
        y += tl.load(bias + row_64)
    y = tl.where((slot < SLOTS)[:, None], y * share[:, None], 0.0)
    y = tl.sum(y, axis=0)
    inside = first + tl.arange(0, ROWS) < n
    tl.store(out + token * n + first + tl.arange(0, ROWS), y.to(out.dtype.element_ty), mask=inside)


def small_tiles(
    gate_up: str, down: str, slots: int, rows: int, sms: int
) -> tuple[SmallTile, SmallTile]:
    """For weights of these formats, with so many rows of gate and up in all pairs together.
    Those of nvfp4 and mxfp4 measured on an H100 with benchmarks/gpu/sweeps.py, else estimates."""
    parts = max(2, triton.next_power_of_2(slots))
    stages = 3 if parts <= 8 else 2
    first = SmallTile(16, 4, _blocks(gate_up), 4, 3)
    if gate_up in ("nvfp4", "mxfp4") and rows >= 32 * 4 * sms:
        first = SmallTile(32, 2, 2, 2, 3)
    return first, SmallTile(16, parts, _blocks(down), min(16, parts), stages)


def _blocks(format: str) -> int:
    return 2 if format in ("nvfp4", "mxfp4") else 1


def pieces(weight: PackedQuantized) -> tuple[object, ...]:
    """The arguments of a weight that all kernels of experts take."""
    return weight.codes, weight.scales, weight.row_scales, weight.zeros


def strides(weight: PackedQuantized) -> tuple[int, int, int, int]:
    """blocks, code_stride, scale_stride and groups."""
    scales = weight.scales
    last, groups = (0, 0) if scales is None else (scales.shape[-1], scales.shape[-2])
    return weight.blocks, weight.codes.shape[-1], last, groups


def experts_small(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: PackedQuantized,
    down: PackedQuantized,
    kind: str,
    *,
    limit: float = 0.0,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    tiles: tuple[SmallTile, SmallTile] | None = None,
) -> torch.Tensor:
    """sum over k of weights[t, k] * (down[e] @ h + down_bias[e]) with h = the activation of
    gate_up[e] @ x[t] + gate_up_bias[e] and e = ids[t, k]: [T, H] bfloat16.

    x [T, H] bfloat16, `weights` float32 [T, K], `ids` int32 [T, K], `gate_up` [E, 2 I, H] with gate
    rows first, `down` [E, H, I], biases float32 [E, 2 I] and [E, H], all contiguous; `kind` and
    `limit` as in gated_activation. Sums are in float32; only h and the result are rounded. `tiles`:
    other sizes than small_tiles'. Raises ValueError for what does not go together.
    """
    check_experts(x, weights, ids, gate_up, down, kind, gate_up_bias, down_bias)
    (t, slots), hidden, intermediate = ids.shape, gate_up.k, down.k
    h = torch.empty((t * slots, intermediate), dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    both = (gate_up, down)
    if tiles is None and aligned(x) and all(gemv_serves(1, w, x.device) for w in both):
        gemv(x, gate_up, gate_up_bias, h, kind, limit, ids=ids)
        down_gemv(h, weights, ids, down, down_bias, out)
        return out
    has = instructions(x.device)
    first, second = tiles or small_tiles(
        gate_up.format, down.format, slots, 2 * intermediate * t * slots, num_sms(x.device)
    )
    launch(
        gate_up_small_kernel,
        (t * slots, triton.cdiv(intermediate, first.rows // 2)),
        x.device,
        x,
        ids,
        *pieces(gate_up),
        gate_up_bias,
        h,
        intermediate,
        hidden,
        *strides(gate_up),
        SLOTS=slots,
        T=T,
        ROWS=first.rows,
        PARTS=first.parts,
        BLOCKS=first.blocks,
        EVEN=hidden % (128 * first.parts * first.blocks) == 0,
        KIND=kind,
        LIMIT=limit,
        num_warps=first.warps,
        num_stages=first.stages,
        **format_of(gate_up),
        **has,
    )
    launch(
        down_small_kernel,
        (t, triton.cdiv(hidden, second.rows)),
        x.device,
        h,
        ids,
        weights,
        *pieces(down),
        down_bias,
        out,
        hidden,
        intermediate,
        *strides(down),
        SLOTS=slots,
        PARTS=second.parts,
        T=T,
        ROWS=second.rows,
        BLOCKS=second.blocks,
        EVEN=intermediate % (128 * second.blocks) == 0,
        num_warps=second.warps,
        num_stages=second.stages,
        **format_of(down),
        **has,
    )
    return out
