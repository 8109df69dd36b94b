"""From messages to prompt text: the model's chat template, or its family's encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from quire.dialects import deepseek_v4
from quire.errors import UsageError
from quire.tokenization.chat_template import DEADLINE_SECONDS, TemplateRenderer


class ChatRenderer(Protocol):
    """What quire.tokenization.chat_template.TemplateRenderer does, for encoders too.

    `template`: the source, "" of an encoder.
    """

    template: str

    def render(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str: ...

    def render_inline(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str: ...

    def knows(self, name: str) -> bool: ...

    def close(self) -> None: ...


class DeepSeekV4Renderer:
    """DeepSeek V4's encoder, with the variables that vLLM gives it.

    `thinking` or `enable_thinking` (default false), `drop_thinking` (default true),
    `reasoning_effort`: "none" is no thinking, "max" and "xhigh" the largest effort, others the
    usual one; an effort turns thinking on unless it is said otherwise.
    """

    template = ""
    _VARIABLES = {  # noqa: RUF012 (never changed)
        "thinking": bool,
        "enable_thinking": bool,
        "drop_thinking": bool,
        "reasoning_effort": str,
        "add_generation_prompt": bool,
        "tools": list,
    }

    def knows(self, name: str) -> bool:
        """Whether the prompt depends on a variable of this name."""
        return name in self._VARIABLES

    def render(self, messages: Sequence[Mapping[str, Any]], /, **kwargs: Any) -> str:
        """The prompt. UsageError for variables it does not have or of another type, and for
        thinking that is turned on and off."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        for name, value in given.items():
            kind = self._VARIABLES.get(name)
            if kind is None or not isinstance(value, kind):
                raise _bad_variable(name, "unknown" if kind is None else f"not {kind.__name__}")
        effort = given.get("reasoning_effort")
        return deepseek_v4.encode(
            _with_tools(messages, given.get("tools")),
            thinking=_thinking(given, effort),
            drop_thinking=given.get("drop_thinking", True),
            max_effort=effort in ("max", "xhigh"),
            generate=given.get("add_generation_prompt", False),
        )

    render_inline = render

    def close(self) -> None:
        """Nothing to end: the encoder takes time and memory in proportion to the messages."""


def _thinking(given: Mapping[str, Any], effort: str | None) -> bool:
    said = {given[name] for name in ("thinking", "enable_thinking") if name in given}
    if effort is not None:
        said.add(effort != "none")
    if len(said) > 1:
        raise _bad_variable("thinking", "said to be on and off, by it or by reasoning_effort")
    return said == {True}


def _with_tools(
    messages: Sequence[Mapping[str, Any]], tools: list[Any] | None
) -> list[Mapping[str, Any]]:
    """Tools stand behind the first system message; without one it is empty."""
    if not tools:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _bad_variable(name: str, what: str) -> UsageError:
    return UsageError(
        "chat_arguments_invalid",
        f"the template variable {name[:40]!r} is {what}",
        fix="DeepSeek V4 has thinking, drop_thinking (true or false) and reasoning_effort (text)",
        field="chat_template_kwargs",
    )


def chat_renderer(
    architectures: Sequence[str],
    templates: Mapping[str, str],
    special_tokens: Mapping[str, str],
    template: str | None = None,
    deadline: float = DEADLINE_SECONDS,
) -> ChatRenderer | None:
    """The renderer of a model; None where it has neither template nor encoder.

    `templates`: the model's own by name ("default", "tool_use"); `template` replaces them.
    """
    own = template or templates.get("default")
    if own is not None:
        with_tools = None if template else templates.get("tool_use")
        return TemplateRenderer(own, special_tokens, deadline, tool_template=with_tools)
    if deepseek_v4.ARCHITECTURE in architectures:
        return DeepSeekV4Renderer()
    return None


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """The names in a model's config.json."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def add_effort(effort: str, kwargs: dict[str, Any], renderer: ChatRenderer) -> None:
    """Say a request's reasoning effort in the variables that the template has.

    Those the request gives itself stay. Templates that only switch thinking get that. Raises
    UsageError where the template has neither.
    """
    if renderer.knows("reasoning_effort"):
        kwargs.setdefault("reasoning_effort", effort)
    elif renderer.knows("enable_thinking"):
        kwargs.setdefault("enable_thinking", effort != "none")
    else:
        raise UsageError(
            "not_supported",
            "reasoning_effort means nothing to this model",
            why="its chat template has no variable for it",
            fix="leave reasoning_effort out",
            field="reasoning_effort",
        )


def check_tools(renderer: ChatRenderer) -> None:
    """Raise UsageError where the template would not show tools to the model."""
    if not renderer.knows("tools"):
        raise UsageError(
            "not_supported",
            "tools are not supported by this model",
            why="its chat template does not show them to it",
            fix="leave tools out, or take a model whose template has them",
            field="tools",
        )
