"""Messages survive the wire however it is cut; hostile bytes give WireError and nothing else."""

import random
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.engine import wire
from quire.engine.api import EngineInfo, EngineStats
from quire.engine.wire import (
    MAX_FRAME,
    Abort,
    Add,
    Delta,
    Failed,
    FrameReader,
    Hello,
    Outputs,
    Progress,
    Ready,
    Shutdown,
    WireError,
    frame,
    from_engine_decoder,
    to_engine_decoder,
)
from quire.params import SamplingParams
from quire.step import TokenLogprobs
from quire.tiers.counts import TierStats

PARAMS = SamplingParams(n=2, seed=2**64 - 1, stop="é", logit_bias={5: -1.5}, bad_words=["no"])
INFO = EngineInfo("m", 2048, 32000, "f", {"a": [1, None, {"b": 2.5}]}, {"temperature": 0.6})
TO_ENGINE: list[Any] = [
    wire.Start({"model": "m", "port": None, "ratio": 0.5}),
    Add("r", [1, 2**31 - 1, 0], PARAMS, seed=2**64 - 1, choice=1, timeout=1.5),
    Add("é\u2028", [], SamplingParams(), seed=-(2**63), bad_words=[[1], [2, 3]], cache_salt="s"),
    Abort("r", "stop", 7),
    Abort("r"),
    wire.ClearCache(3),
    Shutdown(),
]
FROM_ENGINE: list[Any] = [
    Hello(wire.WIRE_VERSION),
    Progress("weights", 0.25),
    Ready(INFO),
    Failed("ModelError", "bad_weights", "what", "why", "fix"),
    Outputs(
        [
            Delta("r", [1, 2], [TokenLogprobs([1, 9], [-0.1, -3.0], [1, 2])], cached_tokens=32),
            Delta("q", [], finish_reason="error", error=["c", "w", "", ""]),
            Delta("p", [3], cached_tokens=48, cached_by_tier={"device": 16, "fs": 32}),
        ],
        EngineStats(waiting=3, step_age=0.5, tiers=[TierStats("fs", 9, errors={"EIO": 1})]),
    ),
    wire.CacheCleared(3),
]
BOTH = [
    pytest.param(to_engine_decoder, TO_ENGINE, id="to engine"),
    pytest.param(from_engine_decoder, FROM_ENGINE, id="from engine"),
]


@pytest.mark.parametrize(("decoder", "messages"), BOTH)
def test_messages_come_back_equal_and_in_order(decoder: Any, messages: list[Any]) -> None:
    assert FrameReader(decoder).feed(b"".join(map(frame, messages))) == messages


@pytest.mark.parametrize(("decoder", "messages"), BOTH)
def test_a_stream_may_be_cut_at_every_byte(decoder: Any, messages: list[Any]) -> None:
    stream = b"".join(map(frame, messages))
    for cut in range(len(stream) + 1):
        reader = FrameReader(decoder)
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == messages
    reader = FrameReader(decoder)
    assert [m for i in range(len(stream)) for m in reader.feed(stream[i : i + 1])] == messages


def test_every_message_type_is_tried() -> None:
    for union, messages in ((wire.ToEngine, TO_ENGINE), (wire.FromEngine, FROM_ENGINE)):
        assert set(union.__args__) == {type(m) for m in messages}


@pytest.mark.parametrize(("decoder", "messages"), BOTH)
def test_messages_of_the_other_direction_are_refused(decoder: Any, messages: list[Any]) -> None:
    others = TO_ENGINE if messages is FROM_ENGINE else FROM_ENGINE
    for message in others:
        with pytest.raises(WireError):
            FrameReader(decoder).feed(frame(message))


def test_the_layout_of_an_abort_is_the_documented_one() -> None:
    # fixarray of 4, "abort", "r", "stop", 7
    body = b"\x94\xa5abort\xa1r\xa4stop\x07"
    assert frame(Abort("r", "stop", 7)) == struct.pack("<I", len(body)) + body


def test_fields_of_a_later_version_are_passed_over() -> None:
    body = msgspec.msgpack.encode(["abort", "r", "stop", 7, {"later": [1]}])
    reader = FrameReader(to_engine_decoder)
    assert reader.feed(struct.pack("<I", len(body)) + body) == [Abort("r", "stop", 7)]


# -- hostile bytes ---------------------------------------------------------------------------------


def refused_or_decoded(decoder: Any, data: bytes) -> bool:
    try:
        FrameReader(decoder).feed(data)
    except WireError:
        return True
    return False


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


