"""Blocks that are being copied to or from the tiers: held, so that nobody else writes to them."""

from __future__ import annotations

from collections.abc import Sequence

from quire.kv.pool import BlockPool


class Loans:
    """References to blocks besides those of requests' tables. A block that is being read is lent
    until the copy is done: this is the fence on its reuse."""

    def __init__(self, pools: Sequence[BlockPool]):
        self._pools = pools
        self._lent: dict[tuple[int, int], int] = {}  # references by pool and block

    def __len__(self) -> int:
        return sum(self._lent.values())

    def take(self, pool: int) -> int | None:
        """A block to be written, where one is free or can be evicted."""
        if not self._pools[pool].available:
            return None
        block = self._pools[pool].allocate(1)[0]
        self._lend(pool, block)
        return block

    def borrow(self, pool: int, block: int, identity: bytes) -> bool:
        """Hold a published block while it is read. False where it holds something else by now."""
        if self._pools[pool].find(identity) != block:
            return False
        self._pools[pool].acquire(block)
        self._lend(pool, block)
        return True

    def _lend(self, pool: int, block: int) -> None:
        self._lent[pool, block] = self._lent.get((pool, block), 0) + 1

    def give_back(self, pool: int, block: int, identity: bytes | None = None) -> None:
        """A copy is done. `identity`: of what was written, which others may find from now on."""
        left = self._lent.pop((pool, block)) - 1
        if left:
            self._lent[pool, block] = left
        if identity is not None:
            self._pools[pool].publish(block, identity)
        self._pools[pool].release(block)

    def add_to(self, counts: list[list[int]]) -> None:
        """Add our references by pool and block, for integrity checks."""
        for (pool, block), count in self._lent.items():
            counts[pool][block] += count
