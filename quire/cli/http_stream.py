"""The least HTTP/1.1 client that can time a stream: asyncio, one request per connection."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_LINE = 2**20


class HttpFailure(Exception):
    """No usable answer; the text says why."""


@dataclass
class Reply:
    """An answer. `chunks`: (seconds of perf_counter, bytes) of its body as they came."""

    status: int
    sent: float
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.chunks)


class Client:
    """Talks to one server. `base_url` is like http://127.0.0.1:8000; a path in it is kept."""

    def __init__(self, base_url: str, key: str | None = None, timeout: float = 600.0):
        """Raises HttpFailure for a URL that is none."""
        try:
            parts = urlsplit(base_url)
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise HttpFailure(f"{base_url} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HttpFailure(f"{base_url} is not a URL like http://127.0.0.1:8000")
        self._tls = parts.scheme == "https"
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")
        self._netloc = parts.netloc.rpartition("@")[2]
        self._key = key
        self._timeout = timeout

    async def request(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        """GET, or POST of JSON. Raises HttpFailure."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._request(path, body)
        except TimeoutError:
            raise HttpFailure(f"no answer within {self._timeout:g} seconds") from None
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise HttpFailure(f"{type(error).__name__}: {error}") from None

    async def _request(self, path: str, body: dict[str, Any] | None) -> Reply:
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{'GET' if body is None else 'POST'} {self._prefix}{path} HTTP/1.1",
            f"Host: {self._netloc}",
            "Connection: close",
        ]
        if self._key is not None:
            head.append(f"Authorization: Bearer {self._key}")
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._tls or None, limit=MAX_LINE
        )
        try:
            sent = time.perf_counter()
            writer.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + data)
            await writer.drain()
            return await _read_reply(reader, sent)
        finally:
            writer.close()


async def _read_reply(reader: asyncio.StreamReader, sent: float) -> Reply:
    status_line = (await reader.readline()).split(b" ", 2)
    if len(status_line) < 2 or not status_line[0].startswith(b"HTTP/1."):
        raise ValueError("the server does not speak HTTP/1.1")
    reply = Reply(int(status_line[1]), sent)
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            data = await reader.readexactly(size + 2)
            reply.chunks.append((time.perf_counter(), data[:-2]))
    elif "content-length" in headers:
        data = await reader.readexactly(int(headers["content-length"]))
        reply.chunks.append((time.perf_counter(), data))
    else:
        while data := await reader.read(2**16):
            reply.chunks.append((time.perf_counter(), data))
    return reply


def events(reply: Reply) -> list[tuple[float, dict[str, Any]]]:
    """The JSON events of a server-sent stream, each with the time its last byte came.

    Raises HttpFailure for data that is no JSON object.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    rest = b""
    for when, data in reply.chunks:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                return found
            try:
                event = json.loads(payload)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise HttpFailure(f"a stream event is no JSON object: {payload[:100]!r}")
            found.append((when, event))
    raise HttpFailure("the stream ended without [DONE]")
