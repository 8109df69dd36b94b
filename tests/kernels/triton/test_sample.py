"""GPU sampling against its reference, the CPU sampler and the numpy sampler, token for token."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from device_requests import copy_of, request, rows_of, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from runner.numpy_sampler import distribution, processed

from quire.kernels.device_state import DeviceState, RowFlag
from quire.kernels.reference import ops
from quire.kernels.reference.sampling.accept import accept as accept_reference
from quire.kernels.reference.sampling.sample import sample as reference
from quire.kernels.sampling import SampleOutputs, Scratch, Status
from quire.kernels.triton.sampling.accept import accept
from quire.kernels.triton.sampling.sample import sample
from quire.params import SamplingParams
from quire.runner.sampler import Sampler
from quire.runner.slots import new_slot
from quire.step import Enter
from tests.kernels.triton.marks import FULL

PROMPT, OUTPUT = [1, 2, 2, 3], [5, 6, 5, 3]


def slot_of(slot: int, params: SamplingParams, seed: int = 0, **more: Any) -> Enter:
    """A request with a prompt and some output."""
    return request(slot, PROMPT + OUTPUT, len(PROMPT), params, seed=seed, **more)


def poison(buffers: SampleOutputs | Scratch) -> None:
    for field in fields(buffers):
        tensor = getattr(buffers, field.name)
        tensor.fill_(math.nan if tensor.is_floating_point() else -(2**30))


def run(
    logits: torch.Tensor,
    rows: torch.Tensor,
    state: DeviceState,
    variant: str = "full",
    logprobs: bool = False,
    kernel: Any = sample,
    drafts: bool = False,
) -> SampleOutputs:
    count, vocab_size = logits.shape
    out = SampleOutputs.allocate(count, state.device)
    scratch = Scratch.allocate(count, vocab_size, state.device)
    poison(out)
    poison(scratch)
    kernel(logits, rows, state, variant, out, scratch, logprobs, not drafts)
    if drafts:
        (accept if kernel is sample else accept_reference)(rows, state, out)
    return out


def check(
    logits: torch.Tensor,
    rows: torch.Tensor,
    state: DeviceState,
    variant: str = "full",
    logprobs: bool = False,
    drafts: bool = False,
) -> SampleOutputs:
    """Run kernel and reference; state and results must be equal. Gives the results."""
    wanted_state = copy_of(state)
    found = run(logits, rows, state, variant, logprobs, drafts=drafts)
    wanted = run(logits, rows, wanted_state, variant, logprobs, reference, drafts)
    for field in fields(found):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(ours, theirs), field.name
    assert torch.equal(state.arena, wanted_state.arena)
    assert torch.equal(state.counts, wanted_state.counts)
    return found


def logits_of(
    rows: int, vocab_size: int, device: torch.device, seed: int = 0, scale: float = 3.0
) -> torch.Tensor:
    """A view with rows apart, NaN between them."""
    whole = torch.full((rows, vocab_size + 8), torch.nan, device=device)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, vocab_size, generator=generator) * scale
    whole[:, :vocab_size] = values.to(device)
    return whole[:, :vocab_size]


def every_row(count: int, device: torch.device) -> torch.Tensor:
    return rows_of([(i, 7, 1, 1) for i in range(count)], device)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, torch.float32), (7, torch.float16), (4099, torch.bfloat16)],
)
@pytest.mark.parametrize("variant", ["greedy", "plain", "full"])
def test_tokens_equal_reference(
    variant: str, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    temperatures = [0.0] * 3 if variant == "greedy" else [0.0, 0.7, 3.0]
    enters = [
        request(slot, [0], params=SamplingParams(temperature=t), seed=2**64 - 1 - slot, choice=slot)
        for slot, t in enumerate(temperatures)
    ]
    state = state_of(enters, device, vocab_size=vocab_size)
    logits = logits_of(3, vocab_size, device).to(dtype)
    out = check(logits, every_row(3, device), state, variant)
    assert out.status.tolist() == [Status.OK] * 3
    assert state.length[:3].tolist() == [2] * 3


@pytest.mark.parametrize("variant", ["greedy", "plain", "full"])
def test_rows_that_do_not_sample_are_left_alone(variant: str, device: torch.device) -> None:
    params = SamplingParams(temperature=0.0)
    state = state_of([slot_of(s, params) for s in range(3)], device)
    rows = rows_of([(2, 7, 1, 1), (-1, 0, 0, 0), (0, 7, 1, 0), (-1, 0, 0, 1), (1, 7, 1, 1)], device)
    out = check(logits_of(5, 50, device), rows, state, variant)
    assert out.status.tolist() == [0, Status.SKIPPED, Status.SKIPPED, Status.SKIPPED, 0]
    assert state.length[:3].tolist() == [8, 9, 9]
    run(logits_of(0, 50, device), rows[:0], state, variant)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("variant", ["greedy", "plain", "full"])
def test_a_row_without_finite_logits_fails_alone(
    variant: str, bad: float, device: torch.device
) -> None:
    params = SamplingParams(temperature=0.0 if variant == "greedy" else 0.8)
    state = state_of([slot_of(s, params) for s in range(3)], device, vocab_size=60)
    logits = logits_of(3, 60, device)
    logits[1, slice(None) if bad == -math.inf else 59] = bad
    out = check(logits, every_row(3, device), state, variant)
    assert out.status.tolist() == [Status.OK, Status.NAN, Status.OK]
    assert out.tokens[1] == -1
    assert state.length[:3].tolist() == [9, 8, 9]


def test_equal_logits_give_the_lowest_token(device: torch.device) -> None:
    state = state_of([slot_of(0, SamplingParams(temperature=0.0))], device, vocab_size=5000)
    logits = torch.zeros(1, 5000, device=device)
    for best in ([4100], [4999, 3000], [2047, 2048], [0, 4999]):
        logits.zero_()[0, best] = 1.0
        for variant in ("greedy", "plain", "full"):
            assert int(run(logits, every_row(1, device), state, variant).tokens[0]) == min(best)


CASES: list[tuple[dict[str, Any], list[int], list[list[int]]]] = [
    ({"allowed_token_ids": [3, 9, 31, 32, 49]}, [], []),
    ({"logit_bias": {4: 50.0, 7: -100.0, 9: 2.0}}, [], []),
    ({"presence_penalty": 1.7}, [], []),
    ({"frequency_penalty": -1.3}, [], []),
    ({"repetition_penalty": 1.9}, [], []),
    ({"repetition_penalty": 1e-40}, [], []),
    ({"repetition_penalty": 0.4, "frequency_penalty": 0.9, "presence_penalty": -0.8}, [], []),
    ({"repetition_penalty": 0.5, "logit_bias": {5: 3.0, 1: -4.0, 30: 1.0}}, [], []),
    ({"min_tokens": 5}, [0, 8], []),
    ({"min_tokens": 4}, [0, 8], []),
    ({}, [], [[10], [5, 3, 12], [3, 13], [6, 14], [2, 5, 6, 5, 3, 15], [6, 5, 3, 16], [4, 3, 17]]),
    ({"allowed_token_ids": list(range(12)), "logit_bias": {20: 90.0}, "min_tokens": 9}, [1], [[2]]),
    ({"min_p": 0.2}, [], []),
    ({"min_p": 1.0}, [], []),
    ({"top_k": 1}, [], []),
    ({"top_k": 5}, [], []),
    ({"top_k": 49}, [], []),
    ({"top_p": 0.5}, [], []),
    ({"top_p": 0.95}, [], []),
    ({"top_p": 1e-9}, [], []),
    ({"top_p": 1 - 1e-12}, [], []),
    ({"min_p": 0.01, "top_k": 9, "top_p": 0.8}, [], []),
    ({"top_k": 3, "top_p": 0.99, "allowed_token_ids": [7, 8]}, [], []),
]


@pytest.mark.parametrize(
    ("temperature", "steps"),
    [(0.0, 1), (0.8, 1), *(pytest.param(t, 12, marks=FULL) for t in (0.0, 0.5, 2.0))],
)
def test_every_parameter_as_in_the_cpu_sampler(
    temperature: float, steps: int, device: torch.device
) -> None:
    """Many steps with all cases as one batch, each slot going on with what it has sampled."""
    enters = []
    for slot, (params, ends, words) in enumerate(CASES):
        params = {"temperature": temperature, "max_tokens": None, **params}
        enters.append(
            slot_of(slot, SamplingParams(**params), slot, end_tokens=ends, bad_words=words)
        )
    slots = [new_slot(e) for e in enters]
    state = state_of(enters, device, slots=len(CASES))
    sampler = Sampler(ops)
    for step in range(steps):
        logits = logits_of(len(CASES), 50, device, seed=step)
        if step % 2 == 0:
            logits = logits.round()  # many ties
        found = check(logits, every_row(len(CASES), device), state)
        wanted = sampler.sample(logits.cpu(), slots)
        assert found.tokens.tolist() == [result.tokens[0] for result in wanted]
        for slot, result in zip(slots, wanted, strict=True):
            slot.append(result.tokens[0])


def draft_rows(slots: int, drafts: int, device: torch.device) -> torch.Tensor:
    """All slots, each with so many drafts."""
    flags = [
        RowFlag.SAMPLE + RowFlag.DRAFTS * drafts + RowFlag.BEHIND * k for k in range(drafts + 1)
    ]
    return rows_of([(slot, 7, 0, flag) for slot in range(slots) for flag in flags], device)


@pytest.mark.parametrize(
    ("temperature", "cases"),
    [
        (0.8, [CASES[i] for i in (10, -2)]),
        (0.0, [CASES[2]]),
        *(pytest.param(t, CASES, marks=FULL) for t in (0.0, 0.8)),
    ],
)
def test_rows_behind_drafts_are_sampled_as_the_cpu_sampler_does_one_by_one(
    temperature: float, cases: Any, device: torch.device
) -> None:
    """Every parameter; drafts are what will be chosen, but for the last of every third slot. So
    penalties, counts, min_tokens and bad words are those of each position: logits stay the same, so
    that penalties alone change what greedy sampling chooses."""
    drafts, enters = 2, []
    for slot, (params, ends, words) in enumerate(cases):
        params = {"temperature": temperature, "max_tokens": None, "logprobs": 1, **params}
        enters.append(
            slot_of(slot, SamplingParams(**params), slot, end_tokens=ends, bad_words=words)
        )
    logits = logits_of(len(cases), 50, device, scale=1.0).round()
    logits = logits.repeat_interleave(1 + drafts, 0)
    sampler, state = Sampler(ops), state_of(enters, device, slots=len(cases))
    wanted: list[list[int]] = []
    for slot, enter in enumerate(enters):
        one, tokens = new_slot(enter), []
        for k in range(1 + drafts):
            row = logits[slot * (1 + drafts) + k].cpu()[None]
            [got] = sampler.sample(row, [one])
            one.append(got.tokens[0])
            tokens += got.tokens
        guesses = tokens[:-1]
        if slot % 3 == 0:
            guesses[-1] = (guesses[-1] + 1) % 50
            tokens = tokens[:-1]
        wanted.append(tokens)
        length = int(state.length[slot])
        state.history[slot, length : length + drafts] = torch.tensor(guesses)
    before = state.length[: len(cases)].clone()
    found = check(logits, draft_rows(len(cases), drafts, device), state, "full", True, True)
    for slot, tokens in enumerate(wanted):
        first = slot * (1 + drafts)
        assert found.tokens[first : first + len(tokens)].tolist() == tokens, cases[slot]
        length = int(before[slot])
        assert int(state.length[slot]) == length + len(tokens)
        assert state.history[slot, length : length + len(tokens)].tolist() == tokens


@settings(max_examples=4, deadline=None)
@given(
    temperature=st.sampled_from([0.0, 1e-30, 1e-4, 0.3, 1.0, 7.0, 100.0]),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 40),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
    repetition=st.floats(0.01, 100),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 1e30]),
    bias=st.dictionaries(st.integers(0, 39), st.floats(-100, 100), max_size=5),
)
def test_any_parameters_as_in_the_cpu_and_the_numpy_sampler(
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition: float,
    frequency: float,
    presence: float,
    seed: int,
    scale: float,
    bias: dict[int, float],
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    enter = slot_of(0, params, seed)
    state = state_of([enter], device, slots=1, vocab_size=40)
    logits = logits_of(1, 40, device, seed % 1000, scale)
    [found] = run(logits, every_row(1, device), state).tokens.tolist()
    [wanted] = Sampler(ops).sample(logits.cpu(), [new_slot(enter)])
    assert [found] == wanted.tokens
    row = processed(logits[0].cpu().numpy(), params, PROMPT, OUTPUT, [], [])
    if scale < 1e30:
        if temperature == 0.0:
            np.testing.assert_allclose(row[found], row.max(), rtol=1e-6)
        elif temperature > 1e-5:
            row = np.minimum(row, np.finfo(np.float32).max)
            assert distribution(row - row.max(), params)[found] > 0


SELECTIONS = [
    {"top_k": 50},
    {"top_k": 2000},
    {"top_p": 0.9},
    {"top_p": 0.999, "top_k": 700},
    {"top_p": 0.6, "min_p": 0.01},
]


@pytest.mark.parametrize(
    ("listed", "scale", "dtype"),
    [
        (True, 4.0, torch.float32),
        (False, 0.3, torch.bfloat16),
        pytest.param(True, 0.3, torch.bfloat16, marks=FULL),
        pytest.param(False, 4.0, torch.float32, marks=FULL),
    ],
)
def test_selections_from_a_large_vocabulary(
    listed: bool,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a list of candidates and without, which is what happens when they are too many."""
    if not listed:
        monkeypatch.setattr("quire.kernels.triton.sampling.sample.CANDIDATES", 1)
    size = 2500
    enters = [slot_of(s, SamplingParams(**p), s) for s, p in enumerate(SELECTIONS)]
    state = state_of(enters, device, vocab_size=size)
    logits = logits_of(len(enters), size, device, 1, scale).to(dtype)
    check(logits, every_row(len(enters), device), state)


