"""The engine's thread never waits for the device, but for the results of the oldest step in flight.

That one wait is for an event (pending.py), as is the one for a packet's buffer to be free again
(packets.py): torch's debug mode for synchronisation allows events and refuses the rest, copies to
the host that are not asynchronous and whatever reads a value from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from quire.engine.startup import Engine
from quire.engine.wire import Add
from quire.params import SamplingParams
from runner.engines import FAMILIES, engine, requests, run

WriteModel = Any
pytestmark = pytest.mark.gpu
# About half a second on any GPU.
LONG = 10**9


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """What waits for the device raises, but for events."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def sampled(name: str, tokens: int, **params: Any) -> Add:
    """A request with penalties and log-probabilities, of a prompt that no other begins with."""
    given = {"temperature": 0.8, "presence_penalty": 0.5, "ignore_eos": True, "logprobs": 2}
    prompt = [3 + len(name), *range(5, 4 + tokens)]
    return Add(name, prompt, SamplingParams(**given | {"max_tokens": 40} | params), seed=7)


def warmed(made: Engine) -> Engine:
    """With the graphs that requests like these ask for."""
    run(made, [sampled(f"warm{i}", 20 + i) for i in range(6)] + requests(6, 1, logprobs=None))
    while made.core.warm():
        pass
    return made


def test_the_debug_mode_refuses_what_waits() -> None:
    """So that the tests below can fail; and it allows events."""
    x = torch.ones(4, device="cuda")
    host = torch.empty(4, pin_memory=True)
    with no_synchronisation():
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        event.synchronize()
    assert host.tolist() == [1] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "deepseek_v3", "deepseek_v4"])
@pytest.mark.parametrize("runner", ["graph", "eager"])
def test_steady_and_mixed_steps_do_not_synchronise(
    write_model: WriteModel, family: str, runner: str, replayed: set[str]
) -> None:
    """Decoding alone; then prompts in chunks beside it, requests that come, end and are aborted."""
    model = write_model(**FAMILIES[family])
    made = warmed(engine(model, "cuda", runner=runner, max_num_seqs=8, kv_cache_memory=2**22))
    core = made.core
    for add in (sampled("a", 9), sampled("bb", 30), *requests(2, 3, max_tokens=60, logprobs=None)):
        assert not core.add(add)
    for _ in range(10):
        core.step()
    replayed.clear()
    with no_synchronisation():
        for _ in range(10):
            core.step()
    assert runner == "eager" or replayed >= {"packet", "decode", "sampling"}
    with no_synchronisation():
        for add in (sampled("ccc", 70), sampled("dddd", 25, temperature=0.0)):
            assert not core.add(add)
        for _ in range(8):
            core.step()
    assert runner == "eager" or "mixed" in replayed
    while not core.idle:
        core.step()


@pytest.mark.parametrize("runner", ["graph", "eager"])
def test_a_step_is_submitted_while_the_device_is_busy(write_model: WriteModel, runner: str) -> None:
    """Nor does submitting wait for an event, or for anything else that the debug mode lets pass."""
    core = warmed(engine(write_model(), "cuda", runner=runner, max_num_seqs=8)).core
    assert core.depth == 2
    for add in (sampled("a", 9), *requests(2, 3, max_tokens=60, logprobs=None)):
        assert not core.add(add)
    for _ in range(6):
        core.step()
    assert not core.add(sampled("ccc", 70))
    busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
    busy.record()
    batch = core.scheduler.schedule()  # of the prompt in "ccc", beside those that decode
    assert batch is not None and batch.num_tokens > batch.num_rows
    pending = core.runner.submit(batch)
    assert not busy.query(), "the host has waited"
    core._clock.submitted(batch)
    core._inflight.append((batch.step, pending))
    while not core.idle:
        core.step()
