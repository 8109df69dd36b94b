"""A waiting request's stay in the tiers, and how far down them loading pays."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from quire.engine.request import Request, State
from quire.kv import BLOCK_SIZE
from quire.kv.manager import KVManager
from quire.kv.prefixes import Page
from quire.tiers.chain import Chain
from quire.tiers.counts import Rate
from quire.tiers.dram import DramTier

DEVICE = "device"  # where cached tokens come from that no tier had to bring
FROM_DRAM = -1  # a source; others are numbers of cold tiers
# Loading has as long as computing would have taken, within these bounds.
LONGEST_VISIT, SHORTEST_VISIT = 10.0, 0.2
# Tokens a second that are assumed until something was measured, so that loading is tried.
SLOW_PREFILL = 1000.0


class Phase(Enum):
    LOOKING = "looking"
    FOUND = "found"
    LOADING = "loading"
    DONE = "done"


@dataclass(eq=False)
class Visit:
    """A request's stay in the tiers. `unanswered`: tiers asked. `found`: who has what, by tier.
    `todo`: pages to load, with their sources. `outstanding`: those under way. `sources`: the tier
    that each block of the sequence came from, by its place; `hit`: tokens that were on the device,
    `reach`: tokens that will be. `patience`: seconds that loading may take. `cold_bytes`: what each
    cold tier has given."""

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
        """Whether the request still waits to be admitted, with this visit."""
        return self.request.state is State.WAITING and self.request.visit is self

    @property
    def sequence(self) -> tuple[list[int], str, str, list[list[bytes]]]:
        """What KVManager asks about a request: tokens, tenant, salt, identities."""
        return sequence_of(self.request)

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

    @property
    def wanted(self) -> bool:
        return any(visit.phase is Phase.LOADING for visit in self.visits)


def sequence_of(request: Request) -> tuple[list[int], str, str, list[list[bytes]]]:
    """See Visit.sequence."""
    add = request.add
    return request.tokens, add.tenant, add.cache_salt, request.identities


@dataclass
class _Elsewhere:
    """Pages that DRAM has, or a tier of those looked at."""

    dram: DramTier
    where: dict[bytes, int]

    def __contains__(self, identity: object) -> bool:
        return identity in self.where or identity in self.dram


class CostModel:
    """What loading and computing would take, as measured lately."""

    def __init__(self, kv: KVManager, chain: Chain, copy_rate: float):
        self.copies = Rate(copy_rate)  # bytes a second to the device
        self.prefill: Rate | None = None  # tokens a second of large steps
        self._kv, self._chain = kv, chain

    def observe_step(self, tokens: int, seconds: float) -> None:
        """A large step computed so many tokens."""
        if self.prefill is None:
            self.prefill = Rate(tokens / max(seconds, 1e-6))
        self.prefill.observe(tokens, seconds)

    def choose(self, visit: Visit) -> None:
        """How far down the tiers loading pays: sets what is to do, and FOUND, or DONE."""
        visit.phase = Phase.DONE
        best, dram = 0.0, self._chain.dram
        where: dict[bytes, int] = {}
        for number in range(FROM_DRAM, len(self._chain.levels)):
            found = visit.found.get(number, ())
            for identity in found:
                if not self._chain.is_forgotten(identity):
                    where.setdefault(identity, number)
            if number >= 0 and not found:
                continue
            hit, reach, pages = self._kv.beyond(*visit.sequence, _Elsewhere(dram, where))
            sources = [FROM_DRAM if p.identity in dram else where[p.identity] for p in pages]
            computing = self._compute_seconds(reach - hit)
            saved = computing - self._load_seconds(pages, sources)
            if pages and (self.prefill is None or saved > best):
                best, visit.hit, visit.reach, visit.phase = saved, hit, reach, Phase.FOUND
                visit.todo = deque(zip(pages, sources, strict=True))
                known = computing if self.prefill is not None else LONGEST_VISIT
                visit.patience = min(LONGEST_VISIT, max(SHORTEST_VISIT, known))
            elif pages:
                self._doubt(sources)

    def _compute_seconds(self, tokens: int) -> float:
        return tokens / SLOW_PREFILL if self.prefill is None else self.prefill.seconds(tokens)

    def _load_seconds(self, pages: list[Page], sources: list[int]) -> float:
        seconds = 0.0
        for page, source in zip(pages, sources, strict=True):
            size = self._kv.groups[page.group].page_bytes
            seconds += self.copies.seconds(size)
            if source >= 0:
                seconds += self._chain.levels[source].rate.seconds(size)
        return seconds

    def _doubt(self, sources: Iterable[int]) -> None:
        """What is left out because of its rate is not measured again: see Rate."""
        for source in set(sources):
            (self._chain.levels[source].rate if source >= 0 else self.copies).doubt()
