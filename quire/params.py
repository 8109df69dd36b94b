"""What a request asks of sampling: the fields and meanings of vLLM's SamplingParams.

One table, `LIMITS`, gives type, range and length of every field. The HTTP server, the Python API
and the engine process all validate against it, so that no value reaches the engine unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.errors import UsageError, suggest

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Limit:
    """Allowed values of one field. Ranges are inclusive; `items` bounds a list's length,
    `characters` each of its strings, `total` (0: no bound) all of them together."""

    kind: str  # "int", "float", "bool", "strings", "ids", "bias"
    low: float = -math.inf
    high: float = math.inf
    items: int = 0
    characters: int = 0
    total: int = 0
    optional: bool = False
    exclusive_low: bool = False

    def describe(self) -> str:
        """The allowed values in words."""
        bounds = {"int": "an integer", "float": "a finite number", "bool": "true or false"}
        if self.kind in bounds:
            text = bounds[self.kind]
            if self.low != -math.inf and self.high != math.inf:
                text += f" from {_plain(self.low)} to {_plain(self.high)}"
            elif self.low != -math.inf:
                text += f" of at least {_plain(self.low)}"
            if self.exclusive_low:
                text += f", above {_plain(self.low)}"
        elif self.kind == "strings":
            text = f"a list of at most {self.items} strings of 1 to {self.characters} characters"
            text += f", at most {self.total} together" if self.total else ""
        elif self.kind == "ids":
            text = f"a list of at most {self.items} token ids"
        else:
            text = (
                f"a map of at most {self.items} token ids to numbers "
                f"from {self.low:g} to {self.high:g}"
            )
        return text + (" or null" if self.optional else "")


def _plain(bound: float) -> str:
    """A bound for people: 2147483647 rather than 2.14748e+09."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


LIMITS: dict[str, Limit] = {
    "n": Limit("int", 1, 128),
    "temperature": Limit("float", 0.0, 100.0),
    "top_p": Limit("float", 0.0, 1.0, exclusive_low=True),
    "top_k": Limit("int", -1, 2**31 - 1),
    "min_p": Limit("float", 0.0, 1.0),
    "presence_penalty": Limit("float", -2.0, 2.0),
    "frequency_penalty": Limit("float", -2.0, 2.0),
    "repetition_penalty": Limit("float", 0.0, 100.0, exclusive_low=True),
    "seed": Limit("int", -(2**63), MAX_SEED, optional=True),
    "stop": Limit("strings", items=16, characters=1024, total=4096),
    "stop_token_ids": Limit("ids", items=256),
    "include_stop_str_in_output": Limit("bool"),
    "ignore_eos": Limit("bool"),
    "max_tokens": Limit("int", 1, 2**31 - 1, optional=True),
    "min_tokens": Limit("int", 0, 2**31 - 1),
    "logprobs": Limit("int", 0, 100, optional=True),
    "prompt_logprobs": Limit("int", 0, 100, optional=True),
    "logit_bias": Limit("bias", -100.0, 100.0, items=1024, optional=True),
    "allowed_token_ids": Limit("ids", items=2**18, optional=True),
    "bad_words": Limit("strings", items=256, characters=256),
    "skip_special_tokens": Limit("bool"),
    "detokenize": Limit("bool"),
}


def check_field(name: str, value: Any, limit: Limit) -> None:
    """Raise UsageError where `value` is not allowed by `limit`."""
    if value is None and limit.optional:
        return
    if limit.kind in ("int", "float"):
        good = _is_number(value, limit)
    elif limit.kind == "bool":
        good = isinstance(value, bool)
    elif limit.kind == "strings":
        good = (
            isinstance(value, list)
            and len(value) <= limit.items
            and all(isinstance(v, str) and 0 < len(v) <= limit.characters for v in value)
            and (not limit.total or sum(map(len, value)) <= limit.total)
        )
    elif limit.kind == "ids":
        good = (
            isinstance(value, list)
            and len(value) <= limit.items
            and set(map(type, value)) <= {int}  # the loops of C: there may be 2**18
            and (not value or (min(value) >= 0 and max(value) < 2**31))
        )
    else:
        good = (
            isinstance(value, dict)
            and len(value) <= limit.items
            and all(_is_int(k) and 0 <= k < 2**31 for k in value)
            and all(_is_number(v, Limit("float", limit.low, limit.high)) for v in value.values())
        )
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise UsageError(
            code="invalid_value",
            what=f"{name}: {shown} is not allowed",
            why=f"{name} must be {limit.describe()}",
            field=name,
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, limit: Limit) -> bool:
    if limit.kind == "int":
        if not _is_int(value):
            return False
    elif not (_is_int(value) or isinstance(value, float)):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if limit.exclusive_low and value <= limit.low:
        return False
    return bool(limit.low <= value <= limit.high)


def check_tokens(name: str, tokens: Collection[int], vocab_size: int) -> None:
    """Raise UsageError where one of field `name`'s token ids is outside the vocabulary."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        bad = next(t for t in tokens if not 0 <= t < vocab_size)
        raise UsageError(
            code="invalid_token",
            what=f"{name}: token id {bad} is outside the vocabulary",
            why=f"ids of this model run from 0 to {vocab_size - 1}",
            field=name,
        )


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, array_like=False):
    """How to choose tokens, when to stop, what to report. Field meanings are vLLM's.

    temperature 0 means greedy. top_k 0 or -1 means all tokens. `seed` None draws one at
    admission. `max_tokens` None means up to the model's context. `logprobs` is the number of
    most likely tokens to report besides the chosen one. Raises UsageError for values outside
    `LIMITS`; fields may be changed, and who takes such parameters calls `validate`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field, and bring lists into one form: `stop` a list, `allowed_token_ids`
        ascending and each once. Raises UsageError."""
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.bad_words is None:
            self.bad_words = []
        for name, limit in LIMITS.items():
            check_field(name, getattr(self, name), limit)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise UsageError(
                    code="invalid_value",
                    what="allowed_token_ids: an empty list allows no token at all",
                    fix="leave the field out, or list at least one id",
                    field="allowed_token_ids",
                )
            self.allowed_token_ids = sorted(set(self.allowed_token_ids))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                code="invalid_value",
                what=f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})",
                field="min_tokens",
            )
        if self.stop and not self.detokenize:
            raise UsageError(
                code="invalid_value",
                what="stop strings need detokenize=True",
                why="stop strings are found in text, and this request asks for none",
                field="stop",
            )

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list that `validate` made of it."""
        return self.stop if isinstance(self.stop, list) else []

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UsageError where a token id lies outside the model's vocabulary."""
        check_tokens("stop_token_ids", self.stop_token_ids or (), vocab_size)
        check_tokens("allowed_token_ids", (self.allowed_token_ids or ())[-1:], vocab_size)
        check_tokens("logit_bias", self.logit_bias or (), vocab_size)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> SamplingParams:
        """Build from untrusted names and values. Raises UsageError for unknown names."""
        known = list(LIMITS)
        for name in fields:
            if name not in LIMITS:
                raise UsageError(
                    code="unknown_field",
                    what=f"unknown sampling parameter {name!r}",
                    fix=suggest(name, known),
                    field=name,
                )
        return cls(**fields)
