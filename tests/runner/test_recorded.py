"""Recorded decode steps give the bits of the model's own code, or are not used."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.kernels import native

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"recording is of native kernels: {native.why_not()}"
)

PROMPTS = [[5 + i] * (3 + 7 * i) for i in range(6)]


def load(model: str, **options: Any) -> LLM:
    return LLM(model, load_format="dummy", skip_tokenizer_init=True, **options)


def answers(llm: LLM, count: int) -> list[Any]:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, logprobs=2, ignore_eos=True)
    prompts = [{"prompt_token_ids": p} for p in PROMPTS[:count]]
    return [
        (o.outputs[0].token_ids, o.outputs[0].logprobs)
        for o in llm.generate(prompts, params, use_tqdm=False)
    ]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gemma", "tiny_latents"])
def test_recorded_and_computed_steps_give_the_same_bits(
    model: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    recorded, computed = load(path), load(path)
    computed._engine.core.runner._recorded = None
    for count in (1, 3, 6, 2, 6):
        assert answers(recorded, count) == answers(computed, count)
    steps = recorded._engine.core.runner._recorded._steps
    assert {1, 2, 3, 6} <= set(steps)


def test_results_share_memory_where_their_lives_do_not_overlap(tiny_llama: str) -> None:
    llm = load(tiny_llama)
    answers(llm, 1)
    program = llm._engine.core.runner._recorded._steps[1].program
    assert len(program.calls) == 2 * 9 + 3  # two layers; embedding, last norm, head
    largest = 4 * max(320, 2 * 96)
    assert program.nbytes <= 6 * largest


def test_a_model_that_computes_with_torch_is_not_recorded_and_says_so(
    tiny_moe: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm = load(tiny_moe)
    with caplog.at_level(logging.INFO, "quire.runner"):
        assert answers(llm, 2) == answers(llm, 2)
    assert "not recorded" in caplog.text
    assert llm._engine.core.runner._recorded._steps == {}


def test_a_recording_with_other_bits_is_not_used(
    tiny_llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm, plain = load(tiny_llama), load(tiny_llama)
    plain._engine.core.runner._recorded = None
    recorded = llm._engine.core.runner._recorded
    honest = recorded._record

    class Wrong:
        """A recorder whose program changes the logits afterwards."""

        def __enter__(self) -> Any:
            self.inner = honest()
            self.program = self.inner.__enter__()
            return self.program

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)
            self.program.calls.pop()
            self.program.calls.append((lambda: recorded_logits_to_zero(), ()))

    def recorded_logits_to_zero() -> None:
        for storage in self_memory():
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    def self_memory() -> Any:
        return wrong.program.memory

    wrong = Wrong()
    recorded._record = lambda: wrong
    with caplog.at_level(logging.WARNING, "quire.runner"):
        assert answers(llm, 1) == answers(plain, 1)
    assert "other bits" in caplog.text
