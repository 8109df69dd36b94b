"""Who computes how many tokens in the next step.

There are no prefill and decode phases: every request has tokens known and tokens computed, and a
step closes part of the gap under one token budget. `schedule` makes a Batch, `commit` takes its
Result; between the two the tokens are in flight, and another step may be scheduled on top.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from quire.engine.admission import check_request, check_timeout
from quire.engine.api import EngineStats
from quire.engine.commit import ROW_ERRORS, error_delta, take_row
from quire.engine.decoding import Flight, commit_tokens, may_decode, take_plain
from quire.engine.drafting import NO_DRAFTS, Drafting
from quire.engine.gates import Gate, Gates
from quire.engine.request import Request, State
from quire.engine.tiering import Tiering
from quire.engine.wire import Add, Delta
from quire.errors import Overloaded, QuireError, UsageError
from quire.kv import BLOCK_SIZE
from quire.kv.manager import KVManager
from quire.params import SamplingParams, check_tokens
from quire.runner.diffs import unfit
from quire.step import DEVICE_TOKEN, NAN_ERROR, Batch, Enter, Result, Row, RowResult

# A request waits for blocks that another is computing only where they are worth a step.
LEAST_SHARED_TOKENS = 3 * BLOCK_SIZE
# The token of a row that decodes ahead of what the host knows: most rows, so they share it.
ON_DEVICE = [DEVICE_TOKEN]
# Finished requests leave the heap of waiting ones when it holds this many and as many as waiting.
LEAST_FINISHED = 64


@dataclass(frozen=True)
class Limits:
    """What the scheduler may do, from options and plan. `recomputed_tokens`: so many tokens before
    a prefix hit are computed again."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    priority: bool = False
    max_queue: int = 256
    recomputed_tokens: int = 0


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
        self.requests: dict[str, Request] = {}
        self._clock = clock
        # A heap. Requests that finished while they waited stay in it for a while.
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        self._running: list[Request] = []  # by Request.order
        self._suspects: set[Request] = set()
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._leaving: list[int] = []
        self._inflight: dict[int, Flight] = {}
        self._gates = Gates(limits.vocab_size)
        self._num_gated = 0  # requests
        self._finished: list[Delta] = []
        self._no_blocks: list[list[int]] = [[] for _ in kv.groups]
        self._computing: dict[bytes, Request] = {}  # prompt blocks under way, by identity
        self._next_deadline = math.inf  # no request expires before
        self._arrivals = 0
        self._steps = 0
        self._counts = dict.fromkeys(
            ("preemptions", "prompt_tokens", "generated_tokens", "query", "hit", "done_steps"), 0
        )

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
            end_tokens=self._end_tokens(add.params),
            max_tokens=self._max_tokens(add),
            gate=gate,
        )
        if self._drafting is not None and gate is None:
            request.drafter = self._drafting.drafter()
        self._num_gated += gate is not None
        if add.timeout is not None:
            request.deadline = self._clock() + add.timeout
            self._next_deadline = min(self._next_deadline, request.deadline)
        self.requests[add.request_id] = request
        self._queue(request)

    def check(self, add: Add, bounded: bool = True) -> None:
        """The checks of `add`, without adding."""
        if add.request_id in self.requests:
            raise UsageError("duplicate_request", f"request id {add.request_id!r} is running")
        vocab_size = self.limits.vocab_size
        prompt, params = add.prompt_token_ids, add.params
        check_request(prompt, params, self.limits.max_model_len, vocab_size)
        for word in add.bad_words:
            check_tokens("bad_words", word, vocab_size)
        misfit = unfit(sorted(self._end_tokens(params)), add.bad_words)
        if misfit is not None:
            raise UsageError("invalid_value", misfit)
        check_timeout(add.timeout)
        length = len(prompt)
        output = self._max_tokens(add)
        # The last token's KV is never computed.
        if not self.kv.fits_ever(length + output - 1, self.step_tokens):
            _, total = self.kv.usage()
            raise UsageError(
                "prompt_too_large",
                f"a prompt of {length} tokens with {output} tokens of output can never fit the "
                f"KV cache of {total} blocks",
                fix="shorten the prompt, lower max_tokens, or start with a larger "
                "--kv-cache-memory",
                field="prompt",
            )
        if bounded and self.num_waiting >= self.limits.max_queue + len(self._free_slots):
            raise Overloaded(
                "queue_full",
                f"{self.num_waiting} requests are waiting already",
                fix="try again later, or raise --max-queue",
            )

    def _end_tokens(self, params: SamplingParams) -> frozenset[int]:
        own = () if params.ignore_eos else self.limits.eos_token_ids
        return frozenset((*(params.stop_token_ids or ()), *own))

    def _max_tokens(self, add: Add) -> int:
        room = self.limits.max_model_len - len(add.prompt_token_ids)
        return room if add.params.max_tokens is None else min(add.params.max_tokens, room)

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
    def num_waiting(self) -> int:
        return len(self.requests) - len(self._running)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is in flight."""
        return not self.requests and not self._inflight

    # -- a step ------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next step, or None where nothing can be computed now."""
        self._steps += 1
        batch = Batch(step=self._steps, leave=[], enter=[], rows=[])
        flight = Flight()
        budget = self.limits.max_num_batched_tokens
        suspect = min(self._suspects, key=_order, default=None)
        if suspect is None:
            running = self._schedule_decoding(batch, flight, budget)
            budget = self._schedule_running(flight, budget - len(flight.decoding), running)
            self._schedule_waiting(batch, flight, budget, None)
        elif self._inflight:
            return None  # a step that raises now must have one possible cause
        elif suspect.state is State.RUNNING:
            self._schedule_running(flight, budget, [suspect])
        else:
            for request in list(self._running):
                self._preempt(request)
            self._schedule_waiting(batch, flight, budget, suspect)
        if not (flight.decoding or flight.parts):
            return None
        batch.rows = [row for _, row in flight.parts]
        batch.leave, self._leaving = self._leaving, []
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

    def _schedule_decoding(self, batch: Batch, flight: Flight, budget: int) -> list[Request]:
        """Give rows to those that decode plainly. Returns the running requests that are left."""
        running = self._running
        # Where tokens or blocks are short, rows go to requests one by one, in their order.
        short = len(running) > budget or self.kv.available() < len(running) * len(self.kv.groups)
        if self._drafting is not None or short:
            return running
        decoding, others = take_plain(running, flight, self._grow_plain)
        if decoding.slots:
            batch.decoding = decoding
        return others

    def _grow_plain(self, request: Request) -> list[list[int]]:
        grown = self.kv.grow(request.request_id, request.promised)
        assert grown is not None, "there were blocks for all"
        for group, blocks in enumerate(grown):
            request.blocks_sent[group] += len(blocks)
        request.covered = -(-request.promised // BLOCK_SIZE) * BLOCK_SIZE
        return grown

    def _schedule_running(self, flight: Flight, budget: int, running: list[Request]) -> int:
        """Give rows to `running`. Returns the budget left for admissions: none where blocks are
        short."""
        # Decoding rows first, so that a long prompt never delays tokens that others wait for.
        decoding, prefilling = list[Request](), list[Request]()
        drafting = self._drafting
        for request in running:
            gap = request.promised - request.scheduled  # Request.gap, without a call
            if gap <= 0 or request.promised >= request.longest:
                continue
            if drafting is None or not drafting.waits(request):
                (decoding if gap == 1 else prefilling).append(request)
        room = self._room_for_drafts(budget, len(decoding), bool(prefilling))
        short = False
        for request in decoding + prefilling:
            if budget == 0:
                break
            if request.slot < 0:  # preempted for one before it
                continue
            gap = request.promised - request.scheduled
            count = gap if gap < budget else budget
            end = request.scheduled + count
            new_blocks, drafts, propose = self._no_blocks, NO_DRAFTS, 0
            if drafting is not None:
                drafts, propose = self._speculate(request, end, room if gap == 1 else 0)
            need = end + len(drafts) + propose
            if need > request.covered:
                if need == end and not self._make_room(request, end, flight):
                    short = True
                    continue
                new_blocks = self._new_blocks(request, need)
            row = self._row(request, count, new_blocks, drafts, propose)
            flight.parts.append((request, row))
            budget -= count + len(drafts)
            room -= len(drafts)
        return 0 if short else budget

    def _room_for_drafts(self, budget: int, decoding: int, prefilling: bool) -> int:
        if self._drafting is None or self._suspects or not decoding:
            return 0
        sampling = len(self._running) + min(len(self._free_slots), self.num_waiting)
        others = prefilling or self.num_waiting > 0
        return self._drafting.room(budget, decoding, sampling, others)

    def _speculate(self, request: Request, end: int, room: int) -> tuple[list[int], int]:
        """For a row that ends at `end`: drafts behind it, at most `room`, and how many more the
        runner is to make; as far as there are blocks, which are taken."""
        drafting = self._drafting
        if drafting is None or self._suspects or end < request.promised:
            return NO_DRAFTS, 0
        drafts = drafting.drafts(request, room)
        propose = drafting.proposals(request, end + len(drafts))
        if self._grows(request, end + len(drafts) + propose):
            return drafts, propose
        if drafts and not self._grows(request, end + len(drafts)):
            drafts = drafts[: max(0, request.covered - end)]
        return drafts, 0

    def _grows(self, request: Request, end: int) -> bool:
        """Whether a running request has blocks for `end` tokens, or takes free ones that nobody
        may need for a token of this step."""
        if end <= request.covered:
            return True
        needed = len(self._running) * len(self.kv.groups)
        if self.kv.available() < needed:
            return False
        return self.kv.grow(request.request_id, end) is not None

    def _make_room(self, request: Request, end: int, flight: Flight) -> bool:
        """Give a running request blocks for `end` tokens, taken from later ones where needed.

        False where it must wait: for its own steps in flight, or for requests before it or with
        a row in this step. One of those always moves on: the first of all running requests
        can take the blocks of all others, and alone it fits.
        """
        planned: set[Request] | None = None
        while self.kv.grow(request.request_id, end) is None:
            if planned is None:
                planned = {r for r, _ in flight.rows()}
            victim = next(r for r in reversed(self._running) if r not in planned)
            if victim is request or request.inflight_steps:
                return False
            self._preempt(victim)
        return True

    def _schedule_waiting(
        self,
        batch: Batch,
        flight: Flight,
        budget: int,
        only: Request | None,
    ) -> None:
        skipped: list[tuple[tuple[int, int], Request]] = []
        while self._waiting and budget > 0 and self._free_slots:
            entry = heapq.heappop(self._waiting)
            request = entry[1]
            if request.state is State.FINISHED:
                continue
            if only not in (None, request) or (only is None and self._waits_for_blocks(request)):
                skipped.append(entry)
                continue
            if request.inflight_steps:
                skipped.append(entry)
                break  # preempted just now; nobody overtakes it
            # A suspect runs alone: it must not wait for what is loaded for others.
            tiering = self.tiering if only is None else None
            if tiering is not None and not tiering.ready(request, len(self._free_slots)):
                skipped.append(entry)
                continue
            hit = self.kv.admit(
                request.request_id,
                request.tokens,
                self.step_tokens,
                tenant=request.add.tenant,
                salt=request.add.cache_salt,
                use_cache=request.add.params.prompt_logprobs is None,
                identities=request.identities,
            )
            if hit is None:
                skipped.append(entry)
                break
            self._start(request, hit)
            count = min(request.gap, budget)
            end = request.computed + count
            grown = self.kv.grow(request.request_id, end)
            assert grown is not None, "admission looked at less than the first step needs"
            _, propose = self._speculate(request, end, 0)
            batch.enter.append(self._enter(request, hit, end + propose))
            row = self._row(request, count, self._no_blocks, propose=propose)
            flight.parts.append((request, row))
            budget -= count
        for entry in skipped:
            heapq.heappush(self._waiting, entry)

    def _start(self, request: Request, hit: int) -> None:
        start = max(0, hit - self.limits.recomputed_tokens)
        request.state = State.RUNNING
        request.slot = self._free_slots.pop()
        request.computed = request.scheduled = start
        request.settle_at = request.covered = request.plain_until = 0
        if request.cached_tokens is None:
            request.cached_tokens = start
            if request.visit is not None:
                request.cached_by_tier = request.visit.cached(start)
            if request.add.params.prompt_logprobs is None:
                self._counts["query"] += request.num_prompt
                self._counts["hit"] += start
        insort(self._running, request, key=_order)
        if self.kv.enable_caching:
            self._announce(request, hit)

    def _waits_for_blocks(self, request: Request) -> bool:
        """Whether a running request is just computing what this one would compute first."""
        if not self._computing or request.add.params.prompt_logprobs is not None:
            return False
        add = request.add
        missing = self.kv.missing(request.tokens, add.tenant, add.cache_salt, request.identities)
        least = self.kv.groups[self.kv.coarsest].blocks_of(LEAST_SHARED_TOKENS)
        shared = missing[:least]
        return len(shared) == least and all(i in self._computing for i in shared)

    def _announce(self, request: Request, hit: int) -> None:
        """Others with the same beginning wait for the blocks of this prompt."""
        coarsest = self.kv.coarsest
        size = self.kv.groups[coarsest].block_size
        for identity in request.identities[coarsest][hit // size : request.num_prompt // size]:
            self._computing.setdefault(identity, request)
        request.announced = True

    def _withdraw(self, request: Request) -> None:
        """The prompt is computed, or will not be: nobody waits for its blocks any more."""
        if request.announced:
            for identity in request.identities[self.kv.coarsest]:
                if self._computing.get(identity) is request:
                    del self._computing[identity]
            request.announced = False

    def _row(
        self,
        request: Request,
        count: int,
        new_blocks: list[list[int]],
        drafts: list[int] = NO_DRAFTS,
        propose: int = 0,
    ) -> Row:
        start = request.scheduled
        end = request.scheduled = start + count
        request.inflight_steps += 1
        sample = end == request.promised
        known = len(request.tokens)
        if count == 1:
            tokens = ON_DEVICE if start >= known else [request.tokens[start]]
        else:
            tokens = request.tokens[start:end]
            tokens += ON_DEVICE * (count - len(tokens))
        if sample:
            request.promised += 1
            if request.gate is None:
                may_decode(request)
        prompt_logprobs = request.prompt_logprobs_sent < request.prompt_logprobs_due
        gated = sample and request.gate is not None
        if drafts:
            tokens = tokens + drafts
        count = len(drafts)
        slot = request.slot
        return Row(slot, start, tokens, new_blocks, sample, prompt_logprobs, gated, count, propose)

    def _new_blocks(self, request: Request, end: int) -> list[list[int]]:
        """What the runner does not know yet of block tables that were grown to `end` tokens."""
        tables, sent = self.kv.table(request.request_id), request.blocks_sent
        new = [table[sent[g] :] for g, table in enumerate(tables)]
        request.blocks_sent = [len(table) for table in tables]
        request.covered = -(-end // BLOCK_SIZE) * BLOCK_SIZE
        return new

    def _enter(self, request: Request, hit: int, end: int) -> Enter:
        request.blocks_sent = [0] * len(self.kv.groups)
        return Enter(
            slot=request.slot,
            params=request.add.params,
            tokens=list(request.tokens),
            num_prompt=request.num_prompt,
            seed=request.add.seed,
            choice=request.add.choice,
            blocks=self._new_blocks(request, end),
            end_tokens=sorted(request.end_tokens),
            bad_words=request.add.bad_words,
            cached=hit,
        )

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
            deltas = commit_tokens(flight, result.tokens, self._publish, self._commit_token)
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
                self._suspects.add(request)
                if alone:
                    self.fail(request.request_id, error)
        for request in list(self._running):
            self._preempt(request)
        self._leaving = []

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
            if self._suspects:
                self._suspects.discard(request)
            if request.announced:
                self._withdraw(request)
        if request.computed >= request.settle_at and request.slot >= 0:
            self._publish(request)
        if delta.finish_reason is not None:
            self._finish(request)
        elif row.sample and request.slot >= 0:
            request.quiet_until = request.longest - 1
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

    def _finish(self, request: Request, confirmed: bool = False, discard: bool = False) -> None:
        if request.state is State.RUNNING:
            if discard:
                self.kv.discard(request.request_id)
            else:
                self._publish(request, confirmed)
                self.kv.free(request.request_id)
            self._release_slot(request)
        request.state = State.FINISHED
        request.computed = request.scheduled = 0
        self._suspects.discard(request)
        self._num_gated -= request.gate is not None
        del self.requests[request.request_id]
        if len(self._waiting) > 2 * self.num_waiting + LEAST_FINISHED:
            self._waiting = [e for e in self._waiting if e[1].state is State.WAITING]
            heapq.heapify(self._waiting)

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks and slot; it will be recomputed, its tokens stay."""
        self._counts["preemptions"] += 1
        self.kv.free(request.request_id)
        self._release_slot(request)
        request.state = State.WAITING
        request.computed = request.scheduled = 0
        request.visit = None
        self._queue(request)

    def _release_slot(self, request: Request) -> None:
        self._withdraw(request)
        request.quiet_until = 0
        self._running.remove(request)
        self._leaving.append(request.slot)
        self._free_slots.append(request.slot)
        request.slot = -1

    def _queue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.order, request))

    # -- what others see ---------------------------------------------------------------------

    def stats(self) -> EngineStats:
        used, total = self.kv.usage()
        counts = self._counts
        drafts = None if self._drafting is None else self._drafting.counts()
        return EngineStats(
            waiting=self.num_waiting,
            running=len(self._running),
            kv_blocks_used=used,
            kv_blocks_total=total,
            prefix_query_tokens=counts["query"],
            prefix_hit_tokens=counts["hit"],
            preemptions=counts["preemptions"],
            steps=counts["done_steps"],
            prompt_tokens=counts["prompt_tokens"],
            generated_tokens=counts["generated_tokens"],
            draft_rows=drafts.rows if drafts else 0,
            draft_tokens=drafts.drafted if drafts else 0,
            accepted_at=drafts.accepted_at if drafts else [],
        )

    def check_slice(self) -> None:
        """A part of `check_integrity`, at most about a millisecond; the next call goes on."""
        assert len(self._running) + len(self._free_slots) == self.limits.max_num_seqs
        self.kv.check_slice()

    def check_integrity(self) -> None:
        """Raise AssertionError where requests, slots and blocks contradict each other."""
        self.kv.check_integrity()
        slots = [r.slot for r in self._running]
        assert sorted(slots + self._free_slots) == list(range(self.limits.max_num_seqs))
        assert self._running == sorted(self._running, key=_order)
        assert all(self.requests.get(r.request_id) is r for r in self._suspects)
        assert all(r.state is not State.RUNNING for _, r in self._waiting)
        waiting = [r for _, r in self._waiting if r.state is State.WAITING]
        assert all(r.state is State.RUNNING for r in self._running)
        assert {r.request_id for r in waiting + self._running} == set(self.requests)
        assert len(waiting) + len(self._running) == len(self.requests)
        assert self._num_gated == sum(r.gate is not None for r in self.requests.values())
        assert all(r.announced and r.state is State.RUNNING for r in self._computing.values())
        flying: dict[int, int] = {}
        for flight in self._inflight.values():
            for request, row in flight.rows():
                if request.state is State.RUNNING:
                    count = len(row.tokens) - row.drafts
                    flying[id(request)] = flying.get(id(request), 0) + count
        for request in self.requests.values():
            request.check_integrity()
            assert request.inflight == flying.get(id(request), 0)


def _order(request: Request) -> tuple[int, int]:
    return request.order
