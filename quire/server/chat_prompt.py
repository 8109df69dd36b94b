"""From chat messages to prompt text, through the model's template."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from quire.dialects.renderer import ChatRenderer, add_effort, check_tools
from quire.errors import UsageError
from quire.server.fields import invalid
from quire.server.schemas import ChatMessage, Tool
from quire.server.state import ServerState
from quire.tokenization.messages import normalize_messages

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TEMPLATE_KWARGS = 32

# What the server itself gives to a template: not for clients to replace.
RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "eos_token",
        "messages",
        "pad_token",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "strftime_now",
        "timeout",
        "tokenize",
        "tokenizer",
        "tools",
        "unk_token",
    }
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as prompt text. `resumed`: the content of the message that the answer
    continues, None where it begins a turn."""

    text: str
    resumed: str | None = None


async def render_chat(state: ServerState, fields: dict[str, Any]) -> Rendered:
    """The prompt text of `messages` and the template fields. Raises UsageError."""
    renderer = _renderer(state)
    given: list[ChatMessage] = fields["messages"]
    plain = [_plain(index, message) for index, message in enumerate(given)]
    kwargs = _variables(fields, renderer)
    resume = bool(fields.get("continue_final_message"))
    generate = fields.get("add_generation_prompt")
    if resume and generate:
        raise invalid(
            "continue_final_message", "given with add_generation_prompt", "only one of the two"
        )
    kwargs["add_generation_prompt"] = not resume if generate is None else generate
    return await state.rendering.run(lambda: _render(renderer, plain, kwargs, resume))


def _render(
    renderer: ChatRenderer, plain: list[dict[str, Any]], kwargs: dict[str, Any], resume: bool
) -> Rendered:
    """On a thread: arguments of earlier calls are parsed, and the template runs."""
    messages = normalize_messages(plain, renderer.template)
    if not resume:
        return Rendered(renderer.render(messages, **kwargs))
    resumed: str = messages[-1]["content"]
    marker = secrets.token_hex(16)  # of which no message can have a part by accident
    messages[-1]["content"] += marker
    return Rendered(_cut_at(renderer.render(messages, **kwargs), marker), resumed)


def _variables(fields: dict[str, Any], renderer: ChatRenderer) -> dict[str, Any]:
    """What the template gets beside messages. Raises UsageError."""
    kwargs = _checked_kwargs(fields.get("chat_template_kwargs") or {})
    if effort := fields.get("reasoning_effort"):
        add_effort(effort, kwargs, renderer)
    if tools := shown_tools(fields):
        check_tools(renderer)
        kwargs["tools"] = msgspec.to_builtins([_as_shown(tool) for tool in tools])
    return kwargs


def _as_shown(tool: Tool) -> Tool:
    """Without `strict`, which says something to a server, not to a model."""
    return msgspec.structs.replace(
        tool, function=msgspec.structs.replace(tool.function, strict=None)
    )


def shown_tools(fields: dict[str, Any]) -> list[Tool]:
    """The tools that the model is told of: none with tool_choice "none". Raises UsageError for
    what needs a grammar."""
    tools: list[Tool] = fields.get("tools") or []
    for index, tool in enumerate(tools):
        if tool.function.strict:
            raise UsageError(
                "not_supported",
                f"tools[{index}].function.strict is not supported yet",
                why="nothing here makes a model keep to a schema, so this cannot be promised",
                fix="leave strict out, and check arguments when they come",
                field="tools",
            )
    return [] if fields.get("tool_choice") == "none" else tools


def _renderer(state: ServerState) -> ChatRenderer:
    state.tokenizer()
    renderer = state.ready_service().renderer
    if renderer is None:
        raise UsageError(
            "no_chat_template",
            "this model has no chat template",
            fix="use /v1/completions with a prompt in the model's own format",
        )
    return renderer


def _plain(index: int, message: ChatMessage) -> dict[str, Any]:
    """A message as a dict, without absent fields. Raises UsageError for what is not allowed."""
    if message.role not in ROLES:
        detail = f"unknown role {message.role[:40]!r}"
        raise invalid("messages", detail, f"in roles {', '.join(ROLES)}", f"[{index}].role")
    if message.tool_calls and message.role != "assistant":
        raise invalid("messages", "tool_calls", "without them but of the assistant", f"[{index}]")
    content = message.content
    if content is None and message.role != "assistant":
        raise invalid("messages", "no content", "given content", f"[{index}].content")
    texts = [part.text for part in content] if isinstance(content, list) else content
    plain: dict[str, Any] = {"role": message.role, "content": texts}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    if message.reasoning is not None:
        plain.setdefault("reasoning_content", message.reasoning)
    return plain


def _checked_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    allowed = f"at most {MAX_TEMPLATE_KWARGS} names that the template knows, none of them reserved"
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise invalid("chat_template_kwargs", f"{len(kwargs)} names", allowed)
    for name in kwargs:
        if name in RESERVED_KWARGS or not name.isidentifier() or name.startswith("_"):
            detail = f"the name {name[:40]!r} is reserved"
            raise invalid("chat_template_kwargs", detail, allowed)
    return dict(kwargs)


def _cut_at(text: str, marker: str) -> str:
    """`text` up to the marker at the end of the final message, for the model to continue it."""
    before, found, _ = text.partition(marker)
    if not found:
        raise UsageError(
            "template_error",
            "continue_final_message: the chat template leaves out or changes the final message",
            field="continue_final_message",
        )
    return before
