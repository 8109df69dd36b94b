"""The Driver of test_scheduler.py with tiers below its blocks, whose copies come late and whose
cold tier fails as it is told.
"""

from __future__ import annotations

import contextlib
import errno
import random
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from mock_runner import POISON, MockRunner
from test_scheduler import Driver

from quire.engine.tiering import Tiering
from quire.kv import BLOCK_SIZE, NULL_BLOCK
from quire.kv.groups import KVGroup
from quire.step import Copies
from quire.tiers.chain import Chain
from quire.tiers.cold import ColdTier, Damaged, Evicted, Missing
from quire.tiers.dram import DramTier
from quire.tiers.slab import HostSlab

CELL = struct.Struct("<Bqq")  # what a cell holds: nothing, poison, or a group and a hash
PAGE_BYTES = BLOCK_SIZE * CELL.size  # of a block of BLOCK_SIZE tokens


def encode(cells: Sequence[object]) -> bytes:
    parts = []
    for cell in cells:
        group, value = cell if isinstance(cell, tuple) else (0, 0)
        parts.append(CELL.pack(0 if cell is None else 1 if cell == POISON else 2, group, value))
    return b"".join(parts)


def decode(page: bytes | memoryview) -> list[object]:
    kinds: list[object] = [None, POISON]
    return [
        (group, value) if kind == 2 else kinds[kind]
        for kind, group, value in CELL.iter_unpack(bytes(page))
    ]


class LateCopier:
    """Does what it is ordered some time later, as a stream of its own would, and says so later
    still. `hurry`: at once."""

    rate, order_bytes, order_pages, most_orders = 1e9, 5 * PAGE_BYTES, 4, 3

    def __init__(self, runner: MockRunner, slab: HostSlab, rng: random.Random):
        self.runner, self.slab, self.rng = runner, slab, rng
        self.hurry = self.breaks = False
        self.orders: deque[Copies] = deque()
        self.done: list[tuple[int, float]] = []
        self.stored = self.loaded = 0

    def copy(self, order: Copies) -> None:
        if self.breaks:
            raise RuntimeError("the copy engine is on strike")
        assert NULL_BLOCK not in order.blocks
        assert len(set(order.blocks)) == len(order.blocks) == len(set(order.slots))
        self.orders.append(order)
        self.work()

    def work(self) -> None:
        while self.orders and (self.hurry or self.rng.random() < 0.5):
            order = self.orders.popleft()
            pages = self.runner.pages[order.pool]
            for block, slot in zip(order.blocks, order.slots, strict=True):
                view = self.slab.view(order.pool, slot)
                if order.store:
                    view[:] = encode(pages[block])
                else:
                    pages[block] = decode(view)
            self.stored += len(order.blocks) * order.store
            self.loaded += len(order.blocks) * (not order.store)
            self.done.append((order.number, 1e-5))

    def copied(self) -> list[tuple[int, float]]:
        self.work()
        done, self.done = self.done, []
        return done

    def close(self) -> None:
        pass


class FlakyTier:
    """Pages in a dictionary. `faults`: the part of calls that fail, each in a way of its own; what
    comes back is always right or an exception, as the contract has it. `most`: pages it holds; it
    hands on the oldest, or where it cannot read it says so."""

    name, capacity = "flaky", 10**9
    hands_on = True

    def __init__(self, rng: random.Random, faults: float = 0.0, most: int = 10**9):
        self.pages: dict[bytes, bytes] = {}
        self.most, self.evictions = most, 0
        self.evicted: Evicted | None = None
        self.rng, self.faults = rng, faults
        self.delay = 0.0
        self.loads = 0

    @property
    def used(self) -> int:
        return sum(map(len, list(self.pages.values())))

    @property
    def count(self) -> int:
        return len(self.pages)

    def _stumble(self) -> None:
        if self.delay:
            time.sleep(self.delay)
        if self.rng.random() < self.faults:
            raise OSError(self.rng.choice([errno.EIO, errno.EMFILE, errno.ENOSPC]), "stumbled")

    def start(self) -> None:
        self._stumble()

    def present(self, identities: Sequence[bytes]) -> set[bytes]:
        self._stumble()
        lies = self.rng.random() < self.faults / 4
        return {i for i in identities if lies or i in self.pages}

    def load(self, identity: bytes, into: memoryview) -> None:
        self._stumble()
        self.loads += 1
        page = self.pages.get(identity)
        if page is None:
            into[:] = b"\xff" * len(into)
            raise Missing
        if self.rng.random() < self.faults:
            into[:7] = b"garbage"
            del self.pages[identity]
            raise Damaged("checksum", "rotten")
        into[:] = page

    def store(self, identity: bytes, page: memoryview) -> bool:
        self._stumble()
        if identity in self.pages:
            return False
        self.pages[identity] = bytes(page)
        while len(self.pages) > self.most:
            self._evict()
        return True

    def _evict(self) -> None:
        with contextlib.suppress(StopIteration, KeyError, RuntimeError):  # other writers evict too
            oldest = next(iter(self.pages))
            gone = self.pages.pop(oldest)
            self.evictions += 1
            if self.evicted is not None:
                lost = self.rng.random() < self.faults
                self.evicted(oldest, None if lost else memoryview(gone))

    def forget(self, identity: bytes) -> None:
        self._stumble()
        self.pages.pop(identity, None)

    def clear(self) -> int:
        count = len(self.pages)
        self.pages.clear()
        return count

    def close(self) -> None:
        pass


class TieredDriver(Driver):
    """`slots`: pages of each pool in DRAM."""

    def __init__(
        self,
        groups: list[KVGroup],
        pool_blocks: list[int],
        *args: object,
        tiers: Sequence[ColdTier] = (),
        dram_slots: int = 12,
        policy: str = "lru",
        **options: object,
    ):
        groups = [replace(g, page_bytes=g.block_size * CELL.size) for g in groups]
        super().__init__(groups, pool_blocks, *args, **options)  # type: ignore[arg-type]
        sizes = {group.pool: group.page_bytes for group in groups}
        pages = [sizes[pool] for pool in range(len(self.kv.pools))]
        slab = HostSlab(pages, [dram_slots] * len(pages))
        self.copier = LateCopier(self.runner, slab, self.rng)
        chain = Chain(DramTier(slab, policy), [(tier, 1e9) for tier in tiers])
        budget = self.scheduler.limits.max_num_batched_tokens
        self.tiering = Tiering(self.kv, chain, self.copier, budget)
        self.scheduler.tiering = self.tiering

    def iterate(self) -> None:
        self.tiering.advance()
        self.check_tiers()
        if not self.pending and self.tiering.busy:
            self.tiering.wait(0.002)
            self.iterations -= 1  # that was no turn
        super().iterate()

    def may_stall(self) -> bool:
        return self.tiering.busy

    def check_tiers(self) -> None:
        self.tiering.chain.dram.check_integrity()
        visits = self.tiering._visits
        assert len(set(map(id, visits))) == len(visits)

    def settle(self) -> None:
        """Let everything that is on its way arrive."""
        self.copier.hurry, deadline = True, time.monotonic() + 20
        while not self.tiering.settled:
            assert time.monotonic() < deadline, "the tiers do not come to rest"
            self.tiering.advance()
            self.check_tiers()
            self.tiering.wait(0.002)
        self.copier.hurry = False

    def drain(self) -> None:
        deadline = time.monotonic() + 60
        while not self.scheduler.idle:
            self.iterate()
            assert time.monotonic() < deadline, "no progress"
        self.settle()
        assert len(self.kv.loans) == 0
        self.check()
        super().drain()

    def close(self) -> None:
        self.tiering.close(1.0)
