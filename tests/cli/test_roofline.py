"""The floor of a scenario: by hand on a tiny model, and against figures that were worked out apart
for known models on a machine of 4.27 TB/s and 794 TFLOP/s."""

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import pytest
from models.deepseek_v4.published import FLASH
from models.test_deepseek_v3 import PUBLISHED

from quire.cli.roofline import Ceilings, Drafted, Work, ideal, roofline, to_record
from quire.cli.workload import DECODE, SCENARIOS, TOTAL, Scenario
from quire.kernels.reference import ops
from quire.layers.build import Build, Reads
from quire.models.registry import build_model, read_config

from .tools import config

H200 = Ceilings(4.27e12, 794e12)
PLAN = {"max_num_seqs": 512, "max_num_batched_tokens": 8192, "context_tokens": 400_000}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


# Bytes of a value, and whether many tokens are multiplied with it in e4m3.
Held = tuple[float, bool]


def part_of(name: str, tied: bool) -> str:
    if "embed_tokens" in name:
        return "head" if tied else "embedding"
    if name == "lm_head.weight":
        return "head"
    return "experts" if ".experts." in name else "layers"


def work_of(hf: dict[str, Any], value_bytes: int = 2, kv_dtype: str = "auto", **held: Held) -> Work:
    """Of a model whose weights and KV cache have values of that many bytes; `held`: parts that
    have others."""
    build = Build(ops, kv_dtype=kv_dtype)
    build_model(hf, build)
    tensors = [tensor for weight in build.weights for tensor in weight.tensors()]
    tied = all(tensor.name != "lm_head.weight" for tensor in tensors)
    values = dict.fromkeys(("layers", "experts", "head", "embedding"), 0)
    for tensor in tensors:
        values[part_of(tensor.name, tied)] += prod(tensor.shape)
    sparse = {t.name.partition(".experts.")[0] for t in tensors if ".experts." in t.name}
    parts = []
    for name, count in values.items():
        size, fast = held.get(name, (value_bytes, False))
        part = {"name": name, "values": count, "nbytes": size * count}
        part |= {"e4m3_values": count if fast else 0}
        parts.append(part | {"layers": len(sparse) if name == "experts" else 0})
    return Work.of(read_config(hf), parts, build.caches, value_bytes)


def figure(hf: dict[str, Any], name: str) -> float:
    scenario = next(s for s in SCENARIOS if s.name == name)
    found = ideal(roofline(work_of(hf), scenario, PLAN, H200), scenario)
    assert found is not None
    return found[1]


def test_a_tiny_model_by_hand() -> None:
    """Two layers of hidden 64, 4 heads of 16 over 2 KV heads, intermediate 128; head of 272."""
    work = work_of(config(), 4)
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 2 * 64
    layers, head = 2 * (attention + mlp + norms) + 64, 272 * 64
    assert (work.layers.values, work.layers.nbytes) == (layers, 4 * layers)
    assert (work.head.values, work.head.nbytes) == (head, 4 * head)
    assert work_of(config(tie_word_embeddings=False), 4).head == work.head
    # One decode step of 3 rows: every weight once, 2 operations per weight and row.
    need = work.products(3, 3)
    assert need.bytes == 4 * (layers + head)
    assert need.flops == 2 * 3 * (layers + head) and need.e4m3_flops == 0
    # 10 tokens of context: keys and values of 2 layers x 2 heads x 16 x 4 bytes; two products.
    seen = work.decoding(10)
    assert seen.bytes == 10 * 2 * 2 * 2 * 16 * 4 and seen.flops == 10 * 2 * 2 * 2 * 4 * 16
    # Whichever is slower, products and attention one after the other.
    assert Ceilings(100, 1000).seconds(need, seen) == pytest.approx(
        max(need.bytes / 100, need.flops / 1000) + max(seen.bytes / 100, seen.flops / 1000)
    )
    assert Ceilings(100).seconds(need) == need.bytes / 100


