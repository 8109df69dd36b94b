"""A validated API call: what to ask of the engine, and how to answer."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from quire.engine.api import GenerateRequest
from quire.errors import UsageError
from quire.params import LIMITS, SamplingParams
from quire.server.fields import invalid
from quire.server.prompts import Prompt
from quire.server.schemas import MAX_CHOICES, StreamOptions
from quire.server.state import ServerState
from quire.tokenization.rules import TextRules, text_rules


@dataclass(frozen=True)
class Call:
    """One request for text. `requests` has one entry per prompt; `id` is the client's handle.
    `prompt_only`: nothing behind the prompt is shown (max_tokens 0)."""

    id: str
    created: int
    model: str
    fingerprint: str
    requests: list[GenerateRequest]
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    prompt_only: bool
    return_token_ids: bool
    logprobs: int | None

    @property
    def large(self) -> bool:
        """Whether the answer may take long to encode: log-probabilities, of which there are up to
        101 at each position."""
        return self.logprobs is not None or self.requests[0].params.prompt_logprobs is not None


async def build_call(
    state: ServerState,
    fields: dict[str, Any],
    prompts: list[Prompt],
    params: SamplingParams,
    prefix: str,
    tenant: str,
) -> Call:
    """Check what fields say together, and what the engine says. Raises QuireError."""
    if len(prompts) * params.n > MAX_CHOICES:
        raise invalid("n", f"{len(prompts)} prompts x n {params.n}", f"at most {MAX_CHOICES}")
    params.check_vocabulary(state.ready_service().engine.info.vocab_size)
    stream, include_usage = _streaming(fields, params)
    rules = await _text_rules(state, params)
    service = state.accepting_service()
    call_id = prefix + secrets.token_hex(16)
    for prompt in prompts:
        _check_room(params, prompt, fields, service.engine.info.max_model_len)
    requests = [
        GenerateRequest(
            request_id=f"{call_id}-{index}",
            prompt_token_ids=prompt.ids,
            params=params,
            prompt=prompt.text,
            priority=_priority(state, fields),
            cache_salt=fields.get("cache_salt") or "",
            tenant=tenant,
            timeout=state.options.server.request_timeout,
            rules=rules,
        )
        for index, prompt in enumerate(prompts)
    ]
    service.engine.check(requests)
    return Call(
        id=call_id,
        created=int(time.time()),
        model=state.model_name(),
        fingerprint=service.engine.info.fingerprint,
        requests=requests,
        n=params.n,
        stream=stream,
        include_usage=include_usage,
        echo=bool(fields.get("echo")),
        prompt_only=fields.get("max_tokens") == 0,
        return_token_ids=bool(fields.get("return_token_ids")),
        logprobs=params.logprobs,
    )


def sampling_params(
    state: ServerState,
    fields: dict[str, Any],
    max_tokens: int | None,
    overrides: dict[str, Any],
) -> SamplingParams:
    """The route's default max_tokens, the model's defaults, what the request gives, and
    `overrides`: later ones win. Raises UsageError."""
    defaults = state.ready_service().engine.info.default_params
    model = {name: value for name, value in defaults.items() if name in LIMITS}
    given = {name: value for name, value in fields.items() if name in LIMITS and value is not None}
    values = {"max_tokens": max_tokens, **model, **given, **overrides}
    return SamplingParams.from_fields(values)


async def _text_rules(state: ServerState, params: SamplingParams) -> TextRules:
    """What stop strings and bad words are to the tokenizer: found once for all prompts, off the
    event loop. Raises UsageError."""
    if not params.stop and not params.bad_words:
        return TextRules()
    tokenizer = state.ready_service().tokenizer
    return await state.tokenizing.run(lambda: text_rules(params, tokenizer))


def _check_room(
    params: SamplingParams, prompt: Prompt, fields: dict[str, Any], max_model_len: int
) -> None:
    """Raise UsageError where the client's own max_tokens or min_tokens does not fit behind the
    prompt. (A default max_tokens that does not is cut by the engine.)"""
    room = max_model_len - len(prompt.ids)
    asked = fields.get("max_completion_tokens") or fields.get("max_tokens")
    for name, value in (("max_tokens", asked), ("min_tokens", params.min_tokens)):
        if value is not None and value > room:
            raise UsageError(
                "context_length_exceeded",
                f"{name}: {value} tokens do not fit behind a prompt of {len(prompt.ids)}",
                why=f"the model's context is {max_model_len} tokens, so {room} are left",
                field=name,
            )


def _streaming(fields: dict[str, Any], params: SamplingParams) -> tuple[bool, bool]:
    stream = bool(fields.get("stream"))
    options: StreamOptions | None = fields.get("stream_options")
    if options is not None and not stream:
        raise invalid("stream_options", "given without stream", "absent unless stream is true")
    if stream and fields.get("prompt_logprobs") is not None:
        raise invalid("prompt_logprobs", "given with stream", "absent when stream is true")
    return stream, bool(options and options.include_usage)


def _priority(state: ServerState, fields: dict[str, Any]) -> int:
    priority = fields.get("priority") or 0
    if priority and state.options.engine.scheduling_policy != "priority":
        raise invalid(
            "priority",
            f"{priority} would be ignored: this server runs requests in order of arrival",
            "0 unless it was started with --scheduling-policy priority",
        )
    return int(priority)
