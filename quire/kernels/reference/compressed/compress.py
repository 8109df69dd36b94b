"""Pooling windows of tokens into compressed entries, across the borders of steps."""

from __future__ import annotations

import torch


def compress(
    rows_T2W: torch.Tensor,
    state_SR2W: torch.Tensor,
    state_slots_B: torch.Tensor,
    query_start_B: torch.Tensor,
    context_len_B: torch.Tensor,
    ratio: int,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [E, D] of the windows that this step's tokens complete, and the tokens int64 [E] that
    complete them. Entry w is complete with the token at position ratio * (w + 1) - 1.

    rows: values and logits of each token (index 0 and 1); an entry is the sum of the values of its
    tokens, weighted by a softmax of the logits over tokens, each channel by itself. Without
    `overlap` W is D. With it W is 2 D: an entry also pools the window before its own, where that
    counts with the first D channels and its own with the last D.

    state: the last R rows of each request, a row at its position modulo R; read for tokens before
    this step, and given this step's rows. R is at least the tokens that an entry pools.
    """
    span = 2 * ratio if overlap else ratio
    size = rows_T2W.shape[2] // 2 if overlap else rows_T2W.shape[2]
    length = state_SR2W.shape[1]
    entries, tokens = [rows_T2W.new_empty(0, size)], []
    starts = query_start_B.tolist()
    for slot, first, last, end in zip(
        state_slots_B.tolist(), starts, starts[1:], context_len_B.tolist(), strict=False
    ):
        ring, start = state_SR2W[slot], end - (last - first)
        mine = rows_T2W[first:last]
        begun, complete = start // ratio, end // ratio
        if complete > begun:
            oldest = ratio * begun + ratio - span
            before = _earlier(ring, oldest, start)
            known = torch.cat([before, mine[: ratio * complete - start]])
            entries.append(_pool(known.unfold(0, span, ratio), size, ratio, overlap))
            tokens += [ratio * (w + 1) - 1 - start + first for w in range(begun, complete)]
        kept = torch.arange(max(start, end - length), end)
        ring[kept % length] = mine[kept - start]
    return torch.cat(entries), torch.tensor(tokens, dtype=torch.int64)


def _earlier(ring_R2W: torch.Tensor, oldest: int, start: int) -> torch.Tensor:
    """Rows of the positions from `oldest` to before `start`; those before the sequence weigh 0."""
    positions = torch.arange(oldest, start)
    found = ring_R2W[positions % ring_R2W.shape[0]]
    found[positions < 0] = torch.tensor([0.0, -torch.inf])[:, None]
    return found


def _pool(windows_E2WS: torch.Tensor, size: int, ratio: int, overlap: bool) -> torch.Tensor:
    values, logits = windows_E2WS.unbind(1)
    if overlap:
        values, logits = (
            torch.cat([part[:, :size, :ratio], part[:, size:, ratio:]], dim=-1)
            for part in (values, logits)
        )
    # Sums over the last dimension, whose bits do not depend on how many there are.
    return (values.contiguous() * logits.contiguous().softmax(-1)).sum(-1)
