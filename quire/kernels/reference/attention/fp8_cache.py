"""Keys or values of a cache in e4m3 with a float32 scale for each head of each token.

A block is bytes: of each head its 16 tokens' codes, then their 16 scales, so that whoever copies a
page takes both. A scale is the head's largest magnitude over 448, or a fixed one of the checkpoint;
it is stored all the same, so that readers know one form only. A head with a value that is not
finite has NaN for a scale: codes need no NaN then.
"""

from __future__ import annotations

import torch

from quire.formats.float8 import E4M3_MAX, decode_e4m3, encode_e4m3
from quire.kernels.reference.packed import BLOCK

SCALE_BYTES = 4
FP8_CACHE = torch.uint8  # what tells such a cache


def packed_width(head_size: int) -> int:
    """Bytes of a head of one token."""
    return head_size + SCALE_BYTES


def head_size_of(width: int, dtype: torch.dtype) -> int:
    """Values of a head of which a cache of `dtype` has `width` elements for each token."""
    return width - SCALE_BYTES if dtype == FP8_CACHE else width


def codes_and_scales(
    cache: torch.Tensor, tokens_last: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache uint8 [blocks, Hkv, 16 * (D + 4) in any shape]: codes uint8
    [blocks, Hkv, 16, D], or [blocks, Hkv, D, 16] where `tokens_last`, and scales float32
    [blocks, Hkv, 16]."""
    flat = cache.view(*cache.shape[:2], -1)
    size = head_size_of(flat.shape[2] // BLOCK, FP8_CACHE)
    codes = flat[..., : BLOCK * size]
    shape = (size, BLOCK) if tokens_last else (BLOCK, size)
    return codes.view(*codes.shape[:2], *shape), flat[..., BLOCK * size :].view(torch.float32)


def encode_heads(
    heads: torch.Tensor, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 and scales float32 [T, Hkv] of float32 heads [T, Hkv, D]. `fixed` float32
    [Hkv]: scales that were given, beyond whose range values are cut."""
    largest = heads.abs().amax(-1)
    scales = largest / E4M3_MAX if fixed is None else fixed.expand_as(largest)
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    return encode_e4m3(heads * (1 / scales)[..., None]).view(torch.uint8), scales


def decode_heads(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] of codes uint8 [..., D] and scales [...]."""
    return decode_e4m3(codes) * scales[..., None]
