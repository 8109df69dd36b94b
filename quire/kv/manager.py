"""Blocks of all requests over all groups: admission, growth, publishing, windows, release."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from math import gcd

from quire.kv import NULL_BLOCK
from quire.kv.groups import KVGroup
from quire.kv.identity import BlockIdentity
from quire.kv.loans import Loans
from quire.kv.pool import BlockPool
from quire.kv.prefixes import Page, Prefixes


@dataclass(slots=True)
class RequestBlocks:
    """The blocks of one running request.

    `tables[g]` covers the sequence from its start; entries the window has passed are NULL_BLOCK.
    `identities[g]`: identities of the sequence's full blocks, as far as they were computed.
    `hit`: tokens whose blocks were found at admission. `published`: tokens whose full blocks were
    offered to the prefix index. `passed[g]`: blocks given back. `prompt_boundary`: the longest hit
    that a later request with the same prompt can have.
    """

    tables: list[list[int]]
    identities: list[list[bytes]]
    roots: list[bytes]
    hit: int = 0
    published: int = 0
    passed: list[int] = field(default_factory=list)
    prompt_boundary: int = 0


class KVManager:
    """Owns the pools. Only the scheduler calls it, and the tiers for it, on the engine thread.

    `enable_caching` False: no block is ever published or looked up. Hits end at multiples of
    `hit_tokens`, where blocks of all groups do. `coarsest`: index of a group of the largest blocks.
    `published` (None: nobody wants to know) gathers what became findable, as (pool, block,
    identity), and `discarded` what must not be found any more; the tiers take both. `loans`:
    blocks that these copy.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        pool_blocks: Sequence[int],
        identity: BlockIdentity,
        enable_caching: bool = True,
    ):
        self.groups = tuple(groups)
        self.pools = tuple(BlockPool(n) for n in pool_blocks)
        self.identity = identity
        self.enable_caching = enable_caching
        self._prefixes = Prefixes(self.groups, self.pools)
        self.hit_tokens = self._prefixes.hit_tokens
        self.coarsest = max(self.groups, key=lambda group: group.block_size).index
        self._finest = gcd(*(group.block_size for group in self.groups))
        self._windows = [group for group in self.groups if group.window is not None]
        self.loans = Loans(self.pools)
        self.published: list[tuple[int, int, bytes]] | None = None
        self.discarded: list[bytes] = []
        self._running: dict[str, RequestBlocks] = {}
        self._checked_pool = 0

    # -- questions ---------------------------------------------------------------------------

    def fits_ever(self, tokens: int, step_tokens: int) -> bool:
        """Whether a request of `tokens` could run alone."""
        need = self.peak(tokens, step_tokens)
        return all(n < p.num_blocks for n, p in zip(need, self.pools, strict=True))

    def peak(self, tokens: int, step_tokens: int) -> list[int]:
        """Most blocks of each pool that a request of `tokens` holds."""
        need = [0] * len(self.pools)
        for group in self.groups:
            need[group.pool] += group.peak_blocks(tokens, step_tokens)
        return need

    def table(self, request_id: str) -> list[list[int]]:
        """Block tables by group."""
        return self._running[request_id].tables

    def usage(self) -> tuple[int, int]:
        """Blocks held and blocks in all, over all pools."""
        return sum(p.held for p in self.pools), sum(p.num_blocks - 1 for p in self.pools)

    def available(self) -> int:
        """Blocks that every pool can still give."""
        return min([pool.available for pool in self.pools])

    # -- a request's life --------------------------------------------------------------------

    def admit(
        self,
        request_id: str,
        tokens: Sequence[int],
        step_tokens: int,
        tenant: str = "",
        salt: str = "",
        use_cache: bool = True,
        identities: list[list[bytes]] | None = None,
    ) -> int | None:
        """Start a request if its whole prompt fits now: hit prefix blocks, take the others.

        Returns the number of tokens whose KV is already there (a multiple of `hit_tokens`, below
        len(tokens)), or None where the pools are too full; then nothing has changed.
        `identities` is a list of the caller's that keeps block identities from one attempt (or
        one admission) of this sequence to the next; it starts empty.
        """
        blocks = self._new_blocks(tokens, tenant, salt, [] if identities is None else identities)
        hit = 0
        if self.enable_caching and use_cache:
            hit = self._prefixes.longest(blocks.identities, len(tokens) - 1)
        if not self._room_for(blocks, hit, len(tokens), step_tokens):
            return None
        for group in self.groups:
            pool, table = self.pools[group.pool], blocks.tables[group.index]
            first, last = group.first_needed(hit), hit // group.block_size
            table.extend([NULL_BLOCK] * min(first, last))
            blocks.passed[group.index] = min(first, last)
            for block in self._prefixes.found(group, blocks.identities, hit):
                pool.acquire(block)
                table.append(block)
        for group in self.groups:
            if group.window is None:
                table = blocks.tables[group.index]
                missing = group.blocks_of(len(tokens)) - len(table)
                table.extend(self.pools[group.pool].allocate(missing))
        blocks.hit = blocks.published = hit
        self._running[request_id] = blocks
        return hit

    def missing(
        self, tokens: Sequence[int], tenant: str, salt: str, identities: list[list[bytes]]
    ) -> list[bytes]:
        """Identities (of the coarsest group) of the full prompt blocks that `admit` would have to
        compute, except a last one that ends the prompt. `identities` as in `admit`."""
        blocks = self._new_blocks(tokens, tenant, salt, identities)
        limit, size = len(tokens) - 1, self.groups[self.coarsest].block_size
        hit = self._prefixes.longest(blocks.identities, limit)
        return blocks.identities[self.coarsest][hit // size : limit // size]

    def absent(
        self, tokens: Sequence[int], tenant: str, salt: str, identities: list[list[bytes]]
    ) -> list[Page]:
        """Pages that no block holds and that would let `admit` begin later, in order of places.
        `identities` as in `admit`."""
        blocks = self._new_blocks(tokens, tenant, salt, identities)
        limit = len(tokens) - 1
        hit = self._prefixes.longest(blocks.identities, limit)
        reach = self._prefixes.floor(limit)
        return self._prefixes.absent(blocks.identities, hit, reach, all_windows=True)

    def beyond(
        self,
        tokens: Sequence[int],
        tenant: str,
        salt: str,
        identities: list[list[bytes]],
        elsewhere: Container[bytes],
    ) -> tuple[int, int, list[Page]]:
        """(tokens that are there now, tokens that would be were the pages `elsewhere` here too, and
        these pages)."""
        blocks = self._new_blocks(tokens, tenant, salt, identities)
        limit = len(tokens) - 1
        hit = self._prefixes.longest(blocks.identities, limit)
        reach = self._prefixes.longest(blocks.identities, limit, elsewhere)
        pages = self._prefixes.absent(blocks.identities, hit, reach) if reach > hit else []
        return hit, reach, pages

    def touch(self, identities: list[list[bytes]], tokens: int) -> None:
        """Let what is there of the first `tokens` tokens' blocks be evicted last, and of it the
        first."""
        self._prefixes.touch(identities, tokens)

    def fits_now(
        self,
        tokens: Sequence[int],
        tenant: str,
        salt: str,
        identities: list[list[bytes]],
        step_tokens: int,
    ) -> bool:
        """Whether `admit` would find room, whatever of the prompt is found."""
        blocks = self._new_blocks(tokens, tenant, salt, identities)
        hit = self._prefixes.longest(blocks.identities, len(tokens) - 1)
        return self._room_for(blocks, hit, len(tokens), step_tokens)

    def _new_blocks(
        self, tokens: Sequence[int], tenant: str, salt: str, identities: list[list[bytes]]
    ) -> RequestBlocks:
        if not identities:
            identities.extend([] for _ in self.groups)
        blocks = RequestBlocks(
            tables=[[] for _ in self.groups],
            identities=identities,
            roots=[self.identity.root(g.index, tenant, salt) for g in self.groups],
            passed=[0] * len(self.groups),
            prompt_boundary=self._prefixes.floor(len(tokens) - 1),
        )
        if self.enable_caching:
            for group in self.groups:
                self._extend_identities(blocks, group, tokens, len(tokens) // group.block_size)
        return blocks

    def grow(self, request_id: str, num_tokens: int) -> list[list[int]] | None:
        """Make the tables cover `num_tokens` tokens: the blocks that are new in each, or None, and
        no change, where pools are full."""
        tables = self._running[request_id].tables
        missing: list[int] = []
        total = 0
        for group in self.groups:
            count = max(0, group.blocks_of(num_tokens) - len(tables[group.index]))
            missing.append(count)
            total += count
        for pool in self.pools:
            if total > pool.available and not self._have_room(missing):
                return None
        grown = []
        for group in self.groups:
            new = self.pools[group.pool].allocate(missing[group.index])
            tables[group.index].extend(new)
            grown.append(new)
        return grown

    def _have_room(self, blocks: list[int]) -> bool:
        """Whether pools have so many blocks for each group."""
        need = [0] * len(self.pools)
        for group, count in zip(self.groups, blocks, strict=True):
            need[group.pool] += count
        return all(count <= pool.available for count, pool in zip(need, self.pools, strict=True))

    def commit(self, request_id: str, tokens: Sequence[int], computed: int, valid: int) -> int:
        """KV of the first `computed` tokens is in place.

        Publishes full blocks among the first min(computed, valid) tokens, and gives back blocks
        that no query at or after position `computed` can read. Returns the number of computed
        tokens below which another call would do nothing.
        """
        blocks = self._running[request_id]
        full = min(computed, valid)
        if self.enable_caching and full > blocks.published:
            for group in self.groups:
                first, end = blocks.published // group.block_size, full // group.block_size
                if first < end:
                    self._extend_identities(blocks, group, tokens, end)
                    self._publish(blocks, group, first, end)
            blocks.published = full
        settled = (computed // self._finest + 1) * self._finest
        for group in self._windows:
            first = group.first_needed(computed)
            self._pass_window(blocks, group, first)
            assert group.window is not None
            settled = min(settled, (first + 1) * group.block_size + group.window - 1)
        return settled

    def free(self, request_id: str) -> None:
        """Give back all blocks of a request, the last first, so that beginnings stay longest."""
        blocks = self._running.pop(request_id)
        for group in self.groups:
            for block in reversed(blocks.tables[group.index]):
                self.pools[group.pool].release(block)

    def discard(self, request_id: str) -> None:
        """Like free, but no block that this request computed and still holds can be found, even
        where others hold it too."""
        blocks = self._running[request_id]
        for group in self.groups:
            for block in blocks.tables[group.index][blocks.hit // group.block_size :]:
                if block != NULL_BLOCK:
                    identity = self.pools[group.pool].discard(block)
                    if identity is not None and self.published is not None:
                        self.discarded.append(identity)
        self.free(request_id)

    def clear_cache(self) -> None:
        for pool in self.pools:
            pool.clear_cache()

    # -- inside ------------------------------------------------------------------------------

    def _extend_identities(
        self, blocks: RequestBlocks, group: KVGroup, tokens: Sequence[int], end: int
    ) -> None:
        """Know the identities of a group's first `end` blocks, which are full."""
        chain, size = blocks.identities[group.index], group.block_size
        known = len(chain)
        if known < end:
            parent = chain[-1] if chain else blocks.roots[group.index]
            for start in range(known * size, end * size, size):
                parent = self.identity.block(parent, tokens[start : start + size])
                chain.append(parent)

    def _publish(self, blocks: RequestBlocks, group: KVGroup, first: int, end: int) -> None:
        """Offer a group's blocks `first` to `end`, which are full."""
        table, identities = blocks.tables[group.index], blocks.identities[group.index]
        for i in range(first, end):
            block = table[i]
            if block != NULL_BLOCK and group.keeps(i, blocks.prompt_boundary):
                new = self.pools[group.pool].publish(block, identities[i])
                if new and self.published is not None:
                    self.published.append((group.pool, block, identities[i]))

    def _room_for(self, blocks: RequestBlocks, hit: int, tokens: int, step_tokens: int) -> bool:
        need = [0] * len(self.pools)
        for group in self.groups:
            pool, found = (
                self.pools[group.pool],
                self._prefixes.found(group, blocks.identities, hit),
            )
            need[group.pool] += group.peak_blocks(tokens, step_tokens) - len(found)
            need[group.pool] += sum(pool.is_cached(block) for block in found)
        return all(n <= pool.available for n, pool in zip(need, self.pools, strict=True))

    def _pass_window(self, blocks: RequestBlocks, group: KVGroup, first: int) -> None:
        table, pool = blocks.tables[group.index], self.pools[group.pool]
        for i in range(blocks.passed[group.index], min(first, len(table))):
            pool.release(table[i])
            table[i] = NULL_BLOCK
        blocks.passed[group.index] = max(blocks.passed[group.index], min(first, len(table)))

    def check_slice(self) -> None:
        """Check one slice of one pool; the next call goes on where this one ended."""
        if self.pools[self._checked_pool].check_slice():
            self._checked_pool = (self._checked_pool + 1) % len(self.pools)

    def check_integrity(self) -> None:
        """Raise AssertionError where pools and tables disagree."""
        expected = [[0] * pool.num_blocks for pool in self.pools]
        for blocks in self._running.values():
            for group in self.groups:
                for block in blocks.tables[group.index]:
                    if block != NULL_BLOCK:
                        expected[group.pool][block] += 1
        self.loans.add_to(expected)
        for pool, counts in zip(self.pools, expected, strict=True):
            pool.check_integrity()
            assert pool.counts() == counts, "reference counts differ from block tables"
