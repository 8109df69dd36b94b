"""Right tokens: a request's bits do not depend on what else runs or how its KV came about."""

from __future__ import annotations

import random
from typing import Any

import pytest

from quire import LLM, RequestOutput, SamplingParams
from quire.kernels import native
from quire.plan.memory import bytes_for_tokens

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"determinism is the native kernels' promise: {native.why_not()}"
)

Case = tuple[list[int], SamplingParams]
Bits = list[tuple[list[int], list[list[tuple[int, float]]], str | None]]


def bits(output: RequestOutput) -> Bits:
    """Everything that must be equal: tokens, log-probabilities to the last bit, finish reason."""
    found: Bits = []
    for choice in output.outputs:
        logprobs = [
            [(token, entry.logprob) for token, entry in position.items()]
            for position in choice.logprobs or []
        ]
        found.append((choice.token_ids, logprobs, choice.finish_reason))
    return found


def cases(seed: int, count: int) -> list[Case]:
    """Requests of many lengths, some with a common beginning, greedy and sampled."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 320) for _ in range(70)]
    made = []
    for i in range(count):
        own = [rng.randrange(3, 320) for _ in range(rng.randrange(1, 60))]
        prompt = common[: rng.choice([0, 0, 20, 48, 70])] + own
        params = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            seed=i,
            n=rng.choice([1, 1, 3]),
            logprobs=rng.choice([0, 3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            ignore_eos=True,
        )
        made.append((prompt, params))
    return made


def run(llm: LLM, given: list[Case]) -> list[Bits]:
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in given]
    outputs = llm.generate(prompts, [params for _, params in given], use_tqdm=False)
    return [bits(output) for output in outputs]


def load(model: str, **options: Any) -> LLM:
    return LLM(model, load_format="dummy", skip_tokenizer_init=True, **options)


# Each row changes how the same requests are computed.
WAYS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 512},
    {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 33, "async_scheduling": True},
    {"max_num_seqs": 3, "threads": 1},
    {"max_num_seqs": 6, "max_model_len": 176, "tight": True},
    {"max_num_seqs": 6, "max_model_len": 176, "tight": True, "async_scheduling": True},
]


@pytest.mark.parametrize(
    ("model", "dtype", "count"),
    [
        ("tiny_llama", "bfloat16", 14),
        ("tiny_gemma", "float32", 14),
        ("tiny_moe", "float32", 8),
        ("tiny_deepseek", "float32", 8),
        pytest.param("tiny_llama", "float32", 40, marks=pytest.mark.full),
        pytest.param("tiny_gemma", "bfloat16", 40, marks=pytest.mark.full),
        pytest.param("tiny_moe", "bfloat16", 20, marks=pytest.mark.full),
        pytest.param("tiny_deepseek", "bfloat16", 20, marks=pytest.mark.full),
    ],
)
def test_bits_do_not_depend_on_batch_chunks_preemption_or_prefix_hits(
    model: str, dtype: str, count: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    given = cases(seed=1, count=count)
    alone = load(path, dtype=dtype, enable_prefix_caching=False, max_num_batched_tokens=512)
    expected = [run(alone, [case])[0] for case in given]
    for i, way in enumerate(WAYS):
        options = dict(way)
        tight = options.pop("tight", False)
        if tight:
            options["kv_cache_memory"] = tight_memory(path, dtype, options)
        llm = load(path, dtype=dtype, **options)
        order = list(range(len(given)))
        random.Random(i).shuffle(order)
        for _ in range(2):  # the second time with a warm prefix cache
            found = run(llm, [given[j] for j in order])
            for j, got in zip(order, found, strict=True):
                assert got == expected[j], f"{way}, request {j}"
        if tight:
            stats = llm._engine.core.scheduler.stats()
            assert stats.preemptions > 0, "this way was meant to preempt"


def tight_memory(path: str, dtype: str, options: dict[str, Any]) -> int:
    """KV bytes for the longest request, and little more."""
    plan = load(path, dtype=dtype, kv_cache_memory=64 * 2**20, **options).plan
    step, sequences = plan.max_num_batched_tokens, plan.max_num_seqs
    return bytes_for_tokens(plan.groups, plan.max_model_len, step, sequences)


def test_real_weights_give_the_same_bits_alone_and_in_a_batch() -> None:
    llm = LLM("smollm2", max_model_len=512, max_num_batched_tokens=48)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, logprobs=2)
    prompts = ["The sea was", "Once upon a time there was a fox who", "def main():", "1 + 1 ="]
    alone = [bits(llm.generate(p, params, use_tqdm=False)[0]) for p in prompts]
    together = [bits(o) for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == alone
