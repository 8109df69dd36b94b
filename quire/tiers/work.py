"""Threads in front of a cold tier: bounded queues, outcomes as messages, and a fuse that blows.

The engine thread hands out jobs and takes outcomes; it never waits for a tier. Job queues are
bounded: what finds no room is refused at once, and the caller decides what to leave out.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.tiers.cold import ColdTier, Damaged, Missing

log = logging.getLogger("quire.tiers")

# Faults in a row after which a tier is left alone, and for how long: each time twice as long.
FUSE_FAULTS = 5
FIRST_REST, LONGEST_REST = 30.0, 600.0
# Enough of them to hash as fast as a good disk reads (a core hashes 1.5 to 2 GB/s), and not so many
# that they keep the engine thread from its core.
READERS = max(2, min(8, (os.cpu_count() or 4) // 2))
WRITERS = max(1, READERS // 2)


@dataclass(frozen=True)
class Asked:
    """Pages of one KV group to look up: `places` are their blocks' numbers in the sequence.
    `contiguous`: a page is of use only where all before it are there."""

    identities: list[bytes]
    places: list[int]
    contiguous: bool


@dataclass
class Outcome:
    """What became of a job. `kind`: lookup, load, store, take (of what the tier above evicts),
    other. `error`: empty, or a kind of error;
    `fault`: it was the tier's, not the page's."""

    tier: int
    kind: str
    ticket: Any
    found: set[bytes] = field(default_factory=set)
    error: str = ""
    fault: bool = False
    wrote: bool = False
    size: int = 0
    begun: float = 0.0
    ended: float = 0.0


class Fuse:
    """Keeps a tier from being asked while it only fails. Used by the engine thread."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic):
        self._what, self._clock = what, clock
        self._faults = 0
        self._rest = FIRST_REST
        self._until: float | None = None

    @property
    def closed(self) -> bool:
        """Whether the tier may be asked. After a rest it may, once it has not failed again."""
        return self._until is None or self._clock() >= self._until

    def good(self) -> None:
        if self._until is not None:
            log.warning("%s works again", self._what)
        self._faults, self._rest, self._until = 0, FIRST_REST, None

    def fault(self, kind: str, detail: str) -> None:
        self._faults += 1
        if self._faults >= FUSE_FAULTS and self.closed:
            log.warning(
                "%s is switched off for %.0f s after %d faults, the last: %s (%s)",
                self._what, self._rest, self._faults, kind, detail,
            )  # fmt: skip
            self._until = self._clock() + self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)


