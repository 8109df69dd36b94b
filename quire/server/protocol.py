"""uvicorn's HTTP/1.1 protocol with the limits it lacks.

Added: the size of a request's head and of everything that is not body (431), time to send it
(408), a cap on connections (503), a bound on clients that stop reading, and disconnects seen by
every request of a pipelining connection. Refusals are JSON like all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from quire.config.options import ServerOptions
from quire.server.errors import RETRY_AFTER_SECONDS, HttpError, error_object

# Chunked bodies of one-byte chunks have five bytes around each; more than this is not a body.
_OVERHEAD_PER_BODY_BYTE = 8
_CLOSE_SECONDS = 2.0


class LimitedProtocol(HttpToolsProtocol):
    """One client connection. Lives on the event loop.

    `on_refused` is told why a limit ended a connection: "connections", "head_size",
    "head_timeout", "malformed" or "stalled".
    """

    def __init__(
        self, *args: Any, options: ServerOptions, on_refused: Callable[[str], None], **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._options = options
        self._on_refused = on_refused
        self._refused = False
        self._in_head = False
        self._in_message = False
        self._head_bytes = 0  # of URL and headers, as parsed
        self._received = 0  # since the message began, or since its head was complete
        self._body_bytes = 0
        self._cycles: list[RequestResponseCycle] = []
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._options.max_connections:
            # Answered when its request arrives: closing earlier would reset the answer away.
            self._refused = True
            self.transport = transport
            self._head_timer = self.loop.call_later(_CLOSE_SECONDS, transport.abort)
            return
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._head_timer)
        _cancel(self._stall_timer)
        for cycle in self._cycles:  # uvicorn tells only the newest
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._refuse(503, "connections", "too many open connections")
            return
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # Data between requests may be the rest of a refused body, or empty lines: not for ever.
        if self._idle() and self._head_timer is None:
            self._start_head_timer()
        if not self._in_message:
            self._received = 0
        # A head, chunk sizes or trailers that go on and on.
        allowed = self._options.max_header_bytes + _OVERHEAD_PER_BODY_BYTE * self._body_bytes
        if self._received > allowed:
            self._refuse_head()

    def _idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self._options.max_header_bytes:
            raise ValueError("request head too large")  # the parser stops; see send_400_response

    def on_headers_complete(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = None
        self._in_head = False
        self._received = 0
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        super().on_headers_complete()
        if self.cycle is not None:
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    # Refusals

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this for whatever the parser refuses."""
        if self._head_bytes > self._options.max_header_bytes:
            self._refuse_head()
        else:
            self._refuse(400, "malformed", "this is not a valid HTTP/1.1 request")

    def _refuse_head(self) -> None:
        limit = self._options.max_header_bytes
        self._refuse(431, "head_size", f"the request line and headers exceed {limit} bytes")

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self._options.header_timeout, self._head_late)

    def _head_late(self) -> None:
        if not self._in_head:
            self._on_refused("head_timeout")
            self._close()
            return
        seconds = self._options.header_timeout
        self._refuse(
            408, "head_timeout", f"the request head was not complete after {seconds:g} seconds"
        )

    def _refuse(self, status: int, reason: str, message: str) -> None:
        """Answer unless another answer is under way on this connection, and close it."""
        self._on_refused(reason)
        if not self.transport.is_closing() and not any(c.response_started for c in self._running()):
            body = msgspec.json.encode(error_object(HttpError(status, reason, message)))
            retry = b"retry-after: %d\r\n" % RETRY_AFTER_SECONDS if status == 503 else b""
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\n%b"
                b"connection: close\r\n\r\n%b" % (STATUS_LINE[status], len(body), retry, body)
            )
        self._close()

    def _running(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _close(self) -> None:
        """Close, and not wait for ever for the client to take what is left."""
        self.transport.close()
        self.loop.call_later(_CLOSE_SECONDS, self.transport.abort)

    # Slow readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._options.request_timeout, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stall_timer)

    def _stalled(self) -> None:
        self._on_refused("stalled")
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """The connection was idle for idle_timeout."""
        if not self.transport.is_closing():
            self._close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
