"""The engine loop's three verbs: schedule, submit, commit."""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

from quire.engine.scheduler import Scheduler
from quire.engine.wire import Abort, Add, Delta
from quire.errors import QuireError
from quire.step import Batch, Result

log = logging.getLogger("quire.engine")


class Pending(Protocol):
    """A submitted step."""

    def done(self) -> bool: ...

    def result(self) -> Result:
        """Wait for the step. Raises what its computation raised."""


class Runner(Protocol):
    """Turns a Batch into device work; see quire/step.py for the contract."""

    def submit(self, batch: Batch) -> Pending: ...

    def reset(self) -> None:
        """Drop all slots, after a step that raised."""


class EngineCore:
    """A scheduler and a runner. One thread calls it.

    `depth`: steps in flight. With 2, step n+1 is submitted before step n is committed.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, depth: int = 1):
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        self._inflight: deque[tuple[int, Pending | None]] = deque()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, add: Add) -> Delta | None:
        """Queue a request; a refusal comes back as its error delta."""
        try:
            self.scheduler.add(add)
        except QuireError as error:
            parts = [error.code, error.what, error.why, error.fix]
            return Delta(add.request_id, [], finish_reason="error", error=parts)
        return None

    def check_when_idle(self) -> None:
        """A slice of integrity checking, at most about a millisecond."""
        self.scheduler.check_slice()

    def abort(self, abort: Abort) -> None:
        self.scheduler.abort(abort.request_id, abort.reason, abort.length)

    def step(self) -> list[Delta]:
        """Submit what can be in flight, commit the oldest step; deltas in order of requests."""
        self.scheduler.expire()
        try:
            while len(self._inflight) < self.depth:
                batch = self.scheduler.schedule()
                if batch is None:
                    break
                self._submit(batch)
            deltas = self._commit() if self._inflight else []
        except Exception as error:  # a step's fault must not end the engine
            self._recover(error)
            deltas = []
        return deltas + self.scheduler.take_finished()

    def _submit(self, batch: Batch) -> None:
        self._inflight.append((batch.step, None))
        self._inflight[-1] = (batch.step, self.runner.submit(batch))

    def _commit(self) -> list[Delta]:
        _, pending = self._inflight[0]
        assert pending is not None
        result = pending.result()
        self._inflight.popleft()
        return self.scheduler.commit(result)

    def _recover(self, error: Exception) -> None:
        """A step raised: find out by recomputation whose fault it is."""
        log.exception("a step failed; its requests are computed one by one to find the cause")
        steps = [step for step, _ in self._inflight]
        self._inflight.clear()
        self.runner.reset()
        reason = f"{type(error).__name__}: {error}"
        self.scheduler.quarantine(
            steps, QuireError("step_failed", "computing this request failed", why=reason)
        )