class TierThreads:
    """Readers and writers of one cold tier. `finish` is called on their threads with each Outcome.

    A hung job keeps its thread; the others and the engine go on without it.
    """

    def __init__(
        self,
        number: int,
        tier: ColdTier,
        finish: Callable[[Outcome], None],
        readers: int = READERS,
        writers: int = WRITERS,
        limit: int = 64,
    ):
        self.tier = tier
        self.number, self._finish = number, finish
        self._reads: queue.Queue[_Job] = queue.Queue(limit)
        self._writes: queue.Queue[_Job] = queue.Queue(limit)
        self._ended = threading.Event()
        for jobs, count in ((self._reads, readers), (self._writes, writers)):
            for _ in range(count):
                name = f"quire-tier-{tier.name}"
                threading.Thread(target=self._work, args=(jobs,), name=name, daemon=True).start()

    def start(self) -> None:
        """Get the tier ready, before anything else is written."""
        self._put(self._writes, Outcome(self.number, "other", "start"), self._start)

    def lookup(self, ticket: Any, asked: Sequence[Asked]) -> bool:
        """Find out which pages are there. False: the queue is full."""

        def run(outcome: Outcome) -> None:
            outcome.found = answer(self.tier, asked)

        return self._put(self._reads, Outcome(self.number, "lookup", ticket), run)

    def load(self, identity: bytes, into: memoryview) -> bool:
        """Read a page. False: the queue is full."""

        def run(outcome: Outcome) -> None:
            self.tier.load(identity, into)

        outcome = Outcome(self.number, "load", identity, size=len(into))
        return self._put(self._reads, outcome, run)

    def store(self, identity: bytes, page: memoryview) -> bool:
        """Write a page. False: the queue is full."""

        def run(outcome: Outcome) -> None:
            outcome.wrote = self.tier.store(identity, page)

        outcome = Outcome(self.number, "store", identity, size=len(page))
        return self._put(self._writes, outcome, run)

    def take(self, identity: bytes, page: memoryview, wanted: Callable[[bytes], bool]) -> bool:
        """Write a page that the tier above has evicted, unless nobody wants it by then. Called on
        that tier's threads. False: the queue is full."""

        def run(outcome: Outcome) -> None:
            outcome.wrote = wanted(identity) and self.tier.store(identity, page)

        outcome = Outcome(self.number, "take", identity, size=len(page))
        return self._put(self._writes, outcome, run)

    def other(self, ticket: Any, run: Callable[[ColdTier], object]) -> bool:
        """Do something else with the tier, behind the writes. False: the queue is full."""
        outcome = Outcome(self.number, "other", ticket)
        return self._put(self._writes, outcome, lambda _: self._run(run))

    @property
    def writing(self) -> bool:
        """Whether the writers have something to do."""
        return self._writes.unfinished_tasks > 0

    def close(self, seconds: float) -> None:
        """Let the writers finish what is queued, for `seconds` at most; then the tier is closed."""
        deadline = time.monotonic() + seconds
        while self.writing and time.monotonic() < deadline:
            time.sleep(0.005)
        self._ended.set()
        if not self.writing:
            self.tier.close()

    def _run(self, run: Callable[[ColdTier], object]) -> None:
        run(self.tier)

    def _start(self, outcome: Outcome) -> None:
        self.tier.start()

    def _put(self, jobs: queue.Queue[_Job], outcome: Outcome, run: Run) -> bool:
        try:
            jobs.put_nowait((outcome, run))
        except queue.Full:
            return False
        return True

    def _work(self, jobs: queue.Queue[_Job]) -> None:
        while not self._ended.is_set():
            try:
                job = jobs.get(timeout=1.0)
            except queue.Empty:
                continue
            outcome, run = job
            outcome.begun = time.monotonic()
            try:
                run(outcome)
            except Missing:
                outcome.error = "missing"
            except Damaged as error:
                outcome.error = error.kind
                log.warning("tier %s: a block is damaged (%s)", self.tier.name, error)
            except Exception as error:  # whatever a tier raises is its fault, and a miss
                outcome.error, outcome.fault = _kind(error), True
                log.debug("tier %s: a %s failed", self.tier.name, outcome.kind, exc_info=error)
            outcome.ended = time.monotonic()
            jobs.task_done()
            self._finish(outcome)


Run = Callable[[Outcome], None]
_Job = tuple[Outcome, Run]
LOOKUP_PIECE = 32


def answer(tier: ColdTier, asked: Sequence[Asked]) -> set[bytes]:
    """The pages that are there, as far as they can be of use: contiguous groups first, and of the
    others only what lies before the place where one of those ends."""
    found = set[bytes]()
    reach: float = float("inf")
    for each in sorted(asked, key=lambda a: not a.contiguous):
        wanted = [i for i, place in zip(each.identities, each.places, strict=True) if place < reach]
        for start in range(0, len(wanted), LOOKUP_PIECE):
            piece = wanted[start : start + LOOKUP_PIECE]
            there = tier.present(piece)
            found |= there
            if each.contiguous and len(there) < len(piece):
                first = next(i for i in range(len(piece)) if piece[i] not in there)
                reach = min(reach, each.places[start + first])
                break
    return found


def _kind(error: Exception) -> str:
    """A short name of what went wrong, for a counter."""
    kind = getattr(error, "kind", None)
    if isinstance(kind, str):
        return kind
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__
