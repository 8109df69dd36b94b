"""The plan of config.json alone: sizes by hand, choices with reasons, refusals with numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from quire.comm.group import Group
from quire.config.parse import build_options
from quire.errors import ModelError, PlanError
from quire.hardware.machine import Machine
from quire.kernels.reference import ops
from quire.plan import memory
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.plan import Plan
from quire.plan.resolve import resolve

GIB = 2**30
MACHINE = Machine("a processor", "x86_64", 4, 16 * GIB, 8 * GIB)
REFERENCE = KernelFacts(ops, None, why_not="no compiler was found")
# The reference stands in for native kernels: only its packed_nbytes is asked.
NATIVE = KernelFacts(ops, ops, isa="avx2")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 16,
    "sliding_window": 64,
    "sliding_window_pattern": 3,
}


def plan(
    hf: dict[str, Any] = LLAMA,
    machine: Machine = MACHINE,
    found: KernelFacts = NATIVE,
    formats: dict[str, str] | None = None,
    group: Group | None = None,
    **options: Any,
) -> Plan:
    return resolve(build_options(options), ModelFacts("m", hf, formats), machine, found, group)


LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64
MATRICES = 3 * LAYER + 2 * 1000 * 64
NORMS = (2 * 3 + 1) * 64


@pytest.mark.parametrize(
    ("hf", "options", "itemsize"),
    [
        ({}, {}, 2),
        ({}, {"dtype": "float32"}, 4),
        ({"torch_dtype": "float32"}, {}, 4),
        ({"torch_dtype": "float32"}, {"dtype": "bfloat16"}, 2),
        ({"torch_dtype": None, "dtype": "float16"}, {}, 2),
    ],
)
def test_weights_by_hand(hf: dict[str, Any], options: dict[str, Any], itemsize: int) -> None:
    assert plan({**LLAMA, **hf}, **options).weight_bytes == MATRICES * itemsize + 4 * NORMS


def test_tied_embeddings_count_once_and_biases_are_float32() -> None:
    tied = plan({**LLAMA, "tie_word_embeddings": True})
    assert plan().weight_bytes - tied.weight_bytes == 2 * 1000 * 64
    biased = plan({**LLAMA, "attention_bias": True, "mlp_bias": True})
    biases = 3 * (64 + 32 + 32 + 64 + 160 + 160 + 64)
    assert biased.weight_bytes - plan().weight_bytes == 4 * biases


def test_formats_of_the_files_count_and_dtype_changes_only_dense_ones() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    stored = {name: "q8_0"}
    small = plan(formats=stored)
    # The stand-in keeps packed weights as float32.
    assert small.weight_bytes - plan().weight_bytes == 160 * 64 * (4 - 2)
    assert small.weight_formats == "bf16 x 22, q8_0 x 1"
    assert plan(formats=stored, dtype="float32").weight_formats == "f32 x 22, q8_0 x 1"
    assert plan(formats={name: "f64"}, dtype="float32").weight_formats == "f32 x 23"


@pytest.mark.parametrize("kind", ["f8_e4m3", "f64", "q3_k", "i8"])
def test_a_format_that_the_kernels_lack_is_refused_before_loading(kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        plan(formats={"model.layers.0.mlp.up_proj.weight": kind})
    assert caught.value.code == "unsupported_format"


def test_kv_activations_and_rotary_tables_by_hand() -> None:
    made = plan(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024)
    page = 3 * 2 * 2 * 16 * 16 * 2
    assert made.pool_blocks == (1 + 16384 // 16 + 8,)
    assert made.kv_bytes == page * made.pool_blocks[0]
    assert made.context_tokens == 16384
    # The widest: gate and up with their product, against qkv with the queries and their result.
    width = max(3 * 160, 128 + 2 * 64)
    layers = (3 * 64 + width) * 256
    logits = 64 * 256 + 1000 * (64 + 16)
    assert made.activation_bytes == 4 * max(layers, logits) + 4 * 16 * 1024
    row = 1000 + 4 * 64 + width
    assert made.graph_bytes == 4 * row * 36  # recorded decode steps of 1 to 8 rows
    parts = made.weight_bytes + made.kv_bytes + made.activation_bytes
    parts += made.graph_bytes + memory.RESERVE_BYTES
    assert made.total_bytes == parts


def test_the_vocabulary_of_an_untied_head_does_not_widen_every_token() -> None:
    big = {**LLAMA, "vocab_size": 100_000}
    untied, tied = plan(big), plan({**big, "tie_word_embeddings": True})
    assert untied.activation_bytes == tied.activation_bytes


def test_reference_kernels_need_room_for_one_widened_weight() -> None:
    native, reference = plan(), plan(found=REFERENCE)
    assert reference.activation_bytes - native.activation_bytes == 4 * 1000 * 64
    assert (
        plan(found=REFERENCE, dtype="float32").activation_bytes
        == plan(dtype="float32").activation_bytes
    )


def test_window_layers_take_no_more_than_their_windows() -> None:
    made = plan(GEMMA, max_num_seqs=4, max_num_batched_tokens=128, kv_cache_dtype="float32")
    sliding, full = made.groups
    assert ((sliding.window, sliding.layers), (full.window, full.layers)) == (
        (64, (0, 1)),
        (None, (2,)),
    )
    # (64 + 128) / 16 blocks and one more, for each of 4 requests.
    assert made.pool_blocks == (1 + 4 * 13, 1 + 1024 + 4)
    layer = 2 * 2 * 16 * 16 * 4
    assert made.kv_bytes == 53 * 2 * layer + 1029 * layer


def test_two_groups_of_one_pool_take_its_memory_once_and_keep_to_kv_cache_memory() -> None:
    even = {**GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 2}
    made = plan(even, kv_cache_memory=40 * 2**20)
    assert [g.pool for g in made.groups] == [0, 0]
    assert 0 <= 40 * 2**20 - made.kv_bytes < 2 * made.groups[0].page_bytes


@pytest.mark.parametrize("size", [3 * 2**20, 50 * 2**20, GIB])
def test_kv_cache_memory_is_filled_and_never_exceeded(size: int) -> None:
    made = plan(kv_cache_memory=size)
    assert 0 <= size - made.kv_bytes < 2 * made.groups[0].page_bytes
    assert made.max_model_len == min(4096, made.context_tokens)


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(PlanError, match="4097") as caught:
        plan(max_model_len=4097)
    assert (caught.value.code, caught.value.fix) == ("context_too_long", "use at most 4096")


def test_a_context_that_does_not_fit_the_kv_cache_is_refused_with_the_need() -> None:
    with pytest.raises(PlanError) as caught:
        plan(max_model_len=4096, kv_cache_memory=2**20)
    assert caught.value.code == "out_of_memory"
    need = memory.bytes_for_tokens(plan().groups, 4096, 512, 64)
    assert f"{need / 2**20:.1f} MiB are needed" in caught.value.why


def test_a_kv_cache_that_does_not_fit_the_machine_is_refused() -> None:
    with pytest.raises(PlanError, match=r"KV cache of 100\.0 GiB"):
        plan(kv_cache_memory=100 * GIB)


def test_a_model_that_does_not_fit_the_machine_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match="does not fit") as caught:
        plan(machine=replace(MACHINE, available_bytes=300 * 2**20))
    assert "300.0 MiB are available" in caught.value.why


def test_on_a_small_machine_the_kv_cache_takes_half_of_what_is_left() -> None:
    spare = 8 * 2**20
    fixed = plan().total_bytes - plan().kv_bytes
    made = plan(machine=replace(MACHINE, available_bytes=fixed + spare))
    assert spare * 0.4 < made.kv_bytes <= spare / 2 + 2**20
    assert made.max_model_len == min(4096, made.context_tokens)
    assert any(c.what == "kv cache" and "half" in c.reason for c in made.choices)


def test_a_model_with_a_very_short_context_still_starts() -> None:
    assert plan({**LLAMA, "max_position_embeddings": 32}).max_model_len == 32


def test_missing_native_kernels_are_a_downgrade_that_strict_refuses() -> None:
    made = plan(found=REFERENCE)
    choice = next(c for c in made.choices if c.what == "kernels")
    assert (choice.chosen, choice.downgrade, choice.reason) == (
        "reference",
        True,
        "no compiler was found",
    )
    assert not made.deterministic
    with pytest.raises(PlanError, match="kernels would be reference") as caught:
        plan(found=REFERENCE, strict=True)
    assert caught.value.why == "no compiler was found"
    with pytest.raises(PlanError, match="native"):
        plan(found=REFERENCE, kernels="native")


def test_strict_accepts_what_was_asked_for() -> None:
    assert plan(strict=True).kernels == "native"
    asked = plan(found=REFERENCE, kernels="reference", deterministic=False, strict=True)
    assert asked.kernels == "reference"
    with pytest.raises(PlanError, match="deterministic"):
        plan(kernels="reference", strict=True)


def test_each_of_two_ranks_holds_half_of_what_is_shared() -> None:
    one, two = plan(), plan(group=Group(1, 2))
    shared = 3 * LAYER + 1000 * 64
    assert one.weight_bytes - two.weight_bytes == 2 * shared // 2
    assert two.groups[0].page_bytes * 2 == one.groups[0].page_bytes
    with pytest.raises(PlanError, match="3 ranks"):
        plan(group=Group(0, 3))


def test_the_fingerprint_changes_with_what_changes_bits_and_with_nothing_else() -> None:
    base = plan().fingerprint
    assert plan(max_num_seqs=3, max_model_len=128, threads=2).fingerprint == base
    changed = [
        plan(dtype="float32"),
        plan(kv_cache_dtype="float32"),
        plan(found=REFERENCE),
        plan(found=replace(NATIVE, isa="avx512")),
        plan({**LLAMA, "num_hidden_layers": 4}),
        plan(formats={"lm_head.weight": "q8_0"}),
    ]
    assert len({p.fingerprint for p in changed} | {base}) == len(changed) + 1


def test_a_plan_is_plain_data() -> None:
    import json

    made = plan()
    assert json.loads(json.dumps(made.to_dict()))["total_bytes"] == made.total_bytes
    assert made.summary()["context"] == "4096 tokens"


def test_a_head_size_that_native_kernels_lack_goes_to_the_reference_and_says_so() -> None:
    odd = {**LLAMA, "head_dim": 20}
    [choice] = [c for c in plan(odd).choices if c.what == "kernels"]
    assert (choice.chosen, choice.downgrade) == ("reference", True)
    assert "head size 20" in choice.reason
    with pytest.raises(PlanError, match="native"):
        plan(odd, kernels="native")
    with pytest.raises(PlanError, match="strict"):
        plan(odd, strict=True)
