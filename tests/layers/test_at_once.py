"""Parts of a layer beside each other: the same results, in a CUDA graph as without one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from quire.layers.at_once import MOST_TOKENS, at_once


def layer(x_TH: torch.Tensor, weight_HH: torch.Tensor) -> torch.Tensor:
    def rest() -> torch.Tensor:
        rest_TH = x_TH
        for _ in range(3):
            rest_TH = torch.relu(rest_TH @ weight_HH)
        return rest_TH

    part_TH, rest_TH = at_once(x_TH, lambda: torch.relu(x_TH @ weight_HH) @ weight_HH, rest)
    return rest_TH + part_TH


def wanted(x_TH: torch.Tensor, weight_HH: torch.Tensor) -> torch.Tensor:
    once = torch.relu(x_TH @ weight_HH)
    return torch.relu(torch.relu(once @ weight_HH) @ weight_HH) + once @ weight_HH


def test_without_a_graph_the_rest_comes_first() -> None:
    seen: list[str] = []
    assert at_once(
        torch.ones(2, 4), lambda: len(seen) or seen.append("part"), lambda: seen.append("rest")
    ) == (1, None)
    assert seen == ["rest"]


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


@pytest.mark.gpu
def test_kernels_that_begin_early_wait_for_both_branches() -> None:
    from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm
    from quire.runner.graphs import Graphs

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    x_TH, out_TH = (torch.empty(4, 4096, device=device) for _ in range(2))
    weight_H = torch.rand(4096, device=device, generator=generator) + 0.5

    def normed(y_TH: torch.Tensor, times: int) -> torch.Tensor:
        for _ in range(times):
            y_TH = rms_norm(y_TH, weight_H, 1e-6)
        return y_TH

    def compute(short: int, long: int) -> torch.Tensor:
        y_TH = rms_norm(x_TH, weight_H, 1e-6)
        for _ in range(20):
            parts = at_once(y_TH, partial(normed, y_TH, short), partial(normed, y_TH, long))
            y_TH = add_rms_norm(*parts, weight_H, 1e-6)
        return y_TH

    graphs = Graphs(device)
    for sizes in ((1, 5), (5, 1)):
        x_TH.zero_()
        graphs.capture(sizes, lambda sizes=sizes: out_TH.copy_(compute(*sizes)))
        assert not graphs.failed
        for _ in range(10):
            x_TH.normal_(generator=generator)
            wanted_TH = compute(*sizes)
            assert graphs.replay(sizes)
            assert torch.equal(out_TH, wanted_TH)


@pytest.mark.gpu
def test_a_capture_that_fails_within_a_branch_leaves_others_alone() -> None:
    from quire.runner.graphs import Graphs

    device = torch.device("cuda")
    graphs, x_TH = Graphs(device), torch.ones(4, 64, device=device)
    pool = graphs._pool

    def fails() -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise MemoryError("in a branch")
        return x_TH + 1

    for parts in ((fails, lambda: x_TH * 2), (lambda: x_TH * 2, fails)):
        graphs.capture(parts, lambda parts=parts: at_once(x_TH, *parts))
        assert "in a branch" in graphs.failed[parts]
    out_TH = torch.empty_like(x_TH)

    def compute() -> None:
        one, other = at_once(x_TH, lambda: x_TH + 1, lambda: x_TH * 2)
        out_TH.copy_(one + other)

    graphs.capture("good", compute)
    assert graphs._pool == pool and graphs.replay("good")
    assert torch.equal(out_TH, torch.full_like(x_TH, 4))
