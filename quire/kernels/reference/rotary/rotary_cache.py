"""Head norms, rotary and cache write of quire.kernels.triton.rotary in plain torch.

Rotation is a product of complex numbers. Caches have the GPU's layout [blocks, Hkv, 16, D].
"""

from __future__ import annotations

import torch

from quire.kernels.reference.attention.fp8_cache import (
    FP8_CACHE,
    codes_and_scales,
    encode_heads,
    head_size_of,
)


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
    kv_heads, head_size = k_cache.shape[1], head_size_of(k_cache.shape[3], k_cache.dtype)
    heads = qkv.float().reshape(len(qkv), qkv.shape[1] // head_size, head_size)
    q, k, v = torch.split(heads, [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q = _rotate(_norm(q, q_norm, eps), positions, cos_sin)
    k = _rotate(_norm(k, k_norm, eps), positions, cos_sin)
    for part, (cache, values) in enumerate(((k_cache, k), (v_cache, v))):
        if cache.dtype == FP8_CACHE:
            stored = codes_and_scales(cache)
            coded = encode_heads(values, None if fixed is None else fixed[part])
            for memory, new in zip(stored, coded, strict=True):
                write_cache(memory, new, slots)
        else:
            write_cache(cache, values, slots)
    q = q.flatten(1).to(qkv.dtype)
    return q if out is None else out.copy_(q)


def _norm(heads: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return heads
    return heads / (heads.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def _rotate(
    heads: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor | None
) -> torch.Tensor:
    if cos_sin is None:
        return heads
    half = cos_sin.shape[1] // 2
    cosine, sine = torch.split(cos_sin[positions], half, dim=1)
    pairs = torch.complex(heads[..., :half].contiguous(), heads[..., half : 2 * half].contiguous())
    pairs = pairs * torch.complex(cosine, sine).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag, heads[..., 2 * half :]], dim=-1)


def write_cache(cache: torch.Tensor, heads: torch.Tensor, slots: torch.Tensor) -> None:
    """Heads [T, Hkv, ...] to their slots of a cache [blocks, Hkv, 16, ...], none to negative ones.

    Without asking the device which slots are negative: those rows repeat a row that is not,
    or, where there is none, what the first slot holds already."""
    if not len(slots):
        return
    written = slots >= 0
    row = torch.arange(len(slots), device=slots.device)
    row = torch.where(written, row, written.int().argmax())
    slot = slots[row].clamp(min=0)
    block, offset = slot // cache.shape[2], slot % cache.shape[2]
    values = heads[row].to(cache.dtype)
    cache[block, :, offset] = torch.where(written.any(), values, cache[block, :, offset])
