"""DeepSeek V4 in the whole engine: the same bits alone, batched, chunked, preempted, after hits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from models.deepseek_v4.oracle import HEAVY, SPARSE, Oracle
from models.harness import text
from quire import LLM, SamplingParams
from quire.engine.tiering import Tiering
from quire.kernels import native
from quire.plan.memory import bytes_for_tokens

Case = tuple[list[int], SamplingParams]
# Drafts wherever the last token was there before, most of them wrong.
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
MTP = {"method": "mtp", "num_speculative_tokens": 2}
# Each row changes how the same requests are computed.
WAYS: list[Any] = [
    pytest.param({"max_num_batched_tokens": 33, "async_scheduling": True}, id="chunks"),
    pytest.param({"max_num_seqs": 3}, id="few at once"),
    pytest.param({"max_num_seqs": 6, "max_model_len": 160, "tight": True}, id="preempted"),
    pytest.param({"max_num_batched_tokens": 40, "speculative_config": NGRAM}, id="with drafts"),
    *(
        pytest.param(way, id=name, marks=pytest.mark.full)
        for name, way in {
            "batched by two threads": {"max_num_batched_tokens": 512, "threads": 2},
            "with drafts of its module": {
                "max_num_batched_tokens": 40, "max_num_seqs": 5, "speculative_config": MTP,
            },
            "small chunks": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
            "preempted ahead": {
                "max_num_seqs": 6, "max_model_len": 160, "tight": True, "async_scheduling": True,
            },
        }.items()
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("deepseek_v4"), hc_sinkhorn_iters=3)


@pytest.fixture(scope="module")
def alone(oracle: Oracle) -> list[Any]:
    """What each request gives by itself, computed in one chunk."""
    llm = load(oracle, enable_prefix_caching=False, max_num_batched_tokens=512)
    return [run(llm, [case])[0] for case in CASES]


def load(oracle: Oracle, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "threads": 1, **options}
    return LLM(str(oracle.published), skip_tokenizer_init=True, **options)


def cases(count: int) -> list[Case]:
    """Requests of many lengths, most with a common beginning, greedy and sampled."""
    rng = random.Random(1)
    common = text(70, seed=2)
    made = []
    for i in range(count):
        prompt = common[: rng.choice([0, 20, 48, 70])] + text(rng.randrange(1, 50), seed=100 + i)
        params = SamplingParams(
            max_tokens=rng.randrange(8, 36),
            temperature=rng.choice([0.0, 0.9]),
            seed=i,
            logprobs=3,
            ignore_eos=True,
        )
        made.append((prompt, params))
    return made


CASES = cases(7)


def run(llm: LLM, given: list[Case]) -> list[Any]:
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in given]
    outputs = llm.generate(prompts, [params for _, params in given], use_tqdm=False)
    return [
        (
            choice.token_ids,
            [[(t, e.logprob) for t, e in position.items()] for position in choice.logprobs or []],
            choice.finish_reason,
        )
        for output in outputs
        for choice in output.outputs
    ]


def test_greedy_tokens_are_those_of_transformers(oracle: Oracle, kernels: str) -> None:
    llm = load(oracle, kernels=kernels, max_num_batched_tokens=24, max_num_seqs=3)
    prompts = [text(length, seed) for seed, length in enumerate((1, 9, 40, 65))]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        got = output.outputs[0].token_ids
        logits, _ = oracle.expected(prompt + got)
        assert got == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.why_not()}")
@pytest.mark.parametrize("way", WAYS)
def test_bits_do_not_depend_on_batch_chunks_preemption_or_prefix_hits(
    oracle: Oracle, alone: list[Any], way: dict[str, Any]
) -> None:
    options = dict(way)
    if options.pop("tight", False):
        options["kv_cache_memory"] = tight_memory(oracle, options)
    llm = load(oracle, **options)
    order = list(range(len(CASES)))
    random.Random(3).shuffle(order)
    for _ in range(2):  # the second time with a warm prefix cache
        found = run(llm, [CASES[i] for i in order])
        for i, got in zip(order, found, strict=True):
            assert got == alone[i], f"request {i}"
    stats = llm._engine.core.scheduler.stats()
    assert (stats.preemptions > 0) == ("tight" in way)
    assert (stats.prefix_hit_tokens > 0) == way.get("enable_prefix_caching", True)
    llm._engine.core.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("drafting", "kv_cache_dtype"),
    [
        pytest.param(None, "float32", id="plain"),
        pytest.param(None, "fp8", id="FP8 cache"),
        pytest.param(MTP, "float32", id="drafts of its module"),
        pytest.param(NGRAM, "float32", id="drafts", marks=pytest.mark.full),
    ],
)
def test_tiers_change_no_bit(
    oracle: Oracle,
    alone: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drafting: dict[str, Any] | None,
    kv_cache_dtype: str,
) -> None:
    """Entries and checkpoints of windows go down and come back, under drafts too."""
    monkeypatch.setattr(Tiering, "observe", lambda self, tokens, seconds: None)  # load all found
    options: dict[str, Any] = {"max_num_seqs": 6, "max_model_len": 160}
    options |= {"speculative_config": drafting, "kv_cache_dtype": kv_cache_dtype}
    if kv_cache_dtype != "float32":
        plain = load(oracle, enable_prefix_caching=False, kv_cache_dtype=kv_cache_dtype)
        alone = run(plain, CASES)
    options["kv_cache_memory"] = tight_memory(oracle, options)
    pages = sum(group.page_bytes for group in load(oracle, **options).plan.groups)
    tiers = f"dram:{12 * pages}B,fs:{tmp_path}/kv:1GiB"
    llm = load(oracle, kv_tiers=tiers, **options)
    for seed in range(3):
        order = list(range(len(CASES)))
        random.Random(seed).shuffle(order)
        for i, got in zip(order, run(llm, [CASES[i] for i in order]), strict=True):
            assert got == alone[i], f"request {i}"
    core = llm._engine.core
    assert {tier.name: tier.loaded_bytes > 0 for tier in core.stats().tiers}["dram"]
    core.scheduler.check_integrity()
    core.close()


def tight_memory(oracle: Oracle, options: dict[str, Any]) -> int:
    """KV bytes for the longest request, and little more."""
    plan = load(oracle, kv_cache_memory=64 * 2**20, **options).plan
    step, sequences = plan.max_num_batched_tokens, plan.max_num_seqs
    return bytes_for_tokens(plan.groups, plan.max_model_len, step, sequences)


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "fp8"])
def test_a_hit_computes_four_tokens_again_and_gives_the_same_bits(
    kv_cache_dtype: str, tmp_path: Path
) -> None:
    """The published ratios: pages of 128 tokens, and entries that end in another request's page."""
    oracle = Oracle(
        tmp_path, compress_rates={SPARSE: 4, HEAVY: 128}, hc_sinkhorn_iters=3,
        layer_types=[SPARSE, HEAVY], num_hidden_layers=2, num_hash_layers=1,
    )  # fmt: skip
    common = text(300)
    params = SamplingParams(temperature=0.0, max_tokens=10, logprobs=2, ignore_eos=True)
    options = {"max_model_len": 512, "kv_cache_dtype": kv_cache_dtype}
    llm = load(oracle, **options)
    cold = load(oracle, enable_prefix_caching=False, **options)
    prompts = [common, common, common[:270] + text(30, 1), common[:200], common[:128]]
    given = [(prompt, params) for prompt in prompts]
    assert [run(llm, [case]) for case in given] == [run(cold, [case]) for case in given]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    # Windows are kept at 256 tokens, the border before the end of the first prompt, and at 128,
    # that of the fourth. The last prompt itself must have a token to compute.
    assert [output.num_cached_tokens for output in outputs] == [252, 252, 252, 124, 0]
