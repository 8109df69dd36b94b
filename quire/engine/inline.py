"""Requests on an engine in this process: the loop under LLM and the command line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from quire.engine.api import GenerateRequest
from quire.engine.collect import Collector
from quire.engine.wire import Delta
from quire.outputs import RequestDelta

if TYPE_CHECKING:  # torch comes with the engine, once a model is loaded
    from quire.engine.core import EngineCore
    from quire.tokenization.tokenizer import Tokenizer


def stream(
    core: EngineCore,
    tokenizer: Tokenizer | None,
    requests: Sequence[GenerateRequest],
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[RequestDelta, None, None]:
    """Deltas of all requests until they end; their number is not bounded by --max-queue.

    `stopped` is asked between steps: once it says yes, what runs ends with finish_reason "abort".
    Raises UsageError before anything runs where a request can never run, and the QuireError of a
    request that fails. However it ends, the engine is empty and usable afterwards.
    """
    collectors = [Collector(request, tokenizer) for request in requests]
    owners: dict[str, Collector] = {}
    adds = []
    for collector in collectors:
        for add in collector.add().choices():
            core.scheduler.check(add, bounded=False)
            adds.append(add)
            owners[add.request_id] = collector

    def take(delta: Delta) -> RequestDelta | None:
        collector = owners[delta.request_id]
        for abort in collector.push(delta):
            core.abort(abort)
        return collector.take()

    try:
        for add in adds:
            core.scheduler.add(add, bounded=False)
        while not core.idle:
            if stopped():
                for request_id in owners:
                    core.scheduler.abort(request_id)
            for delta in core.step():
                if (news := take(delta)) is not None:
                    yield news
        for delta in core.scheduler.take_finished():  # aborts that left nothing in flight
            if (news := take(delta)) is not None:
                yield news
    finally:
        for request_id in owners:
            core.scheduler.abort(request_id)
        while not core.idle:
            core.step()
        core.scheduler.take_finished()
        core.settle()
