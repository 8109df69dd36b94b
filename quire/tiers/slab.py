"""Host memory for pages: one area per pool, cut into slots of that pool's page size."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence

import torch

MEMORY_PAGE = 4096
_POPULATE_WRITE = 23  # madvise(2): touch pages now, outside of the driver's locks
CHUNK_BYTES = 2**28  # pinned at a time; a copy must not cross from one chunk into the next


class HostSlab:
    """`areas[pool]` is uint8 [slots, page bytes].

    Memory is touched when first written. For a GPU it must be pinned: until `pin` has come to a
    slot, that slot is not among the `usable` ones. Only `pin` runs on another thread.
    """

    def __init__(self, page_bytes: Sequence[int], slots: Sequence[int], pinned: bool = False):
        self.page_bytes = tuple(page_bytes)
        self._memory = [
            mmap.mmap(-1, max(1, n) * size) for n, size in zip(slots, page_bytes, strict=True)
        ]
        self.areas = [
            torch.frombuffer(memory, dtype=torch.uint8)[: n * size].view(n, size)
            for memory, n, size in zip(self._memory, slots, page_bytes, strict=True)
        ]
        self.slots = tuple(slots)
        self.chunk_slots = [_chunk_slots(size) for size in page_bytes]
        self.usable = [0 if pinned else n for n in slots]

    def view(self, pool: int, slot: int) -> memoryview:
        """The bytes of one slot."""
        size = self.page_bytes[pool]
        return memoryview(self._memory[pool])[slot * size : (slot + 1) * size]

    def pin(self, register: Callable[[int, int], None], stopped: Callable[[], bool]) -> None:
        """Have `register(address, bytes)` pin all memory, chunk by chunk, the pools in turn.

        Raises what `register` raises; what is pinned by then is usable.
        """
        for first in range(0, max(self.slots), min(self.chunk_slots)):
            for pool, total in enumerate(self.slots):
                chunk, done = self.chunk_slots[pool], self.usable[pool]
                if stopped():
                    return
                if done < total and first >= done:
                    some = min(chunk, total - done)
                    size = self.page_bytes[pool]
                    with contextlib.suppress(OSError):  # an old kernel leaves it to `register`
                        self._memory[pool].madvise(_POPULATE_WRITE, done * size, some * size)
                    register(self.areas[pool].data_ptr() + done * size, some * size)
                    self.usable[pool] = done + some


def _chunk_slots(page_bytes: int) -> int:
    """Slots of a chunk: whole pages of memory, about CHUNK_BYTES."""
    step = MEMORY_PAGE // math.gcd(page_bytes, MEMORY_PAGE)
    return max(step, CHUNK_BYTES // page_bytes // step * step)


def split(size: int, page_bytes: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Slots of each pool in `size` bytes, shared by weight (bytes that a block of tokens has in
    each pool)."""
    total = sum(weights)
    return [
        size * weight // total // page for page, weight in zip(page_bytes, weights, strict=True)
    ]
