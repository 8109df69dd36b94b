"""Hyper-connections: nearly doubly stochastic mixes, sums by hand, bits of each token its own."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.route_tokens import route_tokens
from quire.kernels.reference.streams.mixing import collapse, mixing, sigmoid, spread


def logits(tokens: int, streams: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, streams * (streams + 2), generator=generator) * 2


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_rows_and_columns_of_a_mix_sum_to_one(streams: int) -> None:
    given = logits(50, streams)
    scale, base = torch.tensor([1.0, 0.5, 0.7]), torch.linspace(-1, 1, given.shape[1])
    reads, writes, matrix = mixing(given, base, scale, streams, 1e-6, 200)
    torch.testing.assert_close(matrix.sum(1), torch.ones(50, streams), rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix.sum(2), torch.ones(50, streams), rtol=0, atol=1e-4)
    first = torch.sigmoid(given[:, :streams] + base[:streams])
    torch.testing.assert_close(reads, first + 1e-6)
    middle = slice(streams, 2 * streams)
    torch.testing.assert_close(writes, 2 * torch.sigmoid(given[:, middle] * 0.5 + base[middle]))


def test_streams_are_read_and_written_by_their_weights() -> None:
    streams = torch.tensor([[[1.0, 2.0], [10.0, 20.0]]])
    assert collapse(streams, torch.tensor([[2.0, 0.5]])).tolist() == [[7.0, 14.0]]
    # From the first stream all goes to the second, from the second half to each.
    matrix = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    found = spread(torch.tensor([[100.0, 0.0]]), streams, torch.tensor([[1.0, 2.0]]), matrix)
    assert found.tolist() == [[[105.0, 10.0], [206.0, 12.0]]]


def test_sigmoid_has_no_bounds() -> None:
    x = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0])
    torch.testing.assert_close(sigmoid(x), torch.sigmoid(x))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_a_token_are_its_own(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = logits(37, 4)
        scale, base = torch.tensor([1.0, 0.5, 0.7]), torch.linspace(-1, 1, 24)

        def results(some: torch.Tensor) -> tuple[torch.Tensor, ...]:
            tokens = torch.zeros(len(some), dtype=torch.int64)
            mixed = mixing(some, base, scale, 4, 1e-6, 20)
            return *mixed, *route_tokens(some, tokens, None, base, 6, 1.5)

        whole = results(given)
        for t in range(37):
            parts = results(given[t : t + 1].clone())
            assert all(torch.equal(a[0], b[t]) for a, b in zip(parts, whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_experts_are_chosen_by_score_and_bias_and_weighed_by_score_alone() -> None:
    given = torch.tensor([[0.0, 1.0, -30.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    bias = torch.tensor([0.0, 0.0, 9.0, -9.0])
    tokens = torch.tensor([1, 0])
    weights, ids = route_tokens(given, tokens, None, bias, 2, 1.5)
    assert ids.tolist() == [[2, 1], [2, 0]]
    scores = torch.nn.functional.softplus(given.double()).sqrt().gather(1, ids)
    wanted = scores / scores.sum(-1, keepdim=True) * 1.5
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-8)
    table = torch.tensor([[3, 0], [0, 1]])
    weights, ids = route_tokens(given, tokens, table, None, 2, 1.5)
    assert ids.tolist() == [[0, 1], [3, 0]]
    assert torch.allclose(weights[1], torch.tensor([0.75, 0.75]))
    low = route_tokens(torch.full((1, 4), -200.0), tokens[:1], None, None, 2, 1.5)
    assert low[0].isfinite().all()
