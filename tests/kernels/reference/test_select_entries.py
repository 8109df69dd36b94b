"""The best entries by the indexer's scores, of equal ones the earliest."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.compressed.select_entries import select_entries

HEADS, SIZE, ENTRIES = 5, 8, 40


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(tokens, HEADS, SIZE, generator=generator),
        torch.randn(tokens, HEADS, generator=generator),
        torch.randn(ENTRIES, SIZE, generator=generator),
    )


@pytest.mark.parametrize("count", [1, 7, 40, 64])
def test_they_are_the_best_of_those_a_token_may_see(count: int) -> None:
    queries, weights, keys = inputs(30)
    visible = torch.arange(30) + 5
    found = select_entries(queries, weights, keys, visible, count)
    assert found.shape == (30, min(count, ENTRIES))
    scores = torch.einsum("th,the->te", weights, torch.einsum("thd,ed->the", queries, keys).relu())
    for t, row in enumerate(found.tolist()):
        ranked = sorted(range(int(visible[t])), key=lambda e: -float(scores[t, e]))
        wanted = sorted(ranked[:count])
        assert row == wanted + [-1] * (len(row) - len(wanted))


def test_of_equal_scores_the_earliest_count() -> None:
    queries = torch.zeros(1, HEADS, SIZE)
    found = select_entries(
        queries, torch.ones(1, HEADS), torch.randn(ENTRIES, SIZE), torch.tensor([33]), 10
    )
    assert found.tolist() == [list(range(10))]


def test_negative_scores_are_chosen_where_there_is_nothing_better() -> None:
    queries = torch.ones(1, 1, 2)
    keys = torch.tensor([[3.0, 0], [1, 0], [2, 0], [5, 5]])
    found = select_entries(queries, -torch.ones(1, 1), keys, torch.tensor([3]), 2)
    assert found.tolist() == [[1, 2]]


def test_a_token_chooses_alike_alone_and_among_others() -> None:
    queries, weights, keys = inputs(30)
    visible = torch.arange(30) + 5
    whole = select_entries(queries, weights, keys, visible, 6)
    for t in range(30):
        seen = int(visible[t])
        one = slice(t, t + 1)
        alone = select_entries(queries[one], weights[one], keys[:seen], visible[one], 6)
        assert alone[0].tolist() == whole[t, : alone.shape[1]].tolist()


def test_no_tokens_and_no_entries_choose_nothing() -> None:
    queries, weights, keys = inputs(3)
    assert select_entries(queries[:0], weights[:0], keys, torch.empty(0), 4).shape == (0, 4)
    none = torch.zeros(3, dtype=torch.int64)
    assert select_entries(queries, weights, keys[:0], none, 4).shape == (3, 0)
    assert (select_entries(queries, weights, keys, none, 4) == -1).all()
