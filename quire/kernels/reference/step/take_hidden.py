"""Reference of quire/kernels/triton/step/take_hidden.py."""

from __future__ import annotations

from itertools import pairwise

import torch


def take_hidden(
    kept: torch.Tensor, rows: torch.Tensor, query_start: torch.Tensor, out: torch.Tensor
) -> None:
    out.zero_()
    place = 0
    for row, (begin, end) in zip(rows.tolist(), pairwise(query_start.tolist()), strict=True):
        out[begin:end] = kept[place : place + end - begin]
        place += row[2] if row[0] >= 0 else 0
