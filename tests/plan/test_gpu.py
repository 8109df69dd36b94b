"""The plan for a GPU: what is chosen and refused, and its arithmetic. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from quire.config.parse import build_options
from quire.errors import PlanError
from quire.hardware.machine import Gpu, Machine
from quire.kernels.reference import ops
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.gpu import graph_sizes
from quire.plan.plan import Plan
from quire.plan.resolve import resolve

GIB = 2**30
H200 = Gpu("NVIDIA H200", "sm_90", (9, 0), 132, 232448, 140 * GIB, 139 * GIB)
MACHINE = Machine("a processor", "x86_64", 16, 64 * GIB, 32 * GIB, H200, "")
FOUND = KernelFacts(ops, None, why_not="no compiler was found", triton="3.6.0")
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


def plan(
    hf: dict[str, Any] = QWEN,
    gpu: Gpu | None = H200,
    found: KernelFacts = FOUND,
    formats: dict[str, str] | None = None,
    **options: Any,
) -> Plan:
    machine = replace(MACHINE, gpu=gpu, no_gpu="torch finds no usable GPU" if gpu is None else "")
    return resolve(build_options(options), ModelFacts("m", hf, formats), machine, found)


def reasons(plan: Plan) -> dict[str, str]:
    return {choice.what: choice.chosen for choice in plan.choices}


def test_a_gpu_is_taken_and_its_memory_is_filled() -> None:
    found = plan()
    assert (found.device, found.kernels, found.isa, found.runner) == (
        "cuda", "triton", "sm_90, triton 3.6.0", "graph",
    )  # fmt: skip
    layer = 4096 * (6144 + 4096 + 3 * 12288)
    assert found.weight_bytes == pytest.approx(2 * (36 * layer + 2 * 151936 * 4096), rel=1e-3)
    assert 0.98 * 0.9 * 140 * GIB < found.total_bytes <= 0.9 * 140 * GIB
    assert found.max_model_len == 40960
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (512, 8192)
    assert found.async_scheduling
    assert not found.deterministic


def test_less_memory_where_others_use_the_gpu() -> None:
    busy = plan(gpu=replace(H200, available_bytes=60 * GIB))
    assert busy.total_bytes <= 60 * GIB


@pytest.mark.parametrize(
    ("gpu", "triton", "why"),
    [
        (None, "3.6.0", "torch finds no usable GPU"),
        (H200, None, "Triton is not installed"),
        (replace(H200, architecture="sm_75", capability=(7, 5)), "3.6.0", "sm_80 or newer"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_said_or_refused(
    gpu: Gpu | None, triton: str | None, why: str
) -> None:
    found = replace(FOUND, triton=triton)
    assert plan(gpu=gpu, found=found).device == "cpu"
    with pytest.raises(PlanError, match=why):
        plan(gpu=gpu, found=found, device="cuda")
    if gpu is not None:
        with pytest.raises(PlanError, match="--strict"):
            plan(gpu=gpu, found=found, strict=True)


def test_the_cpu_can_be_asked_for() -> None:
    assert plan(device="cpu").device == "cpu"


def test_a_model_that_does_not_fit_names_the_largest_part() -> None:
    with pytest.raises(PlanError, match="weights are the most") as caught:
        plan(gpu=replace(H200, memory_bytes=16 * GIB, available_bytes=15 * GIB))
    assert "weights take 15.3 GiB" in str(caught.value)
    with pytest.raises(PlanError, match="activations are the most: lower --max-num-batched"):
        plan(max_num_batched_tokens=2**20, gpu=replace(H200, available_bytes=60 * GIB))


def test_a_head_size_that_kernels_do_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match="head size 100"):
        plan({**QWEN, "head_dim": 100})


def test_quantised_weights_are_a_downgrade_that_strict_refuses() -> None:
    formats = {"lm_head.weight": "q4_1"}
    assert reasons(plan(formats=formats))["weights"] == "dequantised to bfloat16"
    with pytest.raises(PlanError, match="dequantised"):
        plan(formats=formats, strict=True)


def test_deterministic_says_which_kernels_change() -> None:
    chosen, plain = reasons(plan(deterministic=True)), reasons(plan())
    assert chosen["deterministic"] == "yes"
    assert chosen["matrix products"] != plain["matrix products"]
    assert plan(deterministic=True).fingerprint != plan().fingerprint


def test_eager_captures_nothing() -> None:
    eager = plan(runner="eager")
    assert (eager.runner, eager.decode_graphs, eager.mixed_graphs) == ("eager", (), ())
    assert eager.graph_bytes == 0


@pytest.mark.parametrize(
    ("tokens", "sequences"), [(8192, 256), (512, 64), (16, 3), (16, 256), (1, 1)]
)
def test_graph_sizes_end_at_what_a_step_can_hold(tokens: int, sequences: int) -> None:
    decode, mixed = graph_sizes(tokens, sequences)
    assert decode[-1] == min(sequences, tokens)
    assert list(decode) == sorted(set(decode))
    assert all(size <= tokens for size in mixed)
    assert all(2 * a >= b for a, b in pairwise(decode))


def test_limits_of_the_kernels_are_refused_before_loading() -> None:
    with pytest.raises(PlanError, match="--kv-cache-dtype float32 does not go with"):
        plan(kv_cache_dtype="float32")
    assert plan(dtype="float32", kv_cache_dtype="bfloat16").kv_dtype == "bfloat16"
    many = {
        **QWEN,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 1024,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 64,
    }
    with pytest.raises(PlanError, match="8 of 1024 experts"):
        plan(many)


def test_the_plan_says_what_is_known_of_the_architecture() -> None:
    assert "measured" in why(plan(), "architecture")
    for name, capability in (("sm_100", (10, 0)), ("sm_120", (12, 0))):
        found = plan(gpu=replace(H200, architecture=name, capability=capability), strict=True)
        assert reasons(found)["architecture"] == name
        assert "never run" in why(found, "architecture")
    unknown = plan(gpu=replace(H200, architecture="sm_86", capability=(8, 6)))
    assert "no test compiles" in why(unknown, "architecture")


def why(found: Plan, what: str) -> str:
    return next(choice.reason for choice in found.choices if choice.what == what)
