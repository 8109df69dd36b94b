"""Which dialect a model speaks: by its architecture, its chat template, or the options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.dialects.deepseek_v4 import ARCHITECTURE as DEEPSEEK_V4
from quire.dialects.dsml import TOKEN
from quire.dialects.hermes import CLOSE as END_CALL
from quire.dialects.hermes import OPEN as BEGIN_CALL
from quire.dialects.parser import OutputParser
from quire.dialects.reasoning import CLOSE, OPEN
from quire.errors import UsageError

if TYPE_CHECKING:
    from quire.dialects.renderer import ChatRenderer
    from quire.tokenization.tokenizer import Tokenizer

# What may be a token of its own.
_MARKERS = {"hermes": (BEGIN_CALL, END_CALL), "deepseek_v4": (TOKEN,)}
# Hermes' calls as templates write them, line ends perhaps as \n and quotes escaped; others have
# the same marker with something else behind it.
_HERMES = re.compile(r'<tool_call>(?:\\n|\s)*\{\s*\\?"(?:name|arguments)\b')


@dataclass(frozen=True)
class Dialect:
    """How answers of a model are read. `tools`, `reasoning`: names of parsers, or "none";
    `tools_reason`, `reasoning_reason`: why these."""

    tools: str = "none"
    reasoning: str = "none"
    tools_reason: str = ""
    reasoning_reason: str = ""

    def parser(self, prompt: str, tools: bool, resumed: str | None = None) -> OutputParser:
        """A parser for one choice. `prompt`: the text that is answered. `tools`: whether calls
        are looked for. `resumed`: the content of the message that the answer continues."""
        if resumed is not None:
            prompt = OPEN + "\n" if resumed.rfind(OPEN) > resumed.rfind(CLOSE) else CLOSE
        return OutputParser(self.tools if tools else "none", self.reasoning, prompt)

    def hidden_by(self, tokenizer: Tokenizer) -> bool:
        """Whether markers are special tokens of the tokenizer, which a text leaves out unless it
        is asked for them."""
        used = _MARKERS.get(self.tools, ()) + ((OPEN, CLOSE) if self.reasoning != "none" else ())
        return any(tokenizer.token_id(marker) in tokenizer.special_ids for marker in used)


def resolve_dialect(
    tool_call_parser: str,
    reasoning_parser: str,
    architectures: Sequence[str] = (),
    template: str | None = None,
) -> Dialect:
    """The dialect of a model. The parsers are names that options allow; "auto" is decided here."""
    tools, tools_reason = tool_call_parser, "--tool-call-parser"
    if tools == "auto":
        tools, tools_reason = _tools_of(architectures, template or "")
    reasoning, reasoning_reason = reasoning_parser, "--reasoning-parser"
    if reasoning == "auto":
        reasoning, reasoning_reason = _reasoning_of(architectures, template or "")
    return Dialect(tools, reasoning, tools_reason, reasoning_reason)


def check_choice(
    tool_call_parser: str, reasoning_parser: str, renderer: ChatRenderer | None
) -> None:
    """Raise UsageError where a parser that was asked for would never have anything to parse."""
    asked = {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
    for name, parser in asked.items():
        if parser in ("auto", "none"):
            continue
        why = "" if renderer is not None else "the model has no chat template, or no tokenizer"
        if name == "tool_call_parser" and renderer is not None and not renderer.knows("tools"):
            why = "the model's chat template does not show tools to it"
        if why:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                "invalid_option",
                f"{flag} {parser} would have nothing to parse",
                why=why,
                fix=f"leave {flag} out",
                field=name,
            )


def _tools_of(architectures: Sequence[str], template: str) -> tuple[str, str]:
    if DEEPSEEK_V4 in architectures:
        return "deepseek_v4", DEEPSEEK_V4
    if "<tool_call>" in template:
        if _HERMES.search(template):
            return "hermes", "the chat template writes <tool_call> with JSON"
        return "none", "the chat template's tool calls are of a kind that is not known here"
    return "none", "the chat template shows no tool calls that are known here"


def _reasoning_of(architectures: Sequence[str], template: str) -> tuple[str, str]:
    if DEEPSEEK_V4 in architectures:
        return "deepseek_v4", DEEPSEEK_V4
    if CLOSE in template:
        return "qwen3", "the chat template has </think>"
    return "none", "the chat template has no </think>"
