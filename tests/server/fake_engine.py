"""An engine in memory for the server's tests: it echoes the prompt's tokens, over and over.

Choice c of a request starts at token c of the prompt. With an `answer` it says that instead, and
ends by itself. Delays and failures are attributes, to be
changed while it runs. A token is one byte of UTF-8.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from quire.engine.api import EngineInfo, EngineStats, GenerateRequest
from quire.errors import EngineDead, Overloaded, QuireError
from quire.outputs import ChoiceDelta, Logprob, PositionLogprobs, RequestDelta
from quire.tiers.counts import TierStats

MODEL = "echo/tiny"
CONTEXT = 2048
VOCABULARY = 256


INFO = EngineInfo(
    model=MODEL,
    max_model_len=CONTEXT,
    vocab_size=VOCABULARY,
    fingerprint="fp_test",
    plan={"kv_blocks": 7},
    default_params={"temperature": 0.25, "unknown_to_us": 1},
)


class FakeTokenizer:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")


class FakeRenderer:
    template = "{{ messages }}"

    def __init__(self, *variables: str) -> None:
        self.variables = variables
        self.messages: list[dict[str, Any]] = []
        self.kwargs: dict[str, Any] = {}

    def knows(self, name: str) -> bool:
        return name in self.variables

    def render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        self.messages, self.kwargs = messages, kwargs
        text = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return text + ("<assistant>" if kwargs["add_generation_prompt"] else "")

    def close(self) -> None:
        pass


@dataclass
class FakeEngine:
    delay: float = 0.0  # seconds per token
    first_delay: float = 0.0
    fail_after: int | None = None  # tokens, then QuireError
    overloaded: bool = False
    room: int = 2**31  # choices it takes at once
    answer: str | None = None
    dead: bool = False
    step_age: float = 0.0
    silence: float = 0.0
    closed: bool = False
    tiers: list[TierStats] = field(default_factory=list)
    cached_by_tier: dict[str, int] | None = None
    cleared: int = 0
    clears: bool = True
    draining: bool = False
    running: set[str] = field(default_factory=set)
    requests: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: int = 0
    info: EngineInfo = INFO

    def check(self, requests: Sequence[GenerateRequest]) -> None:
        if self.dead:
            raise EngineDead("engine_dead", "the engine has ended", why="/secret/path: boom")
        if self.overloaded or sum(r.params.n for r in requests) > self.room:
            raise Overloaded("queue_full", "the queue is full")

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        done = False
        try:
            await asyncio.sleep(self.first_delay)
            async for delta in self._deltas(request):
                done = delta.finished
                self.finished += done
                yield delta
        finally:
            self.running.discard(request.request_id)
            if not done:
                self.aborted.append(request.request_id)

    async def _deltas(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        """Tokens that fell due while the consumer was busy come as one delta."""
        params, prompt = request.params, request.prompt_token_ids
        total = min(params.max_tokens or CONTEXT, CONTEXT - len(prompt))
        said, last = prompt, "length"
        if self.answer is not None:
            said = list(self.answer.encode())
            last = "stop" if len(said) <= total else "length"
            total = min(total, len(said))
        decoders = [codecs.getincrementaldecoder("utf-8")("ignore") for _ in range(params.n)]
        start, sent = time.perf_counter(), 0
        while sent < total:
            if self.dead:
                raise EngineDead("engine_dead", "the engine has ended", why="/secret/path: boom")
            if self.fail_after is not None and sent >= self.fail_after:
                raise QuireError("step_failed", "this step failed", why="/secret/path")
            elapsed = time.perf_counter() - start
            late = request.timeout is not None and elapsed > request.timeout
            due = min(total, int(elapsed / self.delay) + 1) if self.delay else sent + 1
            reason = "abort" if late else last if due == total else None
            choices = []
            for c in range(params.n):
                shift = c if self.answer is None else 0
                ids = [said[(i + shift) % len(said)] for i in range(sent, due)]
                text = decoders[c].decode(bytes(ids))
                logprobs = None
                if params.logprobs is not None:
                    logprobs = [position(i, params.logprobs) for i in ids]
                choices.append(ChoiceDelta(c, text, ids, logprobs, reason))
            pieces = None
            if sent == 0 and params.prompt_logprobs is not None:
                positions = prompt_positions(request)  # in two pieces, as of a chunked prompt
                half, pieces = positions[: len(prompt) // 2], positions[len(prompt) // 2 :]
                empty = [ChoiceDelta(c) for c in range(params.n)]
                yield RequestDelta(request.request_id, empty, len(prompt), prompt_logprobs=half)
            sent = due
            yield RequestDelta(
                request.request_id,
                choices,
                num_prompt_tokens=len(prompt),
                num_cached_tokens=3,
                cached_tokens_by_tier=self.cached_by_tier,
                num_output_tokens=sent * params.n,
                prompt_logprobs=pieces,
                finished=reason is not None,
            )
            if reason is not None:
                return
            await asyncio.sleep(self.delay)

    async def stats(self) -> EngineStats:
        if self.dead:
            raise EngineDead("engine_dead", "the engine has ended", why="/secret/path: boom")
        return EngineStats(
            waiting=2,
            running=len(self.running),
            kv_blocks_used=25,
            kv_blocks_total=100,
            prefix_query_tokens=11,
            prefix_hit_tokens=5,
            preemptions=4,
            prompt_tokens=sum(len(r.prompt_token_ids) for r in self.requests),
            step_age=self.step_age,
            silence=self.silence,
            tiers=self.tiers,
        )

    async def clear_cache(self) -> None:
        if not self.clears:
            raise TimeoutError
        self.cleared += 1

    async def drain(self, timeout: float) -> None:
        self.draining = True
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.closed = True


@lru_cache(maxsize=4096)
def position(token: int, count: int) -> PositionLogprobs:
    """The chosen token has rank 3 and log-probability -3, whoever is asked for."""
    result = {(token + k) % VOCABULARY: entry(token + k, k) for k in range(1, count + 1)}
    result[token] = entry(token, 3)
    return result


def entry(token: int, rank: int) -> Logprob:
    return Logprob(float(-rank), rank, chr(token % VOCABULARY))


def prompt_positions(request: GenerateRequest) -> list[PositionLogprobs | None]:
    count = request.params.prompt_logprobs or 0
    return [None, *(position(i, count) for i in request.prompt_token_ids[1:])]
