"""Kernels are noted of one layer of each kind: the same as of all, in every family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from quire.kernels.triton.launch import wanted_kernels
from quire.models.registry import Model
from quire.runner.device import DeviceRunner
from quire.runner.layer_kinds import one_of_a_kind
from quire.runner.shapes import Sampling, Shape
from runner.engines import FAMILIES, engine

WriteModel = Any


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_of_each_kind_launches_what_all_do(
    family: str, write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeviceRunner, "warm", lambda _: 0)  # nothing is computed
    config = dict(FAMILIES[family])
    if "layer_types" not in config:
        config["num_hidden_layers"] = 4
    sizes = {"max_num_seqs": 24, "max_num_batched_tokens": 600, "kv_cache_memory": 2**26}
    made = engine(write_model(**config), "cuda", warm=False, dtype="bfloat16", **sizes)
    runner = made.core.runner
    assert isinstance(runner, DeviceRunner)
    runner._threads = 8
    layers, called = cast(Any, runner.model).layers, []
    with torch.inference_mode():
        with wanted_kernels() as all_kernels:
            for key in runner._wanted:
                if isinstance(key, Shape | Sampling):
                    runner._compute(key)()
        runner.model.layers = [counted(layer, called) for layer in layers]
        with wanted_kernels() as kernels:
            runner._note_steps()
    assert kernels.keys() == all_kernels.keys() and len(kernels) > 10
    shapes = sum(isinstance(key, Shape) for key in runner._wanted)
    assert len(called) < shapes * len(layers)
    assert len(runner.model.layers) == len(layers)


def counted(layer: Any, called: list[Any]) -> Any:
    def call(*args: Any) -> Any:
        called.append(layer)
        return layer(*args)

    return call


def test_the_first_of_each_kind_stays_in_its_order() -> None:
    model = cast(Model, SimpleNamespace(layers=["a", "b", "c", "d"]))
    with one_of_a_kind(model, [[(1,)], [(1,), (2,)], [(1,)], [(2,), (1,)]]):
        assert model.layers == ["a", "b", "d"]
    assert model.layers == ["a", "b", "c", "d"]
