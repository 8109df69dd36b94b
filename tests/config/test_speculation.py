"""--speculative-config: vLLM's keys and defaults, and everything else refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quire.config.options import all_options
from quire.config.parse import build_options
from quire.config.speculation import (
    MOST_DRAFTS,
    QUANTIZATIONS,
    Speculation,
    parse_speculation,
)
from quire.errors import UsageError

NGRAM = {"method": "ngram", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("given", "most", "least"),
    [
        ({}, 5, 5),
        ({"prompt_lookup_max": 4}, 4, 4),
        ({"prompt_lookup_min": 2}, 2, 2),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 2}, 4, 2),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": None}, 4, 4),
    ],
)
def test_sizes_of_ngrams_default_as_in_vllm(given: dict[str, Any], most: int, least: int) -> None:
    assert parse_speculation(NGRAM | given) == Speculation("ngram", 3, most, least)


@pytest.mark.parametrize("name", ["mtp", "deepseek_mtp"])
def test_the_models_own_module_goes_by_two_names(name: str) -> None:
    made = parse_speculation({"method": name, "num_speculative_tokens": 2})
    assert made == Speculation("mtp", 2) and made.ahead == 2
    for other in ({"model": "small"}, {"prompt_lookup_max": 3}):
        with pytest.raises(UsageError, match="does not go with method 'mtp'"):
            parse_speculation({"method": name, "num_speculative_tokens": 2, **other})


def test_text_a_map_a_variable_and_a_file_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text('[speculative-config]\nmethod = "ngram"\nnum_speculative_tokens = 3\n')
    text = json.dumps(NGRAM)
    ways = [
        build_options({"speculative_config": text}),
        build_options({"speculative_config": NGRAM}),
        build_options({}, {"speculative_config": text}),
        build_options({}, config_file=str(file)),
        build_options({"speculative_config": {"model": "ngram", "num_speculative_tokens": 3}}),
    ]
    assert {way.engine.speculation for way in ways} == {Speculation("ngram", 3, 5, 5)}
    assert build_options({}).engine.speculation is None
    assert build_options({"speculative_config": None}).engine.speculation is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_speculative_token": 3}, "did you mean 'num_speculative_tokens'"),
        ({"method": "ngarm"}, "did you mean 'ngram'"),
        ({"method": 3}, "method 3"),
        ({"method": None}, "method is missing"),
        ({"num_speculative_tokens": None}, "num_speculative_tokens is missing"),
        ({"num_speculative_tokens": 0}, f"from 1 to {MOST_DRAFTS}"),
        ({"num_speculative_tokens": MOST_DRAFTS + 1}, f"from 1 to {MOST_DRAFTS}"),
        ({"num_speculative_tokens": True}, "whole number"),
        ({"num_speculative_tokens": "3"}, "whole number"),
        ({"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "is above"),
        ({"prompt_lookup_max": -1}, "whole number"),
        ({"model": "some/model"}, "model does not go with"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_options({"speculative_config": NGRAM | given})
    assert says in str(caught.value)
    assert caught.value.field == "speculative_config"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "draft_model"}, "model is missing"),
        ({"method": "draft_model", "model": 3}, "must be a string"),
        ({"model": "a/b", "prompt_lookup_max": 3}, "does not go with method 'draft_model'"),
        ({"model": "a/b", "revision": 3}, "must be a string"),
        ({"method": "ngram", "revision": "main"}, "does not go with method 'ngram'"),
        ({"method": "ngram", "max_model_len": 9}, "max_model_len does not go with method 'ngram'"),
        ({"method": "mtp", "quantization": "fp8"}, "quantization does not go with method 'mtp'"),
        ({"model": "a/b", "quantization": "awq"}, "'awq' is not known"),
        ({"model": "a/b", "max_model_len": 0}, "whole number"),
        ({"model": "a/b", "draft_tensor_parallel_size": 2}, "can only be 1"),
    ],
)
def test_keys_of_another_method_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_speculation({"num_speculative_tokens": 3} | given)


def test_a_model_without_a_method_drafts() -> None:
    asked = {"model": "a/b", "revision": "main", "num_speculative_tokens": 3}
    assert parse_speculation(asked) == Speculation("draft_model", 3, model="a/b", revision="main")
    assert parse_speculation(asked).ahead == 3
    assert parse_speculation(NGRAM).ahead == 0


def test_a_draft_models_own_quantisation_and_length_are_kept() -> None:
    asked = {"model": "a/b", "num_speculative_tokens": 3, "quantization": "fp8"}
    asked |= {"max_model_len": 2048, "draft_tensor_parallel_size": 1}
    made = parse_speculation(asked)
    assert made == Speculation(
        "draft_model", 3, model="a/b", quantization="fp8", max_model_len=2048
    )
    assert all_options("model")["quantization"][1].metadata["choices"] == QUANTIZATIONS


def test_an_unknown_key_is_told_all_that_are_known() -> None:
    with pytest.raises(UsageError, match="unknown key 'moe_backend'") as caught:
        parse_speculation(NGRAM | {"moe_backend": "x"})
    known = "method num_speculative_tokens model revision quantization max_model_len"
    for key in (*known.split(), "draft_tensor_parallel_size", "prompt_lookup_max"):
        assert key in caught.value.fix


@pytest.mark.parametrize("text", ["", "ngram", "[1]", "3", "[" * 100_000, '{"method": "ngram"'])
def test_text_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="speculative-config"):
        build_options({"speculative_config": text})
