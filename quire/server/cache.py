"""The KV cache for whoever runs the server: what it holds, and emptying it."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.engine.api import EngineStats
from quire.server.auth import is_loopback
from quire.server.errors import HttpError
from quire.server.sse import encode
from quire.server.state import ServerState


def check_admin(state: ServerState, tenant: str) -> None:
    """Raise HttpError 403 for a key that may not administer. Without keys everyone on this machine
    may, where others cannot reach the server."""
    server = state.options.server
    names = [name.strip() for name in server.admin_keys.split(",")]
    if not (tenant in names if state.keys else is_loopback(server.host)):
        raise HttpError(
            403,
            "not_admin",
            "this key may not look after the cache",
            why="all tenants share it",
            fix="use a key that --admin-keys names",
        )


async def show_cache(state: ServerState, request: Request) -> Response:
    """GET /v1/cache: what the device and each tier hold, and what they have done."""
    check_admin(state, request.scope["quire.tenant"])
    return _json(_shown(await state.ready_service().engine.stats()))


async def clear_cache(state: ServerState, request: Request) -> Response:
    """DELETE /v1/cache: forget all KV of earlier requests, in all tiers."""
    check_admin(state, request.scope["quire.tenant"])
    engine = state.ready_service().engine
    try:
        await engine.clear_cache()
    except TimeoutError:
        raise HttpError(503, "not_ready", "the engine is in a long step") from None
    return _json({"cleared": True})


def _shown(stats: EngineStats) -> dict[str, Any]:
    return {
        "device": {
            "blocks_used": stats.kv_blocks_used,
            "blocks_total": stats.kv_blocks_total,
            "query_tokens": stats.prefix_query_tokens,
            "hit_tokens": stats.prefix_hit_tokens,
        },
        "tiers": [msgspec.to_builtins(each) for each in stats.tiers],
    }


def _json(body: dict[str, Any]) -> Response:
    return Response(encode(body), media_type="application/json")
