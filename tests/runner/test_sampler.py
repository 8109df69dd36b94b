"""Each sampling parameter against an independent numpy implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.kernels.reference import ops
from quire.params import SamplingParams
from quire.runner.sampler import (
    FORBIDDEN_ERROR,
    NAN_ERROR,
    Sampler,
    _constrain,
    _keep_likely,
    _penalise,
)
from quire.runner.slots import Slot, new_slot
from quire.step import Enter
from runner.numpy_sampler import distribution, processed

V = 24
PROMPT, OUTPUT = [1, 2, 2, 3], [5, 6, 5, 3]
sampler = Sampler(ops)


def slot(
    params: SamplingParams,
    seed: int = 0,
    choice: int = 0,
    end_tokens: list[int] | None = None,
    bad_words: list[list[int]] | None = None,
    output: list[int] = OUTPUT,
) -> Slot:
    tokens = [*PROMPT, *output]
    return new_slot(
        Enter(0, params, tokens, len(PROMPT), seed, choice, [], end_tokens or [], bad_words or [])
    )


def row(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale


def chosen(logits: torch.Tensor, slots: list[Slot]) -> list[int]:
    results = sampler.sample(logits, slots)
    assert all(r.error is None for r in results)
    return [r.tokens[0] for r in results]


PARAMETERS: list[tuple[dict[str, Any], list[int], list[list[int]]]] = [
    ({"allowed_token_ids": [3, 9, 11]}, [], []),
    ({"logit_bias": {4: 50.0, 7: -100.0}}, [], []),
    ({"presence_penalty": 1.7}, [], []),
    ({"frequency_penalty": -1.3}, [], []),
    ({"repetition_penalty": 1.9}, [], []),
    ({"repetition_penalty": 0.4, "frequency_penalty": 0.9, "presence_penalty": -0.8}, [], []),
    ({"min_tokens": 5}, [0, 8], []),
    ({"min_tokens": 4}, [0, 8], []),  # as many as there are: nothing is suppressed
    ({}, [], [[10], [5, 3, 12], [3, 13], [6, 14], [2, 5, 6, 5, 3, 15]]),
    ({"allowed_token_ids": list(range(12)), "logit_bias": {20: 90.0}, "min_tokens": 9}, [1], [[2]]),
]


@pytest.mark.parametrize(("fields", "ends", "words"), PARAMETERS)
def test_lists_become_tensors_when_the_request_enters_not_at_every_token(
    fields: dict[str, Any], ends: list[int], words: list[list[int]], monkeypatch: Any
) -> None:
    one = slot(SamplingParams(temperature=0.0, max_tokens=None, **fields), 0, 0, ends, words)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor made of a list")

    monkeypatch.setattr(torch, "tensor", forbidden)
    assert len(chosen(row()[None], [one])) == 1


@pytest.mark.parametrize(("fields", "ends", "words"), PARAMETERS)
def test_what_changes_logits_changes_them_as_vllm_does(
    fields: dict[str, Any], ends: list[int], words: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, **fields)
    logits = row()
    expected = processed(logits.numpy(), params, PROMPT, OUTPUT, ends, words)
    one = slot(params, end_tokens=ends, bad_words=words)
    got = logits.clone()
    _constrain(got, one)
    _penalise(got, one)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)
    for seed in range(30):
        logits = row(seed)
        expected = processed(logits.numpy(), params, PROMPT, OUTPUT, ends, words)
        assert chosen(logits[None], [one]) == [int(expected.argmax())]


def test_a_penalty_counts_what_was_sampled_after_the_request_entered() -> None:
    params = SamplingParams(frequency_penalty=1.0, temperature=0.0)
    one = slot(params, output=[])
    for token in (5, 5, 7):
        one.append(token)
    got = torch.zeros(V)
    _penalise(got, one)
    assert (got[5], got[7], got[1]) == (-2.0, -1.0, 0.0)


LIKELY = [
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": -1},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.01, "top_k": 9, "top_p": 0.8},
]


@pytest.mark.parametrize("fields", LIKELY)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_same_tokens_stay_likely_as_in_vllm(fields: dict[str, Any], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, **fields)
    for seed in range(20):
        logits = row(seed)
        expected = distribution(logits.double().numpy().copy(), params)
        kept = _keep_likely(logits / temperature, params.min_p, params.top_k, params.top_p)
        assert (kept > -math.inf).tolist() == (expected > 0).tolist()
        probabilities = kept.double().softmax(0).numpy()
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)


def test_ties_at_the_edge_of_top_k_all_stay() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0])
    assert (_keep_likely(logits, 0.0, 2, 1.0) > -math.inf).tolist() == [False, *[True] * 4]


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7, "repetition_penalty": 1.5}],
)
def test_sampled_frequencies_fit_the_distribution(fields: dict[str, Any]) -> None:
    """Chi-square over draws that differ in the request's seed and in its choice."""
    params = SamplingParams(**{"temperature": 1.2, **fields})
    logits = row(4, scale=1.0)
    before = processed(logits.numpy(), params, PROMPT, OUTPUT, [], [])
    expected = distribution(before, params)
    draws = 1200
    slots = [slot(params, seed=i // 4, choice=i % 4) for i in range(draws)]
    counts = np.bincount(chosen(logits.expand(draws, V), slots), minlength=V)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    wanted = expected[likely] * draws
    chi_square = float(((counts[likely] - wanted) ** 2 / wanted).sum())
    freedom = int(likely.sum()) - 1
    # Wilson and Hilferty 1931: the cube root is nearly normal; 4 deviations.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def test_the_same_seed_choice_and_position_give_the_same_token_in_any_batch() -> None:
    params = SamplingParams(temperature=1.5, top_p=0.95)
    slots = [slot(params, seed=s, choice=s % 3) for s in range(20)]
    logits = torch.stack([row(s) for s in range(20)])
    together = chosen(logits, slots)
    assert together == [chosen(logits[i : i + 1], [slots[i]])[0] for i in range(20)]
    assert together[::-1] == chosen(logits.flip(0), slots[::-1])
    assert len(set(together)) > 3


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-4])
def test_a_tiny_temperature_is_greedy_and_not_an_overflow(temperature: float) -> None:
    for seed in range(20):
        logits = row(seed)
        params = SamplingParams(temperature=temperature)
        assert chosen(logits[None], [slot(params, seed=seed)]) == [int(logits.argmax())]


