"""The engine process: `python -m quire.engine.process FD`.

FD is one end of a Unix stream socket. The first message it gets is Start, the first it sends is
Hello; quire/engine/wire.py has the rest. The process ends when the other end of the socket
closes, so it never outlives its frontend.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable

import msgspec

from quire.engine import wire
from quire.engine.api import EngineStats
from quire.engine.core import EngineCore
from quire.errors import QuireError

HEARTBEAT_SECONDS = 1.0
EXIT_PARENT_GONE = 3

log = logging.getLogger("quire.engine")


class EngineProcess:
    """Reads messages on a thread, runs the core on the main thread."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._inbox: queue.SimpleQueue[wire.ToEngine] = queue.SimpleQueue()
        self._ending = False
        self._sending = threading.Lock()
        # What the reading thread tells while a step computes: the latest counters, when the main
        # thread's loop last turned, and when the frontend was last told anything.
        self._stats: EngineStats | None = None
        self._turned = self._told = time.monotonic()

    def run(self) -> int:
        """Serve until told to end. Returns the exit code."""
        try:
            self._send(wire.Hello(wire.WIRE_VERSION))
            threading.Thread(target=self._read, name="engine-reader", daemon=True).start()
            start = self._inbox.get()
            if not isinstance(start, wire.Start):
                raise QuireError("protocol", "the first message must be Start")
            core = self._start(start)
            self._serve(core)
            core.close()
        except QuireError as error:
            self._fail(type(error).__name__, error)
            return 1
        except BrokenPipeError:
            return EXIT_PARENT_GONE
        except Exception as error:
            log.error("the engine ends:\n%s", traceback.format_exc())
            reason = f"{type(error).__name__}: {error}"
            self._fail("QuireError", QuireError("engine_failed", "the engine failed", why=reason))
            return 1
        return 0

    def _start(self, start: wire.Start) -> EngineCore:
        from quire.config.parse import build_options
        from quire.engine.startup import start_engine

        options = build_options(start.options)
        logging.getLogger().setLevel(options.server.log_level.upper())
        engine = start_engine(options, lambda phase, done: self._send(wire.Progress(phase, done)))
        gc.collect()
        gc.freeze()  # what start-up made stays: later collections need not look at it
        self._send(wire.Ready(engine.info))
        return engine.core

    def _serve(self, core: EngineCore) -> None:
        deltas: list[wire.Delta] = []
        self._stats = core.stats()
        while not self._ending:
            self._turned = time.monotonic()
            for message in self._messages(wait=self._may_wait(core)):
                deltas += self._handle(core, message)
            deltas += core.step()
            now = time.monotonic()
            if deltas or now - self._told >= HEARTBEAT_SECONDS:
                self._stats, self._told = core.stats(), now
                self._send(wire.Outputs(deltas, self._stats))
                deltas = []
            if core.idle:
                core.check_when_idle()

    def _may_wait(self, core: EngineCore) -> bool:
        """Whether there is nothing to do until a message comes."""
        return core.idle and not core.warm() and core.settle()

    def _messages(self, wait: bool) -> Iterable[wire.ToEngine]:
        """All messages that are there; with `wait`, blocks up to a heartbeat for the first."""
        try:
            yield self._inbox.get(block=wait, timeout=HEARTBEAT_SECONDS if wait else None)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, core: EngineCore, message: wire.ToEngine) -> list[wire.Delta]:
        """Returns refusals."""
        if isinstance(message, wire.Add):
            return core.add(message)
        if isinstance(message, wire.Abort):
            core.abort(message)
        elif isinstance(message, wire.ClearCache):
            core.clear_cache()
            self._send(wire.CacheCleared(message.number))
        elif isinstance(message, wire.Shutdown):
            self._ending = True
        return []

    def _send(self, message: wire.FromEngine) -> None:
        with self._sending:
            self._connection.sendall(wire.frame(message))

    def _fail(self, kind: str, error: QuireError) -> None:
        self._send(wire.Failed(kind, error.code, error.what, error.why, error.fix))

    def _read(self) -> None:
        """Runs on its own thread, so that a vanished parent is noticed during a long step, and
        the parent hears meanwhile that it computes."""
        reader = wire.FrameReader(wire.to_engine_decoder)
        try:
            while True:
                self._beat()
                if not select.select([self._connection], [], [], HEARTBEAT_SECONDS)[0]:
                    continue
                data = self._connection.recv(2**18)
                if not data:
                    break
                for message in reader.feed(data):
                    self._inbox.put(message)  # type: ignore[arg-type]
        except (OSError, wire.WireError) as error:
            log.error("the frontend's connection failed: %s", error)
        if not self._ending:
            os._exit(EXIT_PARENT_GONE)

    def _beat(self) -> None:
        """Tell how long the main thread has been in its step, where that takes long."""
        stats, now = self._stats, time.monotonic()
        age = now - self._turned
        if stats is None or age < HEARTBEAT_SECONDS or now - self._told < HEARTBEAT_SECONDS:
            return
        if self._sending.acquire(blocking=False):  # else a frame is on its way
            try:
                self._told = now
                message = wire.Outputs([], msgspec.structs.replace(stats, step_age=age))
                self._connection.sendall(wire.frame(message))
            finally:
                self._sending.release()


def main() -> int:
    """Entry point of the child process."""
    # Ctrl-C and a supervisor's SIGTERM go to the whole process group; the frontend decides what
    # they mean. This process ends with Shutdown, or when the frontend's end of the socket closes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    connection = socket.socket(fileno=int(sys.argv[1]))
    return EngineProcess(connection).run()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Daemon threads and native pools need no farewell.
    os._exit(code)
