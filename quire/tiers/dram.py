"""The DRAM tier: pages in host memory by identity. The way of every page to and from the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from quire.tiers.policy import POLICIES, Policy
from quire.tiers.slab import HostSlab


@dataclass(slots=True)
class Entry:
    """A page. `ready`: its bytes are there. `pins`: copies and files under way; a pinned page
    stays. `doomed`: it goes once nothing pins it, and is not found until then."""

    pool: int
    slot: int
    ready: bool = False
    pins: int = 0
    doomed: bool = False


class DramTier:
    """Pages in a HostSlab. Only the engine thread calls it; other threads read and write the bytes
    of slots that are pinned for them."""

    def __init__(self, slab: HostSlab, policy: str = "lru"):
        self.slab = slab
        self.evictions = 0
        self._entries: dict[bytes, Entry] = {}
        self._policies: list[Policy] = [POLICIES[policy](n) for n in slab.slots]
        self._free: list[deque[int]] = [deque() for _ in slab.slots]
        self._offered = [0] * len(slab.slots)  # slots that have been in _free

    @property
    def capacity(self) -> int:
        """Bytes that can be used by now."""
        sizes = zip(self.slab.usable, self.slab.page_bytes, strict=True)
        return sum(slots * size for slots, size in sizes)

    @property
    def used(self) -> int:
        """Bytes of pages."""
        sizes = zip(self._policies, self.slab.page_bytes, strict=True)
        return sum(len(policy) * size for policy, size in sizes)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, identity: object) -> bool:
        """Whether the page is there, or on its way here."""
        entry = self._entries.get(identity)  # type: ignore[call-overload]
        return entry is not None and not entry.doomed

    def get(self, identity: bytes) -> Entry | None:
        """The entry of a page that is there or on its way here."""
        entry = self._entries.get(identity)
        return None if entry is None or entry.doomed else entry

    def entry(self, identity: bytes) -> Entry:
        """The entry of a pinned page, doomed or not."""
        return self._entries[identity]

    def reserve(self, identity: bytes, pool: int) -> Entry | None:
        """A pinned entry for a page to be written, evicting another where needed; None where all
        are pinned, or the page is here already or has not left yet."""
        if identity in self._entries:
            return None
        slot = self._take_slot(pool)
        if slot is None:
            return None
        entry = self._entries[identity] = Entry(pool, slot, pins=1)
        self._policies[pool].insert(identity)
        return entry

    def _take_slot(self, pool: int) -> int | None:
        free, usable = self._free[pool], self.slab.usable[pool]
        if self._offered[pool] < usable:
            free.extend(range(self._offered[pool], usable))
            self._offered[pool] = usable
        if free:
            return free.popleft()
        victim = self._policies[pool].evict(lambda key: self._entries[key].pins == 0)
        if victim is None:
            return None
        self.evictions += 1
        return self._entries.pop(victim).slot

    def fill(self, identity: bytes) -> None:
        """The page of a reserved entry has been written: it can be found, and is pinned no more."""
        self._entries[identity].ready = True
        self.unpin(identity)

    def fail(self, identity: bytes) -> None:
        """The page of a reserved entry will not come."""
        self.drop(identity)
        self.unpin(identity)

    def pin(self, identity: bytes) -> None:
        """Keep a page while it is read, and note that it was used."""
        entry = self._entries[identity]
        entry.pins += 1
        self._policies[entry.pool].touch(identity)

    def unpin(self, identity: bytes) -> None:
        entry = self._entries[identity]
        entry.pins -= 1
        assert entry.pins >= 0, "unpinned more often than pinned"
        if entry.pins == 0:
            if entry.doomed:
                self._remove(identity)
            else:
                self._policies[entry.pool].release(identity)

    def drop(self, identity: bytes) -> None:
        """Forget a page, once nothing pins it. It is not found any more."""
        entry = self._entries.get(identity)
        if entry is not None:
            entry.doomed = True
            if entry.pins == 0:
                self._remove(identity)

    def clear(self) -> None:
        """Drop everything."""
        for identity in list(self._entries):
            self.drop(identity)

    def _remove(self, identity: bytes) -> None:
        entry = self._entries.pop(identity)
        self._policies[entry.pool].remove(identity)
        self._free[entry.pool].append(entry.slot)

    def check_integrity(self) -> None:
        """Raise AssertionError where slots, entries and policies contradict each other."""
        for pool, offered in enumerate(self._offered):
            held = [e.slot for e in self._entries.values() if e.pool == pool]
            assert sorted([*held, *self._free[pool]]) == list(range(offered))
            assert len(self._policies[pool]) == len(held)
        assert all(e.pins > 0 for e in self._entries.values() if e.doomed or not e.ready)
