"""All requests of the engine, from their arrival to their end.

There are no prefill and decode phases: every request has tokens known and tokens computed, and a
step closes part of the gap under one token budget. `schedule` makes a Batch, `commit` takes its
Result; between the two the tokens are in flight, and another step may be scheduled on top.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from quire.engine.api import EngineStats
from quire.engine.batches import Batches
from quire.engine.commit import ROW_ERRORS, error_delta, take_row
from quire.engine.decoding import Flight, commit_tokens
from quire.engine.drafting import Drafting
from quire.engine.gates import Gate, Gates
from quire.engine.limits import Limits, check_add
from quire.engine.request import Request, State
from quire.engine.roster import Roster
from quire.engine.tiering import Tiering
from quire.engine.wire import Add, Delta
from quire.errors import Overloaded, QuireError, UsageError
from quire.kv.manager import KVManager
from quire.step import NAN_ERROR, Batch, Result, Row, RowResult


class Scheduler:
    """Owns all requests and the KVManager. Only the engine thread calls it."""

    def __init__(
        self,
        limits: Limits,
        kv: KVManager,
        clock: Callable[[], float] = time.monotonic,
        drafting: Drafting | None = None,
    ):
        self.limits = limits
        self.kv = kv
        self.tiering: Tiering | None = None  # set before the first request
        self._drafting = drafting
        # Most tokens that one step writes of a request.
        self.step_tokens = limits.max_num_batched_tokens + (drafting.ahead if drafting else 0)
        self.roster = Roster(kv, limits.max_num_seqs)
        self._batches = Batches(limits, kv, self.roster, drafting, self.step_tokens)
        self._clock = clock
        self._inflight: dict[int, Flight] = {}
        self._gates = Gates(limits.vocab_size)
        self._num_gated = 0  # requests
        self._finished: list[Delta] = []
        self._next_deadline = math.inf  # no request expires before
        self._arrivals = 0
        self._steps = 0
        self._counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "done_steps"), 0)

    @property
    def requests(self) -> dict[str, Request]:
        """Those that have not ended, by their ids."""
        return self.roster.requests

    # -- requests come and go ----------------------------------------------------------------

    def add(self, add: Add, bounded: bool = True, gate: Gate | None = None) -> None:
        """Queue a request; with a `gate` that says which tokens may come next. Raises UsageError
        where it can never run, Overloaded where the queue is full (`bounded` False: the queue may
        grow)."""
        self.check(add, bounded)
        self._arrivals += 1
        request = Request(
            add=add,
            arrival=self._arrivals,
            priority=add.priority if self.limits.priority else 0,
            end_tokens=self.limits.end_tokens(add.params),
            max_tokens=self.limits.max_tokens(add),
            gate=gate,
        )
        if self._drafting is not None and gate is None:
            request.drafter = self._drafting.drafter()
        self._num_gated += gate is not None
        if add.timeout is not None:
            request.deadline = self._clock() + add.timeout
            self._next_deadline = min(self._next_deadline, request.deadline)
        self.roster.add(request)

    def check(self, add: Add, bounded: bool = True) -> None:
        """The checks of `add`, without adding."""
        if add.request_id in self.requests:
            raise UsageError("duplicate_request", f"request id {add.request_id!r} is running")
        check_add(add, self.limits, self.kv, self.step_tokens)
        waiting = self.roster.num_waiting
        if bounded and waiting >= self.limits.max_queue + self.roster.free_slots:
            raise Overloaded(
                "queue_full",
                f"{waiting} requests are waiting already",
                fix="try again later, or raise --max-queue",
            )

    def abort(self, request_id: str, reason: str = "abort", length: int = -1) -> None:
        """Finish a request from outside; the first `length` output tokens count (-1: all).

        Unknown and finished ids are ignored, so a late or doubled abort is harmless.
        """
        request = self.requests.get(request_id)
        if request is None:
            return
        if length >= 0:
            dropped = max(0, request.num_output - length)
            self._counts["generated_tokens"] -= dropped
            del request.tokens[request.num_prompt + length :]
        self._finish(request, confirmed=length >= 0)
        cached = request.cached_tokens or 0
        self._finished.append(
            Delta(
                request_id,
                [],
                finish_reason=reason,
                cached_tokens=cached,
                cached_by_tier=request.cached_by_tier,
            )
        )

    def fail(self, request_id: str, error: QuireError) -> None:
        """Finish one request with an error; what it has computed cannot be found afterwards."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, discard=True)
            self._finished.append(error_delta(request_id, error))

    def expire(self) -> None:
        """Abort the requests whose deadline has passed."""
        now = self._clock()
        if now < self._next_deadline:
            return
        for request in [r for r in self.requests.values() if r.deadline <= now]:
            self.abort(request.request_id)
        self._next_deadline = min((r.deadline for r in self.requests.values()), default=math.inf)

    def take_finished(self) -> list[Delta]:
        """Deltas of requests that ended outside a step (aborts, failures)."""
        finished, self._finished = self._finished, []
        return finished

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is in flight."""
        return not self.requests and not self._inflight

    # -- a step ------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None where nothing can be computed now."""
        self._steps += 1
        made = self._batches.build(self._steps, bool(self._inflight), self.tiering)
        if made is None:
            return None
        batch, flight = made
        self._inflight[batch.step] = flight
        if self._num_gated:
            self._gates.hold(batch.step, flight.rows())
        return batch

    def is_gated(self, step: int) -> bool:
        """Whether a step in flight waits for masks."""
        return self._gates.holds(step)

    def masks(self, step: int) -> dict[int, bytes] | None:
        """Of a step in flight: the masks of its gated rows by their index, without those of
        requests that have finished or whose gate fails now. None while a token before one of them
        is not known; then earlier steps must be committed first."""
        opened = self._gates.open(step)
        if opened is None:
            return None
        masks, failed = opened
        for request, error in failed:
            self._finish(request)
            self._finished.append(error_delta(request.request_id, error))
        return masks

    # -- its result --------------------------------------------------------------------------

    def commit(self, result: Result) -> list[Delta]:
        """Take a step's result: append tokens, publish blocks, finish requests.

        Returns what to tell the frontends. Rows of requests that have finished meanwhile are
        dropped: nothing computed past an end is ever seen.
        """
        self._counts["done_steps"] += 1
        flight = self._inflight.pop(result.step)
        if result.rows:
            deltas = self._commit_rows(flight, result.rows)
            generated = sum(len(delta.token_ids) for delta in deltas)
        else:
            deltas = commit_tokens(flight, result.tokens, self._commit_token)
            generated = len(deltas)
        self._counts["generated_tokens"] += generated
        return deltas

    def _commit_rows(self, flight: Flight, results: list[RowResult]) -> list[Delta]:
        deltas = []
        for (request, row), got in zip(flight.rows(), results, strict=True):
            request.inflight_steps -= 1
            delta = self._commit_row(request, row, got)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def _commit_token(self, request: Request, row: Row, token: int) -> Delta | None:
        computed, goes_on = request.computed + 1, token not in request.end_tokens
        if request.quiet_until and computed < request.longest - 1 and goes_on:
            request.computed = computed
            request.tokens.append(token)
            self._publish(request)
            return Delta(request.request_id, [token])
        return self._commit_row(request, row, RowResult([token]))

    def quarantine(self, steps: list[int], error: QuireError) -> None:
        """One of these steps raised, none gave anything; the runner has dropped all its slots.

        Where all their rows are one request's, it is that request's fault: it fails with `error`.
        Otherwise the requests in them become suspects, which are recomputed one at a time until
        each has sampled a token or failed on its own. All others are recomputed as after a
        preemption.
        """
        blamed: set[Request] = set()
        for step in steps:
            self._gates.drop(step)
            for request, row in self._inflight.pop(step).rows():
                request.inflight_steps -= 1
                request.promised -= row.sample
                blamed.add(request)
        alone = len(blamed) == 1
        for request in blamed:
            if request.state is not State.FINISHED:
                self.roster.suspects.add(request)
                if alone:
                    self.fail(request.request_id, error)
        for request in list(self.roster.running):
            self.roster.preempt(request)
        self.roster.leaving.clear()  # nor does the runner know of anybody who left

    def _commit_row(self, request: Request, row: Row, got: RowResult) -> Delta | None:
        if request.slot >= 0:
            request.computed += len(row.tokens) - row.drafts
        elif request.state is State.FINISHED:
            return None
        if got.error is not None:
            self._finish(request, discard=got.error == NAN_ERROR)
            return error_delta(request.request_id, ROW_ERRORS[got.error])
        first = len(request.tokens)
        delta = take_row(request, row, got)
        if self._drafting is not None:
            if row.drafts:
                self._drafting.count(row, min(len(got.tokens) - 1, len(delta.token_ids)))
            if got.drafts:
                self._drafting.take(request, got.drafts)
        if row.sample:
            if first == request.num_prompt:
                self._counts["prompt_tokens"] += first
            if self.roster.suspects:
                self.roster.suspects.discard(request)
            if request.announced:
                self.roster.sharing.withdraw(request)
        if request.computed >= request.settle_at and request.slot >= 0:
            self._publish(request)
        if delta.finish_reason is not None:
            self._finish(request)
        elif row.sample and request.slot >= 0:
            request.be_quiet()
        return delta if delta.token_ids or delta.prompt_logprobs else None

    def _publish(self, request: Request, confirmed: bool = False) -> None:
        """Offer computed blocks to the prefix index.

        Output of a request with stop strings counts only once the frontend has confirmed its
        length: a stop string may have ended it earlier.
        """
        valid = len(request.tokens)
        if request.add.params.stop_strings and not confirmed:
            valid = request.num_prompt
        request.settle_at = self.kv.commit(
            request.request_id, request.tokens, request.computed, valid
        )
        if request.quiet_until:
            request.be_quiet()

    def _finish(self, request: Request, confirmed: bool = False, discard: bool = False) -> None:
        if request.state is State.RUNNING:
            if discard:
                self.kv.discard(request.request_id)
            else:
                self._publish(request, confirmed)
                self.kv.free(request.request_id)
            self.roster.release(request)
        self.roster.remove(request)
        self._num_gated -= request.gate is not None

    # -- what others see ---------------------------------------------------------------------

    def stats(self) -> EngineStats:
        used, total = self.kv.usage()
        counts = self._counts
        drafts = None if self._drafting is None else self._drafting.counts()
        return EngineStats(
            waiting=self.roster.num_waiting,
            running=len(self.roster.running),
            kv_blocks_used=used,
            kv_blocks_total=total,
            prefix_query_tokens=self._batches.query_tokens,
            prefix_hit_tokens=self._batches.hit_tokens,
            preemptions=self.roster.preemptions,
            steps=counts["done_steps"],
            prompt_tokens=counts["prompt_tokens"],
            generated_tokens=counts["generated_tokens"],
            draft_rows=drafts.rows if drafts else 0,
            draft_tokens=drafts.drafted if drafts else 0,
            accepted_at=drafts.accepted_at if drafts else [],
        )

    def check_slice(self) -> None:
        """A part of `check_integrity`, at most about a millisecond; the next call goes on."""
        self.roster.check_slots()
        self.kv.check_slice()

    def check_integrity(self) -> None:
        """Raise AssertionError where requests, slots and blocks contradict each other."""
        self.kv.check_integrity()
        self.roster.check_integrity()
        assert self._num_gated == sum(r.gate is not None for r in self.requests.values())
        flying: dict[int, int] = {}
        for flight in self._inflight.values():
            for request, row in flight.rows():
                if request.state is State.RUNNING:
                    count = len(row.tokens) - row.drafts
                    flying[id(request)] = flying.get(id(request), 0) + count
        for request in self.requests.values():
            request.check_integrity()
            assert request.inflight == flying.get(id(request), 0)
            if request.slot >= 0 and request.plain_until and self._drafting is None:
                assert request.scheduled + 1 == request.promised
