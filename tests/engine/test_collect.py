"""A frontend's side of a request: merging, stop strings, ends, errors, log-probabilities."""

from __future__ import annotations

import gc
import random
import time
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from quire import SamplingParams
from quire.engine.api import GenerateRequest
from quire.engine.collect import Collector
from quire.engine.wire import Abort, Delta
from quire.errors import Overloaded, QuireError, UsageError
from quire.kernels.device_state import MAX_WORD_TOKENS
from quire.step import TokenLogprobs
from quire.tokenization.rules import MAX_BAD_WORD_TOKENS, text_rules
from quire.tokenization.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per letter: id i is LETTERS[i]."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def ids(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def collector(tokenizer: Tokenizer | None, **params: Any) -> Collector:
    params = SamplingParams(**{"max_tokens": 100, **params})
    return Collector(GenerateRequest("r", [1, 2, 3], params, "abc"), tokenizer)


def feed(c: Collector, text: str, sizes: list[int], reason: str | None) -> list[Abort]:
    """Sends `text` in deltas of these sizes; the last one carries the reason."""
    aborts, tokens, start = [], ids(text), 0
    for size in sizes:
        last = start + size >= len(tokens)
        aborts += c.push(
            Delta("r", tokens[start : start + size], finish_reason=reason if last else None)
        )
        start += size
    return aborts


def split(total: int, rng: random.Random) -> list[int]:
    sizes = []
    while total:
        sizes.append(rng.randint(1, min(total, 4)))
        total -= sizes[-1]
    return sizes


def test_a_stop_string_ends_the_choice_the_same_however_deltas_arrive(
    tokenizer: Tokenizer,
) -> None:
    text = "once upon a time the end of it"
    for seed in range(30):
        c = collector(tokenizer, stop=["the end", "zzz"])
        aborts = feed(c, text, split(len(text), random.Random(seed)), "length")
        delta = c.take()
        assert delta is not None and delta.finished
        [choice] = delta.choices
        assert choice.text == "once upon a time "
        assert (choice.finish_reason, choice.stop_reason) == ("stop", "the end")
        # The tokens that made the stop string count; the ones after it do not.
        assert choice.token_ids == ids("once upon a time the end")
        assert aborts == [Abort("r", "stop", len("once upon a time the end"))]
        assert delta.num_output_tokens == len(choice.token_ids)


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    c = collector(tokenizer, stop=["the end"])
    feed(c, "on to the e", [3, 4, 4], "length")
    delta = c.take()
    assert delta is not None
    assert delta.choices[0].text == "on to the e"
    assert delta.choices[0].finish_reason == "length"


def test_an_end_token_counts_but_is_not_shown(tokenizer: Tokenizer) -> None:
    for include, text in ((False, "ab"), (True, "abz")):
        c = collector(tokenizer, include_stop_str_in_output=include)
        c.push(Delta("r", ids("ab")))
        c.push(Delta("r", ids("z"), finish_reason="stop", stop_reason=25))
        delta = c.take()
        assert delta is not None
        assert delta.choices[0].token_ids == ids("abz")
        assert delta.choices[0].text == text
        assert delta.choices[0].stop_reason == 25


def test_deltas_merge_between_takes_and_nothing_is_given_twice(tokenizer: Tokenizer) -> None:
    c = collector(tokenizer)
    assert c.take() is None
    c.push(Delta("r", ids("ab"), cached_tokens=2))
    c.push(Delta("r", ids("cd"), cached_tokens=2))
    first = c.take()
    assert first is not None and first.choices[0].text == "abcd" and not first.finished
    assert first.num_cached_tokens == 2
    assert c.take() is None
    c.push(Delta("r", ids("e"), finish_reason="length"))
    second = c.take()
    assert second is not None and second.choices[0].text == "e" and second.finished
    assert second.num_output_tokens == 5


def test_each_choice_has_its_own_request_and_the_request_ends_with_the_last(
    tokenizer: Tokenizer,
) -> None:
    c = collector(tokenizer, n=3, seed=7)
    adds = c.add().choices()
    assert [a.choice for a in adds] == [0, 1, 2]
    assert {a.seed for a in adds} == {7}
    for i in (2, 0):
        c.push(Delta(adds[i].request_id, ids("a"), finish_reason="length"))
    assert not c.finished
    assert c.request_ids == [adds[1].request_id]
    c.push(Delta(adds[1].request_id, ids("b"), finish_reason="length"))
    assert c.finished
    delta = c.take()
    assert delta is not None
    assert sorted((x.index, x.text) for x in delta.choices) == [(0, "a"), (1, "b"), (2, "a")]


def test_one_failed_choice_fails_the_request_and_aborts_the_others(tokenizer: Tokenizer) -> None:
    c = collector(tokenizer, n=2)
    [first, second] = c.add().choices()
    aborts = c.push(
        Delta(first.request_id, [], finish_reason="error", error=["step_failed", "w", "y", "f"])
    )
    assert [a.request_id for a in aborts] == [second.request_id]
    with pytest.raises(QuireError) as caught:
        c.take()
    assert not isinstance(caught.value, UsageError)


