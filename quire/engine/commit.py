"""What a row's result means for its request: tokens, their end, and what the frontend is told."""

from __future__ import annotations

from quire.engine.request import Request
from quire.engine.wire import Delta
from quire.errors import QuireError, UsageError
from quire.step import FORBIDDEN_ERROR, NAN_ERROR, Row, RowResult

ROW_ERRORS = {
    NAN_ERROR: QuireError(
        "numerical_error",
        "the model's numbers for this request are not finite",
        why="its weights or the number format they are computed in",
        fix="check the weights; try --dtype float32",
    ),
    FORBIDDEN_ERROR: UsageError(
        "invalid_value",
        "no token is allowed at some position of this request",
        why="allowed_token_ids, bad_words and logit_bias leave none, or only those that end the "
        "request before min_tokens",
        fix="allow more tokens, or lower min_tokens",
    ),
}


def take_row(request: Request, row: Row, got: RowResult) -> Delta:
    """Append what a row without an error gave; its delta, which may say nothing."""
    tokens, logprobs, prompt_logprobs = got.tokens, got.logprobs, got.prompt_logprobs
    reason = stop_token = None
    if row.sample:
        known = request.tokens
        first = len(known)
        known += tokens
        if len(known) >= request.longest or not request.end_tokens.isdisjoint(tokens):
            reason, stop_token = _end(request, first)
            tokens = known[first:]
            logprobs = logprobs[: len(tokens)] if logprobs else None
        request.promised += len(tokens) - 1
        if row.drafts and request.slot >= 0:
            accepted = len(got.tokens) - 1
            request.computed += accepted
            request.scheduled += accepted
    if prompt_logprobs:
        # A request preempted in its prompt computes positions again that were sent already.
        prompt_logprobs = prompt_logprobs[max(0, request.prompt_logprobs_sent - row.start) :]
        request.prompt_logprobs_sent += len(prompt_logprobs)
    return Delta(
        request.add.request_id,
        tokens,
        logprobs or None,
        prompt_logprobs or None,
        reason,
        stop_token,
        request.cached_tokens or 0,
        cached_by_tier=request.cached_by_tier,
    )


def _end(request: Request, first: int) -> tuple[str | None, int | None]:
    """Cut new tokens, those from `first` on, behind the one that ends the request: (finish
    reason, stop token) where one does."""
    known = request.tokens
    for length, token in enumerate(known[first:], first + 1):
        if token in request.end_tokens and length >= request.earliest_end:
            del known[length:]
            named = token in (request.add.params.stop_token_ids or ())
            return "stop", token if named else None
        if length >= request.longest:
            del known[length:]
            return "length", None
    return None, None


def error_delta(request_id: str, error: QuireError) -> Delta:
    return Delta(
        request_id=request_id,
        token_ids=[],
        finish_reason="error",
        error=[error.code, error.what, error.why, error.fix],
    )
