"""Pages between the device and DRAM: orders for the runner's copier, and the blocks on loan for
them until they are done."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from quire.engine.visits import Transfer
from quire.kv.manager import KVManager
from quire.step import Copies
from quire.tiers.chain import Chain
from quire.tiers.counts import Rate
from quire.tiers.work import Fuse

log = logging.getLogger("quire.tiers")

Fresh = tuple[int, int, bytes]  # pool, block, identity


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


@dataclass
class Order:
    """An order given to the copier: (identity, block) of each page, and for whom it is loaded."""

    copies: Copies
    pages: list[tuple[bytes, int]]
    transfers: list[Transfer]


class PageCopies:
    """Gives orders and takes what is done. `loaded` is called with each Transfer that has ended,
    and whether its page can be found on the device now."""

    def __init__(
        self,
        kv: KVManager,
        chain: Chain,
        copier: Copier,
        loaded: Callable[[Transfer, bool], None],
        rate: Rate,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._kv, self._chain, self._copier, self._loaded = kv, chain, copier, loaded
        self._rate = rate
        self._fuse = Fuse("copying pages to and from the device", clock)
        self._to_load: deque[Transfer] = deque()  # pages that are in DRAM, pinned
        self._to_store: deque[Fresh] = deque()
        self._orders: dict[int, Order] = {}
        self._numbers = 0

    @property
    def usable(self) -> bool:
        """False while copies only fail."""
        return self._fuse.closed

    @property
    def busy(self) -> bool:
        """Whether an order is under way."""
        return bool(self._orders)

    @property
    def waiting(self) -> bool:
        """Whether there is something to order."""
        return bool(self._to_load or self._to_store)

    def load(self, transfer: Transfer) -> None:
        """Pin a page that is in DRAM; it is copied to a free block as soon as `order` comes."""
        self._chain.dram.pin(transfer.page.identity)
        self._to_load.append(transfer)

    def store(self, fresh: Iterable[Fresh]) -> None:
        """Blocks to be copied to DRAM, as far as they still hold the same then."""
        self._to_store.extend(fresh)

    def drop_stores(self) -> None:
        """Forget what was to be stored."""
        self._to_store.clear()

    def order(self) -> None:
        """Give orders for what waits, as many as may be under way."""
        self._order_loads()
        if self.usable:
            self._order_stores()
        else:
            self._chain.stats.dropped += len(self._to_store)
            self._to_store.clear()
        self.take()  # a copier that works at once has done them

    def _order_loads(self) -> None:
        while self._to_load and len(self._orders) < self._copier.most_orders:
            pages: list[tuple[bytes, int]] = []
            transfers: list[Transfer] = []
            pool = self._to_load[0].pool
            while self._to_load and self._to_load[0].pool == pool and self._has_room(pool, pages):
                transfer = self._to_load.popleft()
                identity = transfer.page.identity
                block = self._kv.loans.take(pool) if transfer.wanted else None
                if block is None:  # nobody waits any more, or running requests need all blocks
                    self._chain.dram.unpin(identity)
                    self._loaded(transfer, False)
                else:
                    pages.append((identity, block))
                    transfers.append(transfer)
            self._give(pool, pages, transfers)

    def _order_stores(self) -> None:
        while self._to_store and len(self._orders) < self._copier.most_orders:
            pages: list[tuple[bytes, int]] = []
            pool = self._to_store[0][0]
            while self._to_store and self._to_store[0][0] == pool and self._has_room(pool, pages):
                _, block, identity = self._to_store.popleft()
                if identity in self._chain.dram:
                    continue
                if not self._kv.loans.borrow(pool, block, identity):
                    continue
                if self._chain.dram.reserve(identity, pool) is None:
                    self._kv.loans.give_back(pool, block)
                    self._chain.stats.dropped += 1
                    continue
                pages.append((identity, block))
            self._give(pool, pages, [])

    def _has_room(self, pool: int, pages: list[tuple[bytes, int]]) -> bool:
        """Whether an order of these pages can take another."""
        size = len(pages) * self._chain.dram.slab.page_bytes[pool]
        return len(pages) < self._copier.order_pages and size < self._copier.order_bytes

    def _give(self, pool: int, pages: list[tuple[bytes, int]], transfers: list[Transfer]) -> None:
        if not pages:
            return
        self._numbers += 1
        slots = [self._chain.dram.entry(identity).slot for identity, _ in pages]
        blocks = [block for _, block in pages]
        copies = Copies(self._numbers, not transfers, pool, blocks, slots)
        order = Order(copies, pages, transfers)
        try:
            self._copier.copy(copies)
        except Exception as error:  # a copy's fault must not end the engine
            log.debug("copying %d pages failed", len(pages), exc_info=error)
            self._chain.stats.error("copy")
            self._fuse.fault("copy", f"{type(error).__name__}: {error}")
            self._end(order, good=False)
        else:
            self._orders[copies.number] = order

    def take(self) -> None:
        """Take what the copier has done."""
        for number, seconds in self._copier.copied():
            self._fuse.good()
            order = self._orders.pop(number)
            pool, stats = order.copies.pool, self._chain.stats
            size = len(order.pages) * self._chain.dram.slab.page_bytes[pool]
            if order.copies.store:
                stats.stored_bytes += size
                stats.store_seconds += seconds
            else:
                stats.loaded_bytes += size
                stats.load_seconds += seconds
                self._rate.observe(size, seconds)
            self._end(order, good=True)

    def _end(self, order: Order, good: bool) -> None:
        """Give blocks back; what came is findable, unless it was dropped meanwhile."""
        pool, dram, loans = order.copies.pool, self._chain.dram, self._kv.loans
        if order.copies.store:
            for identity, block in order.pages:
                loans.give_back(pool, block)
                if good:
                    self._chain.arrived(identity)
                else:
                    dram.fail(identity)
            return
        for transfer, (identity, block) in zip(order.transfers, order.pages, strict=True):
            right = good and not dram.entry(identity).doomed
            loans.give_back(pool, block, identity if right else None)
            dram.unpin(identity)
            self._loaded(transfer, right)

    def close(self) -> None:
        self._copier.close()
