"""Sampling parameters of `run` and chat: flags, `/set`, and the model's defaults."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quire.cli.flags import Parser
from quire.errors import UsageError, suggest
from quire.params import LIMITS, SamplingParams

FLAGS = {
    "temperature": "randomness; 0 takes the likeliest token",
    "top_p": "sample from the likeliest tokens of this total probability",
    "top_k": "sample from this many likeliest tokens; 0 is all",
    "min_p": "least probability, as a share of the likeliest token's",
    "presence_penalty": "against tokens that occurred",
    "frequency_penalty": "against tokens, by how often they occurred",
    "repetition_penalty": "above 1: against tokens that occurred, prompt included",
    "max_tokens": "longest answer; by default what the context allows",
    "min_tokens": "shortest answer",
    "ignore_eos": "do not stop at the end-of-sequence token",
}

# For models whose generation_config.json names no temperature: the likeliest tokens, so that the
# same question has the same answer (small instruct models want a low temperature anyway).
CAREFUL = {"temperature": 0.0}

# One answer, as text, is what a terminal shows.
_FIXED = ("n", "detokenize", "prompt_logprobs", "logprobs")


def add_sampling_flags(parser: Parser) -> None:
    """Flags of FLAGS, --stop, --system, and --seed, which is an option of the model too."""
    group = parser.add_argument_group("the answer")
    for name, text in FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        if LIMITS[name].kind == "bool":
            action = argparse.BooleanOptionalAction
            group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        else:
            metavar = "N" if LIMITS[name].kind == "int" else "X"
            text = f"{text} ({LIMITS[name].describe()})"
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument(
        "--seed",
        default=argparse.SUPPRESS,
        metavar="N",
        help="makes a sampled answer repeatable; seeds dummy weights too",
    )


def given_fields(flags: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters that the command line names. Raises UsageError."""
    values = vars(flags)
    fields = {
        name: value if LIMITS[name].kind == "bool" else parse_value(name, value)
        for name, value in values.items()
        if name in FLAGS
    }
    if "stop" in values:
        fields["stop"] = values["stop"]
    if "seed" in values:
        fields["seed"] = parse_value("seed", values["seed"])
    return fields


def parse_value(name: str, text: str) -> Any:
    """A parameter's value from text: JSON, or the text itself. Raises UsageError for the name."""
    if name not in LIMITS:
        raise UsageError(
            "unknown_field",
            f"unknown sampling parameter {name!r}",
            fix=suggest(name, list(LIMITS)) or f"parameters: {', '.join(settable())}",
            field=name,
        )
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("yes", "on", "no", "off") and LIMITS[name].kind == "bool":
        return text.lower() in ("yes", "on")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if LIMITS[name].kind == "strings" and not isinstance(value, list):
        return text
    if LIMITS[name].kind == "bias" and isinstance(value, dict):
        return {int(k) if k.isdecimal() else k: v for k, v in value.items()}
    return value


def settable() -> list[str]:
    """What `/set` can change."""
    return [name for name in LIMITS if name not in _FIXED]


def check_settable(name: str) -> None:
    """Raise UsageError for a parameter that a terminal has no use for."""
    if name in _FIXED:
        raise UsageError(
            "not_settable", f"{name} cannot be set here", why="a chat shows one answer as text"
        )


def make_params(defaults: dict[str, Any], fields: dict[str, Any]) -> SamplingParams:
    """The model's defaults (CAREFUL where it names no temperature), then `fields`.

    Raises UsageError.
    """
    start = {"max_tokens": None} | ({} if "temperature" in defaults else CAREFUL) | defaults
    return SamplingParams.from_fields(start | fields)


def changed_fields(params: SamplingParams) -> dict[str, Any]:
    """The parameters that differ from vLLM's defaults, for records."""
    plain = SamplingParams()
    values = {name: getattr(params, name) for name in LIMITS}
    return {name: v for name, v in values.items() if v != getattr(plain, name)}
