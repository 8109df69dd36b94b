"""Errors as HTTP answers, in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from quire.errors import EngineDead, Overloaded, QuireError

log = logging.getLogger("quire.server")

RETRY_AFTER_SECONDS = 1


class HttpError(QuireError):
    """A refusal with its own HTTP status and headers."""

    def __init__(
        self,
        status: int,
        code: str,
        what: str,
        why: str = "",
        fix: str = "",
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(code, what, why, fix, field)
        self.status = status
        self.headers = dict(headers or {})


def not_ready(code: str, what: str, retry_after: float = RETRY_AFTER_SECONDS) -> HttpError:
    """503 for a server that loads or drains."""
    headers = {"Retry-After": str(max(1, round(retry_after)))}
    return HttpError(503, code, what, headers=headers)


def error_object(error: QuireError) -> dict[str, Any]:
    """The body of an error answer.

    A server-side cause (paths, stack traces of the engine) goes to the log, not to the client.
    """
    parts = [error.what, error.why, error.fix]
    if error.status >= 500 and not isinstance(error, Overloaded | HttpError):
        parts = [error.what]
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    message = "; ".join(part for part in parts if part)
    body = {"message": message, "type": kind, "param": error.field, "code": error.code}
    return {"error": body}


def error_response(error: QuireError) -> Response:
    """`error` as an answer; logs the cause of a server-side one."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, Overloaded | EngineDead):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if error.status >= 500 and not isinstance(error, Overloaded | HttpError):
        log.error("%s: %s", error.code, error)
    body = msgspec.json.encode(error_object(error))
    return Response(body, error.status, headers, media_type="application/json")


def unexpected(error: Exception) -> QuireError:
    """Log a defect of ours with a reference, and the error that shows only that reference."""
    reference = secrets.token_hex(4)
    log.error("internal error %s", reference, exc_info=error)
    return QuireError("internal_error", f"internal error; the server's log has it as {reference}")
