"""Unsigned integers of 4 or 8 bits as checkpoints pack them into int32 words, in plain torch.

A word holds 32 / bits codes, the first in its lowest bits. AWQ's words of 4 bits hold their columns
in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """int32 words to uint8 codes; dimension `dim` grows by 32 / bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.movedim(dim, -1)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2).to(torch.uint8).movedim(-1, dim)


def pack_words(codes: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Inverse of `unpack_words`. The dimension is filled up with zeros to a whole word."""
    moved = codes.movedim(dim, -1)
    per_word = 32 // bits
    padded = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % per_word))
    shifts = torch.arange(0, 32, bits, device=codes.device)
    runs = padded.reshape(*padded.shape[:-1], padded.shape[-1] // per_word, per_word)
    words = (runs.long() << shifts).sum(-1)
    # int32 holds the upper half of the words as negative numbers.
    words = words - ((words >> 31) << 32)
    return words.to(torch.int32).movedim(-1, dim)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """AWQ's int32 [R, C / 8] to uint8 codes [R, C]."""
    place = [AWQ_ORDER.index(column) for column in range(8)]
    return _reorder(unpack_words(words, 4), place)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Inverse of `unpack_awq`."""
    return pack_words(_reorder(codes, list(AWQ_ORDER)), 4)


def _reorder(codes: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Each run of eight columns in another order."""
    runs = codes.reshape(codes.shape[0], codes.shape[1] // 8, 8)
    return runs[:, :, order].flatten(1)
