"""Norm of latents, rotary position embedding and the cache's write, in one pass.

Of a token's programs the first has its latent, the others have some query heads each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rows import row_stride


@triton.jit
def _turned(
    pointers, cosine, sine, exists,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The halves of rotated heads; pointers [HEADS, 1] are at their first value."""
    if INTERLEAVED:  # neighbours are loaded together, then taken apart
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(pointers + both, mask=exists & (both < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (HEADS, BLOCK_HALF, 2)))
    else:
        i = tl.arange(0, BLOCK_HALF)[None, :]
        inside = exists & (i < HALF)
        a = tl.load(pointers + i, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(pointers + HALF + i, mask=inside, other=0.0).to(tl.float32)
    return a * cosine - b * sine, b * cosine + a * sine


@triton.jit
def latent_cache_kernel(
    q_ptr,
    latents_ptr,
    positions_ptr,
    cos_sin_ptr,
    norm_ptr,
    cache_ptr,
    slots_ptr,
    out_ptr,
    eps,
    Q_STRIDE: tl.constexpr,
    LATENT_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    CACHE_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    token = (tl.program_id(0) // (TILES + 1)).to(tl.int64)
    part = tl.program_id(0) % (TILES + 1)
    i = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = i < HALF
    column = tl.arange(0, BLOCK_RANK)
    in_rank = column < RANK
    norm = tl.load(norm_ptr + column, mask=column < tl.where(part == 0, RANK, 0), other=0.0)
    wait_for_inputs(PDL)
    table_ptrs = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + i
    cosine = tl.load(table_ptrs, mask=in_half, other=0.0)
    sine = tl.load(table_ptrs + HALF, mask=in_half, other=0.0)
    if part == 0:
        slot = tl.load(slots_ptr + token)
        row_ptr = latents_ptr + token * LATENT_STRIDE
        x = tl.load(row_ptr + column, mask=in_rank, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / RANK + eps) * norm
        zero = tl.zeros([1, 1], tl.int32)
        key_ptr = row_ptr + RANK + zero
        key_a, key_b = _turned(key_ptr, cosine, sine, zero == 0, 1, HALF, BLOCK_HALF, INTERLEAVED)
        # Padding has no slot: its latent is not written.
        written = tl.where(slot >= 0, RANK, 0)
        turned = tl.where(slot >= 0, HALF, 0)
        place = cache_ptr + slot // BLOCK * CACHE_STRIDE + slot % BLOCK * (RANK + 2 * HALF)
        tl.store(place + column, x.to(cache_ptr.dtype.element_ty), mask=column < written)
        tl.store(place + RANK + i, key_a.to(cache_ptr.dtype.element_ty), mask=i < turned)
        tl.store(place + RANK + HALF + i, key_b.to(cache_ptr.dtype.element_ty), mask=i < turned)
    else:
        head = (part - 1) * TILE + tl.arange(0, TILE)[:, None]
        exists = head < HEADS
        heads = q_ptr + token * Q_STRIDE + head * (NOPE + 2 * HALF) + NOPE
        a, b = _turned(heads, cosine, sine, exists, TILE, HALF, BLOCK_HALF, INTERLEAVED)
        places = out_ptr + token * OUT_STRIDE + head * (RANK + 2 * HALF) + RANK
        tl.store(places + i, a.to(out_ptr.dtype.element_ty), mask=exists & in_half)
        tl.store(places + HALF + i, b.to(out_ptr.dtype.element_ty), mask=exists & in_half)


def block_sizes(heads: int, rank: int, rotary: int) -> dict[str, int]:
    """Query heads of a program, and blocks; a program has at most 2,048 values of queries."""
    block_half = triton.next_power_of_2(rotary // 2)
    return {
        "TILE": min(triton.next_power_of_2(heads), max(1, 1024 // block_half)),
        "BLOCK_RANK": triton.next_power_of_2(rank),
        "BLOCK_HALF": block_half,
    }


def latent_cache(
    q: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cache: torch.Tensor,
    slots: torch.Tensor,
    heads: int,
    interleaved: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents [T, rank + rotary] normed, rotated and written to the cache [blocks, 1, 16, rank +
    rotary]; of queries [T, heads * (nope + rotary)] the rotated parts, at their places in
    [T, heads * (rank + rotary)]: the rest of it is not written.

    positions int64 [T]; cos_sin float32 [positions, rotary], cosines then sines; norm float32
    [rank]; slots int64 [T], negative ones are not written. `interleaved`: neighbours 2i and 2i + 1
    rotate together, and come out at i and i + rotary / 2; otherwise i and i + rotary / 2 rotate,
    and stay there. Rows of q, latents and out are contiguous. All in float32, rounded once.
    Positions and slots past the tables are not checked. Raises ValueError for other layouts.
    """
    tokens, rotary, rank = len(q), cos_sin.shape[1], len(norm)
    width, (nope, rest) = rank + rotary, divmod(q.shape[1] - heads * rotary, heads)
    if cache.shape[1:] != (1, BLOCK, width) or not cache[0].is_contiguous():
        raise ValueError(f"cache: blocks are not contiguous [1, {BLOCK}, {width}]")
    if rotary % 2 or rest or nope < 0 or latents.shape != (tokens, width):
        raise ValueError(
            f"q {list(q.shape)} of {heads} heads, latents {list(latents.shape)} and cos_sin "
            f"{list(cos_sin.shape)} do not fit together"
        )
    if out is None:
        out = torch.empty((tokens, heads * width), dtype=q.dtype, device=q.device)
    sizes = block_sizes(heads, rank, rotary)
    tiles = triton.cdiv(heads, sizes["TILE"])
    launch(
        latent_cache_kernel,
        (tokens * (tiles + 1),),
        q.device,
        q,
        latents,
        positions,
        cos_sin,
        norm,
        cache,
        slots,
        out,
        eps,
        Q_STRIDE=row_stride(q, "q"),
        LATENT_STRIDE=row_stride(latents, "latents"),
        OUT_STRIDE=row_stride(out, "out"),
        CACHE_STRIDE=cache.stride(0),
        TILES=tiles,
        HEADS=heads,
        NOPE=nope,
        RANK=rank,
        HALF=rotary // 2,
        INTERLEAVED=interleaved,
        BLOCK=BLOCK,
        num_warps=4,
        **sizes,
    )
    return out
