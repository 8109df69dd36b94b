"""The asyncio client of an engine process: launches it, speaks the wire, serves many requests."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import msgspec

from quire import errors
from quire.engine import wire
from quire.engine.admission import check_request
from quire.engine.api import EngineInfo, EngineStats, GenerateRequest
from quire.engine.collect import Collector
from quire.errors import EngineDead, Overloaded, QuireError, UsageError
from quire.outputs import RequestDelta
from quire.settings import child_environment
from quire.tokenization.tokenizer import Tokenizer

log = logging.getLogger("quire.engine")

Progress = Callable[[str, float], None]
START_SECONDS = 1800.0
END_SECONDS = 5.0
CLEAR_SECONDS = 60.0  # a step of a long prompt comes first
PROMPT_POSITIONS = 32  # of a prompt's log-probabilities that are made into objects at a time


class EngineClient:
    """Implements AsyncEngine over a child process. Lives on one event loop.

    `launch` starts the process; `tokenizer` (None: token ids only) may be set until the first
    request.
    """

    info: EngineInfo

    def __init__(self, process: subprocess.Popen[bytes]):
        self.tokenizer: Tokenizer | None = None
        self._process = process
        self._writer: asyncio.StreamWriter
        self._reader: asyncio.StreamReader
        self._reading: asyncio.Task[None] | None = None
        self._running: dict[str, _Running] = {}
        self._owners: dict[str, _Running] = {}
        self._stats = EngineStats()
        self._stats_time = time.monotonic()
        self._dead: EngineDead | None = None
        self._closing = False
        self._clearing: dict[int, asyncio.Future[None]] = {}

    @classmethod
    async def launch(
        cls, options: dict[str, Any], progress: Progress | None = None
    ) -> EngineClient:
        """Start an engine process with these options (flat names) and wait until it is ready.

        Raises the QuireError that ended its start-up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "quire.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
            )
        client = cls(process)
        try:
            client._reader, client._writer = await asyncio.open_connection(sock=ours)
            client._send(wire.Start(options))
            await asyncio.wait_for(client._await_ready(progress), START_SECONDS)
        except BaseException:
            await client.close()
            raise
        client._reading = asyncio.create_task(client._read())
        return client

    async def _await_ready(self, progress: Progress | None) -> None:
        self._frames = wire.FrameReader(wire.from_engine_decoder)
        while True:
            data = await self._reader.read(2**18)
            if not data:
                raise self._death("the engine process ended during start-up")
            for message in self._frames.feed(data):
                if isinstance(message, wire.Hello) and message.version != wire.WIRE_VERSION:
                    raise QuireError(
                        "wire_version",
                        f"the engine speaks wire version {message.version}, "
                        f"this frontend {wire.WIRE_VERSION}",
                        fix="install one version of quire",
                    )
                if isinstance(message, wire.Progress) and progress is not None:
                    progress(message.phase, message.fraction)
                if isinstance(message, wire.Failed):
                    raise _failure(message)
                if isinstance(message, wire.Ready):
                    self.info = message.info
                    return

    # -- requests ----------------------------------------------------------------------------

    def check(self, requests: Sequence[GenerateRequest]) -> None:
        """Raise what the engine would refuse, without asking it."""
        if self._dead is not None:
            raise self._dead
        info = self.info
        for each in requests:
            check_request(each.prompt_token_ids, each.params, info.max_model_len, info.vocab_size)
        new = sum(each.params.n for each in requests)
        waiting = len(self._owners) + new - int(info.plan["max_num_seqs"])
        if waiting > info.max_queue:
            raise Overloaded(
                "queue_full",
                f"with this request {waiting} would be waiting, {info.max_queue} may",
                fix="try again later" + (", or with fewer prompts and choices" if new > 1 else ""),
            )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[RequestDelta, None]:
        """See AsyncEngine.generate."""
        self.check([request])
        if request.request_id in self._running:
            raise UsageError("duplicate_request", f"request id {request.request_id!r} is running")
        running = _Running(Collector(request, self.tokenizer))
        self._running[request.request_id] = running
        for request_id in running.collector.request_ids:
            self._owners[request_id] = running
        self._send(running.collector.add())
        try:
            while True:
                await running.news.wait()
                running.news.clear()
                if self._dead is not None:
                    raise self._dead
                delta = running.collector.take()
                if delta is not None:
                    yield delta
                    if delta.finished:
                        return
        finally:
            for request_id in running.collector.request_ids:
                self._owners.pop(request_id, None)
                if self._dead is None:
                    self._send(wire.Abort(request_id))
            self._running.pop(request.request_id, None)

    # -- state -------------------------------------------------------------------------------

    async def stats(self) -> EngineStats:
        """See AsyncEngine.stats. Raises EngineDead."""
        if self._dead is not None:
            raise self._dead
        silence = time.monotonic() - self._stats_time
        age = self._stats.step_age + silence
        return msgspec.structs.replace(self._stats, step_age=age, silence=silence)

    async def clear_cache(self) -> None:
        """See AsyncEngine.clear_cache."""
        if self._dead is not None:
            raise self._dead
        number = max(self._clearing, default=0) + 1
        done = self._clearing[number] = asyncio.get_running_loop().create_future()
        self._send(wire.ClearCache(number))
        try:
            await asyncio.wait_for(done, CLEAR_SECONDS)
        finally:
            del self._clearing[number]

    async def drain(self, timeout: float) -> None:
        """See AsyncEngine.drain."""
        deadline = time.monotonic() + timeout
        while self._running and self._dead is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """See AsyncEngine.close."""
        self._closing = True
        if hasattr(self, "_writer"):
            if self._process.poll() is None:
                self._send(wire.Shutdown())
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
        await asyncio.to_thread(self._end_process)

    def _end_process(self) -> None:
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    # -- the wire ----------------------------------------------------------------------------

    def _send(self, message: wire.ToEngine) -> None:
        self._writer.write(wire.frame(message))

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(2**18):
                for message in self._frames.feed(data):
                    await self._take(message)
            self._die(self._death("the engine process ended"))
        except (OSError, wire.WireError) as error:
            self._die(self._death(str(error)))
        except Exception as error:  # whatever it is, nobody may wait for ever
            log.error("reading from the engine failed", exc_info=error)
            self._die(self._death(f"reading from the engine failed: {error}"))

    async def _take(self, message: wire.ToEngine | wire.FromEngine) -> None:
        if isinstance(message, wire.Outputs):
            self._stats, self._stats_time = message.stats, time.monotonic()
            for delta in message.deltas:
                for piece in _pieces(delta):
                    self._deliver(piece)
                    if piece.prompt_logprobs:
                        await asyncio.sleep(0)  # others may use the event loop between them
        elif isinstance(message, wire.CacheCleared):
            done = self._clearing.get(message.number)
            if done is not None and not done.done():
                done.set_result(None)
        elif isinstance(message, wire.Failed):
            self._die(EngineDead("engine_dead", message.what, message.why, message.fix))

    def _deliver(self, delta: wire.Delta) -> None:
        running = self._owners.get(delta.request_id)
        if running is None:
            return
        try:
            aborts = running.collector.push(delta)
        except Exception as error:  # a defect of ours: this request's, not all others'
            log.error("an answer could not be taken", exc_info=error)
            why = f"{type(error).__name__}: {error}"
            aborts = running.collector.fail(
                QuireError("internal_error", "the engine's answer could not be taken", why=why)
            )
        for abort in aborts:
            self._owners.pop(abort.request_id, None)
            self._send(abort)
        if delta.finish_reason is not None:
            self._owners.pop(delta.request_id, None)
        if running.collector.changed:
            running.news.set()

    def _death(self, what: str) -> EngineDead:
        code = self._process.poll()
        why = f"exit code {code}" if code is not None else "its connection closed"
        return EngineDead("engine_dead", what, why, fix="see the engine's log above")

    def _die(self, error: EngineDead) -> None:
        if self._dead is None and not self._closing:
            self._dead = error
        for running in self._running.values():
            running.news.set()
        for done in self._clearing.values():
            if not done.done():
                done.set_exception(error)


class _Running:
    """A request being served."""

    def __init__(self, collector: Collector):
        self.collector = collector
        self.news = asyncio.Event()


def _pieces(delta: wire.Delta) -> Iterator[wire.Delta]:
    """A delta with log-probabilities of a long prompt as several, the last with all the rest."""
    found = delta.prompt_logprobs or []
    last = max(0, len(found) - 1) // PROMPT_POSITIONS * PROMPT_POSITIONS
    for start in range(0, last, PROMPT_POSITIONS):
        some = found[start : start + PROMPT_POSITIONS]
        yield wire.Delta(
            delta.request_id, [], prompt_logprobs=some, cached_tokens=delta.cached_tokens
        )
    yield msgspec.structs.replace(delta, prompt_logprobs=found[last:]) if last else delta


def _failure(message: wire.Failed) -> QuireError:
    kind = getattr(errors, message.kind, QuireError)
    return kind(message.code, message.what, message.why, message.fix)
