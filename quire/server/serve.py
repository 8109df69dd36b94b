"""Run the server: bind, load the engine while /health already answers, serve, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn

from quire.config.options import Options, ServerOptions
from quire.errors import EngineDead, QuireError, UsageError
from quire.server.app import create_app
from quire.server.auth import check_binding, load_keys
from quire.server.protocol import LimitedProtocol
from quire.server.state import ServerState, Service
from quire.settings import settings

log = logging.getLogger("quire.server")

# Told the phase of loading and how much of it is done (0 to 1); /health and /ready show it.
Progress = Callable[[str, float], None]
ServiceFactory = Callable[[Progress], Awaitable[Service]]

# Of the kernel, per connection (they inherit it): a slow reader must not have it hold megabytes.
SEND_BUFFER_BYTES = 64 * 1024
FLUSH_SECONDS = 5.0  # for clients to take the rest of answers that are complete
CLOSE_SECONDS = 10.0  # for the engine to end
DEATH_NOTICE_SECONDS = 2.0  # a dead engine's clients get their error before the server ends
WATCH_INTERVAL_SECONDS = 1.0


def run(
    options: Options,
    factory: ServiceFactory,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """`serve` on an event loop of its own (uvloop where it is installed)."""
    loop_factory = None
    if sys.platform != "win32":
        with suppress(ImportError):  # an optional, faster loop with the same behaviour
            import uvloop

            loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(options, factory, on_ready))


async def serve(
    options: Options,
    factory: ServiceFactory,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then drain, and a second signal stops at once.

    `factory` is awaited once the socket listens. `on_ready` gets the URL when requests are
    accepted. Raises UsageError (keys, binding, port), what `factory` raises, and EngineDead
    where the engine ends by itself.
    """
    keys = load_keys(options.server, settings().api_key)
    check_binding(options.server, keys)
    sock = bind(options.server)
    url = _url(options.server.host, sock)
    state = ServerState(options, keys)
    server = _http_server(state, options.server)
    stop = _Stop()
    with stop.on_signals():
        tasks = [
            asyncio.create_task(server.serve(sockets=[sock])),
            asyncio.create_task(state.metrics.watch_event_loop()),
        ]
        try:
            await _listening(server, tasks[0])
            state.service = await stop.first(_load(state, factory))
            if state.service is not None:
                await _serve_ready(state, stop, on_ready, url)
                await stop.second(_drain(state, state.service, server))
        finally:
            await _shut_down(state, server, stop, tasks)


async def _listening(server: uvicorn.Server, task: asyncio.Task[None]) -> None:
    """Until the server accepts connections. Raises what its task raised."""
    while not server.started and not task.done():
        await asyncio.sleep(0.001)
    if task.done():
        task.result()
        raise UsageError("cannot_bind", "the HTTP server ended before it listened")


async def _load(state: ServerState, factory: ServiceFactory) -> Service:
    def progress(phase: str, fraction: float = 0.0) -> None:
        state.phase = f"{phase} {fraction:.0%}" if 0 < fraction < 1 else phase

    return await factory(progress)


async def _serve_ready(
    state: ServerState, stop: _Stop, on_ready: Callable[[str], None] | None, url: str
) -> None:
    """Until the first signal. Raises EngineDead."""
    gc.collect()
    gc.freeze()  # what start-up made stays: later collections need not look at it
    state.phase = "ready"
    if on_ready is not None:
        on_ready(url)
    await stop.first(_watch_engine(state))


async def _watch_engine(state: ServerState) -> None:
    """Raise EngineDead a moment after the engine has ended; never return."""
    engine = state.ready_service().engine
    while True:
        await asyncio.sleep(WATCH_INTERVAL_SECONDS)
        try:
            await engine.stats()
        except EngineDead:
            await asyncio.sleep(DEATH_NOTICE_SECONDS)
            raise
        except QuireError as error:
            log.warning("engine statistics: %s", error)


