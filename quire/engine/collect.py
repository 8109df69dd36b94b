"""A frontend's side of one request: choices out, tokens in, text and stop strings."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from quire.engine.api import GenerateRequest
from quire.engine.wire import Abort, Add, Delta, choice_id
from quire.errors import EngineDead, Overloaded, QuireError, UsageError
from quire.outputs import ChoiceDelta, Logprob, PositionLogprobs, RequestDelta
from quire.step import TokenLogprobs
from quire.tokenization.detokenizer import Detokenizer
from quire.tokenization.rules import text_rules
from quire.tokenization.stop import StopChecker
from quire.tokenization.tokenizer import Tokenizer


@dataclass
class _Choice:
    """One choice: its text machinery, and what is new since the last take."""

    request_id: str
    detokenizer: Detokenizer | None
    stops: StopChecker | None
    fresh: ChoiceDelta
    num_tokens: int = 0
    done: bool = False
    changed: bool = False


class Collector:
    """Turns a request into Adds and their Deltas into RequestDeltas.

    Nothing past an end leaves here: tokens after a stop string are dropped, and the engine is
    told with an Abort how many counted. `tokenizer` None gives token ids without text.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer | None):
        self.request = request
        self.tokenizer = tokenizer
        self.error: QuireError | None = None
        self._cached = 0
        self._cached_by_tier: dict[str, int] | None = None
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None
        self._prompt_missing = 0  # positions whose log-probabilities are still to come
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]  # nothing precedes the first token
            self._prompt_missing = len(request.prompt_token_ids) - 1
        self._rules = request.rules or text_rules(request.params, tokenizer)
        self._choices = [self._new_choice(i) for i in range(request.params.n)]
        self._by_id = {choice.request_id: choice for choice in self._choices}

    def _new_choice(self, index: int) -> _Choice:
        params, tokenizer = self.request.params, self.tokenizer
        detokenizer, stops = None, None
        if tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, continuation=True)
            if self._rules.stops is not None:
                include = params.include_stop_str_in_output
                stops = StopChecker(self._rules.stops, include, params.min_tokens)
        name = choice_id(self.request.request_id, index)
        return _Choice(name, detokenizer, stops, ChoiceDelta(index))

    def add(self) -> Add:
        """What to send to the engine. A seed is drawn where none is given."""
        request, params = self.request, self.request.params
        return Add(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed % 2**64,
            priority=request.priority,
            cache_salt=request.cache_salt,
            tenant=request.tenant,
            timeout=request.timeout,
            bad_words=self._rules.bad_words,
        )

    @property
    def request_ids(self) -> list[str]:
        """Engine-side ids of the choices that still run."""
        return [c.request_id for c in self._choices if not c.done]

    @property
    def finished(self) -> bool:
        return self.error is not None or all(c.done for c in self._choices)

    def push(self, delta: Delta) -> list[Abort]:
        """Take a delta of one of our choices; returns aborts to send to the engine."""
        choice = self._by_id.get(delta.request_id)
        if choice is None or choice.done or self.error is not None:
            return []
        if delta.error is not None:
            aborts = self.fail(error_of(delta.error))
            return [abort for abort in aborts if abort.request_id != delta.request_id]
        if choice.fresh.index == 0:
            self._cached = max(self._cached, delta.cached_tokens)
            if delta.cached_by_tier is not None:
                self._cached_by_tier = delta.cached_by_tier
            if delta.prompt_logprobs:
                self._take_prompt_logprobs(delta.prompt_logprobs)
        choice.changed = True
        stopped = self._take_tokens(choice, delta)
        if stopped is not None:
            self._end(choice, "stop", stopped)
            return [Abort(choice.request_id, "stop", choice.num_tokens)]
        if delta.finish_reason is not None:
            self._flush(choice)
            self._end(choice, delta.finish_reason, delta.stop_reason)
        return []

    def fail(self, error: QuireError) -> list[Abort]:
        """End the request with an error; returns aborts of what runs."""
        self.error = error
        return [Abort(i) for i in self.request_ids]

    def _take_prompt_logprobs(self, found: list[TokenLogprobs]) -> None:
        known = self._prompt_logprobs or []
        self._prompt_logprobs = known + [self._position(position) for position in found]
        self._prompt_missing -= len(found)

    def _take_tokens(self, choice: _Choice, delta: Delta) -> str | None:
        """Adds tokens and text one by one; returns the stop string that ended the choice."""
        params, fresh = self.request.params, choice.fresh
        last = len(delta.token_ids) - 1
        for i, token in enumerate(delta.token_ids):
            fresh.token_ids.append(token)
            choice.num_tokens += 1
            if delta.logprobs is not None:
                fresh.logprobs = fresh.logprobs or []
                fresh.logprobs.append(self._position(delta.logprobs[i]))
            ends = i == last and delta.finish_reason == "stop"
            if choice.detokenizer is None or (ends and not params.include_stop_str_in_output):
                continue
            text = choice.detokenizer.push([token])
            if choice.stops is None:
                fresh.text += text
                continue
            fresh.text += choice.stops.push(text)
            if choice.stops.matched is not None:
                return choice.stops.matched
        return None

    def _flush(self, choice: _Choice) -> None:
        if choice.detokenizer is None:
            return
        text = choice.detokenizer.finish()
        if choice.stops is not None:
            text = choice.stops.push(text, 0) + choice.stops.finish()
        choice.fresh.text += text

    def _end(self, choice: _Choice, reason: str, stop: int | str | None) -> None:
        choice.done = True
        choice.fresh.finish_reason, choice.fresh.stop_reason = reason, stop

    def _position(self, found: TokenLogprobs) -> PositionLogprobs:
        """Token id -> Logprob; the chosen token comes first and keeps its own rank."""
        position: PositionLogprobs = {}
        for token, value, rank in zip(found.tokens, found.logprobs, found.ranks, strict=True):
            if token not in position:
                text = None if self.tokenizer is None else self.tokenizer.token_text(token)
                position[token] = Logprob(value, rank, text)
        return position

    @property
    def changed(self) -> bool:
        return self.error is not None or any(c.changed for c in self._choices)

    def take(self) -> RequestDelta | None:
        """What is new since the last take, merged; None where nothing is. Raises the request's
        error. Only the first choice computes the prompt's log-probabilities; until they are
        complete the others wait."""
        if self.error is not None:
            raise self.error
        fresh = []
        first = self._choices[0]
        waiting = self._prompt_missing > 0 and not first.done
        for choice in self._choices:
            if choice.changed and (choice is first or not waiting):
                fresh.append(choice.fresh)
                choice.fresh = ChoiceDelta(choice.fresh.index)
                choice.changed = False
        if not fresh:
            return None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return RequestDelta(
            request_id=self.request.request_id,
            choices=fresh,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self._cached,
            cached_tokens_by_tier=self._cached_by_tier,
            num_output_tokens=sum(c.num_tokens for c in self._choices),
            prompt_logprobs=prompt_logprobs,
            finished=self.finished,
        )


_KINDS: dict[str, type[QuireError]] = {
    "queue_full": Overloaded,
    "step_failed": QuireError,
    "numerical_error": QuireError,
    "gate_failed": QuireError,
    "engine_dead": EngineDead,
}


def error_of(parts: list[str]) -> QuireError:
    """The exception that a delta's error parts stand for; other codes are the request's fault."""
    code, what, why, fix = parts
    return _KINDS.get(code, UsageError)(code, what, why, fix)
