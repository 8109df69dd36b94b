"""Causal attention over the paged KV cache, request by request and all scores at once."""

from __future__ import annotations

import torch

from quire.kernels.reference.attention.fp8_cache import (
    FP8_CACHE,
    codes_and_scales,
    decode_heads,
    head_size_of,
)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    *,
    decode: bool,
    deterministic: bool,
    scratch: object = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As quire.kernels.triton.attention.paged_attention; rows of padding are left as they are, or
    0 in a new result. It has no use for `deterministic` and `scratch`."""
    _, kv_heads, block, width = k_cache.shape
    head_size = head_size_of(width, k_cache.dtype)
    if out is None:
        out = torch.zeros_like(q)
    for b in range(context_len.shape[0]):
        context = int(context_len[b])
        first = b if decode else int(query_start[b])
        last = first + 1 if decode else int(query_start[b + 1])
        if context == 0 or first == last:
            continue
        earliest = context - (last - first)
        oldest = 0 if window is None else max(0, earliest - window + 1)
        position = torch.arange(earliest, context, device=q.device)
        key = torch.arange(oldest, context, device=q.device)
        blocks, offsets = block_tables[b, key // block].long(), key % block
        k_KHD = _read(k_cache, blocks, offsets)
        v_KHD = _read(v_cache, blocks, offsets)
        q_THGD = q[first:last].float().view(last - first, kv_heads, -1, head_size)
        logits_HGTK = torch.einsum("thgd,khd->hgtk", q_THGD, k_KHD) * scale
        if softcap is not None:
            logits_HGTK = softcap * torch.tanh(logits_HGTK / softcap)
        seen_TK = key <= position[:, None]
        if window is not None:
            seen_TK &= key > position[:, None] - window
        logits_HGTK = logits_HGTK.masked_fill(~seen_TK, -torch.inf)
        total_HGT = torch.logsumexp(logits_HGTK, dim=-1)
        if sinks is not None:
            total_HGT = torch.logaddexp(total_HGT, sinks.view(kv_heads, -1, 1))
        weights_HGTK = torch.exp(logits_HGTK - total_HGT[..., None])
        mixed_THGD = torch.einsum("hgtk,khd->thgd", weights_HGTK, v_KHD)
        out[first:last] = mixed_THGD.reshape(last - first, -1).to(out.dtype)
    return out


def _read(cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """float32 [K, Hkv, D] of tokens."""
    if cache.dtype == FP8_CACHE:
        return decode_heads(*(part[blocks, :, offsets] for part in codes_and_scales(cache)))
    return cache[blocks, :, offsets].float()
