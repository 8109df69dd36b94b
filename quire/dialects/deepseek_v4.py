"""DeepSeek V4's prompt: it has an encoder instead of a chat template.

Facts: the README and the encoder that DeepSeek publishes with the model (`encoding/`, April 2026).
The two fixed texts below are part of the format: the model was trained on these bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.dialects.dsml import BAR, CLOSE, END_INVOKE, END_PARAMETER, TOKEN
from quire.dialects.dsml import OPEN as OPEN_CALLS
from quire.errors import UsageError

ARCHITECTURE = "DeepseekV4ForCausalLM"
BOS, EOS = f"<{BAR}begin\u2581of\u2581sentence{BAR}>", f"<{BAR}end\u2581of\u2581sentence{BAR}>"
USER, ASSISTANT = f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
REMINDER = f"<{BAR}latest_reminder{BAR}>"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")

# Before everything else, for the largest reasoning effort.
MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
_TOOLS_BEFORE = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "{OPEN_CALLS}" block like the following:

{OPEN_CALLS}
<{TOKEN}invoke name="$TOOL_NAME">
<{TOKEN}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{END_PARAMETER}
...
{END_INVOKE}
<{TOKEN}invoke name="$TOOL_NAME2">
...
{END_INVOKE}
{CLOSE}

String parameters should be specified as is and set `string="true"`. For all other types \
(numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_BEHIND = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_RESPONSE_FORMAT = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)

Message = Mapping[str, Any]


def encode(
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    drop_thinking: bool = True,
    max_effort: bool = False,
    generate: bool = True,
) -> str:
    """The prompt for a conversation; `generate`: up to where the assistant's turn begins.

    A message may carry `tools`, `response_format` and `task`, as the published format has them.
    `drop_thinking` leaves out thoughts of turns before the last user's; tools turn it off.
    Raises UsageError for a role or a task that the format does not know.
    """
    drop = drop_thinking and not any(message.get("tools") for message in messages)
    turns = _turns(messages)
    last = _last_user(turns)
    if thinking and drop:  # what led to an old answer goes with its thoughts
        turns = [t for i, t in enumerate(turns) if t["role"] != "developer" or i >= last]
        last = _last_user(turns)
    pieces = [BOS, MAX_EFFORT if thinking and max_effort and turns else ""]
    for place, turn in enumerate(turns):
        thinks = thinking and not (drop and place < last)
        after_task = place > 0 and turns[place - 1].get("task") is not None
        pieces.append(_turn(turn, thinks=thinks and not after_task))
        follows = turns[place + 1]["role"] if place + 1 < len(turns) else None
        if follows in ("assistant", "latest_reminder") or (follows is None and generate):
            pieces.append(_transition(turn, thinking, thinks))
    return "".join(pieces)


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with those of users and tools joined: `parts` has (text, id of the call or None).

    Results of tools stand in the order in which the assistant called them.
    """
    turns: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    for message in messages:
        role = message["role"]
        if role not in ("user", "tool"):
            turns.append(dict(message))
            if role == "assistant" and message.get("tool_calls"):
                order = {c.get("id"): i for i, c in enumerate(message["tool_calls"]) if c.get("id")}
            continue
        text, call = message.get("content") or "", None
        if role == "tool":
            text, call = f"<tool_result>{text}</tool_result>", message.get("tool_call_id") or ""
        joins = bool(turns) and turns[-1]["role"] == "user"
        if not joins or (role == "user" and turns[-1].get("task") is not None):
            turns.append({"role": "user", "parts": [], "order": order})
            if role == "user" and "task" in message:
                turns[-1]["task"] = message["task"]
        turns[-1]["parts"].append((text, call))
    return turns


def _last_user(turns: Sequence[Message]) -> int:
    places = [i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")]
    return places[-1] if places else -1


def _turn(turn: Message, thinks: bool) -> str:
    """One turn, without what leads to the next."""
    role, content = turn["role"], turn.get("content") or ""
    if role == "system":
        return content + _extras(turn)
    if role == "developer":
        return USER + content + _extras(turn)
    if role == "user":
        return USER + "\n\n".join(_in_order(turn["parts"], turn["order"]))
    if role == "latest_reminder":
        return REMINDER + content
    if role == "assistant":
        thoughts = turn.get("reasoning_content") or turn.get("reasoning") or ""
        thoughts = f"{thoughts}</think>" if thinks else ""
        return thoughts + content + _calls(turn.get("tool_calls") or ()) + EOS
    raise UsageError("messages_invalid", f"DeepSeek V4 has no role {role!r}", field="messages")


def _extras(turn: Message) -> str:
    """Tools and response format, behind the text of a system or developer message."""
    extras = ""
    if turn.get("tools"):
        extras += "\n\n" + tools_block([tool["function"] for tool in turn["tools"]])
    if turn.get("response_format"):
        extras += "\n\n" + _RESPONSE_FORMAT + _json(turn["response_format"])
    return extras


def tools_block(functions: Sequence[Any]) -> str:
    """The text that tells the model of its tools, one function's JSON a line."""
    return _TOOLS_BEFORE + "\n".join(map(_json, functions)) + _TOOLS_BEHIND


def _in_order(parts: list[tuple[str, str | None]], order: Mapping[str, int]) -> list[str]:
    """The texts: results of tools by the order of their calls, in the places that results have."""
    results = [part for part in parts if part[1] is not None]
    if order:
        results.sort(key=lambda part: order.get(part[1] or "", 0))
    ranked = iter(results)
    return [text if call is None else next(ranked)[0] for text, call in parts]


def _calls(calls: Sequence[Message]) -> str:
    if not calls:
        return ""
    invokes = (
        f'<{TOKEN}invoke name="{call["function"]["name"]}">\n'
        f"{_parameters(call['function'].get('arguments'))}\n{END_INVOKE}"
        for call in calls
    )
    return f"\n\n{OPEN_CALLS}\n" + "\n".join(invokes) + f"\n{CLOSE}"


def _parameters(arguments: Any) -> str:
    """A call's arguments, an object or its JSON, as tags; what is neither is one parameter."""
    given = arguments
    if isinstance(arguments, str):
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, Mapping):
        given = {} if arguments is None else {"arguments": arguments}
    return "\n".join(
        f'<{TOKEN}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}{END_PARAMETER}"
        for name, value in given.items()
    )


def _transition(turn: Message, thinking: bool, thinks: bool) -> str:
    """What stands between a turn and the assistant's next."""
    task = turn.get("task")
    if task is not None:
        if task not in TASKS:
            raise UsageError(
                "messages_invalid",
                f"DeepSeek V4 has no task {task!r}",
                fix=f"one of {', '.join(TASKS)}",
                field="messages",
            )
        token = f"<{BAR}{task}{BAR}>"
        if task != "action":
            return token
        return ASSISTANT + ("<think>" if thinking else "</think>") + token
    if turn["role"] in ("user", "developer"):
        return ASSISTANT + ("<think>" if thinks else "</think>")
    return ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
