"""Head norms, rotary position embedding (Su et al. 2021) and the KV cache's write, in one pass.

A program has some neighbouring heads of one token, whether query, key or value, so that few heads
fill it as well as many do. A head lies in registers as the two halves that rotate together and the
rest, so rotation moves nothing between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.reference.attention.fp8_cache import FP8_CACHE, head_size_of
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.attention.fp8_cache import (
    SCALE_BYTES,
    largest_magnitude,
    scale_of,
    scales_at,
)
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.quantized.encode import e4m3_codes
from quire.kernels.triton.rows import row_stride


@triton.jit
def _load_norm(q_ptr, k_ptr, k_head, column, mask):
    """Each head's weights [HEADS, columns], those of keys from k_head 0 on; 1 where masked."""
    # Chosen among whole pointers: Triton 3.9 forgets the alignment of a choice of base pointers.
    return tl.load(tl.where(k_head < 0, q_ptr + column, k_ptr + column), mask=mask, other=1.0)


@triton.jit
def inverse_rms(squares, D: tl.constexpr, eps):
    """What heads with such sums of squares are multiplied by in an RMS norm."""
    return tl.rsqrt(squares / D + eps)


@triton.jit
def rotated(a, b, cosine, sine):
    """Columns of both halves, of which those in the same places rotate together."""
    return a * cosine - b * sine, b * cosine + a * sine


@triton.jit
def _store(
    q_ptrs, k_ptrs, v_ptrs, x, inverse_scale, is_q, is_k, is_v, inside, FP8: tl.constexpr
):  # fmt: skip
    """Each head of x [HEADS, columns] to where its kind goes, in that tensor's dtype; FP8: keys and
    values as codes of what they are times `inverse_scale`."""
    tl.store(q_ptrs, x.to(q_ptrs.dtype.element_ty), mask=is_q & inside)
    if FP8:
        x = e4m3_codes(x * inverse_scale)
    tl.store(k_ptrs, x.to(k_ptrs.dtype.element_ty), mask=is_k & inside)
    tl.store(v_ptrs, x.to(v_ptrs.dtype.element_ty), mask=is_v & inside)


