"""The request fields of every route, in tables. docs/http-api.md lists the same names."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec

from quire.params import LIMITS
from quire.server.fields import (
    SAMPLING_FIELDS,
    Field,
    bool_field,
    int_field,
    limit_field,
    string_field,
)
from quire.server.schema import RequestSchema

MAX_PROMPTS = 256
MAX_CHOICES = 256  # prompts x n of one request
MAX_MESSAGES = 4096
MAX_TEMPLATE_KWARGS_BYTES = 16384
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_TOOLS = 128
MAX_ARGUMENTS = 2**18  # characters of one earlier call: parsing them holds the interpreter
MAX_TOOLS_BYTES = 256 * 1024
MAX_TOOLS_DEPTH = 64

# Cannot change the answer: accepted and not used.
IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Would change the answer, not built: refused, except for these values (null always passes).
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
_NOT_BUILT_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **_NOT_BUILT,
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}
_NOT_BUILT_CHAT: dict[str, tuple[Any, ...]] = {
    **_NOT_BUILT,
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "thinking_token_budget": (),
    "verbosity": (),
    "web_search_options": (),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`. Obfuscation pads frames and cannot change the answer: not used."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A content part of a message."""

    text: str


Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_./:-]{1,128}\Z")]


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a tool is: in this order its fields go to the template."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The function of a `tool_choice`."""

    name: Name


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """Which function a call is of, and its arguments: JSON text."""

    name: str
    arguments: Annotated[str, msgspec.Meta(max_length=MAX_ARGUMENTS)] = ""


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A call of an earlier assistant's message. `index` is there where a client kept a stream's."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message. Fields an assistant's message comes back with may be there as null or empty."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], msgspec.Meta(max_length=MAX_TOOLS)] | None = None
    function_call: None = None
    refusal: str | None = None
    annotations: list[msgspec.Raw] | None = None
    audio: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


_PROMPT = Field(
    msgspec.Raw,  # decoded by `prompts`, which knows the model's context
    f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} of either",
    max_bytes=None,
)
_MESSAGES = Field(
    list[ChatMessage],
    f"a list of 1 to {MAX_MESSAGES} messages with role and content (a string or text parts)",
    max_bytes=None,
    # A content may be "role" too; calls of tools have names.
    most=((b'"role"', 2 * MAX_MESSAGES), (b'"name"', 4 * MAX_MESSAGES)),
    check=lambda value: 0 < len(value) <= MAX_MESSAGES,
)
_TOOLS = Field(
    list[Tool] | None,
    f"a list of at most {MAX_TOOLS} functions in {MAX_TOOLS_BYTES} bytes, nested at most "
    f"{MAX_TOOLS_DEPTH} deep, each with a name (letters, digits, and _ - . / :)",
    MAX_TOOLS_BYTES,
    check=lambda tools: len(tools) <= MAX_TOOLS and not _deeper(tools, MAX_TOOLS_DEPTH),
)
_COMMON = {
    **SAMPLING_FIELDS,
    "model": string_field(1024),
    "stream": bool_field(),
    "stream_options": Field(StreamOptions | None, "an object with include_usage"),
    "priority": int_field(-(2**31), 2**31 - 1),
    "cache_salt": string_field(256),
    "add_special_tokens": bool_field(),
    "return_token_ids": bool_field(),
}
_CHAT_TEMPLATE = {
    "messages": _MESSAGES,
    "add_generation_prompt": bool_field(),
    "continue_final_message": bool_field(),
    "chat_template_kwargs": Field(
        dict[str, Any] | None,
        f"an object of at most {MAX_TEMPLATE_KWARGS_BYTES} bytes",
        MAX_TEMPLATE_KWARGS_BYTES,
    ),
    "tools": _TOOLS,
    "reasoning_effort": Field(
        Literal[EFFORTS] | None,
        f"one of {', '.join(EFFORTS)}",
    ),
}


def _deeper(tools: list[Tool], depth: int) -> bool:
    """Whether a tool's parameters are nested deeper than that."""
    level: list[Any] = [tool.function.parameters for tool in tools]
    for _ in range(depth):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner
    return bool(level)


COMPLETION = RequestSchema(
    fields={
        **_COMMON,
        "prompt": _PROMPT,
        "echo": bool_field(),
        "max_tokens": limit_field(replace(LIMITS["max_tokens"], low=0)),  # 0: only with echo
    },
    ignored=IGNORED,
    not_built=_NOT_BUILT_COMPLETIONS,
)
CHAT = RequestSchema(
    fields={
        **_COMMON,
        **_CHAT_TEMPLATE,
        "max_completion_tokens": SAMPLING_FIELDS["max_tokens"],
        "tool_choice": Field(
            Literal["none", "auto", "required"] | NamedTool | None,
            "none, auto, required or an object that names a function",
        ),
        "parallel_tool_calls": bool_field(),
        "logprobs": bool_field(),
        "top_logprobs": SAMPLING_FIELDS["logprobs"],
    },
    ignored=IGNORED,
    not_built=_NOT_BUILT_CHAT,
)
TOKENIZE = RequestSchema(
    fields={
        **_CHAT_TEMPLATE,
        "model": string_field(1024),
        "prompt": Field(str, "a string", max_bytes=None),
        "add_special_tokens": bool_field(),
        "return_token_strs": bool_field(),
    },
)
DETOKENIZE = RequestSchema(
    fields={
        "model": string_field(1024),
        "tokens": Field(list[int], "a list of token ids", max_bytes=None),
    },
)
