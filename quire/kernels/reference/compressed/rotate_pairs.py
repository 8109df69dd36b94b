"""Rotary embedding of neighbouring values, at the end of each head (GPT-J's pairs)."""

from __future__ import annotations

import torch


def rotate_pairs(
    x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """x [T, ..., D] with its last R values rotated by their token's position (int64 [T]), or back
    where `inverse`. cos_sin float32 [P, R]: cosines of the R / 2 pairs, then sines."""
    shape = (len(x), *[1] * (x.dim() - 2), cos_sin.shape[1])
    table = cos_sin[positions].view(shape)
    cosine, sine = table.chunk(2, dim=-1)
    if inverse:
        sine = -sine
    start = x.shape[-1] - table.shape[-1]
    rest, turned = x[..., :start], x[..., start:]
    a, b = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    return torch.cat([rest, pairs.flatten(-2)], dim=-1)
