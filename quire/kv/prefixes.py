"""How much of a sequence is in the pools already, and what is missing for more."""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import lcm
from typing import NamedTuple

from quire.kv.groups import KVGroup
from quire.kv.pool import BlockPool

Chains = Sequence[Sequence[bytes]]  # by group: identities of a sequence's full blocks


class Page(NamedTuple):
    """A block's content in one group: the `place`-th of its sequence."""

    group: int
    place: int
    identity: bytes


class Prefixes:
    """Looks up and changes nothing but the order of eviction. Hits end at multiples of
    `hit_tokens`, where blocks of all groups do."""

    def __init__(self, groups: Sequence[KVGroup], pools: Sequence[BlockPool]):
        self.hit_tokens = lcm(*(group.block_size for group in groups))
        self._groups, self._pools = groups, pools

    def floor(self, tokens: int) -> int:
        """The last token count up to `tokens` at which a hit can end."""
        return tokens // self.hit_tokens * self.hit_tokens

    def longest(self, chains: Chains, limit: int, elsewhere: Container[bytes] = ()) -> int:
        """The largest boundary (in tokens, at most `limit`) where every group finds what it would
        read, here or `elsewhere`.

        Each group lowers the boundary until it is content; repeated until none lowers it.
        """
        boundary, settled = self.floor(limit), False
        while not settled:
            settled = True
            for group in self._groups:
                lowered = self._lower(group, chains[group.index], boundary, elsewhere)
                if lowered < boundary:
                    boundary, settled = lowered, False
        return boundary

    def _lower(
        self, group: KVGroup, chain: Sequence[bytes], boundary: int, elsewhere: Container[bytes]
    ) -> int:
        pool, size = self._pools[group.pool], group.block_size
        if group.window is None:
            for i in range(boundary // size):
                if pool.find(chain[i]) is None and chain[i] not in elsewhere:
                    return self.floor(i * size)
            return boundary
        i = boundary // size
        while boundary > 0 and i > group.first_needed(boundary):
            i -= 1
            if pool.find(chain[i]) is None and chain[i] not in elsewhere:
                boundary = self.floor(i * size)
                i = boundary // size
        return boundary

    def found(self, group: KVGroup, chains: Chains, hit: int) -> list[int]:
        """The blocks of a group that a hit of `hit` tokens reads. They must be there."""
        pool, chain = self._pools[group.pool], chains[group.index]
        blocks = []
        for place in range(group.first_needed(hit), hit // group.block_size):
            block = pool.find(chain[place])
            assert block is not None
            blocks.append(block)
        return blocks

    def absent(self, chains: Chains, hit: int, reach: int, all_windows: bool = False) -> list[Page]:
        """What is missing for a hit of `reach` tokens, in order of places; with `all_windows` for
        any beyond `hit`."""
        pages = []
        nearest = hit + self.hit_tokens if all_windows else reach
        for group in self._groups:
            pool, chain = self._pools[group.pool], chains[group.index]
            for place in range(group.first_needed(nearest), reach // group.block_size):
                if pool.find(chain[place]) is None:
                    pages.append(Page(group.index, place, chain[place]))
        return sorted(pages, key=lambda page: page.place * self._groups[page.group].block_size)

    def touch(self, chains: Chains, tokens: int) -> None:
        """Let what is there of the first `tokens` tokens' blocks be evicted last, and of it the
        first."""
        for group in self._groups:
            pool = self._pools[group.pool]
            for identity in reversed(chains[group.index][: tokens // group.block_size]):
                block = pool.find(identity)
                if block is not None:
                    pool.touch(block)
