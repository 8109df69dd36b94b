"""DeepSeek V4 in the whole engine: the same bits alone, batched, chunked, preempted, after hits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from models.deepseek_v4.oracle import Oracle
from models.harness import text
from quire import LLM, SamplingParams
from quire.kernels import native
from quire.plan.memory import bytes_for_tokens

Case = tuple[list[int], SamplingParams]
# Each row changes how the same requests are computed.
WAYS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 512},
    {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 33, "async_scheduling": True},
    {"max_num_seqs": 3, "threads": 1},
    {"max_num_seqs": 6, "max_model_len": 176, "tight": True},
    {"max_num_seqs": 6, "max_model_len": 176, "tight": True, "async_scheduling": True},
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("deepseek_v4"))


def load(oracle: Oracle, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, **options}
    return LLM(str(oracle.published), skip_tokenizer_init=True, **options)


def cases(count: int) -> list[Case]:
    """Requests of many lengths, some with a common beginning, greedy and sampled."""
    rng = random.Random(1)
    common = text(70, seed=2)
    made = []
    for i in range(count):
        prompt = common[: rng.choice([0, 20, 48, 70])] + text(rng.randrange(1, 50), seed=100 + i)
        params = SamplingParams(
            max_tokens=rng.randrange(1, 30),
            temperature=rng.choice([0.0, 0.9]),
            seed=i,
            logprobs=3,
            ignore_eos=True,
        )
        made.append((prompt, params))
    return made


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
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        got = output.outputs[0].token_ids
        logits, _ = oracle.expected(prompt + got)
        assert got == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@pytest.mark.skipif(not native.available(), reason=f"no native kernels: {native.why_not()}")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way)))
def test_bits_do_not_depend_on_batch_chunks_preemption_or_prefix_hits(
    oracle: Oracle, way: dict[str, Any]
) -> None:
    given = cases(8)
    alone = load(oracle, enable_prefix_caching=False, max_num_batched_tokens=512)
    expected = [run(alone, [case])[0] for case in given]
    options = dict(way)
    if options.pop("tight", False):
        options["kv_cache_memory"] = tight_memory(oracle, options)
    llm = load(oracle, **options)
    order = list(range(len(given)))
    random.Random(3).shuffle(order)
    for _ in range(2):  # the second time with a warm prefix cache
        found = run(llm, [given[i] for i in order])
        for i, got in zip(order, found, strict=True):
            assert got == expected[i], f"request {i}"
    stats = llm._engine.core.scheduler.stats()
    assert (stats.preemptions > 0) == ("tight" in way)
    assert (stats.prefix_hit_tokens > 0) == way.get("enable_prefix_caching", True)
    llm._engine.core.scheduler.check_integrity()


def tight_memory(oracle: Oracle, options: dict[str, Any]) -> int:
    """KV bytes for the longest request, and little more."""
    plan = load(oracle, kv_cache_memory=64 * 2**20, **options).plan
    step, sequences = plan.max_num_batched_tokens, plan.max_num_seqs
    return bytes_for_tokens(plan.groups, plan.max_model_len, step, sequences)
