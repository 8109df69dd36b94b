"""What becomes of a capture that fails, with pretended CUDA (test_graphs.py has the real one)."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from quire.errors import QuireError
from quire.runner.graphs import Graphs


class Graph:
    """A CUDA graph that refuses to begin or to end its capture where it is told to."""

    alive = 0
    refuses = ""

    def __init__(self) -> None:
        Graph.alive += 1

    def __del__(self) -> None:
        Graph.alive -= 1

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert not gc.isenabled()
        if Graph.refuses == "begin":
            raise RuntimeError("half registered")

    def capture_end(self) -> None:
        if Graph.refuses == "end":
            raise RuntimeError("invalidated")

    def replay(self) -> None:
        pass


class Stream:
    device_index = 0

    def __init__(self, *device: torch.device):
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Memory pools that are no longer recorded to, by who began it."""
    pools, found = count(), list[object]()

    def close(device: int, pool: object) -> None:
        found.append(pool)
        if Graph.refuses == "begin":
            raise RuntimeError("not recording")

    Graph.alive, Graph.refuses = 0, ""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(pools)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", close)
    return found


class Failing:
    """Raises the second time, which is while it is captured."""

    def __init__(self, error: Exception):
        self.error, self.calls = error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            raise self.error


@pytest.mark.parametrize("refuses", ["begin", "end"])
def test_a_graph_that_cuda_left_halfway_is_never_destroyed_and_others_follow(
    refuses: str, closed: list[object]
) -> None:
    graphs = Graphs(torch.device("cuda"))
    graphs.capture("good", lambda: None)
    Graph.refuses = refuses
    graphs.capture("bad", Failing(ValueError("no good")))
    assert graphs.failed == {
        "bad": "RuntimeError: half registered" if refuses == "begin" else "ValueError: no good"
    }
    assert closed == [(0, 0)] and graphs._pool == (0, 1)
    Graph.refuses = ""
    graphs.capture("after", lambda: None)
    assert graphs.replay("good") and graphs.replay("after") and not graphs.replay("bad")
    assert gc.isenabled()
    del graphs
    gc.collect()
    assert Graph.alive == 1


def test_a_graph_whose_capture_was_ended_goes_and_its_pool_stays(closed: list[object]) -> None:
    graphs = Graphs(torch.device("cuda"))
    graphs.capture("bad", Failing(ValueError("no good")))
    with pytest.raises(QuireError):
        graphs.capture("worse", Failing(QuireError("kernel_not_compiled", "no kernel")))
    assert graphs.failed == {"bad": "ValueError: no good"}
    assert not closed and graphs._pool == (0, 0)
    gc.collect()
    assert Graph.alive == 0 and len(graphs) == 0
