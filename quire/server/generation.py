"""Run requests on the engine: deltas of all prompts as one stream, whole results, disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from quire.engine.api import AsyncEngine, GenerateRequest
from quire.errors import EngineDead
from quire.outputs import ChoiceDelta, CompletionOutput, PositionLogprobs, RequestDelta
from quire.server.calls import Call
from quire.server.metrics import Metrics

T = TypeVar("T")
# (index of request in its call, what is new in it)
Deltas = AsyncGenerator[tuple[int, RequestDelta], None]


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Usage:
    """Token counts of a call. `update` keeps the latest counts of each request."""

    def __init__(self) -> None:
        self._latest: dict[int, tuple[int, int, int]] = {}
        self._by_tier: dict[int, dict[str, int]] = {}

    def update(self, index: int, delta: RequestDelta) -> None:
        """Take the counts of request `index`."""
        self._latest[index] = (
            delta.num_prompt_tokens,
            delta.num_output_tokens,
            delta.num_cached_tokens,
        )
        if delta.cached_tokens_by_tier is not None:
            self._by_tier[index] = delta.cached_tokens_by_tier

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's usage object, all requests together."""
        prompt, output, cached = (
            sum(counts[i] for counts in self._latest.values()) for i in range(3)
        )
        details: dict[str, Any] = {"cached_tokens": cached}
        if self._by_tier:
            tiers = sorted({name for each in self._by_tier.values() for name in each})
            details["cached_tokens_by_tier"] = {
                name: sum(each.get(name, 0) for each in self._by_tier.values()) for name in tiers
            }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": details,
        }


def has_news(choice: ChoiceDelta) -> bool:
    """Whether a client should hear of it: not while a prompt is still being computed."""
    return bool(choice.token_ids or choice.text) or choice.finish_reason is not None


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves (then ClientGone).

    To be called once the request's body has been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_call(engine: AsyncEngine, metrics: Metrics, call: Call) -> Deltas:
    """(index of request, delta) of all requests of a call as they come.

    Closing it aborts what still runs. Raises QuireError of the first request that fails.
    """
    if len(call.requests) == 1:
        async with aclosing(_deltas(engine, metrics, call.requests[0])) as deltas:
            async for delta in deltas:
                yield 0, delta
    else:
        async with aclosing(_merged(engine, metrics, call.requests)) as merged:
            async for pair in merged:
                yield pair


async def _deltas(
    engine: AsyncEngine, metrics: Metrics, request: GenerateRequest
) -> AsyncGenerator[RequestDelta, None]:
    clock = metrics.track()
    async with aclosing(engine.generate(request)) as stream:
        async for delta in stream:
            for choice in delta.choices:
                clock.tokens(choice.index, len(choice.token_ids), choice.finish_reason)
            yield delta
            if delta.finished:
                return
    raise EngineDead("engine_dead", "the engine ended a request without finishing it")


async def _merged(engine: AsyncEngine, metrics: Metrics, requests: list[GenerateRequest]) -> Deltas:
    # One slot: a request waits in the engine (which merges) rather than in memory here.
    queue: asyncio.Queue[tuple[int, RequestDelta] | Exception] = asyncio.Queue(1)

    async def pump(index: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(_deltas(engine, metrics, request)) as deltas:
                async for delta in deltas:
                    await queue.put((index, delta))
        except Exception as error:  # raised again below, in the consumer
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(i, request)) for i, request in enumerate(requests)]
    try:
        running = len(requests)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item[1].finished
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Collected:
    """The whole answer of a call: choices of each request, prompt log-probabilities, usage."""

    choices: list[list[CompletionOutput]]
    prompt_logprobs: list[list[PositionLogprobs | None] | None]
    usage: Usage


async def collect(deltas: Deltas, call: Call) -> Collected:
    """Add up all deltas of a call."""
    choices = [[CompletionOutput(index=i) for i in range(call.n)] for _ in call.requests]
    result = Collected(choices, [None] * len(call.requests), Usage())
    async with aclosing(deltas):
        async for index, delta in deltas:
            result.usage.update(index, delta)
            if delta.prompt_logprobs is not None:
                known = result.prompt_logprobs[index] or []
                result.prompt_logprobs[index] = known + delta.prompt_logprobs
            for change in delta.choices:
                choices[index][change.index].extend(change)
    return result
