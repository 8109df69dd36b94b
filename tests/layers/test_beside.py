"""Parts of a layer beside each other: the same results, in a CUDA graph as without one."""

from __future__ import annotations

import pytest
import torch

from quire.layers.beside import MOST_TOKENS, beside


def layer(x_TH: torch.Tensor, weight_HH: torch.Tensor) -> torch.Tensor:
    own = beside(x_TH, lambda: torch.relu(x_TH @ weight_HH) @ weight_HH)
    rest_TH = x_TH
    for _ in range(3):
        rest_TH = torch.relu(rest_TH @ weight_HH)
    return rest_TH + own()


def wanted(x_TH: torch.Tensor, weight_HH: torch.Tensor) -> torch.Tensor:
    once = torch.relu(x_TH @ weight_HH)
    return torch.relu(torch.relu(once @ weight_HH) @ weight_HH) + once @ weight_HH


def test_without_a_graph_the_part_is_computed_at_once() -> None:
    seen = []

    def part() -> torch.Tensor:
        seen.append("part")
        return x_TH + 1

    x_TH = torch.ones(2, 4)
    result = beside(x_TH, part)
    assert seen == ["part"] and torch.equal(result(), x_TH + 1) and seen == ["part"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, MOST_TOKENS, MOST_TOKENS + 1])
def test_a_graph_with_a_branch_gives_the_same(tokens: int) -> None:
    from quire.runner.graphs import Graphs

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(tokens)
    weight_HH = torch.randn(256, 256, device=device, generator=generator) / 16
    x_TH, out_TH = (torch.empty(tokens, 256, device=device) for _ in range(2))

    def compute() -> None:
        y_TH = x_TH
        for _ in range(4):  # what a layer read or wrote in its branch is free for the next one
            y_TH = layer(y_TH, weight_HH)
        out_TH.copy_(y_TH)

    graphs = Graphs(device)
    x_TH.zero_()
    graphs.capture("layers", compute)
    assert not graphs.failed
    for _ in range(5):
        x_TH.normal_(generator=generator)
        y_TH = x_TH.clone()
        for _ in range(4):
            y_TH = wanted(y_TH, weight_HH)
        assert graphs.replay("layers")
        torch.testing.assert_close(out_TH, y_TH, rtol=1e-4, atol=1e-4)