NESTED = b"\x91" * 100_000 + b"\xc0"
HOSTILE = {
    "empty": b"",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "unknown tag": msgspec.msgpack.encode(["run", "rm"]),
    "no tag": msgspec.msgpack.encode([]),
    "map": msgspec.msgpack.encode({"abort": "r"}),
    "missing field": msgspec.msgpack.encode(["abort"]),
    "wrong type": msgspec.msgpack.encode(["abort", 5]),
    "bytes as text": msgspec.msgpack.encode(["abort", b"r"]),
    "invalid utf-8": b"\x92\xa5abort\xa2\xff\xfe",
    "lone surrogate": b"\x92\xa5abort\xa3\xed\xa0\x80",
    "trailing bytes": msgspec.msgpack.encode(["abort", "r"]) + b"\x00",
    "cut short": msgspec.msgpack.encode(["abort", "request"])[:-1],
    "array of 2^32-1 items": b"\x95\xa3add\xa1r\xdd\xff\xff\xff\xff",
    "map of 2^32-1 items": b"\x95\xa3add\xa1r\x91\x01\xdf\xff\xff\xff\xff",
    "text of 2^32-1 bytes": b"\x92\xa5abort\xdb\xff\xff\xff\xff",
    "deep nesting": NESTED,
    "deep options": b"\x92\xa5start\x81\xa1a" + NESTED,
    "map as a key": b"\x92\xa5start\x81\xa1a\x81\x80\x01",
    "array with a map as a key": b"\x92\xa5start\x81\xa1a\x81\x91\x80\x01",
    "bad timestamp": b"\x92\xa5start\x81\xa1a\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    "NaN penalty": msgspec.msgpack.encode(["add", "r", [1], {"presence_penalty": float("nan")}, 1]),
    "params out of range": msgspec.msgpack.encode(["add", "r", [1], {"top_p": 7.0}, 1]),
    "stop strings of the wrong type": msgspec.msgpack.encode(["add", "r", [1], {"stop": [1]}, 1]),
    "token that is no integer": msgspec.msgpack.encode(["add", "r", [1.5], {}, 1]),
    "token beyond 64 bits": b"\x95\xa3add\xa1r\x91\xcf\xff\xff\xff\xff\xff\xff\xff\x80\x01",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_frames_are_refused(body: bytes) -> None:
    assert refused_or_decoded(to_engine_decoder, framed(body))


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="bytes"):
        FrameReader(to_engine_decoder).feed(struct.pack("<I", MAX_FRAME + 1))
    assert FrameReader(to_engine_decoder).feed(struct.pack("<I", MAX_FRAME)) == []


def test_refusals_say_what_is_wrong() -> None:
    body = msgspec.msgpack.encode(["add", "r", [1], {"top_p": 7.0}, 1])
    with pytest.raises(WireError, match="top_p"):
        FrameReader(to_engine_decoder).feed(framed(body))


@pytest.mark.parametrize("decoder", [to_engine_decoder, from_engine_decoder])
def test_changed_bytes_of_real_messages_are_decoded_or_refused(decoder: Any) -> None:
    rng, refused = random.Random(0), 0
    for _ in range(6000):
        message = rng.choice(TO_ENGINE if decoder is to_engine_decoder else FROM_ENGINE)
        data = bytearray(frame(message)[4:])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        refused += refused_or_decoded(decoder, framed(bytes(data)))
    assert 1000 < refused < 6000


@settings(max_examples=300, deadline=None)
@example(b"")
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for decoder in (to_engine_decoder, from_engine_decoder):
        refused_or_decoded(decoder, data)
        refused_or_decoded(decoder, framed(data))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(
    tag=st.sampled_from(["start", "add", "abort", "hello", "ready", "failed", "outputs"]),
    fields=st.lists(JUNK, max_size=8),
)
def test_well_formed_junk_is_decoded_or_refused(tag: str, fields: list[Any]) -> None:
    data = framed(msgspec.msgpack.encode([tag, *fields]))
    for decoder in (to_engine_decoder, from_engine_decoder):
        refused_or_decoded(decoder, data)


def test_an_add_stands_for_all_choices_and_one_copy_of_their_parameters() -> None:
    params = SamplingParams(n=3, prompt_logprobs=2, stop="x")
    add = Add("r", [5, 6], params, seed=9, tenant="t", bad_words=[[1]])
    choices = add.choices()
    assert [c.request_id for c in choices] == ["r", "r#1", "r#2"]
    assert [c.choice for c in choices] == [0, 1, 2]
    assert [c.params.prompt_logprobs for c in choices] == [2, None, None]
    assert choices[1].params is choices[2].params
    assert all((c.seed, c.tenant, c.bad_words) == (9, "t", [[1]]) for c in choices)
    assert all(c.prompt_token_ids is add.prompt_token_ids for c in choices)