@pytest.mark.parametrize(("code", "kind"), [("queue_full", Overloaded), ("any_other", UsageError)])
def test_refusals_keep_their_kind(tokenizer: Tokenizer, code: str, kind: type) -> None:
    c = collector(tokenizer)
    c.push(Delta("r", [], finish_reason="error", error=[code, "w", "y", "f"]))
    with pytest.raises(kind):
        c.take()


def test_logprobs_name_their_tokens_and_prompt_logprobs_begin_with_none(
    tokenizer: Tokenizer,
) -> None:
    c = collector(tokenizer, logprobs=1, prompt_logprobs=0)
    c.push(Delta("r", [], prompt_logprobs=[TokenLogprobs([2], [-1.0], [4])]))
    first = c.take()
    c.push(
        Delta(
            "r",
            ids("b"),
            logprobs=[TokenLogprobs([1, 0], [-2.0, -0.5], [2, 1])],
            prompt_logprobs=[TokenLogprobs([3], [-3.0], [1])],
            finish_reason="length",
        )
    )
    second = c.take()
    assert first is not None and second is not None
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    assert first.prompt_logprobs[1] is not None and first.prompt_logprobs[1][2].rank == 4
    assert second.prompt_logprobs is not None and len(second.prompt_logprobs) == 1
    assert second.choices[0].logprobs is not None
    position = second.choices[0].logprobs[0]
    assert [(t, p.decoded_token, p.rank) for t, p in position.items()] == [(1, "b", 2), (0, "a", 1)]


def test_a_seed_is_drawn_where_none_is_given(tokenizer: Tokenizer) -> None:
    seeds = {collector(tokenizer).add().seed for _ in range(5)}
    assert len(seeds) == 5


def test_bad_words_need_a_tokenizer_and_become_tokens(tokenizer: Tokenizer) -> None:
    assert collector(tokenizer, bad_words=["bad"]).add().bad_words == [ids("bad"), ids(" bad")]
    with pytest.raises(UsageError):
        collector(None, bad_words=["bad"])


def test_choices_and_prompts_share_one_compiled_set_of_stop_strings(tokenizer: Tokenizer) -> None:
    params = SamplingParams(n=128, stop=["ab" * 64 + letter for letter in LETTERS[:16]])
    rules = text_rules(params, tokenizer)
    start = time.process_time()
    two = [Collector(GenerateRequest("r", [1], params, rules=rules), tokenizer) for _ in "ab"]
    assert time.process_time() - start < 0.2
    checkers = [choice.stops for c in two for choice in c._choices]
    assert len({id(checker._stop_strings) for checker in checkers}) == 1


def test_stop_strings_are_freed_without_the_garbage_collector(tokenizer: Tokenizer) -> None:
    gc.collect()
    gc.disable()
    try:
        c = collector(tokenizer, n=4, stop=["abc" * 100])
        feed(c, "ab", [2], "length")
        del c
        assert gc.collect() < 50
    finally:
        gc.enable()


def test_other_choices_wait_for_the_prompts_logprobs_of_the_first(tokenizer: Tokenizer) -> None:
    c = collector(tokenizer, n=2, prompt_logprobs=0)
    c.push(Delta("r#1", ids("b")))
    assert c.take() is None
    c.push(Delta("r", [], prompt_logprobs=[TokenLogprobs([2], [-1.0], [1])]))
    delta = c.take()
    assert delta is not None and [x.index for x in delta.choices] == [0]
    assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
    c.push(Delta("r", ids("a"), prompt_logprobs=[TokenLogprobs([3], [-2.0], [1])]))
    delta = c.take()
    assert delta is not None and [(x.index, x.text) for x in delta.choices] == [(0, "a"), (1, "b")]
    assert delta.prompt_logprobs is not None and len(delta.prompt_logprobs) == 1


def test_a_prompt_of_one_token_has_one_position_without_logprobs() -> None:
    c = Collector(GenerateRequest("r", [1], SamplingParams(prompt_logprobs=1)), None)
    c.push(Delta("r", [4], finish_reason="length"))
    delta = c.take()
    assert delta is not None and delta.prompt_logprobs == [None]


@pytest.mark.parametrize("field", [{"stop": "a"}, {"bad_words": ["a"]}])
def test_text_rules_without_a_tokenizer_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        collector(None, **field)
    assert caught.value.code == "no_tokenizer"


def test_bad_words_of_too_many_tokens_are_refused(tokenizer: Tokenizer) -> None:
    words = [f"{a}{b}" + "x" * 20 for a in LETTERS for b in LETTERS[:9]]
    with pytest.raises(UsageError, match="bad_words"):
        collector(tokenizer, bad_words=words)
    assert MAX_BAD_WORD_TOKENS == MAX_WORD_TOKENS
