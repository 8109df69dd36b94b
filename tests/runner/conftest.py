"""Fixtures of the runners' tests."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from quire.runner.graphs import Graphs
from quire.runner.shapes import Shape


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of CUDA graphs that are replayed during a test: "decode" and "mixed" forward passes,
    "sampling", of a model that drafts "reading" and "guessing", and "packet", of what is new."""
    kinds = set[str]()
    replay = Graphs.replay

    def watched(graphs: Graphs, key: Hashable) -> bool:
        done = replay(graphs, key)
        if done and isinstance(key, Shape):
            kinds.add("decode" if key.tokens == key.rows else "mixed")
        elif done:
            kinds.add(type(key).__name__.lower())
        return done

    monkeypatch.setattr(Graphs, "replay", watched)
    return kinds
