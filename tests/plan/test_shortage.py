"""A GPU that runs out of memory in spite of the plan: the largest term and its flag are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.config.parse import build_options
from quire.engine.startup import find_model, kernel_facts, make_plan
from quire.errors import PlanError
from quire.plan.plan import Plan
from quire.plan.shortage import explained, is_out_of_memory, terms


@pytest.fixture(scope="module")
def plan(tiny_llama: str) -> Plan:
    options = build_options({"model": tiny_llama, "load_format": "dummy", "device": "cpu"})
    found = make_plan(options, find_model(options), None, kernel_facts())
    return replace(found, device="cuda", device_name="a GPU", graph_bytes=0, state_bytes=0)


@pytest.mark.parametrize(
    ("term", "flag"),
    [
        ("weight_bytes", "quantised"),
        ("kv_bytes", "--kv-cache-memory"),
        ("activation_bytes", "--max-num-batched-tokens"),
        ("graph_bytes", "--runner eager"),
        ("state_bytes", "--max-num-seqs"),
    ],
)
def test_the_largest_term_and_its_flag_are_named(plan: Plan, term: str, flag: str) -> None:
    large = replace(plan, **{term: 40 * 2**30})
    with pytest.raises(PlanError) as caught, explained(large, "weights were loaded"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    error = caught.value
    assert error.code == "out_of_memory" and "a GPU" in error.what and "loaded" in error.what
    assert "Tried to allocate 2 GiB" in error.why and "40.0 GiB" in error.why
    name = max(terms(large), key=lambda each: terms(large)[each])
    assert error.fix.startswith(f"the largest term is {name}:") and flag in error.fix.split(";")[0]
    assert "--gpu-memory-utilization" in error.fix


def test_what_cuda_itself_takes_is_not_blamed(plan: Plan) -> None:
    large = replace(plan, reserve_bytes=40 * 2**30)
    with pytest.raises(PlanError) as caught, explained(large, "weights were loaded"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "raise --gpu-memory-utilization" not in caught.value.fix


def test_only_shortages_of_memory_are_explained(plan: Plan) -> None:
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(ValueError("out of memory of this"))
    with pytest.raises(RuntimeError, match="illegal"), explained(plan, "x"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_every_term_of_the_plan_is_counted_once(plan: Plan) -> None:
    assert sum(terms(plan).values()) == plan.total_bytes