@triton.jit
def rotary_cache_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    fixed_ptr,
    out_ptr,
    eps,
    QKV_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    FP8: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    tiles: tl.constexpr = (Q_HEADS + 2 * KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(0) % tiles * HEADS + tl.arange(0, HEADS)[:, None]
    k_head, v_head = head - Q_HEADS, head - Q_HEADS - KV_HEADS
    exists = v_head < KV_HEADS
    # A column for each head: tables then have the layout of heads, and need no exchange for it.
    first = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], (HEADS, BLOCK_HALF))
    second = HALF + first
    rest = 2 * HALF + tl.broadcast_to(tl.arange(0, BLOCK_REST)[None, :], (HEADS, BLOCK_REST))
    in_half, in_rest = first < HALF, rest < D

    if NORM_Q or NORM_K:
        first_normed: tl.constexpr = 0 if NORM_Q else Q_HEADS
        last_normed: tl.constexpr = Q_HEADS + KV_HEADS if NORM_K else Q_HEADS
        normed = (head >= first_normed) & (head < last_normed)
        norm_a = _load_norm(q_norm_ptr, k_norm_ptr, k_head, first, normed & in_half)
        norm_b = _load_norm(q_norm_ptr, k_norm_ptr, k_head, second, normed & in_half)
        if D > 2 * HALF:
            norm_c = _load_norm(q_norm_ptr, k_norm_ptr, k_head, rest, normed & in_rest)

    wait_for_inputs(PDL)
    slot = tl.load(slots_ptr + token)
    if ROTATE:
        position = tl.load(positions_ptr + token)
    head_ptrs = qkv_ptr + token * QKV_STRIDE + head * D
    a = tl.load(head_ptrs + first, mask=exists & in_half, other=0.0).to(tl.float32)
    b = tl.load(head_ptrs + second, mask=exists & in_half, other=0.0).to(tl.float32)
    if D > 2 * HALF:
        c = tl.load(head_ptrs + rest, mask=exists & in_rest, other=0.0).to(tl.float32)
    if ROTATE:
        # Last, since these wait for the position.
        table_ptrs = cos_sin_ptr + position * (2 * HALF)
        cosine = tl.load(table_ptrs + first, mask=in_half, other=0.0)
        sine = tl.load(table_ptrs + second, mask=in_half, other=0.0)

    if NORM_Q or NORM_K:
        squares = tl.sum(a * a + b * b, axis=1)
        if D > 2 * HALF:
            squares += tl.sum(c * c, axis=1)
        inverse = tl.where(normed, inverse_rms(squares, D, eps)[:, None], 1.0)
        a, b = a * inverse * norm_a, b * inverse * norm_b
        if D > 2 * HALF:
            c = c * inverse * norm_c
    if ROTATE:
        turned_a, turned_b = rotated(a, b, cosine, sine)
        a, b = tl.where(v_head < 0, turned_a, a), tl.where(v_head < 0, turned_b, b)

    # Padding has no slot: none of its keys and values are written.
    written = tl.where(slot >= 0, KV_HEADS, 0)
    is_q = k_head < 0
    is_k = (k_head >= 0) & (k_head < written)
    is_v = (v_head >= 0) & (v_head < written)
    block, row = slot // BLOCK, slot % BLOCK
    q_ptrs = out_ptr + token * OUT_STRIDE + head * D
    head_stride: tl.constexpr = BLOCK * (D + (SCALE_BYTES if FP8 else 0))
    k_ptrs = k_cache_ptr + block * K_STRIDE + k_head * head_stride + row * D
    v_ptrs = v_cache_ptr + block * V_STRIDE + v_head * head_stride + row * D
    inverse = 1.0
    if FP8:
        largest = largest_magnitude(b, largest_magnitude(a, 0))
        if D > 2 * HALF:
            largest = largest_magnitude(c, largest)
        fixed = largest
        if FIXED:  # those of values follow those of keys
            fixed = tl.load(fixed_ptr + k_head, mask=exists & (k_head >= 0), other=1.0)
        scale = scale_of(largest, fixed, FIXED)
        inverse = tl.div_rn(1.0, scale)
        k_scales = scales_at(k_cache_ptr, k_head, D, BLOCK) + block * (K_STRIDE // SCALE_BYTES)
        v_scales = scales_at(v_cache_ptr, v_head, D, BLOCK) + block * (V_STRIDE // SCALE_BYTES)
        tl.store(k_scales + row, scale, mask=is_k)
        tl.store(v_scales + row, scale, mask=is_v)
    _store(
        q_ptrs + first, k_ptrs + first, v_ptrs + first, a, inverse,
        is_q, is_k, is_v, in_half, FP8,
    )  # fmt: skip
    _store(
        q_ptrs + second, k_ptrs + second, v_ptrs + second, b, inverse,
        is_q, is_k, is_v, in_half, FP8,
    )  # fmt: skip
    if D > 2 * HALF:
        _store(
            q_ptrs + rest, k_ptrs + rest, v_ptrs + rest, c, inverse,
            is_q, is_k, is_v, in_rest, FP8,
        )  # fmt: skip


def block_sizes(heads: int, half: int, rest: int) -> dict[str, int]:
    """Tile and warps for a token of `heads` heads of 2 * `half` + `rest` values. They decide the
    order of a norm's sum, so they depend on nothing else.

    At most 2,048 values a program, and 16 a thread, 8 of each half: 16-byte accesses of 16-bit
    values, two in flight, and enough programs on a multiprocessor to keep the bus busy.
    """
    block_half = triton.next_power_of_2(half)
    block_rest = triton.next_power_of_2(rest) if rest else 1
    width = triton.next_power_of_2(2 * half + rest)
    tile = min(triton.next_power_of_2(heads), max(1, 2048 // width))
    return {
        "HEADS": tile,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": block_rest,
        "num_warps": max(1, tile * width // 512),
    }


def check_rotary(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    fixed: torch.Tensor | None,
) -> int:
    """Query heads of `qkv`. ValueError where rotary_cache's arguments do not go together."""
    _, kv_heads, block, width = k_cache.shape
    d = head_size_of(width, k_cache.dtype)
    q_heads = qkv.shape[1] // d - 2 * kv_heads
    rotary_dim = d if cos_sin is None else cos_sin.shape[1]
    inner, fp8 = (block * width, width, 1), k_cache.dtype == FP8_CACHE
    if block != BLOCK or k_cache.stride()[1:] != inner or v_cache.stride()[1:] != inner:
        raise ValueError(f"cache: blocks are not contiguous [Hkv, {BLOCK}, D]")
    if fixed is not None and (not fp8 or fixed.shape != (2, kv_heads)):
        raise ValueError(f"fixed: one scale for each of {kv_heads} heads, twice, of an e4m3 cache")
    if q_heads < 1 or qkv.shape[1] % d or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"qkv {list(qkv.shape)}, k_cache {list(k_cache.shape)} and v_cache "
            f"{list(v_cache.shape)} do not fit together"
        )
    if rotary_dim % 2 or not 0 < rotary_dim <= d:
        raise ValueError(f"cos_sin: {rotary_dim} values of a head of {d} cannot rotate")
    return q_heads


def rotary_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    fixed: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The queries of `qkv`, normed and rotated, [T, Hq * D]; keys and values go to the cache.

    qkv [T, (Hq + 2 Hkv) * D]: query heads, key heads, value heads; rows contiguous. positions
    int64 [T]; cos_sin float32 [positions, rotary_dim], cosines then sines, for the first
    rotary_dim values of a head, of which value i rotates with value i + rotary_dim / 2; None
    rotates nothing. q_norm, k_norm float32 [D]: RMS norm of each head before it rotates. k_cache,
    v_cache [blocks, Hkv, 16, D] of one dtype or another, contiguous within a block; uint8: e4m3 and
    scales, of D + 4 bytes (quire/kernels/reference/attention/fp8_cache.py). slots int64
    [T]: block * 16 + offset to write to; a negative one writes nothing. Two tokens never share a
    slot. `fixed` float32 [2, Hkv]: scales of keys and values for e4m3, instead of each head's own.
    All in float32, rounded once. Positions and slots past the tables are not checked.
    Raises ValueError for other layouts.
    """
    t, fp8 = qkv.shape[0], k_cache.dtype == FP8_CACHE
    kv_heads, d = k_cache.shape[1], head_size_of(k_cache.shape[3], k_cache.dtype)
    q_heads = check_rotary(qkv, cos_sin, k_cache, v_cache, fixed)
    rotary_dim = d if cos_sin is None else cos_sin.shape[1]
    if out is None:
        out = torch.empty((t, q_heads * d), dtype=qkv.dtype, device=qkv.device)
    half = rotary_dim // 2
    sizes = block_sizes(q_heads + 2 * kv_heads, half, d - rotary_dim)
    tiles = triton.cdiv(q_heads + 2 * kv_heads, sizes["HEADS"])
    # An absent table's pointer is never read.
    some_norm = next((norm for norm in (q_norm, k_norm) if norm is not None), positions)
    launch(
        rotary_cache_kernel,
        (t * tiles,),
        qkv.device,
        qkv,
        positions,
        positions if cos_sin is None else cos_sin,
        some_norm if q_norm is None else q_norm,
        some_norm if k_norm is None else k_norm,
        k_cache,
        v_cache,
        slots,
        some_norm if fixed is None else fixed,
        out,
        eps,
        QKV_STRIDE=row_stride(qkv, "qkv"),
        OUT_STRIDE=row_stride(out, "out"),
        K_STRIDE=k_cache.stride(0),
        V_STRIDE=v_cache.stride(0),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        D=d,
        HALF=half,
        ROTATE=cos_sin is not None,
        NORM_Q=q_norm is not None,
        NORM_K=k_norm is not None,
        FP8=fp8,
        FIXED=fixed is not None,
        BLOCK=BLOCK,
        **sizes,
    )
    return out
