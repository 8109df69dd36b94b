"""What the scheduler has to do with the tiers: pages go down behind the steps, and come up for
requests before these are admitted.

A waiting request *visits* the tiers: what the device lacks is looked up, and where loading is
expected to be faster than computing it is loaded into free blocks, which then are part of the
prefix cache. Admission finds them there like any others, so nothing else knows of tiers, and
whatever fails is simply not found. Blocks that are being copied are on loan (quire/kv/loans.py):
nobody else gets them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec

from quire.engine.request import Request, State
from quire.kv import BLOCK_SIZE
from quire.kv.manager import KVManager, Page
from quire.step import Copies
from quire.tiers.chain import DRAM, Chain
from quire.tiers.counts import Rate, TierStats
from quire.tiers.work import Asked, Fuse, Outcome

log = logging.getLogger("quire.tiers")

DEVICE = "device"
# Visits under way at a time; further requests wait for these.
MOST_VISITS = 32
LOOKUP_SECONDS = 0.1
# A visit ends when computing would have been done, at the latest after so long, but not before.
LONGEST_VISIT, SHORTEST_VISIT = 10.0, 0.2
# Steps with fewer tokens say little about the speed of computing prompts.
LEAST_PREFILL_TOKENS = 64
# Assumed until something was measured, so that loading is tried.
SLOW_PREFILL = 1000.0
CLOSE_SECONDS = 3.0


class Copier(Protocol):
    """Copies pages; see Copies. `copied` never waits."""

    rate: float  # bytes a second that are assumed before a copy was measured
    order_bytes: int  # what one order holds at most, or a little more,
    order_pages: int  # and in pages
    most_orders: int  # under way at a time

    def copy(self, order: Copies) -> None: ...

    def copied(self) -> list[tuple[int, float]]:
        """Numbers of the orders that are done since the last call, and the seconds they took."""

    def close(self) -> None: ...


class Phase(Enum):
    LOOKING = "looking"
    FOUND = "found"
    LOADING = "loading"
    DONE = "done"


@dataclass(eq=False)
class Visit:
    """A request's stay in the tiers. `unanswered`: tiers asked. `found`: who has what, by tier.
    `todo`: pages to load, and from where (-1: DRAM). `outstanding`: those under way. `sources`:
    the tier that each block of the sequence came from, by its place; `hit`: tokens that were on the
    device, `reach`: tokens that will be. `patience`: seconds that loading may take."""

    request: Request
    deadline: float
    phase: Phase = Phase.LOOKING
    unanswered: set[int] = field(default_factory=set)
    found: dict[int, set[bytes]] = field(default_factory=dict)
    todo: deque[tuple[Page, int]] = field(default_factory=deque)
    outstanding: set[bytes] = field(default_factory=set)
    sources: dict[int, str] = field(default_factory=dict)
    hit: int = 0
    reach: int = 0
    patience: float = 0.0
    started: float = 0.0
    cold_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def is_waiting(self) -> bool:
        return self.request.state is State.WAITING

    def cached(self, hit: int) -> dict[str, int]:
        """Tokens of a hit by the tier that they came from."""
        counts: dict[str, int] = {}
        source = DEVICE
        for place in reversed(range(hit // BLOCK_SIZE)):
            # Of what windows have passed nothing is loaded: it comes with what follows.
            here = place < self.hit // BLOCK_SIZE
            source = DEVICE if here else self.sources.get(place, source)
            counts[source] = counts.get(source, 0) + BLOCK_SIZE
        return counts


@dataclass(eq=False)
class Transfer:
    """A page on its way to the device, for all visits that want it."""

    page: Page
    pool: int
    source: int
    visits: list[Visit] = field(default_factory=list)


@dataclass
class Order:
    """An order given to the copier: (identity, block) of each page."""

    copies: Copies
    pages: list[tuple[bytes, int]]


class Tiering:
    """Owns the chain of tiers. Only the engine thread calls it.

    `step_tokens`: the largest step, for admission.
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
        self._kv, self._copier, self._step_tokens, self._clock = kv, copier, step_tokens, clock
        self.copy_rate = Rate(copier.rate)
        self.prefill_rate: Rate | None = None
        self._visits: list[Visit] = []
        self._coming: list[Visit] = []  # loaded for, and not admitted yet
        self._transfers: dict[bytes, Transfer] = {}
        self._in_dram: deque[Transfer] = deque()  # these want a block
        self._to_store: deque[tuple[int, int, bytes]] = deque()  # (pool, block, identity)
        self._orders: dict[int, Order] = {}
        self._numbers = 0
        self._copies = Fuse("copying pages to and from the device", clock)
        self._page_bytes = chain.dram.slab.page_bytes
        kv.published = []

    # -- what the engine asks ------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request waits for a tier, or a copy is under way."""
        return bool(self._visits or self._orders)

    @property
    def settled(self) -> bool:
        """Nothing is on its way anywhere."""
        waiting = self._kv.published or self._kv.discarded or self._to_store
        return not (waiting or self.busy or self.chain.writing or self.chain.reading)

    def wait(self, seconds: float) -> None:
        """Wait for news of the tiers, at most `seconds`; copies on a device do not wake it."""
        self.chain.wait(min(seconds, 0.001) if self._orders else seconds)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens."""
        if tokens >= min(LEAST_PREFILL_TOKENS, self._step_tokens):
            if self.prefill_rate is None:
                self.prefill_rate = Rate(tokens / max(seconds, 1e-6))
            self.prefill_rate.observe(tokens, seconds)

    def stats(self) -> list[TierStats]:
        """A copy of what each tier counts."""
        found = self.chain.all_stats()
        found[0].state = "on" if self._copies.closed else "off"
        return [msgspec.structs.replace(each) for each in found]

    def clear(self) -> None:
        """Drop every page from all tiers."""
        self._to_store.clear()
        self.chain.clear()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Bring down what is still to be stored, as far as that takes at most `seconds`."""
        deadline = self._clock() + seconds
        while (self._orders or self._to_store) and self._clock() < deadline:
            self.advance()
            if self._orders:
                time.sleep(0.001)
        self.chain.close(max(0.0, deadline - self._clock()))
        self._copier.close()

    # -- a request before admission ---------------------------------------------------------------

    def ready(self, request: Request, slots: int) -> bool:
        """Whether a waiting request may be admitted now: what the tiers have for it is on the
        device, or will not come. `slots`: requests that could be admitted now."""
        if request.visit is None:
            prompt_logprobs = request.add.params.prompt_logprobs is not None
            if prompt_logprobs or not (self._kv.enable_caching and self._copies.closed):
                return True
            if not self._kv.fits_now(*self._sequence(request), self._step_tokens):
                return True  # admission will say so again; what is absent may change until then
            if len(self._visits) >= MOST_VISITS:
                return False
            request.visit = self._look(request)
        visit = request.visit
        if visit.phase is Phase.FOUND:
            # What is loaded for more requests than can be admitted would displace itself.
            self._coming = [v for v in self._coming if v.request.visit is v and v.is_waiting]
            if not self._kv.fits_now(*self._sequence(request), self._step_tokens):
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

    def _sequence(self, request: Request) -> tuple[list[int], str, str, list[list[bytes]]]:
        add = request.add
        return request.tokens, add.tenant, add.cache_salt, request.identities

    def _look(self, request: Request) -> Visit:
        """Begin a visit: ask who has what the device lacks."""
        visit = Visit(request, self._clock() + LOOKUP_SECONDS)
        absent = self._kv.absent(*self._sequence(request))
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
            self._choose(visit)
        return visit

    def _asked(self, absent: Iterable[Page], group: int, contiguous: bool) -> Asked:
        """The pages of one group that DRAM does not have."""
        dram = self.chain.dram
        pages = [p for p in absent if p.group == group and p.identity not in dram]
        return Asked([p.identity for p in pages], [p.place for p in pages], contiguous)

    def _choose(self, visit: Visit) -> None:
        """How far down the tiers loading pays, if at all."""
        visit.phase = Phase.DONE
        request, rate = visit.request, self.prefill_rate
        best, chosen = 0.0, None
        where: dict[bytes, int] = {}
        for number in range(-1, len(self.chain.levels)):
            for identity in visit.found.get(number, ()):
                if not self.chain.is_forgotten(identity):
                    where.setdefault(identity, number)
            if number >= 0 and not visit.found.get(number):
                continue
            hit, reach, pages = self._kv.beyond(
                *self._sequence(request), _Elsewhere(self.chain.dram, where)
            )
            sources = [-1 if p.identity in self.chain.dram else where[p.identity] for p in pages]
            saved = (reach - hit) / (SLOW_PREFILL if rate is None else rate.value)
            saved -= self._load_seconds(pages, sources)
            if pages and (rate is None or saved > best):
                best, chosen = saved, (hit, reach, list(zip(pages, sources, strict=True)))
            elif pages:
                for used in set(sources):
                    (self.chain.levels[used].rate if used >= 0 else self.copy_rate).doubt()
        if chosen is not None:
            visit.hit, visit.reach, pages_from = chosen
            visit.todo = deque(pages_from)
            visit.phase = Phase.FOUND
            seconds = LONGEST_VISIT if rate is None else rate.seconds(visit.reach - visit.hit)
            visit.patience = min(LONGEST_VISIT, max(SHORTEST_VISIT, seconds))

    def _load_seconds(self, pages: list[Page], sources: list[int]) -> float:
        seconds = 0.0
        for page, source in zip(pages, sources, strict=True):
            size = self._page_bytes[self._kv.groups[page.group].pool]
            seconds += self.copy_rate.seconds(size)
            if source >= 0:
                seconds += self.chain.levels[source].rate.seconds(size)
        return seconds

    def _load(self, visit: Visit) -> None:
        visit.phase = Phase.LOADING
        # What is there already must not make room for what comes.
        self._kv.touch(visit.request.identities, visit.reach // BLOCK_SIZE)
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

    def _begin(self, page: Page, pool: int, source: int) -> Transfer | None:
        """Start a page's way to the device; None where it must wait for room."""
        identity = page.identity
        entry = self.chain.dram.get(identity)
        if entry is not None and entry.ready:
            transfer = Transfer(page, pool, -1)
            self.chain.dram.pin(identity)
            self._in_dram.append(transfer)
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
        for number, seconds in self._copier.copied():
            self._copied(self._orders.pop(number), seconds)
        for outcome in self.chain.poll():
            self._answered(outcome)
        assert self._kv.published is not None
        if self._kv.published:
            self._to_store.extend(self._kv.published)
            self._kv.published.clear()
        for identity in self._kv.discarded:
            self.chain.forget(identity)
        self._kv.discarded.clear()
        now = self._clock()
        for visit in list(self._visits):
            self._continue(visit, now)
        self._order_loads()
        if self._copies.closed:
            self._order_stores()
        else:
            self.chain.stats.dropped += len(self._to_store)
            self._to_store.clear()
        self.chain.write()

    def _continue(self, visit: Visit, now: float) -> None:
        if visit.request.state is not State.WAITING or visit.request.visit is not visit:
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
            level.loads.fault("deadline", "no answer in time")
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
        if visit.phase is Phase.LOOKING and outcome.tier in visit.unanswered:
            visit.unanswered.discard(outcome.tier)
            visit.found[outcome.tier] = outcome.found
            if not visit.unanswered:
                self._found(visit)

    def _found(self, visit: Visit) -> None:
        self._visits.remove(visit)
        self._choose(visit)

    def _fetched(self, outcome: Outcome) -> None:
        """A page is in DRAM now, or will not come."""
        transfer = self._transfers[outcome.ticket]
        if outcome.ticket not in self.chain.dram:  # an error, or dropped meanwhile
            self._finish(transfer, failed=True)
            return
        for visit in transfer.visits:
            size = visit.cold_bytes.get(outcome.tier, 0) + outcome.size
            visit.cold_bytes[outcome.tier] = size
            self.chain.levels[outcome.tier].rate.observe(size, outcome.ended - visit.started)
        self.chain.dram.pin(outcome.ticket)
        self._in_dram.append(transfer)

    def _finish(self, transfer: Transfer, failed: bool) -> None:
        """A page's way to the device has ended."""
        identity = transfer.page.identity
        del self._transfers[identity]
        for visit in transfer.visits:
            visit.outstanding.discard(identity)
            if failed:
                visit.todo.clear()  # what lies behind is of no use without it
                visit.sources.pop(transfer.page.place, None)
            if visit.phase is Phase.LOADING and not (visit.todo or visit.outstanding):
                self._end(visit)

    # -- copies ------------------------------------------------------------------------------------

    def _order_loads(self) -> None:
        """Have pages that are in DRAM copied to free blocks of the device."""
        while self._in_dram and len(self._orders) < self._copier.most_orders:
            pages: list[tuple[bytes, int]] = []
            pool = self._in_dram[0].pool
            while self._in_dram and self._in_dram[0].pool == pool and self._has_room(pool, pages):
                transfer = self._in_dram.popleft()
                identity = transfer.page.identity
                wanted = any(visit.phase is Phase.LOADING for visit in transfer.visits)
                block = self._kv.loans.take(pool) if wanted else None
                if block is None:  # nobody waits any more, or running requests need all blocks
                    self.chain.dram.unpin(identity)
                    self._finish(transfer, failed=True)
                else:
                    pages.append((identity, block))
            self._order(pool, pages, store=False)

    def _order_stores(self) -> None:
        """Have fresh blocks copied to DRAM."""
        while self._to_store and len(self._orders) < self._copier.most_orders:
            pages: list[tuple[bytes, int]] = []
            pool = self._to_store[0][0]
            while self._to_store and self._to_store[0][0] == pool and self._has_room(pool, pages):
                _, block, identity = self._to_store.popleft()
                if identity in self.chain.dram or not self._kv.loans.borrow(pool, block, identity):
                    continue
                if self.chain.dram.reserve(identity, pool) is None:
                    self._kv.loans.give_back(pool, block)
                    self.chain.stats.dropped += 1
                    continue
                pages.append((identity, block))
            self._order(pool, pages, store=True)

    def _has_room(self, pool: int, pages: list[tuple[bytes, int]]) -> bool:
        """Whether an order of these pages can take another."""
        size = len(pages) * self._page_bytes[pool]
        return len(pages) < self._copier.order_pages and size < self._copier.order_bytes

    def _order(self, pool: int, pages: list[tuple[bytes, int]], store: bool) -> None:
        if not pages:
            return
        self._numbers += 1
        slots = [self.chain.dram.entry(identity).slot for identity, _ in pages]
        copies = Copies(self._numbers, store, pool, [block for _, block in pages], slots)
        order = self._orders[copies.number] = Order(copies, pages)
        try:
            self._copier.copy(order.copies)
        except Exception as error:  # a copy's fault must not end the engine
            log.debug("copying %d pages failed", len(pages), exc_info=error)
            self.chain.stats.error("copy")
            self._copies.fault("copy", f"{type(error).__name__}: {error}")
            del self._orders[copies.number]
            self._undo(order)

    def _undo(self, order: Order) -> None:
        pool, store = order.copies.pool, order.copies.store
        for identity, block in order.pages:
            self._kv.loans.give_back(pool, block)
            if store:
                self.chain.dram.fail(identity)
            else:
                self.chain.dram.unpin(identity)
                self._finish(self._transfers[identity], failed=True)

    def _copied(self, order: Order, seconds: float) -> None:
        self._copies.good()
        pool, store = order.copies.pool, order.copies.store
        size, stats = len(order.pages) * self._page_bytes[pool], self.chain.stats
        for identity, block in order.pages:
            if store:
                self._kv.loans.give_back(pool, block)
                self.chain.arrived(identity)
            else:
                good = not self.chain.dram.entry(identity).doomed
                self._kv.loans.give_back(pool, block, identity if good else None)
                self.chain.dram.unpin(identity)
                self._finish(self._transfers[identity], failed=not good)
        if store:
            stats.stored_bytes += size
            stats.store_seconds += seconds
        else:
            stats.loaded_bytes += size
            stats.load_seconds += seconds
            self.copy_rate.observe(size, seconds)


@dataclass
class _Elsewhere:
    """Pages that DRAM has, or a tier of those looked at."""

    dram: object
    where: dict[bytes, int]

    def __contains__(self, identity: object) -> bool:
        return identity in self.where or identity in self.dram  # type: ignore[operator]