@pytest.mark.parametrize("keep", [1, 1300, *(pytest.param(k, marks=FULL) for k in (2, 2500))])
def test_ties_stay_in_the_order_of_their_ids(keep: int, device: torch.device) -> None:
    """All tokens are equal: top-p leaves the first ones."""
    size = 2500
    params = SamplingParams(top_p=(keep - 0.5) / size, temperature=2.0)
    state = state_of([slot_of(0, params, seed=keep)], device, vocab_size=size)
    out = check(torch.zeros(1, size, device=device), every_row(1, device), state)
    assert int(out.tokens[0]) < keep


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_forbids_every_token_fails_alone(
    temperature: float, device: torch.device
) -> None:
    only = SamplingParams(
        temperature=temperature, allowed_token_ids=[4], min_tokens=9, max_tokens=20
    )
    enters = [
        slot_of(0, only, end_tokens=[4]),
        slot_of(1, SamplingParams(temperature=temperature)),
        slot_of(2, SamplingParams(temperature=temperature, top_k=3, allowed_token_ids=[4]),
                bad_words=[[4]]),
    ]  # fmt: skip
    state = state_of(enters, device)
    out = check(logits_of(3, 50, device), every_row(3, device), state)
    assert out.status.tolist() == [Status.FORBIDDEN, Status.OK, Status.FORBIDDEN]
    assert state.length[:3].tolist() == [8, 9, 8]


