"""What a frontend (HTTP server, LLM, CLI) and an engine say to each other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from quire.outputs import RequestDelta
from quire.params import SamplingParams
from quire.tiers.counts import TierStats
from quire.tokenization.rules import TextRules


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue. `request_id` is unique among running requests.

    `priority`: lower runs first (under the priority policy). `cache_salt` and `tenant`: requests
    share prefix-cache blocks only where both are equal. `timeout`: seconds after which the
    request ends with finish_reason "abort". `rules`: those of `params` (text_rules), which requests
    of the same parameters share; None has the engine's frontend make them.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    timeout: float | None = None
    rules: TextRules | None = None


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine serves, known once it is ready. `plan` is Plan.to_dict(); `default_params`
    come from the model's generation_config.json; `started` is in seconds since 1970."""

    model: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    plan: dict[str, Any]
    default_params: dict[str, Any]
    eos_token_ids: list[int] = []
    max_queue: int = 256
    started: float = 0.0


class EngineStats(msgspec.Struct, frozen=True):
    """Counters since start, and gauges. `step_age`: seconds that the engine has been in the same
    step (or since it was last heard). `silence`: seconds since it was last heard, which is every
    second even while a step computes. `to_warm`: shapes of steps that are still to be prepared
    (CUDA graphs to capture); until then they are computed more slowly. `draft_rows`: rows of steps
    that had drafts; `draft_tokens` in them; `accepted_at[i]`: how often draft i was accepted.
    `tiers`: what each tier of the KV cache has done, the fastest first."""

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    step_age: float = 0.0
    silence: float = 0.0
    to_warm: int = 0
    tiers: list[TierStats] = []
    draft_rows: int = 0
    draft_tokens: int = 0
    accepted_at: list[int] = []

    @property
    def accepted_tokens(self) -> int:
        """Drafts that were accepted."""
        return sum(self.accepted_at)


class AsyncEngine(Protocol):
    """An engine as the server sees it. All methods are called on one event loop."""

    info: EngineInfo

    def check(self, requests: Sequence[GenerateRequest]) -> None:
        """Raise UsageError for a request that can never run, Overloaded if the queue cannot take
        all of them, EngineDead if the engine has ended."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        """Deltas until one is `finished`. What arrives while the consumer is busy is merged into
        one delta, so memory does not grow with a slow reader. Closing the generator (or
        cancelling its task) aborts the request. Raises QuireError for a failed request."""

    async def stats(self) -> EngineStats:
        """The latest counters (at most one second old). Never waits for the engine. Raises
        EngineDead once the engine has ended."""

    async def clear_cache(self) -> None:
        """Forget all KV of earlier requests, on the device and in all tiers. Raises EngineDead, or
        TimeoutError where the engine does not come to it."""

    async def drain(self, timeout: float) -> None:
        """Accept nothing new, and wait until running requests are done or time is up."""

    async def close(self) -> None:
        """Abort what runs and end the engine process. Idempotent."""
