"""DeepSeek V4 over HTTP: its encoder, special tokens and parsers as `quire serve` puts them
together from a model's files. Only the engine is scripted: it says given tokens, which become text
where every engine's do.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fake_engine import INFO, FakeEngine
from msgspec.structs import replace
from server_harness import RunningServer, running
from tokenizers import decoders, models, pre_tokenizers

from quire.cli.serve import start_service
from quire.config.parse import build_options
from quire.dialects.deepseek_v4 import MAX_EFFORT, tools_block
from quire.engine.api import GenerateRequest
from quire.engine.client import EngineClient
from quire.engine.collect import Collector
from quire.engine.wire import Delta
from quire.outputs import RequestDelta
from quire.tokenization.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, DSML = "<｜User｜>", "<｜Assistant｜>", "｜DSML｜"
OPEN, CLOSE = "<think>", "</think>"
TOKENS = (BOS, EOS, USER, ASSISTANT, DSML, OPEN, CLOSE)
ROLES = {BOS, EOS, USER, ASSISTANT}  # special in every tokenizer here

FUNCTION = {
    "name": "get_weather",
    "description": "Wetter, später",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
QUESTION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich?"},
]
ARGUMENTS = '{"city": "Zürich \\"HB\\"", "days": 3}'
THOUGHTS, SAID = "I should look. 日本", "Let me see."
# The answer as the model writes it, behind a prompt that ends with <think>.
PIECES = [
    THOUGHTS, CLOSE, SAID, "\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke name="get_weather">\n<',
    DSML, 'parameter name="city" string="true">Zürich "HB"</', DSML, "parameter>\n<",
    DSML, 'parameter name="days" string="false">3</', DSML, "parameter>\n</",
    DSML, "invoke>\n</", DSML, "tool_calls>", EOS,
]  # fmt: skip


class ScriptedEngine(FakeEngine):
    """Says `script`, token for token, and ends with the last."""

    tokenizer: Tokenizer
    script: list[int]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        self.requests.append(request)
        collector = Collector(request, self.tokenizer)
        for place, token in enumerate(self.script):
            ends = "stop" if place == len(self.script) - 1 else None
            for name in collector.request_ids:
                collector.push(Delta(name, [token], finish_reason=ends))
            delta = collector.take()
            assert delta is not None
            yield delta

    def ids(self, *pieces: str) -> list[int]:
        """Tokens of texts of which each is a token of V4's own, or has none in it."""
        found: list[int] = []
        for piece in pieces:
            own = [self.tokenizer.token_id(piece)] if piece in TOKENS else None
            found += own or self.tokenizer.encode(piece)  # type: ignore[arg-type]
        return found


