"""The Python API on real weights, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quire import LLM, SamplingParams
from quire.errors import UsageError

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@pytest.fixture(scope="module")
def smollm() -> LLM:
    return LLM("smollm2", max_model_len=512)


def test_the_default_model_answers(smollm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = smollm.chat(messages, GREEDY, use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
    assert output.finished


def test_text_is_the_decoding_of_the_tokens(smollm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    for output in smollm.generate(["Once upon", "def f(x):"], params, use_tqdm=False):
        choice = output.outputs[0]
        assert smollm.get_tokenizer().decode(choice.token_ids) == choice.text


def test_prompt_logprobs_are_those_of_generation(smollm: LLM) -> None:
    """The log-probability of a token is the same as output and as part of a prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)
    [first] = smollm.generate("The sun is", params, use_tqdm=False)
    ids = first.prompt_token_ids + first.outputs[0].token_ids
    again = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    [second] = smollm.generate({"prompt_token_ids": ids}, again, use_tqdm=False)
    assert second.prompt_logprobs is not None and second.prompt_logprobs[0] is None
    assert len(second.prompt_logprobs) == len(ids)
    assert first.outputs[0].logprobs is not None
    start = len(first.prompt_token_ids)
    assert second.prompt_logprobs[start:] == first.outputs[0].logprobs
    total = first.outputs[0].cumulative_logprob
    assert total is not None
    wanted = sum(p[t].logprob for t, p in zip(ids[start:], first.outputs[0].logprobs, strict=True))
    assert math.isclose(total, wanted)


def test_a_second_request_finds_its_prefix_cached(smollm: LLM) -> None:
    prompt = {"prompt_token_ids": list(range(500, 600))}
    [first] = smollm.generate(prompt, GREEDY, use_tqdm=False)
    [second] = smollm.generate(prompt, GREEDY, use_tqdm=False)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 96
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_stop_strings_cut_the_text(smollm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=["capital"])
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    [output] = smollm.chat(messages, params, use_tqdm=False)
    assert output.outputs[0].text == "The "
    assert output.outputs[0].stop_reason == "capital"


def test_tools_are_shown_to_the_model_by_a_template_that_can(smollm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "find"}}]
    template = "{{ tools[0].function.name }}: {{ messages[0].content }}"
    [output] = smollm.chat(messages, GREEDY, tools=tools, chat_template=template, use_tqdm=False)
    assert output.prompt == "find: Hi"
    with pytest.raises(UsageError) as caught:
        smollm.chat(messages, GREEDY, tools=tools, use_tqdm=False)
    assert caught.value.code == "not_supported" and caught.value.field == "tools"


def test_a_seed_repeats_and_choices_differ(smollm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=12, ignore_eos=True)
    runs = [smollm.generate("It was", params, use_tqdm=False)[0] for _ in range(2)]
    texts = [[c.token_ids for c in run.outputs] for run in runs]
    assert texts[0] == texts[1]
    assert len({tuple(t) for t in texts[0]}) == 3


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "empty_prompt"),
        ({"prompt_token_ids": []}, "empty_prompt"),
        ({"prompt_token_ids": [10] * 600}, "context_length_exceeded"),
        ({"prompt_token_ids": [-5]}, "invalid_token"),
        ({"prompt_token_ids": [10**6]}, "invalid_token"),
        ({"other": 1}, "invalid_prompt"),
        ({"prompt_token_ids": ["a"]}, "invalid_prompt"),
        ({"prompt_token_ids": [1.5]}, "invalid_prompt"),
        ({"prompt_token_ids": [True]}, "invalid_prompt"),
        ({"prompt_token_ids": "abc"}, "invalid_prompt"),
        ({"prompt_token_ids": 5}, "invalid_prompt"),
        ({"prompt": 5, "prompt_token_ids": [5]}, "invalid_prompt"),
        ([5, 6], "invalid_prompt"),
        (None, "invalid_prompt"),
    ],
)
def test_impossible_prompts_are_refused_and_the_engine_stays_usable(
    smollm: LLM, prompt: Any, code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        smollm.generate(["fine", prompt], GREEDY, use_tqdm=False)
    assert caught.value.code == code
    [output] = smollm.generate("fine", GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 0


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 0), ("temperature", float("nan")), ("stop", [5])]
)
def test_parameters_changed_to_what_is_not_allowed_are_refused(
    smollm: LLM, name: str, value: Any
) -> None:
    params = SamplingParams(max_tokens=1)
    setattr(params, name, value)
    with pytest.raises(UsageError) as caught:
        smollm.generate("a", params, use_tqdm=False)
    assert caught.value.field == name


def test_a_stop_string_set_later_counts(smollm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    params.stop = "e"
    [output] = smollm.generate("The sun is", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop" and "e" not in output.outputs[0].text


@pytest.mark.parametrize("given", [{"temperature": 0}, [GREEDY, None], 5])
def test_what_is_no_sampling_params_is_refused(smollm: LLM, given: Any) -> None:
    with pytest.raises(UsageError):
        smollm.generate(["a", "b"], given, use_tqdm=False)


@pytest.mark.parametrize(
    ("priority", "code"),
    [([1], "wrong_count"), ([1, 2], "invalid_value"), (["a", "b"], "invalid_value")],
)
def test_priorities_that_would_be_ignored_are_refused(
    smollm: LLM, priority: Any, code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        smollm.generate(["a", "b"], GREEDY, use_tqdm=False, priority=priority)
    assert caught.value.code == code
    assert smollm.generate(["a"], GREEDY, use_tqdm=False, priority=[0])[0].finished


def test_parameters_that_exclude_every_token_are_the_requests_fault(smollm: LLM) -> None:
    params = SamplingParams(
        max_tokens=3, min_tokens=2, allowed_token_ids=[5], stop_token_ids=[5], ignore_eos=True
    )
    with pytest.raises(UsageError, match="no token is allowed") as caught:
        smollm.generate("a", params, use_tqdm=False)
    assert caught.value.code == "invalid_value" and "NaN" not in str(caught.value)
    assert smollm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_a_prompt_of_one_token_has_one_position_without_logprobs(smollm: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    [output] = smollm.generate({"prompt_token_ids": [5]}, params, use_tqdm=False)
    assert output.prompt_logprobs == [None]


def test_wrong_use_is_explained() -> None:
    with pytest.raises(UsageError, match="unknown option"):
        LLM("smollm2", max_modl_len=5)
    with pytest.raises(UsageError, match="temperature"):
        SamplingParams(temperature=float("nan"))
