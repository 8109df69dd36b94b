"""The tiers of one engine in a row: DRAM first, cold tiers below it.

Pages come down from the device into DRAM, and from there are written to the cold tiers behind the
engine's back; of tiers that hand on what they evict only to the first, as the next one takes what
leaves it. They come up from a cold tier into DRAM, where the device takes them, and from there go
to the first again. A page is written to no tier that has it, and read once for all who want it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from quire.tiers.cold import ColdTier
from quire.tiers.counts import Rate, TierStats
from quire.tiers.dram import DramTier
from quire.tiers.work import Asked, Fuse, Outcome, TierThreads

DRAM = "dram"
CLEAR = "clear"  # the ticket of such a job
# Pages deleted in vain are remembered, so that they are not found again; the oldest are forgotten.
MOST_FORGOTTEN = 100_000


def _clear(tier: ColdTier) -> int:
    return tier.clear()


class Level:
    """A cold tier as the chain sees it. `rate`: bytes a second that a request gets from it. `late`:
    lookups that were given up and not answered since; meanwhile it is not asked again, so a tier
    that hangs delays few requests. `above`: the tier whose evicted pages it takes.

    Lookups and loads have a fuse each, as an index may know names on a disk that fails to read
    files. Faults are counted here; what came well and in time, by who waits for it."""

    def __init__(self, threads: TierThreads, rate: float):
        self.above: Level | None = None
        self.threads = threads
        self.name = threads.tier.name
        self.rate = Rate(rate)
        self.lookups = Fuse(f"looking into tier {self.name}")
        self.loads = Fuse(f"loading from tier {self.name}")
        self.stores = Fuse(f"storing in tier {self.name}")
        self.behind: OrderedDict[bytes, None] = OrderedDict()  # pages in DRAM to write here
        # What its threads are to do besides, once their queue has room: a page in doubt must go.
        self.jobs: deque[tuple[str, Callable[[ColdTier], object]]] = deque(maxlen=MOST_FORGOTTEN)
        self.stats = TierStats(self.name)
        self.late = 0

    @property
    def readable(self) -> bool:
        """Whether faults keep nobody from looking and loading."""
        return self.lookups.closed and self.loads.closed

    def state(self) -> str:
        """For people."""
        loads, stores = self.readable, self.stores.closed
        if loads and stores:
            return "on"
        return "loads only" if loads else "stores only" if stores else "off"


class Chain:
    """Only the engine thread calls it. `poll` takes what the tiers' threads have finished."""

    def __init__(self, dram: DramTier, cold: Sequence[tuple[ColdTier, float]] = ()):
        """`cold`: tiers with the bytes a second they are thought to give."""
        self.dram = dram
        self.stats = TierStats(DRAM)
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._news = threading.Event()
        self.levels = [
            Level(TierThreads(number, tier, self._finish), rate)
            for number, (tier, rate) in enumerate(cold)
        ]
        self._chain_levels()
        self._reading = 0  # lookups and loads under way
        self._writing = [0] * len(dram.slab.slots)  # pages by pool
        self._most_behind = sum(dram.slab.slots)
        for level in self.levels:
            level.threads.start()

    def _chain_levels(self) -> None:
        """Let each tier that can hand on what it evicts do so to the next of these."""
        chained = [level for level in self.levels if level.threads.tier.hands_on]
        for above, below in pairwise(chained):
            below.above = above
            above.threads.tier.evicted = partial(self._evicted, below)

    def _evicted(self, below: Level, identity: bytes, page: memoryview | None) -> None:
        """On a tier's thread: it has deleted a page for room."""
        if self.is_forgotten(identity):
            return
        taken = False
        if page is not None and below.stores.closed:
            taken = below.threads.take(identity, page, self._is_wanted)
        if not taken:
            self._finish(Outcome(below.threads.number, "take", identity, error="dropped"))

    def _is_wanted(self, identity: bytes) -> bool:
        return not self.is_forgotten(identity)

    def _finish(self, outcome: Outcome) -> None:
        """On a tier's thread."""
        self._outcomes.put(outcome)
        self._news.set()

    @property
    def reading(self) -> bool:
        """Whether a lookup or a load is under way."""
        return self._reading > 0

    @property
    def writing(self) -> bool:
        """Whether pages wait to be written or are being written."""
        return any(self._writing) or any(
            level.jobs or (level.behind and level.stores.closed) for level in self.levels
        )

    def wait(self, seconds: float) -> None:
        """Wait until a tier has finished something, at most `seconds`."""
        self._news.wait(seconds)

    # -- up ----------------------------------------------------------------------------------

    def look(self, ticket: object, asked: Sequence[Asked]) -> list[int]:
        """Ask the cold tiers which pages they have; returns the tiers that will answer."""
        asking = []
        for number, level in enumerate(self.levels):
            usable = level.readable and not level.late
            if usable and level.threads.lookup(ticket, asked):
                level.stats.misses += sum(len(each.identities) for each in asked)
                asking.append(number)
        self._reading += len(asking)
        return asking

    def fetch(self, identity: bytes, pool: int, number: int) -> bool:
        """Have a page read from a cold tier into DRAM. False: there is no room now."""
        level = self.levels[number]
        entry = self.dram.reserve(identity, pool)
        if entry is None:
            return False
        if not level.threads.load(identity, self.dram.slab.view(pool, entry.slot)):
            self.dram.fail(identity)
            return False
        self._reading += 1
        return True

    def is_forgotten(self, identity: bytes) -> bool:
        """Whether a page must not be used, though a tier may still have it."""
        return identity in self._forgotten

    # -- down --------------------------------------------------------------------------------

    def arrived(self, identity: bytes) -> None:
        """A reserved page has come from the device: it is in DRAM, and will be written below."""
        self.dram.fill(identity)
        if identity not in self.dram:  # dropped meanwhile
            return
        self._forgotten.pop(identity, None)
        self._write_behind(self.levels, identity)

    def _write_behind(self, levels: Sequence[Level], identity: bytes) -> None:
        """Have a page written to those of the tiers that do not take it from another."""
        for level in levels:
            if level.above is not None and level.above.stores.closed:
                continue
            level.behind[identity] = None
            if len(level.behind) > self._most_behind:
                level.behind.popitem(last=False)
                level.stats.dropped += 1

    def write(self) -> None:
        """Hand pages to the cold tiers' writers, as far as their queues take them. Pages being
        written cannot leave DRAM, so they are never more than half of it."""
        for level in self.levels:
            while level.jobs and level.threads.other(*level.jobs[0]):
                level.jobs.popleft()
            while level.behind and level.stores.closed:
                identity = next(iter(level.behind))
                entry = self.dram.get(identity)
                if entry is None:  # displaced before its turn came
                    del level.behind[identity]
                    level.stats.dropped += 1
                    continue
                most = max(1, self.dram.slab.usable[entry.pool] // 2)
                view = self.dram.slab.view(entry.pool, entry.slot)
                if self._writing[entry.pool] >= most or not level.threads.store(identity, view):
                    break
                entry.pins += 1
                self._writing[entry.pool] += 1
                del level.behind[identity]

    def forget(self, identity: bytes) -> None:
        """A page must not be found any more: it is in doubt."""
        self.dram.drop(identity)
        for level in self.levels:
            level.behind.pop(identity, None)
            level.jobs.append(("forget", lambda tier: tier.forget(identity)))
        if self.levels:
            self._forgotten[identity] = None
            if len(self._forgotten) > MOST_FORGOTTEN:
                self._forgotten.popitem(last=False)

    def clear(self) -> None:
        """Drop every page of this engine's model, in all tiers; the cold ones do it by and by."""
        self.dram.clear()
        for level in self.levels:
            level.behind.clear()
            level.jobs.append((CLEAR, _clear))

    def _cleared(self, level: Level) -> None:
        """A tier is empty. What it has handed on meanwhile is in the next, so that goes again."""
        for below in self.levels:
            if below.above is level:
                below.jobs.append((CLEAR, _clear))

    # -- what the threads have done --------------------------------------------------------------

    def poll(self) -> list[Outcome]:
        """Take outcomes; returns the lookups and loads among them."""
        self._news.clear()
        reads: list[Outcome] = []
        while True:
            try:
                outcome = self._outcomes.get_nowait()
            except queue.Empty:
                return reads
            level = self.levels[outcome.tier]
            self._count(level, outcome)
            if outcome.kind == "store":
                self._stored(outcome.ticket)
            elif outcome.kind == "load":
                self._loaded(outcome)
            elif outcome.ticket == CLEAR:
                self._cleared(level)
            if outcome.kind in ("load", "lookup"):
                self._reading -= 1
                reads.append(outcome)

    def _stored(self, identity: bytes) -> None:
        entry = self.dram.entry(identity)
        self._writing[entry.pool] -= 1
        self.dram.unpin(identity)

    def _loaded(self, outcome: Outcome) -> None:
        identity = outcome.ticket
        if outcome.error:
            self.dram.fail(identity)
            return
        self.dram.fill(identity)
        self._write_behind(self.levels[: outcome.tier], identity)

    def _count(self, level: Level, outcome: Outcome) -> None:
        stats, seconds = level.stats, outcome.ended - outcome.begun
        fuse = {"lookup": level.lookups, "load": level.loads}.get(outcome.kind, level.stores)
        if outcome.error == "dropped":
            stats.dropped += 1
        elif outcome.error and outcome.error != "missing":
            stats.error(outcome.error)
        if outcome.fault:
            fuse.fault(outcome.error, f"{outcome.kind} failed")
        elif outcome.kind == "lookup":
            stats.hits += len(outcome.found)
            stats.misses -= len(outcome.found)
        elif outcome.kind == "load" and not outcome.error:
            stats.loaded_bytes += outcome.size
            stats.load_seconds += seconds
        elif outcome.kind in ("store", "take") and outcome.wrote:
            fuse.good()
            stats.stored_bytes += outcome.size
            stats.store_seconds += seconds

    def all_stats(self) -> list[TierStats]:
        """Of DRAM, then of the cold tiers. The structs are live."""
        dram = self.stats
        dram.capacity_bytes, dram.used_bytes = self.dram.capacity, self.dram.used
        dram.pages, dram.evictions = len(self.dram), self.dram.evictions
        for level in self.levels:
            tier, stats = level.threads.tier, level.stats
            stats.capacity_bytes, stats.used_bytes = tier.capacity, tier.used
            stats.pages, stats.evictions, stats.state = tier.count, tier.evictions, level.state()
        return [dram, *(level.stats for level in self.levels)]

    def close(self, seconds: float) -> None:
        """Write what is in DRAM only, as far as that takes no more than `seconds`, and close."""
        deadline = time.monotonic() + seconds
        while self.writing and time.monotonic() < deadline:
            self.write()
            self.wait(0.01)
            self.poll()
        for level in self.levels:
            level.threads.close(max(0.0, deadline - time.monotonic()))
