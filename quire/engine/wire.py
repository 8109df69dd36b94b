"""Messages between a frontend and an engine process: msgpack arrays in length-prefixed frames.

A frame is a 4-byte little-endian length and that many bytes: one msgpack array whose first item
names the message and whose other items are its fields in the order below. The first message of an
engine is Hello; a frontend refuses another WIRE_VERSION. docs/wire.md is the schema. Bytes that do
not decode are refused with WireError and the connection is closed; nothing is interpreted.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from quire.engine.api import EngineInfo, EngineStats
from quire.params import SamplingParams
from quire.step import TokenLogprobs

WIRE_VERSION = 3
MAX_FRAME = 256 * 2**20
_LENGTH = struct.Struct("<I")


class WireError(Exception):
    """Bytes that are no message of ours."""


class Add(msgspec.Struct, tag="add", array_like=True):
    """Continue a prompt. On the wire it stands for all `params.n` choices of a request: prompt and
    parameters are sent and checked once. In the engine each choice is one, see `choices`."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    choice: int = 0
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    timeout: float | None = None
    bad_words: list[list[int]] = []

    def choices(self) -> list[Add]:
        """One Add per choice of the request whose first choice this is. Only the first asks for
        log-probabilities of the prompt, which are the same for all."""
        params = self.params
        if params.n > 1 and params.prompt_logprobs is not None:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        others = [
            msgspec.structs.replace(
                self, request_id=choice_id(self.request_id, i), params=params, choice=i
            )
            for i in range(1, params.n)
        ]
        return [self, *others]


def choice_id(request_id: str, choice: int) -> str:
    """The id of one choice of a request, in Abort and Delta."""
    return f"{request_id}#{choice}" if choice else request_id


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """Stop a request. `reason` is the finish reason; only the first `length` output tokens count
    (-1: all committed so far). Unknown or finished ids are ignored."""

    request_id: str
    reason: str = "abort"
    length: int = -1


class Start(msgspec.Struct, tag="start", array_like=True):
    """The first message to an engine process: its options by flat name."""

    options: dict[str, Any]


class ClearCache(msgspec.Struct, tag="clear_cache", array_like=True):
    """Forget all KV that no running request holds, on the device and in all tiers. CacheCleared of
    this number answers."""

    number: int


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """End the engine process."""


class Hello(msgspec.Struct, tag="hello", array_like=True):
    version: int


class Progress(msgspec.Struct, tag="progress", array_like=True):
    """A start-up phase has begun: its name, and the fraction done where known."""

    phase: str
    fraction: float = 0.0


class Ready(msgspec.Struct, tag="ready", array_like=True):
    info: EngineInfo


class CacheCleared(msgspec.Struct, tag="cache_cleared", array_like=True):
    """From now on nothing computed before ClearCache `number` is found."""

    number: int


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine process ends with this error (a QuireError's parts; traceback for the log)."""

    kind: str
    code: str
    what: str
    why: str = ""
    fix: str = ""


class Delta(msgspec.Struct, array_like=True, gc=False):
    """What a step gave one request. `error`: [code, what, why, fix] of a failed request.
    `cached_tokens` (and `cached_by_tier`: by where they came from, where there are tiers) are those
    of the whole request: in the deltas of its first token and of its end, and 0 in most others."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    cached_tokens: int = 0
    error: list[str] | None = None
    cached_by_tier: dict[str, int] | None = None


class Outputs(msgspec.Struct, tag="outputs", array_like=True):
    """Deltas of one step, and counters."""

    deltas: list[Delta]
    stats: EngineStats


ToEngine = Start | Add | Abort | ClearCache | Shutdown
FromEngine = Hello | Progress | Ready | Failed | Outputs | CacheCleared

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The bytes of a message on the wire."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages. `feed` returns the messages that are complete."""

    def __init__(
        self, decoder: msgspec.msgpack.Decoder[ToEngine] | msgspec.msgpack.Decoder[FromEngine]
    ):
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[ToEngine | FromEngine]:
        """Raises WireError for a frame that is too long or does not decode."""
        self._buffer += data
        messages = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME:
                raise WireError(f"a frame of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                body = bytes(self._buffer[start + _LENGTH.size : end])
                messages.append(self._decoder.decode(body))
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                raise WireError(f"a frame that is no message: {error}") from None
            start = end
        del self._buffer[:start]
        return messages