async def _drain(state: ServerState, service: Service, server: uvicorn.Server) -> None:
    """Refuse new work, finish what runs, and let answers reach their clients."""
    state.draining = True
    log.info("draining: no new requests")
    loop, limit = asyncio.get_running_loop(), state.options.server.drain_timeout
    deadline = loop.time() + limit
    await service.engine.drain(limit)
    if loop.time() >= deadline:
        log.warning("requests that still run after %g seconds are ended", limit)
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(FLUSH_SECONDS):
            while server.server_state.tasks:
                await asyncio.sleep(0.02)


async def _shut_down(
    state: ServerState, server: uvicorn.Server, stop: _Stop, tasks: list[asyncio.Task[None]]
) -> None:
    """End requests (each with an error of its own), engine and server; each step is bounded."""
    state.draining = True
    requests = list(server.server_state.tasks)
    for task in requests:
        task.cancel()
    if requests:
        await asyncio.wait(requests, timeout=1.0)
    if state.service is not None:
        await _close_service(state.service)
    server.should_exit = True
    server.force_exit = stop.forced
    await asyncio.wait(tasks[:1], timeout=CLOSE_SECONDS)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    state.close()


async def _close_service(service: Service) -> None:
    """End the engine and the template worker. What does not end in time is only logged."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await service.engine.close()
            if service.renderer is not None:
                await asyncio.to_thread(service.renderer.close)
    except (QuireError, TimeoutError) as error:
        log.error("the engine did not close: %s", error)


def bind(options: ServerOptions) -> socket.socket:
    """A bound socket. Raises UsageError where the address cannot be had."""
    host, port = options.host.strip("[]"), options.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError("bad_host", f"cannot listen on {host}", why=str(error)) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UsageError(
            "port_in_use" if error.errno == errno.EADDRINUSE else "cannot_bind",
            f"cannot listen on {host} port {port}",
            why=str(error.strerror),
            fix="stop what uses it, or choose another with --port (0 takes a free one)",
            field="port",
        ) from None
    return sock


def _url(host: str, sock: socket.socket) -> str:
    """The address for people; a wildcard address is shown as this machine's loopback."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host.strip("[]"), host)
    if ":" in shown and not shown.startswith("["):
        shown = f"[{shown}]"
    return f"http://{shown}:{sock.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: ours drain first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(state: ServerState, options: ServerOptions) -> _Server:
    debug = options.log_level == "debug"
    for name in ("uvicorn", "uvicorn.error"):
        # Its messages on clients' mistakes are counted in metrics; ours are on quire.server.
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.ERROR)
    protocol = partial(
        LimitedProtocol,
        options=options,
        on_refused=partial(state.metrics.count, "connections_refused"),
    )
    config = uvicorn.Config(
        create_app(state),
        http=protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=debug,
        server_header=False,
        proxy_headers=False,  # nothing here depends on a client's address
        timeout_keep_alive=options.idle_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
        backlog=2048,
    )
    return _Server(config)


class _Stop:
    """SIGTERM and SIGINT, counted."""

    def __init__(self) -> None:
        self._signals = (asyncio.Event(), asyncio.Event())

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Count signals meanwhile. Elsewhere than in the main thread they are not ours."""
        loop = asyncio.get_running_loop()
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._count)
        except (RuntimeError, ValueError, NotImplementedError):
            log.debug("no signal handlers outside the main thread")
            yield
            return
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    @property
    def forced(self) -> bool:
        """A second signal came."""
        return self._signals[1].is_set()

    def _count(self) -> None:
        first, second = self._signals
        (second if first.is_set() else first).set()

    async def first(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, or None once there was a signal."""
        return await self._race(work, self._signals[0])

    async def second(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, or None once there were two signals."""
        return await self._race(work, self._signals[1])

    async def _race(self, work: Coroutine[Any, Any, Any], event: asyncio.Event) -> Any:
        tasks = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
