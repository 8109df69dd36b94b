"""What the server says of itself: models, version, plan, health, readiness, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import quire
from quire.engine.api import EngineStats
from quire.errors import QuireError
from quire.server.errors import HttpError
from quire.server.metrics import CONTENT_TYPE
from quire.server.sse import encode
from quire.server.state import ServerState

# A step of a large prompt on a CPU takes minutes, and no request may take longer than
# --request-timeout's default; an engine that computes is heard every second.
MAX_STEP_SECONDS = 600.0
MAX_SILENCE_SECONDS = 30.0
STATS_TIMEOUT_SECONDS = 1.0


def _json(body: Any, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


def _model(state: ServerState) -> dict[str, Any]:
    info = state.ready_service().engine.info
    return {
        "id": state.model_name(),
        "object": "model",
        "created": int(info.started),
        "owned_by": "quire",
        "root": info.model,
        "max_model_len": info.max_model_len,
    }


async def models(state: ServerState, request: Request) -> Response:
    """GET /v1/models."""
    return _json({"object": "list", "data": [_model(state)]})


async def model(state: ServerState, request: Request) -> Response:
    """GET /v1/models/{id}. Raises HttpError 404."""
    state.check_model(request.path_params["id"])
    return _json(_model(state))


async def version(state: ServerState, request: Request) -> Response:
    """GET /version."""
    return _json({"version": quire.__version__})


async def plan(state: ServerState, request: Request) -> Response:
    """GET /v1/plan: what goes where on this machine, and why."""
    return _json(state.ready_service().engine.info.plan)


async def health(state: ServerState, request: Request) -> Response:
    """GET /health: 503 where the engine has ended, is not heard, or has been in the same step for
    very long. Loading and draining are healthy."""
    if state.service is None:
        return _json({"status": "loading", "phase": state.phase})
    try:
        stats = await _stats(state)
    except (QuireError, TimeoutError):
        return _json({"status": "dead"}, 503)
    if stats is None or stats.silence >= MAX_SILENCE_SECONDS or stats.step_age >= MAX_STEP_SECONDS:
        return _json({"status": "stuck"}, 503)
    return _json({"status": "draining" if state.draining else "ok"})


async def ready(state: ServerState, request: Request) -> Response:
    """GET /ready: 200 once requests are accepted, with the number of step shapes (CUDA graphs)
    that are still to be prepared. Raises HttpError 503 otherwise."""
    state.accepting_service()
    answer = await health(state, request)
    if answer.status_code != 200:
        raise HttpError(503, "not_ready", "the engine does not answer")
    stats = await _stats(state)
    return _json({"status": "ready", "graphs_to_capture": stats.to_warm if stats else 0})


async def metrics(state: ServerState, request: Request) -> Response:
    """GET /metrics, for Prometheus. Serves what the server itself knows if the engine is dead."""
    try:
        stats = await _stats(state)
    except (QuireError, TimeoutError):
        stats = None
    name = state.model_name() if state.service else ""
    return Response(state.metrics.render(stats, name), headers={"content-type": CONTENT_TYPE})


async def _stats(state: ServerState) -> EngineStats | None:
    if state.service is None:
        return None
    return await asyncio.wait_for(state.service.engine.stats(), STATS_TIMEOUT_SECONDS)