def test_a_rows_token_depends_on_nothing_but_the_row(device: torch.device) -> None:
    """The same in every variant that serves it, alone and in any place of a batch."""
    size, plain = 2500, 3
    every = [{"temperature": 0.8 * i} for i in range(plain)] + SELECTIONS[3:4]
    enters = [slot_of(s, SamplingParams(**p), s) for s, p in enumerate(every)]
    fresh = state_of(enters, device, vocab_size=size)
    logits = logits_of(len(every), size, device, 5, 1.0)
    rows = every_row(len(every), device)
    full = run(logits, rows, copy_of(fresh)).tokens.tolist()
    assert (
        run(logits[:plain], rows[:plain], copy_of(fresh), "plain").tokens.tolist() == full[:plain]
    )
    assert run(logits[:1], rows[:1], copy_of(fresh), "greedy").tokens.tolist() == full[:1]
    assert run(logits.flip(0), rows.flip(0), copy_of(fresh)).tokens.tolist() == full[::-1]
    for i in (1, 3):
        alone = run(logits[i : i + 1], rows[i : i + 1], copy_of(fresh))
        assert alone.tokens.tolist() == [full[i]]


@pytest.mark.parametrize(
    ("variant", "vocab_size"),
    [
        ("greedy", 3),
        ("greedy", 2500),
        ("full", 50),
        *(pytest.param(v, 4500, marks=FULL) for v in ("plain", "full")),
    ],
)
def test_log_probabilities_equal_reference(
    variant: str, vocab_size: int, device: torch.device
) -> None:
    fields = {"temperature": 0.0} if variant == "greedy" else {"temperature": 0.9}
    if variant == "full":
        fields |= {"logit_bias": {2: 9.0}, "presence_penalty": 1.0}
    wanted = [0, 1, None, 20, 100]
    enters = [
        request(s, [1, 2], 1, SamplingParams(logprobs=count, **fields), seed=s)  # type: ignore[arg-type]
        for s, count in enumerate(wanted)
    ]
    state = state_of(enters, device, vocab_size=vocab_size)
    logits = logits_of(5, vocab_size, device)
    logits[3] = logits[3].round()  # ties
    out = check(logits, every_row(5, device), state, variant, logprobs=True)
    assert out.rank[2] == -(2**30) and out.logprob[2].isnan()  # it did not ask


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    state = state_of([slot_of(0, SamplingParams())], device)
    out, scratch = SampleOutputs.allocate(1, device), Scratch.allocate(1, 50, device)
    rows = every_row(2, device)
    for logits, variant in (
        (torch.zeros(1, 50), "beam"),
        (torch.zeros(1, 49), "full"),
        (torch.zeros(2, 50), "full"),
    ):
        with pytest.raises(ValueError, match=r"variant|logits"):
            sample(logits.to(device), rows, state, variant, out, scratch)
