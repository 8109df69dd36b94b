"""Layers of a model that launch the same kernels: what steps need can be asked of one of a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quire.kernels.triton.launch import Launch, launches_noted
from quire.models.registry import Model


@contextmanager
def watched_layers(model: Model) -> Iterator[list[list[Launch]]]:
    """What each layer launches inside, where kernels are only noted (launch.wanted_kernels)."""
    launches: list[list[Launch]] = [[] for _ in model.layers]

    def watched(layer: Callable[..., Any], its: list[Launch]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with launches_noted(its):
                return layer(*args)

        return call

    with _layers(model, list(map(watched, model.layers, launches))):
        yield launches


@contextmanager
def one_of_a_kind(model: Model, launches: Sequence[list[Launch]]) -> Iterator[None]:
    """The model has only the first of the layers whose `launches` are the same."""
    firsts = [place for place, its in enumerate(launches) if launches.index(its) == place]
    with _layers(model, [model.layers[place] for place in firsts]):
        yield


@contextmanager
def _layers(model: Model, layers: list[Any]) -> Iterator[None]:
    own, model.layers = model.layers, layers
    try:
        yield
    finally:
        model.layers = own
