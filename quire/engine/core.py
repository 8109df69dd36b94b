"""The engine loop's three verbs: schedule, submit, commit."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Protocol

import msgspec

from quire.engine.api import EngineStats
from quire.engine.gates import Gate
from quire.engine.scheduler import Scheduler
from quire.engine.tiering import Tiering
from quire.engine.wire import Abort, Add, Delta
from quire.errors import QuireError
from quire.plan.shortage import STEP_FIX, is_out_of_memory
from quire.step import Batch, Result

log = logging.getLogger("quire.engine")

# How long an engine with nothing to compute waits for tiers before it looks at its messages again.
TIER_WAIT_SECONDS = 0.005


class Pending(Protocol):
    """A submitted step. One with gated rows samples only after `open`, which comes before the
    next step is submitted and before `warm`."""

    def done(self) -> bool: ...

    def open(self, masks: dict[int, bytes]) -> None:
        """Launch sampling: each gated row chooses among the tokens of its mask (by index of the
        row; quire/step.py), and where its request says so, among fewer. A gated row without a mask
        chooses none. Only for steps with gated rows, once; raises what launching raises."""

    def result(self) -> Result:
        """Wait for the step. Raises what its computation raised."""


class Runner(Protocol):
    """Turns a Batch into device work; see quire/step.py for the contract."""

    def submit(self, batch: Batch) -> Pending: ...

    def reset(self) -> None:
        """Drop all slots, after a step that raised."""

    def warm(self) -> int:
        """Do one piece of work that makes later steps faster; how many pieces are left."""


class StepClock:
    """How long steps compute. With several in flight, one begins when the one before ends."""

    def __init__(self) -> None:
        self._submitted: dict[int, tuple[int, float]] = {}
        self._ended = 0.0

    def submitted(self, batch: Batch) -> None:
        self._submitted[batch.step] = (batch.num_tokens, time.perf_counter())

    def done(self, step: int) -> tuple[int, float]:
        """(tokens, seconds) of a step whose result is there."""
        tokens, submitted = self._submitted.pop(step)
        begun, self._ended = max(submitted, self._ended), time.perf_counter()
        return tokens, self._ended - begun


class EngineCore:
    """A scheduler and a runner. One thread calls it.

    `depth`: steps in flight. With 2, step n+1 is submitted before step n is committed. Where
    step n+1 has gated rows, its forward pass runs meanwhile, and it samples once step n is
    committed and the gates have said what is allowed: no third step is submitted before.
    `host_seconds`: time spent on scheduling, submitting and committing so far. `tiering`: where
    there are tiers; it moves pages between steps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        depth: int = 1,
        tiering: Tiering | None = None,
    ):
        self.scheduler = scheduler
        self.tiering = scheduler.tiering = tiering
        self.runner = runner
        self.depth = depth
        self.host_seconds = 0.0
        self._to_warm = 0
        self._held = False  # the newest step in flight waits for masks
        self._inflight: deque[tuple[int, Pending]] = deque()
        self._clock = StepClock()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def settle(self) -> bool:
        """Move pages on while there is nothing to compute; whether nothing is left to move."""
        if self.tiering is None:
            return True
        self.tiering.advance()
        return self.tiering.settled

    def clear_cache(self) -> None:
        """Forget all KV of earlier tokens, on the device and in all tiers."""
        self.scheduler.kv.clear_cache()
        if self.tiering is not None:
            self.tiering.clear()

    def close(self) -> None:
        """Bring what is still to be stored to the tiers, within a few seconds."""
        if self.tiering is not None:
            self.tiering.close()

    def add(self, add: Add, gate: Gate | None = None) -> list[Delta]:
        """Queue all choices of a request, each behind `gate` where one is given; a refusal comes
        back as an error delta."""
        refusals = []
        for choice in add.choices():
            try:
                self.scheduler.add(choice, gate=gate)
            except QuireError as error:
                parts = [error.code, error.what, error.why, error.fix]
                refusals.append(Delta(choice.request_id, [], finish_reason="error", error=parts))
        return refusals

    def check_when_idle(self) -> None:
        """A slice of integrity checking, at most about a millisecond."""
        self.scheduler.check_slice()

    def abort(self, abort: Abort) -> None:
        self.scheduler.abort(abort.request_id, abort.reason, abort.length)

    def warm(self) -> int:
        """Prepare for faster steps, a piece (some ten milliseconds) a call; the pieces left."""
        if self._held:  # sampling will need what its forward pass has left
            return self._to_warm
        try:
            self._to_warm = self.runner.warm()
        except Exception as error:  # steps of that shape may be slow, the others must go on
            log.error("preparing for a shape of steps failed", exc_info=error)
        return self._to_warm

    def stats(self) -> EngineStats:
        """The scheduler's numbers, the runner's, and the tiers'."""
        tiers = [] if self.tiering is None else self.tiering.stats()
        return msgspec.structs.replace(self.scheduler.stats(), to_warm=self._to_warm, tiers=tiers)

    def step(self) -> list[Delta]:
        """Submit what can be in flight, commit the oldest step; deltas in order of requests."""
        started = time.perf_counter()
        self.scheduler.expire()
        if self.tiering is not None:
            self.tiering.advance()
        deltas: list[Delta] = []
        while len(self._inflight) < self.depth and not self._held:
            batch = self.scheduler.schedule()
            if batch is None:
                break
            self._clock.submitted(batch)
            try:
                pending = self.runner.submit(batch)
            except Exception as error:  # a step's fault must not end the engine
                deltas += self._recover(error, batch.step)
                break
            self._inflight.append((batch.step, pending))
            if self.scheduler.is_gated(batch.step):
                self._held = True
                deltas += self._open()
        self.host_seconds += time.perf_counter() - started
        if self._inflight:
            deltas += self._commit()
            self.warm()
        elif self.tiering is not None and not self.tiering.settled:
            self.tiering.wait(TIER_WAIT_SECONDS)
        return deltas + self.scheduler.take_finished()

    def _open(self) -> list[Delta]:
        """Let the newest step sample, where all that its masks depend on is known."""
        step, pending = self._inflight[-1]
        masks = self.scheduler.masks(step)
        if masks is None:
            return []
        try:
            pending.open(masks)
        except Exception as error:  # a step's fault must not end the engine
            return self._recover(error, step)
        self._held = False
        return []

    def _commit(self) -> list[Delta]:
        step, pending = self._inflight.popleft()
        try:
            result = pending.result()
        except Exception as error:  # a step's fault must not end the engine
            return self._recover(error, step)
        computed = self._clock.done(step)
        if self.tiering is not None:
            self.tiering.observe(*computed)
        started = time.perf_counter()
        deltas = self.scheduler.commit(result)
        if self._held:
            deltas += self._open()
        self.host_seconds += time.perf_counter() - started
        return deltas

    def _recover(self, error: Exception, failed: int) -> list[Delta]:
        """A step raised: commit what came before it, recompute to find out whose fault it is."""
        fix = STEP_FIX if is_out_of_memory(error) else "see the log for the cause, and report it"
        fix = error.fix if isinstance(error, QuireError) else fix
        log.error("a step failed; its requests are computed one by one: %s", fix, exc_info=error)
        deltas, lost = [], [failed]
        self._clock = StepClock()
        self._held = False
        while self._inflight:
            step, pending = self._inflight.popleft()
            if step == failed:
                continue
            if step > failed:
                lost.append(step)
                continue
            try:
                result = pending.result()
            except Exception as earlier:
                log.error("an earlier step had failed already", exc_info=earlier)
                lost.append(step)
            else:
                deltas += self.scheduler.commit(result)
        self.runner.reset()
        why = f"{type(error).__name__}: {error}"
        self.scheduler.quarantine(
            lost, QuireError("step_failed", "computing this request failed", why=why, fix=fix)
        )
        return deltas
