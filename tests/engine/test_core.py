"""The loop of schedule, submit, commit: running ahead changes nothing, and faults are contained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.engine.core import EngineCore
from quire.engine.wire import Add, Delta
from quire.step import Batch, mask_of


def load(model: str, **options: Any) -> LLM:
    return LLM(model, load_format="dummy", skip_tokenizer_init=True, kernels="reference", **options)


def drain(core: EngineCore, adds: list[Add]) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    for add in adds:
        refused = core.add(add)
        assert not refused
    for _ in range(2000):
        if core.idle:
            return found
        for delta in core.step():
            found.setdefault(delta.request_id, []).append(delta)
        core.scheduler.check_integrity()
    raise AssertionError("the engine did not come to an end")


def add(name: str, prompt: list[int], **params: Any) -> Add:
    params.setdefault("temperature", 0.0)
    return Add(name, prompt, SamplingParams(**params), seed=1)


def tokens(deltas: list[Delta]) -> list[int]:
    return [t for delta in deltas for t in delta.token_ids]


class Faulty:
    """A runner that raises whenever a batch computes a certain token."""

    def __init__(self, inner: Any, poison: int, error: Exception | None = None):
        self.inner, self.poison, self.raised = inner, poison, 0
        self.error = error or ArithmeticError("a kernel did not like this")

    def submit(self, batch: Batch) -> Any:
        if any(self.poison in row.tokens for row in batch.rows):
            self.raised += 1
            raise self.error
        return self.inner.submit(batch)

    def reset(self) -> None:
        self.inner.reset()

    def warm(self) -> bool:
        warmed: bool = self.inner.warm()
        return warmed


class FaultyOpen(Faulty):
    """A runner that raises when a step with gated rows that computes a certain token is opened."""

    def submit(self, batch: Batch) -> Any:
        pending = self.inner.submit(batch)
        if any(self.poison in row.tokens and row.gated for row in batch.rows):

            def broken(masks: dict[int, bytes]) -> None:
                self.raised += 1
                raise ArithmeticError("sampling did not like this")

            pending.open = broken
        return pending


class Odd:
    """A gate that allows odd tokens."""

    def allowed(self, output: list[int]) -> bytes:
        return mask_of(range(1, 320, 2), 320)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_row_that_fails_leaves_the_step_after_it_whole(tiny_llama: str, ahead: bool) -> None:
    """Its next token is scheduled already where the engine runs ahead, and will never be known."""
    core = load(tiny_llama, async_scheduling=ahead)._engine.core
    stuck = add("stuck", [5, 6, 7], allowed_token_ids=[9], max_tokens=8)
    stuck.bad_words = [[9, 9]]
    others = [add(str(i), [10 + i, 11, 12], max_tokens=8, ignore_eos=True) for i in range(3)]
    found = drain(core, [stuck, *others])
    assert tokens(found["stuck"]) == [9]
    assert found["stuck"][-1].error is not None and found["stuck"][-1].error[0] == "invalid_value"
    assert core.stats().preemptions == 0
    for other in others:
        alone = drain(core, [add("alone", other.prompt_token_ids, max_tokens=8, ignore_eos=True)])
        assert tokens(found[other.request_id]) == tokens(alone["alone"])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gated_request_whose_sampling_raises_fails_alone(tiny_llama: str, ahead: bool) -> None:
    core = load(tiny_llama, async_scheduling=ahead)._engine.core
    good = [add(f"good{i}", [5 + i] * (10 + i), max_tokens=6, ignore_eos=True) for i in range(3)]
    expected: dict[str, list[int]] = {}
    for one in good:
        core.scheduler.add(one, gate=Odd() if one.request_id == "good1" else None)
        expected |= {name: tokens(deltas) for name, deltas in drain(core, []).items()}
    assert all(token % 2 for token in expected["good1"])
    core.runner = FaultyOpen(core.runner, poison=319)
    for one in (good[0], add("bad", [9, 319, 9], max_tokens=4), *good[1:]):
        core.scheduler.add(one, gate=Odd() if one.request_id in ("bad", "good1") else None)
    found = drain(core, [])
    assert {name: tokens(found[name]) for name in expected} == expected
    assert found["bad"][-1].error is not None and found["bad"][-1].error[0] == "step_failed"
    assert "ArithmeticError" in found["bad"][-1].error[2]
    assert core.scheduler.kv.usage()[0] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_faulty_request_fails_alone(tiny_llama: str, ahead: bool) -> None:
    llm = load(tiny_llama, async_scheduling=ahead)
    core = llm._engine.core
    good = [add(f"good{i}", [5 + i] * (10 + i), max_tokens=9, ignore_eos=True) for i in range(4)]
    expected = {name: tokens(deltas) for name, deltas in drain(core, good).items()}
    core.runner = Faulty(core.runner, poison=319)
    bad = [add("bad0", [9, 319, 9], max_tokens=4), add("bad1", [319] * 40, max_tokens=4)]
    found = drain(core, [*good[:2], bad[0], *good[2:], bad[1]])
    for name, wanted in expected.items():
        assert tokens(found[name]) == wanted
        assert found[name][-1].finish_reason == "length"
    for name in ("bad0", "bad1"):
        assert tokens(found[name]) == []
        assert found[name][-1].error is not None
        assert found[name][-1].error[0] == "step_failed"
        assert "ArithmeticError" in found[name][-1].error[2]
    assert core.scheduler.kv.usage()[0] == 0


def test_a_fault_in_every_step_fails_every_request_and_the_engine_lives(tiny_llama: str) -> None:
    core = load(tiny_llama)._engine.core
    healthy, core.runner = core.runner, Faulty(core.runner, poison=7)
    found = drain(core, [add(f"r{i}", [7] * 5) for i in range(5)])
    assert all(deltas[-1].error is not None for deltas in found.values())
    core.runner = healthy
    assert (
        len(tokens(drain(core, [add("after", [7] * 5, max_tokens=3, ignore_eos=True)])["after"]))
        == 3
    )


def test_a_step_without_memory_says_which_flag_to_change_and_the_engine_lives(
    tiny_llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    core = load(tiny_llama)._engine.core
    healthy, shortage = core.runner, torch.OutOfMemoryError("CUDA out of memory")
    core.runner = Faulty(healthy, 319, shortage)
    good, bad = add("good", [5] * 9, max_tokens=3, ignore_eos=True), add("bad", [9, 319, 9])
    found = drain(core, [good, bad])
    assert len(tokens(found["good"])) == 3
    error = found["bad"][-1].error
    assert error is not None and error[0] == "step_failed"
    assert "out of memory" in error[2] and "--max-num-batched-tokens" in error[3]
    assert "--max-num-batched-tokens" in caplog.text


def test_running_ahead_gives_the_same_answers(tiny_llama: str) -> None:
    adds = [
        add("ends", [5] * 20, max_tokens=30),
        add("stops", [6] * 3, max_tokens=30, stop_token_ids=list(range(3, 320, 7))),
        add("long", [7] * 33, max_tokens=20, ignore_eos=True, logprobs=2),
        add("late", [8] * 40, max_tokens=12, min_tokens=5, temperature=1.0),
    ]
    results = []
    for ahead in (False, True):
        found = drain(load(tiny_llama, async_scheduling=ahead)._engine.core, adds)
        results.append(
            {n: (tokens(d), d[-1].finish_reason, d[-1].stop_reason) for n, d in found.items()}
        )
    assert results[0] == results[1]


def test_nan_logits_fail_their_request_only(tiny_llama: str) -> None:
    llm = load(tiny_llama)
    core = llm._engine.core
    model = core.runner.model
    forward, poisoned = model.forward, 3

    def broken(tokens: Any, positions: Any, step: Any) -> Any:
        hidden = forward(tokens, positions, step)
        hidden[tokens == poisoned] = float("nan")
        return hidden

    alone = tokens(drain(core, [add("good", [5] * 20, max_tokens=6, ignore_eos=True)])["good"])
    model.forward = broken
    found = drain(
        core,
        [
            add("bad", [4] * 18 + [poisoned], max_tokens=4),
            add("good", [5] * 20, max_tokens=6, ignore_eos=True),
        ],
    )
    assert tokens(found["good"]) == alone
    assert found["bad"][-1].error is not None and found["bad"][-1].error[0] == "numerical_error"
    # None of its blocks can be found: the same prompt is computed anew.
    model.forward = forward
    again = drain(core, [add("again", [4] * 18 + [poisoned], max_tokens=2, ignore_eos=True)])[
        "again"
    ]
    assert again[-1].cached_tokens == 0


def test_a_refused_request_answers_and_leaves_no_trace(tiny_llama: str) -> None:
    core = load(tiny_llama, max_model_len=64)._engine.core
    [refused] = core.add(add("long", [5] * 64))
    assert refused.error is not None and refused.error[0] == "context_length_exceeded"
    assert core.idle
