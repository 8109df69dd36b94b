"""Gated rows: sampling waits for what the host allows, in every runner, and others are unchanged.

What a gated request must give is computed without gates: its tokens one by one, each by a request
of its own that continues what came before with allowed_token_ids.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from quire.engine.startup import Engine
from quire.engine.wire import Add
from quire.params import SamplingParams
from quire.step import mask_of
from runner.engines import FAMILIES, SMALL, TINY, Got, cramped, engine, requests, run

WriteModel = Any


def alternating(output: list[int], vocab_size: int) -> list[int]:
    """Even first, then odd after even and even after odd."""
    return list(range(1 - output[-1] % 2 if output else 0, vocab_size, 2))


class Alternating:
    """A gate by parity."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def allowed(self, output: list[int]) -> bytes:
        return mask_of(alternating(output, self.vocab_size), self.vocab_size)


class Only:
    """A gate that always allows the same tokens."""

    def __init__(self, tokens: list[int], vocab_size: int):
        self.mask = mask_of(tokens, vocab_size)

    def allowed(self, output: list[int]) -> bytes:
        return self.mask


def one_by_one(made: Engine, add: Add, vocab_size: int, count: int) -> list[int]:
    """The first `count` tokens of a request whose output alternates, without a gate."""
    own = set(add.params.allowed_token_ids or range(vocab_size))
    output: list[int] = []
    for _ in range(count):
        allowed = [token for token in alternating(output, vocab_size) if token in own]
        params = msgspec.structs.replace(add.params, max_tokens=1, allowed_token_ids=allowed)
        tokens = [*add.prompt_token_ids, *output]
        next_one = msgspec.structs.replace(add, prompt_token_ids=tokens, params=params)
        output += run(made, [next_one])[add.request_id].tokens
    return output


def same(got: Got, want: Got) -> bool:
    """Equal but for the last bits of log-probabilities, which may depend on the batch."""
    close = got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    return close and (got.tokens, got.reason, got.error) == (want.tokens, want.reason, want.error)


def mixed(count: int, seed: int, max_tokens: int = 8) -> list[Add]:
    """Greedy and sampled requests by turns, two of them with allowed_token_ids too."""
    adds = requests(count, seed, max_tokens=max_tokens)
    for add in adds[1::2]:
        add.params.temperature = 1.0
    for add in adds[:4:3]:
        add.params.allowed_token_ids = list(range(7, 320, 3))
    return adds


def gates(adds: list[Add]) -> dict[str, Alternating]:
    """For two of three requests."""
    return {add.request_id: Alternating(320) for add in adds if int(add.request_id) % 3 != 2}


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("ahead", [False, True])
def test_gated_requests_get_what_they_get_one_token_at_a_time(
    write_model: WriteModel, kernels: str, ahead: bool
) -> None:
    model = write_model()
    adds = mixed(5, 1)
    free = run(engine(model, "cpu", kernels=kernels), adds)
    made = engine(model, "cpu", kernels=kernels, async_scheduling=ahead)
    gated = gates(adds)
    found = run(made, adds, seed=1, gates=gated)
    for add in adds:
        mine = found[add.request_id]
        if add.request_id in gated:
            assert mine.tokens == one_by_one(made, add, 320, 8)
            assert mine.tokens != free[add.request_id].tokens
        else:
            assert same(mine, free[add.request_id])


@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_and_aborts_change_nothing_for_gated_requests(
    write_model: WriteModel, ahead: bool
) -> None:
    model = write_model()
    adds = mixed(12, 2, max_tokens=20)
    given: dict[str, Any] = {"kernels": "reference", "max_num_seqs": 8}
    expected = run(engine(model, "cpu", **given), adds, gates=gates(adds))
    made = cramped(model, "cpu", async_scheduling=ahead, **given)
    aborted = {"1": 9, "4": 12, "5": 14}
    found = run(made, adds, seed=3, gates=gates(adds), aborted=aborted)
    assert made.core.scheduler.stats().preemptions > 0
    for name, want in expected.items():
        if found[name].reason == "abort":
            assert name in aborted
            assert found[name].tokens == want.tokens[: len(found[name].tokens)]
        else:
            assert same(found[name], want)
    assert any(got.reason == "abort" for got in found.values())
    assert made.core.scheduler.kv.usage()[0] == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gate_that_always_allows_the_same_is_allowed_token_ids(
    write_model: WriteModel, ahead: bool
) -> None:
    model = write_model()
    tokens = [5, 31, 32, 33, 200, 319]
    plain = requests(4, 3, temperature=1.0)
    restricted = requests(4, 3, temperature=1.0, allowed_token_ids=tokens)
    given: dict[str, Any] = {"kernels": "reference", "async_scheduling": ahead}
    want = run(engine(model, "cpu", **given), restricted)
    only = {add.request_id: Only(tokens, 320) for add in plain}
    for name, got in run(engine(model, "cpu", **given), plain, gates=only).items():
        assert same(got, want[name])
    every = {add.request_id: Only(list(range(320)), 320) for add in plain}
    for name, got in run(engine(model, "cpu", **given), restricted, gates=every).items():
        assert same(got, want[name])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.full)])
