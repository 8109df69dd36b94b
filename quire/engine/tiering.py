"""What the scheduler has to do with the tiers: pages go down behind the steps, and come up for
requests before these are admitted.

A waiting request *visits* the tiers: what the device lacks is looked up, and where loading is
expected to be faster than computing it is loaded into free blocks, which then are part of the
prefix cache. Admission finds them there like any others, so nothing else knows of tiers, and
whatever fails is simply not found. Blocks that are being copied are on loan (quire/kv/loans.py):
nobody else gets them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from quire.engine.page_copies import Copier, PageCopies
from quire.engine.request import Request
from quire.engine.visits import FROM_DRAM, CostModel, Phase, Transfer, Visit, sequence_of
from quire.kv.manager import KVManager
from quire.kv.prefixes import Page
from quire.tiers.chain import DRAM, Chain
from quire.tiers.counts import TierStats
from quire.tiers.work import Asked, Outcome

# Visits under way at a time; further requests wait for these.
MOST_VISITS = 32
LOOKUP_SECONDS = 0.5
# Steps with fewer tokens say little about the speed of computing prompts.
LEAST_PREFILL_TOKENS = 64
CLOSE_SECONDS = 3.0


class Tiering:
    """Owns the chain of tiers. Only the engine thread calls it.

    `step_tokens`: the largest step, for admission. `lookup_seconds`: of this thread, in finding out
    what the tiers have for requests and having it loaded; `copy_seconds`: in storing, in giving and
    taking orders for copies, and in handing pages to the tiers' writers.
    """

    def __init__(
        self,
        kv: KVManager,
        chain: Chain,
        copier: Copier,
        step_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.chain = chain
        self.costs = CostModel(kv, chain, copier.rate)
        self._kv, self._step_tokens, self._clock = kv, step_tokens, clock
        self._copies = PageCopies(kv, chain, copier, self._finish, self.costs.copies, clock)
        self._visits: list[Visit] = []
        self._coming: list[Visit] = []  # loaded for, and not admitted yet
        self._transfers: dict[bytes, Transfer] = {}  # by identity
        self.lookup_seconds = self.copy_seconds = 0.0
        self._lapped = 0.0
        kv.published = []

    # -- what the engine asks ------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request waits for a tier, or a copy is under way."""
        return bool(self._visits) or self._copies.busy

    @property
    def settled(self) -> bool:
        """Nothing is on its way anywhere."""
        waiting = self._kv.published or self._kv.discarded or self._copies.waiting
        return not (waiting or self.busy or self.chain.writing or self.chain.reading)

    def wait(self, seconds: float) -> None:
        """Wait for news of the tiers, at most `seconds`; copies on a device do not wake it."""
        self.chain.wait(min(seconds, 0.001) if self._copies.busy else seconds)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens."""
        if tokens >= min(LEAST_PREFILL_TOKENS, self._step_tokens):
            self.costs.observe_step(tokens, seconds)

    def stats(self) -> list[TierStats]:
        """A copy of what each tier counts."""
        found = self.chain.all_stats()
        found[0].state = "on" if self._copies.usable else "off"
        return [msgspec.structs.replace(each) for each in found]

    def clear(self) -> None:
        """Drop every page from all tiers."""
        self._copies.drop_stores()
        self.chain.clear()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Bring down what is still to be stored, as far as that takes at most `seconds`."""
        deadline = self._clock() + seconds
        self.advance()
        while (self._copies.busy or self._copies.waiting) and self._clock() < deadline:
            self.advance()
            if self._copies.busy:
                time.sleep(0.001)
        self.chain.close(max(0.0, deadline - self._clock()))
        self._copies.close()

    # -- a request before admission ---------------------------------------------------------------

    def ready(self, request: Request, slots: int) -> bool:
        """Whether a waiting request may be admitted now: what the tiers have for it is on the
        device, or will not come. `slots`: requests that could be admitted now."""
        self._lap()
        ready = self._visited(request, slots)
        self.lookup_seconds += self._lap()
        return ready

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self._lapped = self._lapped, time.perf_counter()
        return self._lapped - before

    def _visited(self, request: Request, slots: int) -> bool:
        if request.visit is None:
            prompt_logprobs = request.add.params.prompt_logprobs is not None
            if prompt_logprobs or not (self._kv.enable_caching and self._copies.usable):
                return True
            if not self._kv.fits_now(*sequence_of(request), self._step_tokens):
                return True  # admission will say so again; what is absent may change until then
            if len(self._visits) >= MOST_VISITS:
                return False
            request.visit = self._look(request)
        visit = request.visit
        if visit.phase is Phase.FOUND:
            # What is loaded for more requests than can be admitted would displace itself.
            self._coming = [v for v in self._coming if v.is_waiting]
            if not self._kv.fits_now(*sequence_of(request), self._step_tokens):
                return True  # admission will say so again
            if len(self._coming) >= slots or not self._fits_besides(request):
                return False
            self._coming.append(visit)
            self._load(visit)
        return visit.phase is Phase.DONE

    def _fits_besides(self, request: Request) -> bool:
        """Whether a request finds room together with those that are being loaded for."""
        lengths = [len(visit.request.tokens) for visit in self._coming] + [len(request.tokens)]
        peaks = [self._kv.peak(length, self._step_tokens) for length in lengths]
        needs = map(sum, zip(*peaks, strict=True))
        return len(lengths) == 1 or all(
            need <= pool.available for need, pool in zip(needs, self._kv.pools, strict=True)
        )

    def _look(self, request: Request) -> Visit:
        """Begin a visit: ask who has what the device lacks."""
        visit = Visit(request, self._clock() + LOOKUP_SECONDS)
        absent = self._kv.absent(*sequence_of(request))
        if not absent:
            visit.phase = Phase.DONE
            return visit
        dram, stats = self.chain.dram, self.chain.stats
        here = sum(page.identity in dram for page in absent)
        stats.hits, stats.misses = stats.hits + here, stats.misses + len(absent) - here
        asked = [
            self._asked(absent, group.index, group.window is None) for group in self._kv.groups
        ]
        asked = [each for each in asked if each.identities]
        visit.unanswered = set(self.chain.look(visit, asked)) if asked else set()
        if visit.unanswered:
            self._visits.append(visit)
        else:
            self.costs.choose(visit)
        return visit

    def _asked(self, absent: Iterable[Page], group: int, contiguous: bool) -> Asked:
        """The pages of one group that DRAM does not have."""
        dram = self.chain.dram
        pages = [p for p in absent if p.group == group and p.identity not in dram]
        return Asked([p.identity for p in pages], [p.place for p in pages], contiguous)

    def _load(self, visit: Visit) -> None:
        visit.phase = Phase.LOADING
        # What is there already must not make room for what comes.
        self._kv.touch(visit.request.identities, visit.reach)
        visit.started = self._clock()
        visit.deadline = visit.started + visit.patience
        if visit not in self._visits:
            self._visits.append(visit)
        self._pump(visit)

    def _pump(self, visit: Visit) -> None:
        """Start loading what can be started now."""
        while visit.todo:
            page, source = visit.todo[0]
            identity, pool = page.identity, self._kv.groups[page.group].pool
            transfer = self._transfers.get(identity)
            if transfer is None and self._kv.pools[pool].find(identity) is None:
                if source < 0 and identity not in self.chain.dram:
                    visit.todo.clear()  # displaced meanwhile: what follows is of no use
                    break
                transfer = self._begin(page, pool, source)
                if transfer is None:
                    return
            if transfer is not None:
                transfer.visits.append(visit)
                visit.outstanding.add(identity)
                name = DRAM if transfer.source < 0 else self.chain.levels[transfer.source].name
                visit.sources[page.place] = name
            visit.todo.popleft()
        if not visit.outstanding:
            self._end(visit)
        self._copies.order()

    def _begin(self, page: Page, pool: int, source: int) -> Transfer | None:
        """Start a page's way to the device; None where it must wait for room."""
        identity = page.identity
        entry = self.chain.dram.get(identity)
        if entry is not None and entry.ready:
            transfer = Transfer(page, pool, FROM_DRAM)
            self._copies.load(transfer)
        elif entry is not None:
            return None  # on its way from the device, or from a tier for a visit that has ended
        elif source < 0 or not self.chain.fetch(identity, pool, source):
            return None
        else:
            transfer = Transfer(page, pool, source)
        self._transfers[identity] = transfer
        return transfer

    def _end(self, visit: Visit) -> None:
        visit.phase = Phase.DONE
        visit.todo.clear()
        self._visits.remove(visit)

    # -- between steps -----------------------------------------------------------------------------

    def advance(self) -> None:
        """Take what copier and tiers have done, and give them more. Called before every step; never
        waits."""
        self._lap()
        self._copies.take()
        reads = self.chain.poll()
        self.copy_seconds += self._lap()
        for outcome in reads:
            self._answered(outcome)
        self.lookup_seconds += self._lap()
        assert self._kv.published is not None
        if self._kv.published:
            self._copies.store(self._kv.published)
            self._kv.published.clear()
        for identity in self._kv.discarded:
            self.chain.forget(identity)
        self._kv.discarded.clear()
        self.copy_seconds += self._lap()
        now = self._clock()
        for visit in list(self._visits):
            if visit.phase is not Phase.DONE:  # by what another has done
                self._continue(visit, now)
        self.lookup_seconds += self._lap()
        self._copies.order()
        self.chain.write()
        self.copy_seconds += self._lap()

    def _continue(self, visit: Visit, now: float) -> None:
        if not visit.is_waiting:
            self._end(visit)
        elif visit.phase is Phase.LOADING and now < visit.deadline:
            self._pump(visit)
        elif visit.phase is Phase.LOADING or now >= visit.deadline:
            self._give_up(visit)

    def _give_up(self, visit: Visit) -> None:
        """The deadline has passed: go on with what has come."""
        slow = visit.unanswered or {
            t.source for i in visit.outstanding if (t := self._transfers[i]).source >= 0
        }
        for number in slow:
            level = self.chain.levels[number]
            level.stats.error("deadline")
            looking = visit.phase is Phase.LOOKING
            fuse = level.lookups if looking else level.loads
            fuse.fault("deadline", "no answer in time")
            level.late += looking
        if visit.phase is Phase.LOOKING:
            visit.unanswered.clear()
            self._found(visit)
        else:
            self._end(visit)

    def _answered(self, outcome: Outcome) -> None:
        if outcome.kind == "load":
            self._fetched(outcome)
            return
        visit: Visit = outcome.ticket
        level = self.chain.levels[outcome.tier]
        if outcome.tier not in visit.unanswered:
            level.late -= 1  # nobody waits for it any more
            return
        if not outcome.fault:
            level.lookups.good()
        if visit.phase is Phase.LOOKING:
            visit.unanswered.discard(outcome.tier)
            visit.found[outcome.tier] = outcome.found
            if not visit.unanswered:
                self._found(visit)

    def _found(self, visit: Visit) -> None:
        self._visits.remove(visit)
        self.costs.choose(visit)

    def _fetched(self, outcome: Outcome) -> None:
        """A page is in DRAM now, or will not come."""
        transfer = self._transfers[outcome.ticket]
        if transfer.wanted and not outcome.fault:
            self.chain.levels[outcome.tier].loads.good()
        if outcome.ticket not in self.chain.dram:  # an error, or dropped meanwhile
            self._finish(transfer, False)
            return
        for visit in transfer.visits:
            size = visit.cold_bytes.get(outcome.tier, 0) + outcome.size
            visit.cold_bytes[outcome.tier] = size
            self.chain.levels[outcome.tier].rate.observe(size, outcome.ended - visit.started)
        self._copies.load(transfer)

    def _finish(self, transfer: Transfer, there: bool) -> None:
        """A page's way to the device has ended."""
        identity = transfer.page.identity
        del self._transfers[identity]
        for visit in transfer.visits:
            visit.outstanding.discard(identity)
            if not there:
                visit.todo.clear()  # what lies behind is of no use without it
                visit.sources.pop(transfer.page.place, None)
            if visit.phase is Phase.LOADING and not (visit.todo or visit.outstanding):
                self._end(visit)
