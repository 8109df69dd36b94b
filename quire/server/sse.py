"""Server-sent events: frames built from a prefix made once per answer, and the response that
streams them until the client leaves."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from quire.errors import QuireError
from quire.server.calls import Call
from quire.server.errors import error_object, unexpected
from quire.server.generation import ClientGone, until_disconnect

log = logging.getLogger("quire.server")

DONE = b"data: [DONE]\n\n"
encode = msgspec.json.Encoder().encode


class FrameWriter:
    """Frames of one answer: everything but the choice is the same bytes in each."""

    def __init__(self, call: Call, kind: str):
        head = {
            "id": call.id,
            "object": kind,
            "created": call.created,
            "model": call.model,
            "system_fingerprint": call.fingerprint,
        }
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if call.include_usage else b"]}\n\n"

    def choice(self, index: int, content: bytes, finish: str | None, end: bytes = b"") -> bytes:
        """A frame with one choice. `content` and `end` are its further fields as JSON text,
        `content` ending and `end` beginning with a comma."""
        reason = b'"%b"' % finish.encode() if finish else b"null"
        return b'%b{"index":%d,%b"finish_reason":%b%b}%b' % (
            self._head,
            index,
            content,
            reason,
            end,
            self._tail,
        )

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last frame of `stream_options.include_usage`: no choice, all counts."""
        return b'%b],"usage":%b}\n\n' % (self._head, encode(usage))


def error_frame(error: QuireError) -> bytes:
    """A terminal frame with OpenAI's error object; the `openai` client raises it."""
    return b"data: %b\n\n" % encode(error_object(error))


def last_event(error: QuireError) -> Message:
    """The ASGI message that ends a stream with an error."""
    return {"type": "http.response.body", "body": error_frame(error), "more_body": False}


class EventStream(Response):
    """Streams frames. When the client leaves, `frames` is closed, which aborts the request.

    An error after the start is one error frame, and nothing after it.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], request_id: str):
        super().__init__(
            headers={
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "x-request-id": request_id,
            }
        )
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            await until_disconnect(receive, self._stream(send))
        except ClientGone:
            log.debug("client left a stream")

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._frames) as frames:
            await send(start)
            try:
                async for frame in frames:
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
            except QuireError as error:
                log.error("a stream failed: %s: %s", error.code, error)
                body = error_frame(error)
            except Exception as error:
                body = error_frame(unexpected(error))
            else:
                body = DONE
        await send({"type": "http.response.body", "body": body, "more_body": False})
