"""Token ids of parameters against a model's vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import UsageError
from quire.params import SamplingParams, check_tokens


@pytest.mark.parametrize("tokens", [[], [0], [9, 0], {9: 1.0}])
def test_ids_of_the_vocabulary_are_accepted(tokens: Any) -> None:
    check_tokens("prompt", tokens, 10)


@pytest.mark.parametrize(("tokens", "bad"), [([3, 10], 10), ([-1], -1), ({2: 0.5, 11: 0.5}, 11)])
def test_the_first_id_outside_the_vocabulary_is_named(tokens: Any, bad: int) -> None:
    with pytest.raises(UsageError, match=f"bad_words: token id {bad} is outside") as caught:
        check_tokens("bad_words", tokens, 10)
    assert (caught.value.code, caught.value.field) == ("invalid_token", "bad_words")
    assert caught.value.why == "ids of this model run from 0 to 9"


@pytest.mark.parametrize(
    "fields",
    [{"stop_token_ids": [10]}, {"allowed_token_ids": [1, 10]}, {"logit_bias": {10: 1.0}}],
)
def test_every_parameter_with_token_ids_is_checked(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    params.check_vocabulary(11)
    with pytest.raises(UsageError) as caught:
        params.check_vocabulary(10)
    assert caught.value.field == next(iter(fields))


def test_allowed_ids_are_kept_once_each_and_far_too_many_are_refused_at_once() -> None:
    assert SamplingParams(allowed_token_ids=[7, 3, 7, 3]).allowed_token_ids == [3, 7]
    SamplingParams(allowed_token_ids=[1] * 2**18).check_vocabulary(2)
    with pytest.raises(UsageError, match="allowed_token_ids"):
        SamplingParams(allowed_token_ids=[1] * (2**18 + 1))


@pytest.mark.parametrize("bad", [[1, -1], [2**31], [1.0], [True], ["1"]])
def test_ids_are_integers_of_31_bits(bad: list[Any]) -> None:
    with pytest.raises(UsageError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=bad)


def test_stop_strings_have_a_limit_together() -> None:
    SamplingParams(stop=["a" * 1024] * 4)
    with pytest.raises(UsageError, match="stop") as caught:
        SamplingParams(stop=["a" * 1024] * 5)
    assert "4096 together" in caught.value.why


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("temperature", float("nan")), ("stop", [""]), ("n", 0), ("top_p", 2)],
)
def test_changed_parameters_can_be_checked_again(name: str, value: Any) -> None:
    params = SamplingParams()
    setattr(params, name, value)
    with pytest.raises(UsageError) as caught:
        params.validate()
    assert caught.value.field == name


def test_a_changed_stop_string_counts() -> None:
    params = SamplingParams()
    params.stop = "e"
    params.validate()
    assert params.stop_strings == ["e"]
