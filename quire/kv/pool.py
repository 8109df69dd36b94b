"""A pool of equal pages: who holds which block, which free blocks still carry reusable KV."""

from __future__ import annotations

from collections import OrderedDict, deque

from quire.kv import NULL_BLOCK


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

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        return self.num_blocks - 1 - self.available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, evicting the least recently used cached ones where needed."""
        if count > self.available:
            raise MemoryError(f"{count} blocks wanted, {self.available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._count[block] = 1
            blocks.append(block)
        return blocks

    def find(self, identity: bytes) -> int | None:
        """The block that holds this identity's KV, if any. Takes no reference."""
        return self._index.get(identity)

    def is_cached(self, block: int) -> bool:
        """True where nobody holds the block, so that acquiring it takes from `available`."""
        return self._count[block] == 0

    def acquire(self, block: int) -> None:
        """Take one more reference to a held or cached block."""
        if self._count[block] == 0:
            del self._cached[block]
        self._count[block] += 1

    def publish(self, block: int, identity: bytes) -> None:
        """Let others find a held, fully computed block. The first block of an identity stays."""
        assert self._count[block] > 0
        if self._identity[block] is None and identity not in self._index:
            self._identity[block] = identity
            self._index[identity] = block

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

    def discard(self, block: int) -> None:
        """Forget a block's identity: its content must not be found any more."""
        if self._identity[block] is not None:
            self._forget(block)
            if self._count[block] == 0:
                del self._cached[block]
                self._free.append(block)

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

    def check_integrity(self) -> None:
        """Raise AssertionError where the states contradict each other. O(num_blocks)."""
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        assert NULL_BLOCK not in free | cached, "the null block was given out"
        for block in range(1, self.num_blocks):
            held = self._count[block] > 0
            assert held != (block in free or block in cached), f"block {block} lost or doubled"
            identity = self._identity[block]
            assert identity is None or self._index.get(identity) == block
            assert block not in free or identity is None, "a free block has an identity"
            assert block not in cached or identity is not None, "a cached block has none"
        assert len(self._index) == sum(i is not None for i in self._identity)
