"""A real server on a free port: in a thread (its engine can be reached) or in a process."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvloop
from fake_engine import FakeEngine, FakeRenderer, FakeTokenizer

from quire.config.options import EngineOptions, Options, ServerOptions
from quire.dialects.dialect import Dialect
from quire.server.serve import Progress, ServiceFactory, serve
from quire.server.state import Service
from quire.settings import child_environment

HERE = Path(__file__).parent


class RunningServer:
    def __init__(self, url: str, engine: FakeEngine, renderer: Any):
        self.url = url
        self.engine = engine
        self.renderer = renderer
        self.port = int(url.rsplit(":", 1)[1])

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, trust_env=False, **kwargs)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


def options(scheduling_policy: str = "fcfs", **server: Any) -> Options:
    return replace(
        Options(),
        server=ServerOptions(port=0, **server),
        engine=EngineOptions(scheduling_policy=scheduling_policy),
    )


@contextmanager
def running(
    opts: Options | None = None,
    renderer: Any = None,
    tokenizer: Any = None,
    dialect: Dialect | None = None,
    shows_markup: bool = False,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    start: ServiceFactory | None = None,
) -> Iterator[RunningServer]:
    """A server on a thread of its own, ended afterwards. `start`: makes the service instead, with
    a FakeEngine in it."""
    ready, urls, services = threading.Event(), [], []
    tasks: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []

    async def factory(progress: Progress) -> Service:
        if start is not None:
            services.append(await start(progress))
        else:
            shown, how = renderer or FakeRenderer(), dialect or Dialect()
            services.append(
                Service(FakeEngine(), tokenizer or FakeTokenizer(), shown, how, shows_markup)
            )
        return services[0]

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    async def main() -> None:
        task = asyncio.ensure_future(serve(opts or options(), factory, on_ready))
        tasks.append((asyncio.get_running_loop(), task))
        await asyncio.wait([task])
        if not task.cancelled() and task.exception():
            urls.append("")
            ready.set()

    def thread_main() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(main())

    thread = threading.Thread(target=thread_main, daemon=True)
    thread.start()
    assert ready.wait(10) and urls[0], "the server did not start"
    engine = services[0].engine
    assert isinstance(engine, FakeEngine)
    try:
        yield RunningServer(urls[0], engine, services[0].renderer)
    finally:
        loop, task = tasks[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"
        assert engine.closed


@contextmanager
def process(*flags: str, ready: bool = True) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`server_process.py` as a child, and its URL; killed afterwards if it still runs."""
    child = subprocess.Popen(
        [sys.executable, str(HERE / "server_process.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(PYTHONPATH=str(HERE.parent.parent)),
    )
    assert child.stdout is not None
    try:
        url = json.loads(child.stdout.readline())["url"] if ready else ""
        yield child, url
    finally:
        child.kill()
        child.communicate(timeout=10)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `condition` held within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def read_all(sock: socket.socket) -> bytes:
    """Everything until the peer closes (or resets)."""
    data = b""
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except ConnectionError:
        pass
    return data


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A raw request."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
