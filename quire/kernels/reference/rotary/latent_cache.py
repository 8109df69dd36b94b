"""Norm of latents, rotary and cache write of quire.kernels.triton.rotary in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.reference.rotary.rotary_cache import write_cache


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

    positions int64 [T]; cos_sin float32 [positions, rotary]; norm float32 [rank]; slots int64 [T],
    negative ones are not written. `interleaved`: neighbours 2i and 2i + 1 rotate together, and come
    out at i and i + rotary / 2; otherwise i and i + rotary / 2 rotate, and stay there.
    """
    rotary = cos_sin.shape[1]
    rank = latents.shape[1] - rotary
    if out is None:
        out = q.new_empty(len(q), heads * (rank + rotary))
    turn = cos_sin[positions].chunk(2, dim=1)
    compressed, key = torch.split(latents.float(), [rank, rotary], dim=1)
    compressed = compressed * torch.rsqrt(compressed.square().mean(-1, keepdim=True) + eps) * norm
    key = _rotate(key[:, None], turn, interleaved)[:, 0]
    write_cache(cache, torch.cat([compressed, key], dim=1)[:, None], slots)
    query = q.float().view(len(q), heads, q.shape[1] // heads)[..., -rotary:]
    places = out.view(len(q), heads, rank + rotary)[..., rank:]
    places.copy_(_rotate(query, turn, interleaved))
    return out


def _rotate(heads: torch.Tensor, turn: tuple[torch.Tensor, ...], interleaved: bool) -> torch.Tensor:
    cosine, sine = (half[:, None] for half in turn)
    a, b = (heads[..., ::2], heads[..., 1::2]) if interleaved else heads.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
