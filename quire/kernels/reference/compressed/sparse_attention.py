"""Attention of each token to keys of its own, which are values too."""

from __future__ import annotations

import torch

from quire.kernels.reference.compressed.entries import Entries
from quire.kernels.reference.streams.mixing import total

PIECE = 64  # keys whose part of a sum is made at a time
AT_ONCE = 1 << 22  # products that are in memory at a time


def sparse_attention(
    q_THD: torch.Tensor,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    entries: Entries,
    sinks_H: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """float32 [T, H, D]. `caches`: pairs of a cache [slots, width] of `entries` and the slots int64
    [T, K] that each token sees of it, negative ones being none. The softmax goes over all of them
    and `sinks`, a logit for each head, which has no value.

    Sums go over keys in pieces of a fixed size, in order, so that a token's bits do not depend on
    how many keys others have: none add zeros at the end.
    """
    slots_TK = torch.cat([slots for _, slots in caches], dim=1)
    pad = -slots_TK.shape[1] % PIECE
    out = torch.empty(q_THD.shape)
    step = max(1, AT_ONCE // max(1, q_THD.shape[1] * q_THD.shape[2] * PIECE))
    for first in range(0, len(q_THD), step):
        part = slice(first, first + step)
        keys = [_gather(cache, slots[part], entries) for cache, slots in caches]
        keys_TKD = torch.nn.functional.pad(torch.cat(keys, dim=1), (0, 0, 0, pad))
        seen_TK = torch.nn.functional.pad(slots_TK[part] >= 0, (0, pad))
        out[part] = _attend(q_THD[part], keys_TKD, seen_TK, sinks_H, scale)
    return out


def _gather(cache_SW: torch.Tensor, slots_TK: torch.Tensor, entries: Entries) -> torch.Tensor:
    """Keys [T, K, D], zeros where there are none: what lies in memory there may be NaN."""
    found = entries.unpack(cache_SW[slots_TK.clamp(min=0)])
    return found.masked_fill((slots_TK < 0)[:, :, None], 0.0)


def _attend(
    q_THD: torch.Tensor,
    keys_TKD: torch.Tensor,
    seen_TK: torch.Tensor,
    sinks_H: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    pieces = torch.split(keys_TKD, PIECE, dim=1)
    scores = [(q_THD[:, :, None] * keys[:, None]).sum(-1) * scale for keys in pieces]
    scores_THK = torch.cat(scores, dim=-1).masked_fill(~seen_TK[:, None], -torch.inf)
    highest_TH = torch.maximum(scores_THK.amax(-1), sinks_H)
    weights = torch.split(torch.exp(scores_THK - highest_TH[:, :, None]), PIECE, dim=-1)
    sums = total(piece.contiguous().sum(-1) for piece in weights)
    sums = sums + torch.exp(sinks_H - highest_TH)
    values = torch.split(keys_TKD.transpose(1, 2).contiguous(), PIECE, dim=-1)
    mixed = total(
        (piece[:, :, None] * value[:, None]).sum(-1)
        for piece, value in zip(weights, values, strict=True)
    )
    return mixed / sums[:, :, None]
