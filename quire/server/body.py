"""Request bodies: refused by size before and while they are read, bounded in time and in total."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from quire.config.options import ServerOptions
from quire.errors import Overloaded
from quire.server.errors import HttpError

# Bodies held at the same time by all requests, in multiples of the largest allowed body.
BODIES_IN_MEMORY = 16


class BodyBudget:
    """Bytes of request bodies in memory, all requests together. Lives on the event loop."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0

    @contextmanager
    def hold(self) -> Iterator[BodyHold]:
        """A share of the budget, given back at the end."""
        hold = BodyHold(self)
        try:
            yield hold
        finally:
            self.held -= hold.bytes


class BodyHold:
    """What one request holds of a BodyBudget."""

    def __init__(self, budget: BodyBudget):
        self._budget = budget
        self.bytes = 0

    def grow(self, count: int) -> None:
        """Take `count` bytes more. Raises Overloaded where the budget is spent."""
        if self._budget.held + count > self._budget.limit:
            raise Overloaded(
                "bodies_in_memory",
                "too many large requests at the same time",
                fix="send this request again later",
            )
        self._budget.held += count
        self.bytes += count


async def read_body(request: Request, options: ServerOptions, hold: BodyHold) -> bytes:
    """The body of a JSON request.

    Raises HttpError: 415 (not JSON), 413 (above max_body_bytes, before reading where
    Content-Length says so), 408 (not complete after body_timeout); Overloaded.
    """
    _check_headers(request, options.max_body_bytes)
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(options.body_timeout):
            async for chunk in request.stream():
                if hold.bytes + len(chunk) > options.max_body_bytes:
                    raise _too_large(options.max_body_bytes)
                hold.grow(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise HttpError(
            408,
            "body_timeout",
            f"the request body was not complete after {options.body_timeout:g} seconds",
            headers={"Connection": "close"},
        ) from None
    return b"".join(chunks)


def _check_headers(request: Request, limit: int) -> None:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise HttpError(
            415,
            "unsupported_media_type",
            "the request body must be JSON",
            fix="send Content-Type: application/json",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "unsupported_media_type", "compressed request bodies are not accepted")
    length = request.headers.get("content-length")
    if length is not None and (not length.isdecimal() or int(length[:20]) > limit):
        raise _too_large(limit)


def _too_large(limit: int) -> HttpError:
    return HttpError(
        413,
        "body_too_large",
        f"the request body is larger than {limit} bytes",
        fix="send less, or start the server with a larger --max-body-bytes",
    )


def new_budget(options: ServerOptions) -> BodyBudget:
    """The budget of a server with these options."""
    return BodyBudget(BODIES_IN_MEMORY * options.max_body_bytes)
