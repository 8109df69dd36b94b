"""Expressions of configs match as Python's do, whatever they are in time linear in the name."""

from __future__ import annotations

import random
import re
import time

import pytest

from quire.errors import ModelError
from quire.quant.config import read_scheme
from quire.quant.expressions import Expression
from quire.quant.names import Patterns

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.3.mlp.gate",
    "model.layers.13.mlp.gate_proj",
    "model.layers.3.self_attn.q_proj",
    "model.layers.3.mlp.experts.17.down_proj",
    "model.layers.18.mlp.shared_expert_gate",
    "model.layers.0.block_sparse_moe.gate",
    "visual.blocks.3.attn.qkv",
]
# As quantising tools and their documentation write them.
WRITTEN = [
    ".*lm_head",
    ".*mlp.gate$",
    ".*mlp[.]gate$",
    ".*self_attn.*",
    "visual.*",
    ".*shared_expert_gate$",
    ".*block_sparse_moe\\.gate",
    ".*\\.(q|k|v|o)_proj$",
    ".*(?:gate|up|down)_proj",
    "model\\.layers\\.[0-9]+\\.self_attn\\..*",
    ".*layers\\.\\d+\\.mlp\\.experts\\.\\d+\\..*",
    "^model[.]layers[.](0|1|2|3)[.]",
    ".*\\.18\\..*gate.*",
    ".*mlp\\.gate$|.*lm_head$",
    "model\\.layers\\.(?:[0-9]|1[0-2])\\.(self_attn|mlp).*",
    "[^.]+\\.embed_tokens",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_expressions_of_tools_mean_what_they_do_in_python(text: str) -> None:
    found = [Expression(text).matches(name) for name in NAMES]
    assert found == [re.match(text, name) is not None for name in NAMES]
    assert any(found)


def random_expression(rng: random.Random, depth: int = 0) -> str:
    pieces = []
    for _ in range(rng.randint(0 if depth else 1, 3)):
        kind = rng.random()
        if kind < 0.2 and depth < 2:
            inner = "|".join(random_expression(rng, depth + 1) for _ in range(rng.randint(1, 3)))
            pieces.append(rng.choice(["(", "(?:"]) + inner + ")")
        else:
            pieces.append(rng.choice(["a", "b", ".", "\\.", "[ab]", "[^a]", "\\d", "1", "\\w"]))
        pieces.append(rng.choice(["", "", "", "*", "+", "?", "*?", "+?"]))
    return "".join(pieces) + rng.choice(["", "", "", "$"])


def test_random_expressions_match_as_in_python() -> None:
    rng = random.Random(5)
    told = set()
    for _ in range(1000):
        text = random_expression(rng)
        names = ["".join(rng.choices("ab.1", k=rng.randint(0, 6))) for _ in range(8)]
        expression = Expression(text)
        for name in names:
            expected = re.match(text, name) is not None
            assert expression.matches(name) == expected, (text, name)
            told.add(expected)
    assert told == {True, False}


@pytest.mark.parametrize(
    "text",
    [
        ".?" * 32 + "." * 34 + "!",
        "(.|.)" * 36 + "!",
        ".*" * 6 + "!",
        "(.*)*!",
        "(a+)+b",
        "((x|.)+.?)+!" + ".*" * 90,
        "(" * 8 + ".+" + ")*" * 8 + "!",
    ],
)
def test_no_expression_takes_long(text: str) -> None:
    """`re` takes minutes or years for most of these."""
    patterns = Patterns([f"re:{text}"])
    start = time.perf_counter()
    for name in ("model.layers.0.mlp.experts.12.gate_proj", "a" * 512, "ax" * 256, "ab1." * 128):
        patterns.first(name)
    assert time.perf_counter() - start < 5


def test_names_that_are_too_long_mean_nothing() -> None:
    patterns = Patterns(["re:.*", "*x"])
    assert patterns.first("x" * 512) == 0 and patterns.first("x" * 513) is None


@pytest.mark.parametrize(
    "text",
    [
        "a{99999999999}",
        "a{3}",
        "(",
        ")",
        "a)",
        "*a",
        "a**",
        "a++",
        "(?=a)",
        "(?!.*experts).*",
        "(?P<n>a)",
        "(a)\\1",
        "(?i)a",
        "\\bgate",
        "a^b",
        "[a-",
        "[]a]",
        "[b-a]",
        "[a--b]",
        "a\\",
        "a" * 401,
        "(" * 199 + ")" * 199,
        "(?=" * 100 + "a" + ")" * 100,
    ],
)
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(ModelError) as caught:
        Expression(text)
    assert caught.value.code == "bad_quantization"


def test_keys_of_gptq_dynamic_are_expressions_too() -> None:
    config = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:a{99999999999}": {"bits": 4}}}
    found = read_scheme({"quantization_config": config})
    assert found is not None
    with pytest.raises(ModelError) as caught:
        found.find("x")
    assert caught.value.code == "bad_quantization"