def write_model(path: Path, special: set[str]) -> str:
    """A directory as DeepSeek's, with a tokenizer of bytes: `special` are tokens that a text
    leaves out, the others are in the vocabulary only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [tokenizers.AddedToken(t, special=t in ROLES | special, normalized=False) for t in TOKENS]
    )
    (path / "tokenizer.json").write_text(backend.to_str())
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    (path / "config.json").write_text(json.dumps({"architectures": ["DeepseekV4ForCausalLM"]}))
    return str(path)


# Which of the markers are special tokens: either kind alone must keep the markup in the text.
@pytest.fixture(scope="module", params=[{DSML}, {OPEN, CLOSE}, set()], ids=["dsml", "think", "-"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    model = write_model(tmp_path_factory.mktemp("v4"), request.param)

    async def launch(options: dict[str, Any], progress: Any = None) -> ScriptedEngine:
        return ScriptedEngine(info=replace(INFO, vocab_size=256 + len(TOKENS), max_model_len=8192))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineClient, "launch", launch)
        with running(start=partial(start_service, build_options({"model": model}))) as server:
            yield server


def ask(server: RunningServer, script: list[str], **fields: Any) -> dict[str, Any]:
    """The choice of an answer that is not streamed, whose stream adds up to the same."""
    engine = scripted(server)
    engine.script = engine.ids(*script)
    engine.requests.clear()
    with server.client() as http:
        answer = http.post("/v1/chat/completions", json=fields)
        assert answer.status_code == 200, answer.text
        text = http.post("/v1/chat/completions", json=fields | {"stream": True}).text
    choice: dict[str, Any] = answer.json()["choices"][0]
    frames = [json.loads(line[6:]) for line in text.split("\n\n") if line[6:7] == "{"]
    assert added_up([frame["choices"][0] for frame in frames]) == without_ids(choice)
    whole, streamed = engine.requests
    assert whole.prompt_token_ids == streamed.prompt_token_ids
    return choice


def scripted(server: RunningServer) -> ScriptedEngine:
    assert isinstance(server.engine, ScriptedEngine)
    return server.engine


def added_up(frames: list[dict[str, Any]]) -> dict[str, Any]:
    """Text, thoughts, calls and end of a choice, out of its stream."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for delta in (frame["delta"] for frame in frames):
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append(dict(call["function"]))
            else:
                message["tool_calls"][-1]["arguments"] += call["function"]["arguments"]
    return message | {"finish_reason": frames[-1]["finish_reason"]}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning") or "",
        "tool_calls": [call["function"] for call in message.get("tool_calls") or ()],
        "finish_reason": choice["finish_reason"],
    }


THINKING = {"chat_template_kwargs": {"thinking": True}}
# Behind the system's text, as published: the block itself is compared by its hash elsewhere.
SYSTEM = "Be brief.\n\n" + tools_block([FUNCTION])


def test_what_the_model_writes_becomes_thoughts_content_and_calls(server: RunningServer) -> None:
    choice = ask(server, PIECES, messages=QUESTION, tools=TOOLS, **THINKING)
    assert without_ids(choice) == {
        "content": SAID,
        "reasoning": THOUGHTS,
        "tool_calls": [{"name": "get_weather", "arguments": ARGUMENTS}],
        "finish_reason": "tool_calls",
    }
    engine = scripted(server)
    assert engine.requests[0].prompt_token_ids == engine.ids(
        BOS, SYSTEM, USER, "Weather in Zürich?", ASSISTANT, OPEN
    )


def test_a_conversation_goes_on_with_the_tokens_that_the_model_wrote(server: RunningServer) -> None:
    """Thoughts and calls go back to the model as it wrote them, and so find their prefix cached."""
    message = ask(server, PIECES, messages=QUESTION, tools=TOOLS, **THINKING)["message"]
    engine = scripted(server)
    before = engine.requests[0].prompt_token_ids
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    choice = ask(
        server, [CLOSE, "It is sunny.", EOS], messages=[*QUESTION, message, result], tools=TOOLS,
        reasoning_effort="max",
    )  # fmt: skip
    assert without_ids(choice) == {
        "content": "It is sunny.", "reasoning": "", "tool_calls": [], "finish_reason": "stop",
    }  # fmt: skip
    turn = [USER, "<tool_result>sunny</tool_result>", ASSISTANT, OPEN]
    bos, *rest = before
    assert engine.requests[0].prompt_token_ids == [
        bos, *engine.ids(MAX_EFFORT), *rest, *engine.ids(*PIECES), *engine.ids(*turn),
    ]  # fmt: skip


def test_without_thinking_and_tools_an_answer_is_content(server: RunningServer) -> None:
    choice = ask(server, ["Sunny, 22 °C.", EOS], messages=QUESTION)
    assert choice["message"]["content"] == "Sunny, 22 °C." and choice["finish_reason"] == "stop"
    assert not choice["message"].get("tool_calls")
    engine = scripted(server)
    assert engine.requests[0].prompt_token_ids == engine.ids(
        BOS, "Be brief.", USER, "Weather in Zürich?", ASSISTANT, CLOSE
    )
