"""Which parsers a model gets, and why."""

from __future__ import annotations

import pytest
import tokenizers

from quire.config.options import ServerOptions, all_options
from quire.dialects.dialect import Dialect, check_choice, resolve_dialect
from quire.dialects.parser import REASONING_PARSERS, TOOL_PARSERS
from quire.dialects.renderer import DeepSeekV4Renderer, chat_renderer, check_tools
from quire.errors import UsageError
from quire.tokenization.tokenizer import Tokenizer

HERMES = '{% if tools %}<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>{% endif %}'
THINKS = "{% if enable_thinking %}<think>\n\n</think>{% endif %}"


@pytest.mark.parametrize(
    ("architecture", "template", "tools", "reasoning"),
    [
        ("Qwen2ForCausalLM", HERMES, "hermes", "none"),
        ("Qwen3ForCausalLM", HERMES + THINKS, "hermes", "qwen3"),
        ("Qwen2ForCausalLM", THINKS, "none", "qwen3"),
        (
            "Qwen2ForCausalLM",
            r"'<tool_call>\n{\"arguments\": <args>, \"name\": <f>}'",
            "hermes",
            "none",
        ),
        ("MiniMaxForCausalLM", "'<tool_call>' arguments <invoke name=", "none", "none"),
        ("Qwen3MoeForCausalLM", "<tool_call>\n<function=f> arguments", "none", "none"),
        ("Glm4MoeForCausalLM", "<tool_call>f<arg_key> arguments", "none", "none"),
        ("LlamaForCausalLM", "{{ messages }}", "none", "none"),
        ("LlamaForCausalLM", None, "none", "none"),
        ("DeepseekV4ForCausalLM", None, "deepseek_v4", "deepseek_v4"),
    ],
)
def test_auto_looks_at_family_and_template(
    architecture: str, template: str | None, tools: str, reasoning: str
) -> None:
    found = resolve_dialect("auto", "auto", [architecture], template)
    assert (found.tools, found.reasoning) == (tools, reasoning)
    assert found.tools_reason and found.reasoning_reason


def test_options_win_and_are_the_reason() -> None:
    found = resolve_dialect("none", "deepseek_r1", ["Qwen3ForCausalLM"], HERMES + THINKS)
    assert found == Dialect("none", "deepseek_r1", "--tool-call-parser", "--reasoning-parser")


def test_the_options_offer_every_parser_and_no_other() -> None:
    known = all_options("server")
    for name, parsers in (
        ("tool_call_parser", TOOL_PARSERS),
        ("reasoning_parser", REASONING_PARSERS),
    ):
        choices = known[name][1].metadata["choices"]
        assert sorted(choices) == sorted(["auto", "none", *parsers])
        assert getattr(ServerOptions(), name) == "auto"


@pytest.mark.parametrize("special", [True, False])
def test_markers_that_are_special_tokens_are_noticed(special: bool) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_tokens([tokenizers.AddedToken("<tool_call>", special=special)])
    tokenizer = Tokenizer(backend)
    assert Dialect(tools="hermes").hidden_by(tokenizer) is special
    assert Dialect(reasoning="qwen3").hidden_by(tokenizer) is False


def test_a_model_with_neither_template_nor_encoder_has_no_renderer() -> None:
    assert chat_renderer(["LlamaForCausalLM"], {}, {}) is None
    assert isinstance(chat_renderer(["DeepseekV4ForCausalLM"], {}, {}), DeepSeekV4Renderer)


def test_a_template_of_its_own_for_tools_is_taken_where_there_are_tools() -> None:
    renderer = chat_renderer([], {"default": "plain", "tool_use": "{{ tools[0] }}"}, {})
    assert renderer is not None
    assert renderer.render_inline([{"role": "user", "content": "x"}]) == "plain"
    assert renderer.render_inline([{"role": "user", "content": "x"}], tools=["t"]) == "t"
    check_tools(renderer)


def test_tools_that_a_template_does_not_show_are_refused() -> None:
    renderer = chat_renderer([], {"default": "toolset {{ messages }}"}, {})
    assert renderer is not None
    with pytest.raises(UsageError) as caught:
        check_tools(renderer)
    assert caught.value.code == "not_supported"


@pytest.mark.parametrize(
    ("tools", "reasoning", "template", "field"),
    [
        ("hermes", "auto", "{{ messages }}", "tool_call_parser"),
        ("hermes", "auto", None, "tool_call_parser"),
        ("auto", "qwen3", None, "reasoning_parser"),
        ("none", "qwen3", "{{ messages }}", None),
        ("hermes", "none", "{{ tools }}", None),
        ("auto", "auto", None, None),
    ],
)
def test_a_parser_that_would_do_nothing_is_refused_at_start(
    tools: str, reasoning: str, template: str | None, field: str | None
) -> None:
    renderer = chat_renderer([], {"default": template} if template else {}, {})
    if field is None:
        check_choice(tools, reasoning, renderer)
        return
    with pytest.raises(UsageError) as caught:
        check_choice(tools, reasoning, renderer)
    assert (caught.value.code, caught.value.field) == ("invalid_option", field)
