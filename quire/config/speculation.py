"""The value of --speculative-config: JSON with vLLM's keys, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from quire.errors import UsageError, suggest

METHODS = ("ngram", "draft_model", "mtp")
# Older names of methods, as vLLM maps them.
OTHER_NAMES = {"deepseek_mtp": "mtp"}
MOST_DRAFTS = 32
MOST_LOOKUP = 64
LONGEST = 2**31 - 1
# vLLM's where neither is given.
DEFAULT_LOOKUP = 5
# What checkpoints can be quantised to while loading, the model's and that of who drafts.
QUANTIZATIONS = ("fp8", "nvfp4", "nvfp4-experts")


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted: `num_speculative_tokens` at most for each row of a step.

    `prompt_lookup_min` and `prompt_lookup_max`: sizes of n-grams (method ngram). `model` and
    `revision`: the drafter's, named as the model is (method draft_model); `quantization`: of its
    weights, while loading; `max_model_len`: tokens of a request up to which it drafts. Method mtp
    needs none of them: the model's own module for multi-token prediction drafts.
    """

    method: str
    num_speculative_tokens: int
    prompt_lookup_max: int = 0
    prompt_lookup_min: int = 0
    model: str | None = None
    revision: str | None = None
    quantization: str | None = None
    max_model_len: int | None = None

    @property
    def ahead(self) -> int:
        """Tokens behind a row whose keys and values the drafter writes, having guessed them."""
        return 0 if self.method == "ngram" else self.num_speculative_tokens


# One rank holds what drafts, so of ranks only the number 1 is known, and nothing to keep.
RANKS = "draft_tensor_parallel_size"
KEYS = (*(item.name for item in fields(Speculation)), RANKS)
DRAFT_MODEL_KEYS = ("model", "revision", "quantization", "max_model_len", RANKS)


def parse_speculation(given: Any) -> Speculation:
    """From JSON text or a map. Raises UsageError."""
    values = _object(given)
    for name in values:
        if name not in KEYS:
            close = suggest(str(name), list(KEYS))
            fix = " ".join(filter(None, (close, f"keys that are known: {', '.join(KEYS)}")))
            raise _error("unknown_option", f"unknown key {name!r}", fix)
    method, model = values.get("method"), values.get("model")
    if method is None and model is not None:
        method = "ngram" if model in ("ngram", "[ngram]") else "draft_model"
    method = OTHER_NAMES.get(str(method), method)
    if method not in METHODS:
        fix = suggest(str(method), list(METHODS)) or f"methods: {', '.join(METHODS)}"
        what = "method is missing" if method is None else f"method {method!r} is not known"
        raise _error("invalid_option", what, fix)
    drafts = _whole(values, "num_speculative_tokens", MOST_DRAFTS)
    if drafts is None:
        raise _error("invalid_option", "num_speculative_tokens is missing")
    if method == "ngram":
        names_it = model in ("ngram", "[ngram]")
        _refuse(values, method, DRAFT_MODEL_KEYS[names_it:])
        return Speculation(method, drafts, *_lookup(values))
    _refuse(values, method, ("prompt_lookup_max", "prompt_lookup_min"))
    if method == "mtp":
        _refuse(values, method, DRAFT_MODEL_KEYS)
        return Speculation(method, drafts)
    return _draft_model(values, drafts)


def _draft_model(values: dict[str, Any], drafts: int) -> Speculation:
    for name in ("model", "revision"):
        if values.get(name) is not None and not isinstance(values[name], str):
            raise _error("invalid_option", f"{name} must be a string")
    if not values.get("model"):
        fix = "name a small model of the same vocabulary"
        raise _error("invalid_option", "model is missing, which is to draft", fix)
    quantization = values.get("quantization")
    if quantization is not None and quantization not in QUANTIZATIONS:
        what = f"quantization {quantization!r} is not known"
        raise _error("invalid_option", what, f"one of {', '.join(QUANTIZATIONS)}")
    if values.get(RANKS) not in (None, 1):
        raise _error("invalid_option", f"{RANKS} can only be 1", "leave it out")
    return Speculation(
        "draft_model",
        drafts,
        model=values["model"],
        revision=values.get("revision"),
        quantization=quantization,
        max_model_len=_whole(values, "max_model_len", LONGEST),
    )


def speculation_text(given: Any) -> str:
    """The option's value in one form: checked JSON text. Raises UsageError."""
    parse_speculation(given)
    return json.dumps(_object(given), sort_keys=True)


def _object(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _error("invalid_option", "it is not JSON", why=str(error)) from None
    if not isinstance(given, dict):
        raise _error("invalid_option", "it must be an object of keys and values")
    return given


def _lookup(values: dict[str, Any]) -> tuple[int, int]:
    """(largest, smallest) size of n-grams; one alone is both."""
    most = _whole(values, "prompt_lookup_max", MOST_LOOKUP)
    least = _whole(values, "prompt_lookup_min", MOST_LOOKUP)
    most = most or least or DEFAULT_LOOKUP
    least = least or most
    if least > most:
        what = f"prompt_lookup_min ({least}) is above prompt_lookup_max ({most})"
        raise _error("invalid_option", what)
    return most, least


def _whole(values: dict[str, Any], name: str, most: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise _error("invalid_option", f"{name} must be a whole number from 1 to {most}")
    return value


def _refuse(values: dict[str, Any], method: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if values.get(name) is not None]
    if given:
        raise _error("invalid_option", f"{given[0]} does not go with method {method!r}")


def _error(code: str, what: str, fix: str = "", why: str = "") -> UsageError:
    example = '--speculative-config \'{"method": "ngram", "num_speculative_tokens": 4}\''
    return UsageError(
        code,
        f"--speculative-config: {what}",
        why=why,
        fix=fix or f"for example {example}",
        field="speculative_config",
    )
