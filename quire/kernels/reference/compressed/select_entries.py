"""Which compressed entries each token attends to: the best by the indexer's scores."""

from __future__ import annotations

import torch

AT_ONCE = 1 << 22  # products that are in memory at a time


def select_entries(
    queries_THD: torch.Tensor,
    weights_TH: torch.Tensor,
    keys_ED: torch.Tensor,
    visible_T: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """The `count` best of each token's first `visible` entries (int64 [T]), in ascending order and
    then -1: int64 [T, min(count, E)]. Of equal scores the earlier entry counts as better.

    An entry's score is the sum over heads of weight * relu(query . key).
    """
    entries = len(keys_ED)
    place = torch.arange(entries)
    chosen = []
    some = max(1, AT_ONCE // max(1, queries_THD.shape[1] * queries_THD.shape[2]))
    pieces = torch.split(keys_ED, some)
    step = max(1, some // max(1, entries))
    for first in range(0, len(queries_THD), step):
        part = slice(first, first + step)
        queries, weights = queries_THD[part, None], weights_TH[part, None]
        scores = [_scores(queries, weights, keys) for keys in pieces]
        scores_TE = torch.cat(scores, dim=1)
        hidden_TE = place >= visible_T[part, None]
        order = scores_TE.masked_fill(hidden_TE, -torch.inf).sort(
            dim=-1, descending=True, stable=True
        )
        best = order.indices[:, :count]
        best = best.masked_fill(best >= visible_T[part, None], entries).sort(dim=-1).values
        chosen.append(best.masked_fill(best == entries, -1))
    if not chosen:
        return torch.empty(0, min(count, entries), dtype=torch.int64)
    return torch.cat(chosen)


def _scores(
    queries_T1HD: torch.Tensor, weights_T1H: torch.Tensor, keys_ED: torch.Tensor
) -> torch.Tensor:
    products_TEH = (queries_T1HD * keys_ED[None, :, None]).sum(-1)
    return (products_TEH.relu() * weights_T1H).sum(-1)
