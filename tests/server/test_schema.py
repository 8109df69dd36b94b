"""Bodies: whatever comes, the answer is checked values or a UsageError; the docs are complete."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import UsageError
from quire.params import LIMITS
from quire.server.app import ROUTES
from quire.server.prompts import parse_prompts
from quire.server.schemas import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

SCHEMAS = [COMPLETION, CHAT, TOKENIZE, DETOKENIZE]
NAMES = sorted({n for s in SCHEMAS for n in [*s.fields, *s.ignored, *s.not_built]})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, max_size=5)


def parse_all(body: bytes) -> None:
    for schema in SCHEMAS:
        for allow_unknown in (False, True):
            try:
                values = schema.parse(body, allow_unknown)
                if isinstance(raw := values.get("prompt"), msgspec.Raw):
                    prompts = parse_prompts(bytes(raw), 100)
                    assert all(isinstance(p, str | list) for p in prompts)
            except UsageError as error:
                assert error.code in ("invalid_value", "invalid_json", "unknown_field",
                                      "not_supported", "context_length_exceeded")  # fmt: skip
            else:
                assert set(values) <= set(schema.fields)


@given(BODIES)
@settings(max_examples=150, deadline=None)
def test_any_json_object_is_checked_or_refused(body: dict[str, object]) -> None:
    parse_all(msgspec.json.encode(body))


@given(st.binary(max_size=50) | st.text(alphabet='{}[]":,\\u0d8eE+-.1 ntf', max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_checked_or_refused(body: bytes | str) -> None:
    raw = body if isinstance(body, bytes) else body.encode()
    parse_all(raw)
    parse_all(b'{"prompt": ' + raw + b', "stop": ' + raw + b"}")


def test_every_sampling_field_is_served_by_both_routes() -> None:
    assert set(LIMITS) <= set(COMPLETION.fields) and set(LIMITS) <= set(CHAT.fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCS


@pytest.mark.parametrize("path", [path for _, path, _ in ROUTES])
def test_every_route_is_documented(path: str) -> None:
    assert path.replace("{id:path}", "{id}") in DOCS


DOCS = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text()
