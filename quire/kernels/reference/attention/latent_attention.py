"""Attention over a paged cache of latents (DeepSeek-V2, section 2.1), absorbed, request by request.

All query heads read one latent per token: its `rank` first values are at once the values and, with
the rotated ones after them, the keys.
"""

from __future__ import annotations

import torch


def latent_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    rank: int,
    *,
    decode: bool = False,
    deterministic: bool = False,
    scratch: object = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As quire.kernels.triton.attention.latent_attention; rows of padding are left as they are, or
    0 in a new result. It has no use for `deterministic` and `scratch`."""
    block, width = cache.shape[2:]
    tokens, heads = q.shape[0], q.shape[1] // width
    if out is None:
        out = torch.zeros((tokens, heads * rank), dtype=q.dtype, device=q.device)
    for b in range(context_len.shape[0]):
        context = int(context_len[b])
        first = b if decode else int(query_start[b])
        last = first + 1 if decode else int(query_start[b + 1])
        if context == 0 or first == last:
            continue
        key = torch.arange(context, device=q.device)
        position = torch.arange(context - (last - first), context, device=q.device)
        latents_KW = cache[block_tables[b, key // block].long(), 0, key % block].float()
        q_THW = q[first:last].float().view(last - first, heads, width)
        logits_THK = torch.einsum("thw,kw->thk", q_THW, latents_KW) * scale
        hidden = key > position[:, None, None]
        weights_THK = logits_THK.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed_THR = weights_THK @ latents_KW[:, :rank]
        out[first:last] = mixed_THR.flatten(1).to(out.dtype)
    return out
