"""Which requests compute how many tokens in the next step, and who is preempted for them."""

from __future__ import annotations

from quire.engine.decoding import Flight, take_plain
from quire.engine.drafting import NO_DRAFTS, Drafting
from quire.engine.limits import Limits
from quire.engine.request import Request, State
from quire.engine.roster import Roster, order_of
from quire.engine.rows import covered, make_enter, make_row, new_blocks
from quire.engine.tiering import Tiering
from quire.kv.manager import KVManager
from quire.step import Batch


class Batches:
    """Builds batches. `step_tokens`: the most tokens that one step writes of a request.
    `query_tokens` of prompts were looked up in the prefix cache so far, `hit_tokens` found."""

    def __init__(
        self,
        limits: Limits,
        kv: KVManager,
        roster: Roster,
        drafting: Drafting | None,
        step_tokens: int,
    ):
        self._limits, self._kv, self._roster = limits, kv, roster
        self._drafting, self._step_tokens = drafting, step_tokens
        self._no_blocks: list[list[int]] = [[] for _ in kv.groups]
        self.query_tokens = self.hit_tokens = 0

    def build(
        self, step: int, computing: bool, tiering: Tiering | None
    ) -> tuple[Batch, Flight] | None:
        """The step of this number, or None where nothing can be computed now. `computing`: others
        are in flight."""
        roster = self._roster
        batch = Batch(step=step, leave=[], enter=[], rows=[])
        flight = Flight()
        budget = self._limits.max_num_batched_tokens
        suspect = min(roster.suspects, key=order_of, default=None)
        if suspect is None:
            running = self._decode(batch, flight, budget)
            budget -= len(flight.decoding)
            if running:
                budget = self._go_on(flight, budget, running)
            if roster.waiting:
                self._admit(batch, flight, budget, tiering)
        elif computing:
            return None  # a step that raises now must have one possible cause
        elif suspect.state is State.RUNNING:
            self._go_on(flight, budget, [suspect])
        else:
            for request in list(roster.running):
                roster.preempt(request)
            # It runs alone: it must not wait for what tiers load for others.
            self._admit(batch, flight, budget, None, suspect)
        if not (flight.decoding or flight.parts):
            return None
        batch.rows = [row for _, row in flight.parts]
        batch.leave = roster.take_leaving()
        return batch, flight

    def _decode(self, batch: Batch, flight: Flight, budget: int) -> list[Request]:
        """Give rows to those that decode plainly. Returns the running requests that are left."""
        running = self._roster.running
        # Where tokens or blocks are short, rows go to requests one by one, in their order.
        short = len(running) > budget or self._kv.available() < len(running) * len(self._kv.groups)
        if self._drafting is not None or short:
            return running
        decoding, others = take_plain(running, flight, self._grow_plain)
        if decoding.slots:
            batch.decoding = decoding
        return others

    def _grow_plain(self, request: Request) -> list[list[int]]:
        grown = self._kv.grow(request.request_id, request.promised)
        assert grown is not None, "there were blocks for all"
        for group, blocks in enumerate(grown):
            request.blocks_sent[group] += len(blocks)
        request.covered = covered(request.promised)
        return grown

    def _go_on(self, flight: Flight, budget: int, running: list[Request]) -> int:
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
            fresh, drafts, propose = self._no_blocks, NO_DRAFTS, 0
            if drafting is not None:
                drafts, propose = self._speculate(request, end, room if gap == 1 else 0)
            need = end + len(drafts) + propose
            if need > request.covered:
                if need == end and not self._make_room(request, end, flight):
                    short = True
                    continue
                fresh = new_blocks(self._kv, request, need)
            row = make_row(request, count, fresh, drafts, propose)
            flight.parts.append((request, row))
            budget -= count + len(drafts)
            room -= len(drafts)
        return 0 if short else budget

    def _room_for_drafts(self, budget: int, decoding: int, prefilling: bool) -> int:
        if self._drafting is None or self._roster.suspects or not decoding:
            return 0
        sampling = len(self._roster.running) + min(
            self._roster.free_slots, self._roster.num_waiting
        )
        others = prefilling or self._roster.num_waiting > 0
        return self._drafting.room(budget, decoding, sampling, others)

    def _speculate(self, request: Request, end: int, room: int) -> tuple[list[int], int]:
        """For a row that ends at `end`: drafts behind it, at most `room`, and how many more the
        runner is to make; as far as there are blocks, which are taken."""
        drafting = self._drafting
        if drafting is None or self._roster.suspects or end < request.promised:
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
        needed = len(self._roster.running) * len(self._kv.groups)
        if self._kv.available() < needed:
            return False
        return self._kv.grow(request.request_id, end) is not None

    def _make_room(self, request: Request, end: int, flight: Flight) -> bool:
        """Give a running request blocks for `end` tokens, taken from later ones where needed.

        False where it must wait: for its own steps in flight, or for requests before it or with
        a row in this step. One of those always moves on: the first of all running requests
        can take the blocks of all others, and alone it fits.
        """
        planned: set[Request] | None = None
        while self._kv.grow(request.request_id, end) is None:
            if planned is None:
                planned = {r for r, _ in flight.rows()}
            victim = next(r for r in reversed(self._roster.running) if r not in planned)
            if victim is request or request.inflight_steps:
                return False
            self._roster.preempt(victim)
        return True

    def _admit(
        self,
        batch: Batch,
        flight: Flight,
        budget: int,
        tiering: Tiering | None,
        only: Request | None = None,
    ) -> None:
        """Start those that wait, in their order, or `only` one of them."""
        roster, skipped = self._roster, list[Request]()
        while budget > 0 and roster.free_slots and (request := roster.next_waiting()):
            if only not in (None, request) or (only is None and roster.sharing.waits(request)):
                skipped.append(request)
                continue
            if request.inflight_steps:
                skipped.append(request)
                break  # preempted just now; nobody overtakes it
            if tiering is not None and not tiering.ready(request, roster.free_slots):
                skipped.append(request)
                continue
            hit = self._kv.admit(
                request.request_id,
                request.tokens,
                self._step_tokens,
                tenant=request.add.tenant,
                salt=request.add.cache_salt,
                use_cache=request.add.params.prompt_logprobs is None,
                identities=request.identities,
            )
            if hit is None:
                skipped.append(request)
                break
            self._start(request, hit)
            count = min(request.gap, budget)
            end = request.computed + count
            grown = self._kv.grow(request.request_id, end)
            assert grown is not None, "admission looked at less than the first step needs"
            _, propose = self._speculate(request, end, 0)
            batch.enter.append(make_enter(self._kv, request, hit, end + propose))
            row = make_row(request, count, self._no_blocks, propose=propose)
            flight.parts.append((request, row))
            budget -= count
        roster.put_back(skipped)

    def _start(self, request: Request, hit: int) -> None:
        start = max(0, hit - self._limits.recomputed_tokens)
        self._roster.start(request, hit, start)
        if request.cached_tokens is None:
            request.cached_tokens = start
            if request.visit is not None:
                request.cached_by_tier = request.visit.cached(start)
            if request.add.params.prompt_logprobs is None:
                self.query_tokens += request.num_prompt
                self.hit_tokens += start
