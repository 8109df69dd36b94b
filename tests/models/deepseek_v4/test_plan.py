"""The plan of the published DeepSeek-V4-Flash: sizes by hand, what is refused and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan.test_gpu import plan as gpu_plan
from plan.test_resolve import MACHINE, NATIVE
from plan.test_resolve import plan as llama_plan

from models.deepseek_v4.published import FLASH
from quire.config.parse import build_options
from quire.errors import PlanError
from quire.hardware.machine import Machine
from quire.models.checkpoint import declared_formats
from quire.plan import memory
from quire.plan.facts import ModelFacts
from quire.plan.plan import Plan
from quire.plan.resolve import resolve
from quire.quant.config import read_scheme

TIB = 2**40
# 2 layers have a window alone, 21 compress four tokens and are chosen among, 20 compress 128.
LAYERS, SPARSE, HEAVY = 43, 21, 20
SPARSE_PAGE = 32 * (512 + 128) * 2 * SPARSE  # of 128 tokens, in bfloat16
HEAVY_PAGE = 512 * 2 * HEAVY
WINDOW_PAGE = 16 * 512 * 2 * LAYERS


# Planning 11,008 experts takes seconds; what is not about weights needs few.
FEW = {**FLASH, "n_routed_experts": 8}
LARGE = replace(MACHINE, memory_bytes=2 * TIB, available_bytes=2 * TIB)


def made(hf: dict[str, Any] = FEW, machine: Machine = LARGE, **options: Any) -> Plan:
    facts = ModelFacts("m", hf, declared_formats(hf, read_scheme(hf)))
    return resolve(build_options(options), facts, machine, NATIVE)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return made(FLASH, max_num_seqs=4, max_model_len=1048576)


def test_groups_are_windows_and_pages_of_entries(plan: Plan) -> None:
    found = [(g.window, g.block_size, len(g.layers), g.page_bytes) for g in plan.groups]
    assert found == [
        (132, 16, LAYERS, WINDOW_PAGE),  # 128, and 4 that are computed again after a hit
        (None, 128, SPARSE, SPARSE_PAGE),
        (None, 128, HEAVY, HEAVY_PAGE),
    ]
    assert (SPARSE_PAGE + HEAVY_PAGE) / 128 == 6880
    assert [g.checkpoint for g in plan.groups] == [4096, None, None]
    assert plan.recomputed_tokens == 4


def test_the_largest_context_and_what_it_takes(plan: Plan) -> None:
    assert plan.max_model_len == plan.context_tokens == 1048576
    entries = 1048576 // 128 + 4 + 1  # a page begun by each request, and the null block
    # Windows of 10 blocks: 132 tokens and what a window begins within. For 4 requests and, of
    # each step of 512 tokens in flight, 32 more; a checkpoint for each 4096 tokens and request.
    windows = 4 * 10 + 2 * 32 + (256 + 4) * 10 + 1
    assert plan.pool_blocks == (windows, entries, entries)
    assert plan.kv_bytes == windows * WINDOW_PAGE + entries * (SPARSE_PAGE + HEAVY_PAGE)


def test_open_windows_are_state_of_requests(plan: Plan) -> None:
    # Values and logits in float32 of 8 or 128 tokens, and 32 more for drafts.
    sparse = (8 + 32) * 2 * (1024 + 256) * 4 * SPARSE
    heavy = (128 + 32) * 2 * 512 * 4 * HEAVY
    assert plan.state_bytes == 4 * (sparse + heavy)


def test_weights_are_widened_on_a_cpu(plan: Plan) -> None:
    # DeepSeek says 284 billion parameters.
    assert plan.weight_bytes == pytest.approx(2 * 284e9, rel=0.002)


def test_the_plan_tells_entries_windows_state_and_checkpoints_apart(plan: Plan) -> None:
    found = {choice.what: (choice.chosen, choice.reason) for choice in plan.choices}
    assert found["compressed entries"] == (
        "6880 bytes for each token", "41 layers, in pages of 128 tokens"
    )  # fmt: skip
    assert found["windows"][0] == "6.7 MiB for each request"
    assert found["open windows"][0] == "20.7 MiB for each request"
    assert "last 4 tokens" in found["open windows"][1]
    assert "every 4096 tokens" in found["checkpoints"][1]


def test_too_little_memory_is_told_with_numbers() -> None:
    with pytest.raises(PlanError, match="does not fit") as caught:
        made(machine=MACHINE)
    assert "weights take 2" in caught.value.why and "request state take 1.3 GiB" in caught.value.why


def test_a_gpu_has_the_same_groups_and_counts_streams_and_open_windows() -> None:
    found, on_cpu = gpu_plan(FEW, max_num_seqs=4), made(max_num_seqs=4)
    assert found.runner == "graph" and found.groups == on_cpu.groups
    # Four streams of bfloat16 are kept of every token until it is sampled behind.
    streams = 4 * 4096 * 2 * found.max_num_batched_tokens
    assert found.state_bytes > on_cpu.state_bytes + streams
    packed = gpu_plan(FEW, kv_cache_dtype="fp8")
    assert packed.kv_dtype == "fp8" and memory.entry_bytes(packed.groups) == 3850.25
    assert packed.max_num_seqs == 256  # fewer by default, as each has open windows


def test_an_fp8_cache_takes_3850_bytes_for_each_token_of_flash() -> None:
    packed = made(kv_cache_dtype="fp8")
    assert [g.page_bytes for g in packed.groups] == [
        16 * 584 * LAYERS, 32 * (584 + 132) * SPARSE, 584 * HEAVY
    ]  # fmt: skip
    assert memory.entry_bytes(packed.groups) == 3850.25
    assert packed.kv_dtype == "fp8"
    found = {choice.what: choice.chosen for choice in packed.choices}
    assert found["compressed entries"] == "3850 bytes for each token"
    assert found["windows"] == "3.8 MiB for each request"


def test_checkpoints_may_be_closer_and_end_where_hits_do() -> None:
    closer = made(checkpoint_tokens=300)
    assert [group.checkpoint for group in closer.groups] == [384, None, None]
    with pytest.raises(PlanError) as caught:
        llama_plan(checkpoint_tokens=300)
    assert caught.value.code == "no_checkpoints"
