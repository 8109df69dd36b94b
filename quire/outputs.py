"""What a request gives back: the fields of vLLM's RequestOutput and CompletionOutput."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability (natural log) of one token at one position, its 1-based rank and text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


# Candidates at one position: token id -> Logprob. The chosen token is always among them.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class ChoiceDelta:
    """What is new in one choice since the last delta: text, token ids, their log-probabilities."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's `n` choices.

    `finish_reason` is "stop" (end of sequence, stop string or stop token), "length" or "abort",
    None while running; `stop_reason` is the stop string or stop token id that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, news: ChoiceDelta) -> None:
        """Add what is new in this choice."""
        self.text += news.text
        self.token_ids += news.token_ids
        if news.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += news.logprobs
            chosen = zip(news.token_ids, news.logprobs, strict=True)
            total = sum(position[token].logprob for token, position in chosen)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + total
        if news.finish_reason is not None:
            self.finish_reason, self.stop_reason = news.finish_reason, news.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """A request with its choices.

    `prompt_logprobs[0]` is None (nothing precedes the first token). `num_cached_tokens` counts
    prompt tokens whose KV came from the prefix cache; where there are tiers,
    `cached_tokens_by_tier` says from which ("device", "dram", "fs", "mooncake").
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0
    cached_tokens_by_tier: dict[str, int] | None = None
    finished: bool = False


@dataclass(slots=True)
class RequestDelta:
    """What is new in a request. `num_output_tokens` counts all choices so far."""

    request_id: str
    choices: list[ChoiceDelta]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    cached_tokens_by_tier: dict[str, int] | None = None
    num_output_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