def test_log_probabilities_come_from_the_raw_logits() -> None:
    fields = {"temperature": 0.4, "top_k": 3, "logit_bias": {2: 5.0}, "presence_penalty": 1.0}
    params = SamplingParams(logprobs=5, **fields)  # type: ignore[arg-type]
    for seed in range(10):
        logits = row(seed)
        [result] = sampler.sample(logits[None], [slot(params, seed=seed)])
        assert result.logprobs is not None
        [found] = result.logprobs
        raw = torch.log_softmax(logits.double(), dim=0)
        order = raw.argsort(descending=True)
        assert found.tokens == [*result.tokens, *order[:5].tolist()]
        np.testing.assert_allclose(found.logprobs, raw[found.tokens].numpy(), atol=1e-5)
        rank = order.tolist().index(result.tokens[0]) + 1
        assert found.ranks == [rank, 1, 2, 3, 4, 5]


def test_no_more_log_probabilities_than_the_vocabulary_has() -> None:
    [found] = sampler.logprobs(row()[None], [3], 100)
    assert sorted(found.tokens[1:]) == list(range(V))
    assert sampler.logprobs(row()[None], [3], 0)[0].tokens == [3]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_logprobs_of_many_rows_are_those_of_each_row_alone(count: int) -> None:
    rows = torch.stack([row(seed) for seed in range(9)])
    together = sampler.logprobs(rows, list(range(9)), count)
    assert together == [sampler.logprobs(r[None], [i], count)[0] for i, r in enumerate(rows)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_finite_logits_is_an_error_of_that_row_only(bad: float) -> None:
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.5)):
        logits = torch.stack([row(i) for i in range(3)])
        alone = [sampler.sample(logits[i : i + 1], [slot(params)])[0] for i in (0, 2)]
        logits[1, 7] = bad
        first, second, third = sampler.sample(logits, [slot(params)] * 3)
        assert (second.tokens, second.error) == ([], NAN_ERROR)
        assert [first, third] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_forbids_every_token_is_an_error_of_that_row_only(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, allowed_token_ids=[4], min_tokens=9, max_tokens=20
    )
    free = slot(SamplingParams(temperature=temperature))
    forbidden, fine = sampler.sample(
        torch.stack([row(), row()]), [slot(params, end_tokens=[4]), free]
    )
    assert (forbidden.tokens, forbidden.error) == ([], FORBIDDEN_ERROR)
    assert fine.error is None


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 40),
    min_p=st.floats(0, 1),
    repetition=st.floats(0, 100, exclude_min=True),
    frequency=st.floats(-2, 2),
    seed=st.integers(-(2**63), 2**64 - 1),
    scale=st.sampled_from([0.0, 1e-3, 10.0, 1e30]),
)
def test_any_allowed_parameters_give_a_token(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition: float,
    frequency: float,
    seed: int,
    scale: float,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        logprobs=2,
    )
    [result] = sampler.sample(row(1, scale)[None], [slot(params, seed=seed)])
    assert result.error is None
    assert 0 <= result.tokens[0] < V