def test_where_gate_and_parameters_leave_no_token_the_request_fails_alone(
    write_model: WriteModel, device: str
) -> None:
    model = write_model(**TINY)
    given = SMALL | ({"kernels": "reference"} if device == "cpu" else {})
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    barred = msgspec.structs.replace(params, allowed_token_ids=[4, 6])
    adds = [Add("barred", [5, 6], barred, seed=0), Add("good", [7, 9], params, seed=0)]
    only = {"barred": Only([5, 7], 64)}
    found = run(engine(model, device, **given), adds, gates=only)
    assert found["barred"].error == "invalid_value" and not found["barred"].tokens
    assert len(found["good"].tokens) == 3


def test_a_tiny_model_on_the_gpu_runner_equals_the_cpu_runner(write_model: WriteModel) -> None:
    """In the interpreter, run ahead: a prompt in chunks, decoding, gated rows beside free ones."""
    model = write_model(**TINY)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)
    few = msgspec.structs.replace(params, max_tokens=3, allowed_token_ids=list(range(0, 64, 5)))
    adds = [
        Add("gated", list(range(3, 23)), params, seed=0),
        Add("free", [7, 9], params, seed=0),
        Add("both", [8, 9, 30], few, seed=0),
    ]
    gated = {"gated": Alternating(64), "both": Alternating(64)}
    expected = run(engine(model, "cpu", kernels="reference", **SMALL), adds, gates=gated)
    made = engine(model, "cuda", **SMALL, async_scheduling=True)
    assert made.core.depth == 2
    found = run(made, adds, gates=gated)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert all(token % 5 == 0 for token in found["both"].tokens)
    assert [token % 2 for token in found["gated"].tokens] == [0, 1, 0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("ahead", [False, True])
def test_graphs_give_gated_requests_the_cpu_runners_tokens(
    write_model: WriteModel, family: str, ahead: bool, replayed: set[str]
) -> None:
    """With chunks, arrivals at random, preemption and aborts."""
    model = write_model(**FAMILIES[family])
    adds = mixed(16, 4, max_tokens=20)
    given: dict[str, Any] = {"max_num_seqs": 8, "async_scheduling": ahead}
    expected = run(engine(model, "cpu", kernels="reference"), adds, gates=gates(adds))
    roomy, tight = engine(model, "cuda", **given), cramped(model, "cuda", **given)
    for made in (roomy, tight, roomy):
        found = run(made, adds, seed=5, gates=gates(adds), aborted={"1": 11, "6": 20})
        for name, want in expected.items():
            mine = found[name]
            aborted = mine.reason == "abort"
            assert mine.tokens == (want.tokens[: len(mine.tokens)] if aborted else want.tokens)
        while made.core.warm():  # the full variant's graphs, which gated rows have asked for
            pass
    assert replayed >= {"decode", "mixed", "sampling"}


@pytest.mark.gpu
def test_a_gated_step_on_a_gpu_does_not_sample_before_it_is_open(write_model: WriteModel) -> None:
    made = engine(write_model(), "cuda", async_scheduling=True)
    core = made.core
    params = SamplingParams(temperature=0.0, max_tokens=4)
    assert not core.add(Add("gated", [5, 6, 7], params, seed=0), Alternating(320))
    batch = core.scheduler.schedule()
    assert batch is not None
    pending = core.runner.submit(batch)
    torch.cuda.synchronize()
    assert not pending.done()
    masks = core.scheduler.masks(batch.step)
    assert masks is not None
    pending.open(masks)
    [row] = pending.result().written_out()
    assert pending.done() and row.tokens[0] % 2 == 0
