"""The engine process's own part: what it tells while a step computes."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, cast

import pytest

from quire.engine import process, wire
from quire.engine.api import EngineStats
from quire.engine.core import EngineCore
from quire.engine.wire import Delta, FrameReader, Outputs


class SlowCore:
    """Its first step takes until it is told to end."""

    idle = False

    def __init__(self) -> None:
        self.scheduler = self
        self.end = threading.Event()

    def stats(self) -> EngineStats:
        return EngineStats(waiting=7)

    def warm(self) -> bool:
        return False

    def step(self) -> list[Delta]:
        assert self.end.wait(20)
        return []


def test_while_a_step_computes_the_frontend_hears_for_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "HEARTBEAT_SECONDS", 0.05)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    engine, core = process.EngineProcess(theirs), SlowCore()
    engine._ending = False
    threads = [
        threading.Thread(target=engine._serve, args=[cast(EngineCore, core)], daemon=True),
        threading.Thread(target=engine._read, daemon=True),
    ]
    for thread in threads:
        thread.start()
    reader, heard = FrameReader(wire.from_engine_decoder), list[Any]()
    deadline = time.monotonic() + 10
    while len(heard) < 4 and time.monotonic() < deadline:
        heard += reader.feed(ours.recv(2**16))
    engine._ending = True  # before the socket closes, which else ends this process
    core.end.set()
    threads[0].join(10)
    ours.close()
    threads[1].join(10)
    assert all(isinstance(m, Outputs) and m.deltas == [] and m.stats.waiting == 7 for m in heard)
    ages = [m.stats.step_age for m in heard]
    assert ages == sorted(ages) and ages[0] >= 0.05 and ages[-1] > ages[0]
