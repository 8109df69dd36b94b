"""A pool of equal pages: who holds which block, which free blocks still carry reusable KV."""

from __future__ import annotations

from collections import OrderedDict, deque

from quire.kv import NULL_BLOCK

SLICE_BLOCKS = 2000  # checked in under a millisecond


class BlockPool:
    """Blocks 1..num_blocks-1, reference counted; block 0 is the null block and belongs to nobody.

    A block is in exactly one state: held (count > 0), cached (count 0, with an identity, evicted
    in least-recently-used order when the free ones run out), or free. Only the KVManager changes
    a pool. Raises MemoryError from `allocate` when `available` is too small.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 2:
            raise ValueError("a pool needs the null block and at least one other")
        self.num_blocks = num_blocks
        self._count = [0] * num_blocks
        self._identity: list[bytes | None] = [None] * num_blocks
        self._free = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._checked = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        return self.num_blocks - 1 - self.available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, evicting the least recently used cached ones where needed."""
        free = self._free
        if count > len(free) and count > self.available:
            raise MemoryError(f"{count} blocks wanted, {self.available} available")
        blocks = []
        for _ in range(count):
            if free:
                block = free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._count[block] = 1
            blocks.append(block)
        return blocks

    def find(self, identity: bytes) -> int | None:
        """The block that holds this identity's KV, if any. Takes no reference."""
        return self._index.get(identity)

    def touch(self, block: int) -> None:
        """Let a block nobody holds be evicted last."""
        if self._count[block] == 0:
            self._cached.move_to_end(block)

    def is_cached(self, block: int) -> bool:
        """True where nobody holds the block, so that acquiring it takes from `available`."""
        return self._count[block] == 0

    def acquire(self, block: int) -> None:
        """Take one more reference to a held or cached block."""
        if self._count[block] == 0:
            del self._cached[block]
        self._count[block] += 1

    def publish(self, block: int, identity: bytes) -> bool:
        """Let others find a held, fully computed block. The first block of an identity stays:
        whether this one is it."""
        assert self._count[block] > 0
        if self._identity[block] is not None or self._index.setdefault(identity, block) != block:
            return False
        self._identity[block] = identity
        return True

    def release(self, block: int) -> None:
        """Drop one reference. The last one makes the block cached, or free if unpublished."""
        if block == NULL_BLOCK:
            return
        assert self._count[block] > 0, f"block {block} released more often than taken"
        self._count[block] -= 1
        if self._count[block] == 0:
            if self._identity[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def discard(self, block: int) -> bytes | None:
        """Forget a block's identity, if it has one, and return it: its content must not be found
        any more."""
        identity = self._identity[block]
        if identity is not None:
            self._forget(block)
            if self._count[block] == 0:
                del self._cached[block]
                self._free.append(block)
        return identity

    def clear_cache(self) -> None:
        """Forget all identities, as after a weight reload."""
        for block in list(self._index.values()):
            self.discard(block)

    def _forget(self, block: int) -> None:
        identity = self._identity[block]
        if identity is not None:
            del self._index[identity]
            self._identity[block] = None

    def counts(self) -> list[int]:
        """Reference counts by block, for integrity checks."""
        return self._count

    def check_slice(self, blocks: int = SLICE_BLOCKS) -> bool:
        """Check the next `blocks` blocks; True where the last one was among them."""
        end = min(self._checked + blocks, self.num_blocks)
        for block in range(self._checked, end):
            self._check_block(block)
        self._checked = end if end < self.num_blocks else 0
        return self._checked == 0

    def check_integrity(self) -> None:
        """Raise AssertionError where the states contradict each other. O(num_blocks)."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        assert NULL_BLOCK not in free | cached, "the null block was given out"
        for block in range(self.num_blocks):
            self._check_block(block)
            assert (block in free) == (
                block != NULL_BLOCK and self._count[block] == 0 and block not in cached
            ), f"block {block} lost or doubled"
            assert block not in free or self._identity[block] is None, "a free one has an identity"
        assert len(self._index) == sum(i is not None for i in self._identity)

    def _check_block(self, block: int) -> None:
        identity, count = self._identity[block], self._count[block]
        assert count >= 0 and (block != NULL_BLOCK or (count == 0 and identity is None))
        assert identity is None or self._index.get(identity) == block, "found elsewhere"
        assert (block in self._cached) == (count == 0 and identity is not None)
