"""The ASGI application: a route table, and one gate that every request passes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.config.options import Options
from quire.errors import QuireError
from quire.server import about
from quire.server.auth import KeyRing
from quire.server.cache import clear_cache, show_cache
from quire.server.chat import chat_completions
from quire.server.completions import completions
from quire.server.errors import HttpError, error_response, not_ready, unexpected
from quire.server.generation import ClientGone
from quire.server.sse import last_event
from quire.server.state import ServerState, Service
from quire.server.tokenize import detokenize, tokenize

Handler = Callable[[ServerState, Request], Awaitable[Response]]

# Method, path, handler. Every path needs a key unless auth.PUBLIC_PATHS has it.
ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/health", about.health),
    ("GET", "/ready", about.ready),
    ("GET", "/version", about.version),
    ("GET", "/metrics", about.metrics),
    ("GET", "/v1/models", about.models),
    ("GET", "/v1/models/{id:path}", about.model),
    ("GET", "/v1/plan", about.plan),
    ("GET", "/v1/cache", show_cache),
    ("DELETE", "/v1/cache", clear_cache),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
]
SHUTDOWN = not_ready("shutdown", "the server was stopped before the answer was complete")
_METRIC_PATHS = {path for _, path, _ in ROUTES}


def create_app(state: ServerState) -> Starlette:
    """The application over `state`, whose engine may come later."""
    app = Starlette(
        routes=[Route(path, _endpoint(state, run), methods=[m]) for m, path, run in ROUTES],
        middleware=[Middleware(Gate, state=state)],
        exception_handlers={HTTPException: _routing_error},
    )
    app.router.redirect_slashes = False  # its redirects are built from the Host header
    return app


def build_app(service: Service | None, options: Options, keys: KeyRing | None = None) -> Starlette:
    """The application over an engine that is ready (for tests and embedding)."""
    return create_app(ServerState(options, keys or KeyRing([]), service))


def _endpoint(state: ServerState, run: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler whose every failure is an answer."""

    async def endpoint(request: Request) -> Response:
        try:
            return await run(state, request)
        except QuireError as error:
            return error_response(error)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; the metrics count it
        except Exception as error:
            return error_response(unexpected(error))

    return endpoint


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405, raised by the router."""
    assert isinstance(error, HTTPException)
    path, method = request.scope["path"][:200], request.method
    exists = error.status_code == 405
    refusal = HttpError(
        error.status_code,
        "method_not_allowed" if exists else "not_found",
        f"{path} does not take {method}" if exists else f"there is nothing at {path}",
        headers=error.headers,
    )
    return error_response(refusal)


class Gate:
    """ASGI middleware around all routes: counts answers, and refuses who has no key."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Sets scope["quire.tenant"]. Decides by scope["path"], as the router does."""
        assert scope["type"] == "http", "the server has neither lifespan nor websockets"
        path = scope["path"] if scope["path"] in _METRIC_PATHS else "other"
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._state.metrics.count("http_responses", path, str(message["status"]))
            await send(message)

        try:
            scope["quire.tenant"] = self._state.keys.authorize(scope["path"], scope["headers"])
            await self._app(scope, receive, counted)
        except HttpError as error:
            await error_response(error)(scope, receive, counted)
        except asyncio.CancelledError:  # only `serve` cancels requests, when it stops
            if started:
                await send(last_event(SHUTDOWN))
            else:
                await error_response(SHUTDOWN)(scope, receive, counted)