def test_pairs_of_a_prompt_are_counted_one_by_one() -> None:
    for most, ratio in product((None, 1, 3, 8, 100), (1, 2, 5)):
        reads = Reads(1, 1, most, ratio)
        for start in range(12):
            for end in range(start, 30):
                by_hand = sum(min((p + 1) // ratio, most or 10**9) for p in range(start, end))
                assert reads.pairs(start, end) == by_hand, (reads, start, end)


def test_drafts_are_tokens_of_their_step_and_who_makes_them_reads_its_own_weights() -> None:
    """Two requests, two drafts each of which half are right, made in two passes."""
    work, small = work_of(config()), replace(work_of(config(hidden_size=32)), attention=())
    scenario = Scenario("x", DECODE, 2, 10, 9, "")
    plain = roofline(work, scenario, PLAN, H200)
    found = roofline(work, scenario, PLAN, H200, drafted=Drafted(2.0, 0.5, small))
    products, attention = found.step
    weights = work.layers.nbytes + work.head.nbytes
    each = small.layers.nbytes + small.head.nbytes
    assert products.bytes == weights + 2 * each
    assert products.flops == weights * 2 * 3 + 2 * each * 2  # two operations for two bytes
    assert attention.bytes == plain.step[1].bytes
    assert attention.flops == plain.step[1].flops * 3
    assert (found.rows, found.tokens, found.given) == (2, 6, 2)
    assert ideal(found, scenario) == ("itl_ms", pytest.approx(found.step_s * 1e3 / 2))
    assert to_record(found, scenario, {"itl_ms": 1.0})["step_tokens"] == 6
    # Nobody reads weights for n-grams.
    alone = roofline(work, scenario, PLAN, H200, drafted=Drafted(2.0, 0.5))
    assert alone.step[0] == work.products(6, 6)


def test_one_draft_of_flash_reads_the_experts_of_two_tokens() -> None:
    """12 of 256 in each layer, and not those of one token."""
    work = work_of(FLASH, experts=(0.53, False))
    found = roofline(work, Scenario("x", DECODE, 1, 10, 9, ""), PLAN, H200, drafted=Drafted(1.0))
    assert work.spread(2) == pytest.approx(12, abs=0.15)
    per_layer = found.step[0].bytes - work.layers.nbytes - work.head.nbytes
    assert per_layer / 43 == pytest.approx(work.spread(2) * 3 * 4096 * 2048 * 0.53)


def test_experts_count_as_chosen() -> None:
    hf = config(
        architectures=["Qwen3MoeForCausalLM"], num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True,
    )  # fmt: skip
    work = work_of(hf)
    assert (work.experts, work.per_token, work.sparse) == (8, 2, 2)
    assert work.expert.values == 3 * 64 * 32
    assert work.spread(1) == pytest.approx(2) and work.spread(1000) == pytest.approx(8)
    assert work.spread(2) == pytest.approx(2 + 2 * 6 / 8)  # the second token's that are new
    rest, expert = work.layers.values + work.head.values, 3 * 64 * 32
    assert work.products(5, 5, 4.5).bytes == 2 * (rest + 2 * 4.5 * expert)
    assert work.products(5, 5).flops == 2 * 5 * (rest + 2 * 2 * expert)


def test_parts_of_other_formats_count_their_own_bytes_and_arithmetic() -> None:
    """Experts of four bits and a scale for 16, in bfloat16 layers; layers in FP8 below a bfloat16
    head."""
    hf = config(
        architectures=["Qwen3MoeForCausalLM"], num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True,
    )  # fmt: skip
    plain, four = work_of(hf), work_of(hf, experts=(0.5625, False))
    rest, expert = plain.layers.nbytes + plain.head.nbytes, 3 * 64 * 32
    # 3 distinct experts in each of 2 layers.
    assert four.products(2, 2, 3.0).bytes == rest + 2 * 3 * expert * 0.5625
    assert four.products(2, 2, 3.0).flops == plain.products(2, 2, 3.0).flops
    fast = work_of(config(), layers=(1.0, True))
    layers, head = fast.layers.values, 272 * 64
    need = fast.products(100, 7)
    assert need.bytes == layers + 2 * head
    assert need.e4m3_flops == 2 * 100 * layers and need.flops == 2 * 7 * head
    ceilings = Ceilings(1e30, 1000.0, 4000.0)
    assert ceilings.seconds(need) == need.flops / 1000 + need.e4m3_flops / 4000
    assert Ceilings(1e30, 1000.0).seconds(need) == (need.flops + need.e4m3_flops) / 1000
    measured = {"memory_copy_gb_s": 4000.0, "bf16_tflop_s": 800.0, "e4m3_tflop_s": 1500.0}
    assert Ceilings.of(measured) == Ceilings(4e12, 8e14, 1.5e15)


def test_prompts_in_e4m3_have_a_floor_of_their_own() -> None:
    """16 prompts of 8192 in FP8, whose head is computed once for each."""
    pre = next(s for s in SCENARIOS if s.name == "pre")
    both = Ceilings(4.27e12, 794e12, 1500e12)
    work, plain = work_of(QWEN3_8B, layers=(1.0, True)), work_of(QWEN3_8B)
    found, slow = roofline(work, pre, PLAN, both), roofline(plain, pre, PLAN, both)
    tokens, values = 16 * 8192, work.layers.values
    products, attention = found.prompt
    assert products.e4m3_flops == 2 * tokens * values
    assert products.flops == 2 * 16 * work.head.values
    assert slow.prompt_s - found.prompt_s == pytest.approx(
        2 * tokens * values * (1 / 794e12 - 1 / 1500e12)
    )
    assert attention == slow.prompt[1]
    kept = to_record(found, pre, {"prefill_tok_s": 1.0})
    assert kept["prompt_e4m3_tflop"] == pytest.approx(2 * tokens * values / 1e12)


@pytest.mark.parametrize(
    ("hf", "name", "low", "high"),
    [
        (SMOLLM2, "b1", 0.063, 0.066),
        (QWEN3_8B, "b1", 3.54, 3.56),
        (QWEN3_8B, "thr", 13_000, 13_200),
        (QWEN3_8B, "pre", 45_000, 49_000),
        (QWEN3_30B_A3B, "b1", 1.42, 1.44),
        (QWEN3_30B_A3B, "b32", 12.5, 12.9),
        (QWEN3_30B_A3B, "thr", 17_500, 17_900),
        (QWEN3_30B_A3B, "pre", 90_500, 92_000),
    ],
)
def test_known_models_have_the_floors_worked_out_for_them(
    hf: dict[str, Any], name: str, low: float, high: float
) -> None:
    assert low <= figure(hf, name) <= high


def test_a_record_has_the_share_that_was_reached() -> None:
    work = work_of(config())
    scenario = Scenario("x", DECODE, 4, 10, 9, "")
    found = roofline(work, scenario, PLAN, H200)
    kept = to_record(found, scenario, {"itl_ms": found.step_s * 1e3 * 4})
    assert kept["share"] == pytest.approx(0.25) and kept["rows"] == 4
    assert kept["step_gb"] == pytest.approx(1e-9 * (found.step[0].bytes + found.step[1].bytes))
    total = Scenario("x", TOTAL, 4, 10, 9, "")
    found = roofline(work, total, PLAN, H200)
    seconds = found.prompt_s + 8 * found.step_s
    assert to_record(found, total, {"output_tok_s": 18 / seconds})["share"] == pytest.approx(0.5)


def test_without_a_rate_of_arithmetic_only_decoding_has_a_floor() -> None:
    work = work_of(config())
    names = {"single", "prefill512", "b32", "thr"}
    floors = {
        s.name: ideal(roofline(work, s, PLAN, Ceilings(1e9)), s)
        for s in SCENARIOS
        if s.name in names
    }
    assert {name for name, found in floors.items() if found} == {"single", "b32"}


def test_requests_beyond_slots_or_cache_decode_in_turns() -> None:
    work, scenario = work_of(config()), Scenario("x", TOTAL, 8, 10, 20, "")
    found = roofline(work, scenario, PLAN | {"max_num_seqs": 2}, H200)
    assert found.rows == 2 and found.decode_s == pytest.approx(19 * 4 * found.step_s)
    cramped = roofline(work, scenario, PLAN | {"context_tokens": 65}, H200)
    assert cramped.rows == 3  # of 20 tokens in the mean
    gap = ideal(found, Scenario("x", DECODE, 8, 10, 20, ""))
    assert gap == ("itl_ms", pytest.approx(4 * found.step_s * 1e3))


def test_every_family_with_experts_is_counted() -> None:
    hf = config(
        architectures=["GptOssForCausalLM"], num_local_experts=4, num_experts_per_tok=2,
        head_dim=16, sliding_window=8,
    )  # fmt: skip
    work = work_of(hf)
    assert (work.experts, work.per_token, work.sparse) == (4, 2, 2)


def test_of_compressed_entries_few_are_read_and_all_are_scored() -> None:
    """DeepSeek-V4-Flash after 32,768 tokens, in FP8."""
    seen = work_of(FLASH | {"n_routed_experts": 8}, 1, "fp8").decoding(32768)
    windows, chosen, scored, pooled = 43 * 128, 21 * 512, 21 * 8192, 20 * 256
    assert seen.bytes == (windows + chosen + pooled) * 584 + scored * 132
    assert seen.flops == (windows + chosen + pooled) * 4 * 64 * 512 + scored * 2 * 64 * 128


def test_an_fp8_cache_is_read_with_its_scales() -> None:
    """Of 2 layers, keys and values of 2 heads: 16 bytes and a scale of 4."""
    assert work_of(config(), 1, "fp8").decoding(10).bytes == 10 * 2 * 2 * 2 * (16 + 4)


def test_latents_are_read_once_for_all_heads() -> None:
    """DeepSeek-V3: 61 layers of 576 values a token; 128 heads multiply with 576 and mix 512."""
    seen = work_of(PUBLISHED).decoding(1000)
    assert seen.bytes == 1000 * 61 * 576 * 2
    assert seen.flops == 1000 * 61 * 128 * 2 * (576 + 512)
