"""Sorting of (token, slot) pairs by expert in plain torch, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Aligned:
    """The T * K pairs of an ids [T, K], sorted by expert and cut into blocks of one expert.

    pairs   int32 [T * K]     pair t * K + k at each sorted position; of an expert's, lower first
    experts int32 [max]       each block's expert
    starts  int32 [max]       each block's first sorted position
    ends    int32 [max]       the position after its last one: at most `block` more
    blocks  int32 [1]         how many blocks there are; entries past it are undefined

    Positions have no gaps: an expert's last block is short rather than padded, so whatever is
    stored by position needs no room for padding and nothing has to be cleared.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    blocks: torch.Tensor
    block: int
    experts_per_token: int


def max_blocks(pairs: int, experts: int, block: int) -> int:
    """The most blocks that `pairs` pairs can give: each expert in use has one pair in a first
    block of its own, and the other pairs fill as many further blocks as they can."""
    used = min(pairs, experts)
    return used + (pairs - used) // block


def align(ids: torch.Tensor, experts: int, block: int) -> Aligned:
    t, k = ids.shape
    flat = ids.flatten().long()
    most = max_blocks(t * k, experts, block)
    table = torch.full((3, most), -1, dtype=torch.int32)
    count = start = 0
    for expert, rows in enumerate(flat.bincount(minlength=experts).tolist()):
        for first in range(start, start + rows, block):
            table[:, count] = torch.tensor([expert, first, min(first + block, start + rows)])
            count += 1
        start += rows
    which, starts, ends = table.to(ids.device)
    return Aligned(
        pairs=flat.argsort(stable=True).int(),
        experts=which,
        starts=starts,
        ends=ends,
        blocks=torch.tensor([count], dtype=torch.int32, device=ids.device),
        block=block,
        experts_per_token=k,
    )
