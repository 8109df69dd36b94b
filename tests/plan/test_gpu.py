"""The plan for a GPU: what is chosen and refused, and its arithmetic. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from models.test_deepseek_v3 import PUBLISHED

from quire.config.parse import build_options
from quire.errors import PlanError
from quire.hardware.machine import Gpu, Machine
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.models.checkpoint import declared_formats
from quire.models.registry import build_model
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.gpu import graph_sizes
from quire.plan.plan import Plan
from quire.plan.resolve import resolve
from quire.quant.config import read_scheme

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
QWEN_MOE: dict[str, Any] = {
    **QWEN, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "num_experts_per_tok": 8,
    "moe_intermediate_size": 64,
}  # fmt: skip


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
    with pytest.raises(PlanError, match="do not pack their cache") as caught:
        plan(PUBLISHED, kv_cache_dtype="fp8")
    assert caught.value.code == "unsupported_kv_dtype" and "latents" in caught.value.why
    with pytest.raises(PlanError, match="8 of 1024 experts"):
        plan({**QWEN_MOE, "num_experts": 1024})


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_fp8_cache_takes_a_byte_for_each_value_and_four_for_each_head(dtype: str) -> None:
    found, half = plan(dtype=dtype, kv_cache_dtype="fp8", strict=True), plan(dtype="auto")
    layers, heads, size = 36, 8, 128
    assert [group.page_bytes for group in found.groups] == [2 * 16 * layers * heads * (size + 4)]
    assert [group.page_bytes for group in half.groups] == [2 * 16 * layers * heads * size * 2]
    assert found.kv_dtype == "fp8"
    assert "each head of each token" in reasons(found)["kv cache format"]
    assert found.cache_fingerprint != half.cache_fingerprint


def test_a_checkpoint_that_was_made_for_an_fp8_cache_gets_it() -> None:
    def made(hf: dict[str, Any] = QWEN, made_for: str = "fp8", **options: Any) -> Plan:
        facts = ModelFacts("m", hf, None, kv_cache=made_for, kv_scales=True)
        return resolve(build_options(options), facts, MACHINE, FOUND)

    assert made(strict=True).kv_dtype == "fp8"
    assert reasons(made())["kv cache format"] == "fp8, the checkpoint's scales"
    assert made(kv_cache_dtype="bfloat16", strict=True).kv_dtype == "bfloat16"
    few = {**PUBLISHED, "num_hidden_layers": 4}
    for found in (made(few), made(made_for="nvfp4")):
        assert found.kv_dtype == reasons(found)["kv cache format"] == "bfloat16"
        assert why(found, "kv cache format").startswith("the checkpoint was made for")


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


def quantized(hf: dict[str, Any], format: str, **given: Any) -> Plan:
    """All projections in one format."""
    build = Build(ops)
    build_model(hf, build)
    names = [tensor.name for weight in build.weights for tensor in weight.tensors()]
    formats = {n: format if "_proj.weight" in n else "bf16" for n in names}
    return plan(hf, formats=formats, **given)


def test_codes_are_planned_and_what_serves_them_is_said() -> None:
    layer = 4096 * (6144 + 4096 + 3 * 12288)
    for format, size in (("fp8", 1.0), ("nvfp4", 0.5 + 1 / 16), ("int4_g128", 0.5 + 3 / 128)):
        found = quantized(QWEN, format)
        held = 36 * layer * size + 2 * 2 * 151936 * 4096
        assert found.weight_bytes == pytest.approx(held, rel=2e-3)
        said = reasons(found)[f"linear layers in {format}"]
        assert "decoded in registers" in said and ("e4m3" in said) == (format == "fp8")
        assert not any(choice.downgrade for choice in found.choices)
    ampere = replace(H200, architecture="sm_80", capability=(8, 0))
    for given in ({"deterministic": True}, {"gpu": ampere}):
        assert "e4m3" not in reasons(quantized(QWEN, "fp8", **given))["linear layers in fp8"]
        assert "e4m3" not in reasons(quantized(QWEN_MOE, "fp8", **given))["experts in fp8"]
    for format in ("fp8", "nvfp4"):
        said = reasons(quantized(QWEN_MOE, format))[f"experts in {format}"]
        assert "grouped by expert" in said and ("e4m3" in said) == (format == "fp8")


def test_weights_by_how_often_they_are_read() -> None:
    """By hand: 36 layers of 16 experts in NVFP4, everything else in bfloat16, norms in float32."""
    build = Build(ops)
    build_model(QWEN_MOE, build)
    names = [tensor.name for weight in build.weights for tensor in weight.tensors()]
    formats = {n: "nvfp4" if ".experts." in n else "bf16" for n in names}
    found = plan(QWEN_MOE, formats=formats)
    parts = {part.name: part for part in found.weight_parts}
    # 64 rows of gate and of up, with 4096 columns; 4096 rows with 64, padded to 128.
    wide, high = 64 * (2048 + 256 + 4), 4096 * (64 + 8 + 4)
    assert parts["experts"].nbytes == 36 * 16 * (2 * wide + high)
    assert parts["experts"].values == 36 * 16 * 3 * 64 * 4096 and parts["experts"].layers == 36
    matrices, norms = 4096 * (6144 + 4096 + 16), 2 * 4096 + 2 * 128
    assert parts["layers"].nbytes == 36 * (2 * matrices + 4 * norms) + 4 * 4096
    assert parts["head"].nbytes == parts["embedding"].nbytes == 2 * 151936 * 4096
    assert sum(part.nbytes for part in found.weight_parts) == found.weight_bytes
    assert not any(part.e4m3_values for part in found.weight_parts)


def test_what_is_multiplied_in_e4m3_is_counted() -> None:
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(36)]
    formats = dict.fromkeys(names, "fp8")

    def counted(meant: list[str], **given: Any) -> int:
        facts = ModelFacts("m", QWEN, formats, e4m3_tokens=frozenset(meant))
        gpu = given.pop("gpu", H200)
        machine = replace(MACHINE, gpu=gpu)
        found = resolve(build_options(given), facts, machine, FOUND)
        return {part.name: part.e4m3_values for part in found.weight_parts}["layers"]

    assert counted(names) == 36 * 4096 * 4096
    assert counted(names[:2]) == 2 * 4096 * 4096
    assert counted([]) == counted(names, deterministic=True) == counted(names, dtype="float32") == 0
    assert counted(names, gpu=replace(H200, architecture="sm_80", capability=(8, 0))) == 0


def test_a_quantised_checkpoint_in_half_precision_gets_the_dtype_of_the_kernels() -> None:
    found = quantized({**QWEN, "torch_dtype": "float16"}, "int4_g128")
    [said] = [choice for choice in found.choices if choice.what == "dtype"]
    assert found.dtype == said.chosen == "bfloat16" and said.downgrade and "float16" in said.reason
    wide = quantized(QWEN, "int4_g128", dtype="float32")
    assert reasons(wide)["quantised weights"] == "widened to float32"


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4,
    "max_position_embeddings": 131072, "sliding_window": 128, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_experts_with_biases_must_be_quantised() -> None:
    assert "grouped" in reasons(quantized(GPT_OSS, "mxfp4"))["experts in mxfp4"]
    for given in ({"format": "bf16"}, {"format": "mxfp4", "dtype": "float32"}):
        with pytest.raises(PlanError, match="biases") as caught:
            quantized(GPT_OSS, **given)
        assert caught.value.code == "unsupported_experts"


def test_deepseek_v3_is_planned_with_its_latents() -> None:
    """On one GPU that has never been built: 671 GB of FP8 do not fit those that have."""
    huge = replace(H200, memory_bytes=1000 * GIB, available_bytes=990 * GIB)
    formats = declared_formats(PUBLISHED, read_scheme(PUBLISHED))
    found = plan(PUBLISHED, gpu=huge, formats=formats, strict=True)
    # 58 layers of 257 experts, 3 dense ones, and attention but for kv_b_proj, a byte a value.
    expert, dense = 3 * 7168 * 2048, 3 * 7168 * 18432
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168
    codes = 58 * 257 * expert + 3 * dense + 61 * attention
    # Two bytes: kv_b_proj, embedding, head and routers. A float32 scale for each 128 x 128.
    wide = 61 * 128 * 256 * 512 + 2 * 129280 * 7168 + 58 * 256 * 7168
    assert found.weight_bytes == pytest.approx(codes * (1 + 4 / 128**2) + 2 * wide, rel=1e-3)
    assert found.kv_bytes == found.pool_blocks[0] * 16 * 61 * 1152
    assert reasons(found)["latent attention"] == "absorbed"
    assert reasons(found)["kv_b_proj"] == "widened to bfloat16"
    with pytest.raises(PlanError, match="does not fit"):
        plan(PUBLISHED, formats=formats)


def test_latents_that_kernels_do_not_have_are_refused() -> None:
    for changes, says in (
        ({"kv_lora_rank": 768}, "768 and 64"),
        ({"qk_rope_head_dim": 136}, "136"),
    ):
        with pytest.raises(PlanError, match=says) as caught:
            plan({**PUBLISHED, **changes})
        assert caught.value.code == "unsupported_head_size"
