"""The four conversations that DeepSeek publishes with its encoder as tests (`encoding/tests`, MIT
licence), and the prompts that they become, by their hashes: those of the published files, which
end without a line end.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from quire.dialects.deepseek_v4 import ASSISTANT, BOS, EOS, USER, encode

VECTORS = Path(__file__).parent / "vectors"
PROMPTS = {  # length in characters, beginning of the SHA-256
    1: (2281, "9b366d9d2eac842a6e890594aac0b586"),
    2: (302, "ca66b01a1ac3a204bb032c928fb607d4"),
    3: (3021, "b3b1cd8748b7b90d3c6be6da3f786f12"),
    4: (1125, "60e1643840ba9e4aeede450feb7b0498"),
}


def conversation(number: int) -> tuple[list[dict[str, Any]], bool]:
    """Messages, and whether the model is to think."""
    found = json.loads((VECTORS / f"{number}.json").read_text())
    messages = found["messages"]
    if "tools" in found:
        messages[0]["tools"] = found["tools"]
    return messages, found["thinking"]


@pytest.mark.parametrize("number", PROMPTS)
def test_the_prompt_is_the_published_one(number: int) -> None:
    messages, thinking = conversation(number)
    prompt = encode(messages, thinking=thinking)
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert (len(prompt), digest[:32]) == PROMPTS[number]


def test_thoughts_of_the_first_answer_are_dropped() -> None:
    messages, thinking = conversation(2)
    first, second = messages[2], messages[4]
    assert encode(messages, thinking=thinking) == (
        f"{BOS}You are a helpful assistant.{USER}Hello{ASSISTANT}</think>{first['content']}{EOS}"
        f"{USER}What is the capital of France?{ASSISTANT}<think>{second['reasoning_content']}"
        f"</think>{second['content']}{EOS}"
    )
