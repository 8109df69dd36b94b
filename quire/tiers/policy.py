"""Which resident page leaves first: LRU and ARC."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

Evictable = Callable[[bytes], bool]


class Policy(Protocol):
    """The order of resident keys. One thread calls it."""

    def insert(self, key: bytes) -> None:
        """A key becomes resident."""

    def touch(self, key: bytes) -> None:
        """A resident key was used."""

    def remove(self, key: bytes) -> None:
        """A resident key is gone, for another reason than room."""

    def evict(self, evictable: Evictable) -> bytes | None:
        """Choose the first key that may go, and let it go; None where none may."""

    def __len__(self) -> int: ...


class Lru:
    """The key used longest ago leaves first."""

    def __init__(self, capacity: int):
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._keys[key] = None

    def touch(self, key: bytes) -> None:
        self._keys.move_to_end(key)

    def remove(self, key: bytes) -> None:
        del self._keys[key]

    def evict(self, evictable: Evictable) -> bytes | None:
        return _evict_oldest(self._keys, evictable)

    def __len__(self) -> int:
        return len(self._keys)


class Arc:
    """Adaptive replacement (Megiddo and Modha, FAST 2003): keys used once and keys used again are
    kept apart, and ghosts of evicted keys say which of the two deserves more room, so a flood of
    keys that are used once does not displace the others."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._once: OrderedDict[bytes, None] = OrderedDict()  # T1
        self._often: OrderedDict[bytes, None] = OrderedDict()  # T2
        self._once_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B1
        self._often_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B2
        self._target = 0.0  # of T1's size: p in the paper

    def insert(self, key: bytes) -> None:
        once, often = len(self._once_ghosts), len(self._often_ghosts)
        if key in self._once_ghosts:
            self._target = min(self._capacity, self._target + max(1.0, often / once))
            del self._once_ghosts[key]
            self._often[key] = None
        elif key in self._often_ghosts:
            self._target = max(0.0, self._target - max(1.0, once / often))
            del self._often_ghosts[key]
            self._often[key] = None
        else:
            self._once[key] = None
        self._forget_ghosts()

    def touch(self, key: bytes) -> None:
        if key in self._once:
            del self._once[key]
            self._often[key] = None
        else:
            self._often.move_to_end(key)

    def remove(self, key: bytes) -> None:
        del (self._once if key in self._once else self._often)[key]

    def evict(self, evictable: Evictable) -> bytes | None:
        first = (self._once, self._once_ghosts)
        second = (self._often, self._often_ghosts)
        if len(self._once) <= self._target and self._often:
            first, second = second, first
        for resident, ghosts in (first, second):
            key = _evict_oldest(resident, evictable)
            if key is not None:
                ghosts[key] = None
                self._forget_ghosts()
                return key
        return None

    def _forget_ghosts(self) -> None:
        """The paper's bounds: T1 and B1 hold at most the capacity, all four at most twice it."""
        while self._once_ghosts and len(self._once) + len(self._once_ghosts) > self._capacity:
            self._once_ghosts.popitem(last=False)
        while self._often_ghosts and self._size_with_ghosts() > 2 * self._capacity:
            self._often_ghosts.popitem(last=False)

    def _size_with_ghosts(self) -> int:
        return len(self) + len(self._once_ghosts) + len(self._often_ghosts)

    def __len__(self) -> int:
        return len(self._once) + len(self._often)


POLICIES: dict[str, type[Lru] | type[Arc]] = {"lru": Lru, "arc": Arc}


def _evict_oldest(keys: OrderedDict[bytes, None], evictable: Evictable) -> bytes | None:
    found = next((key for key in keys if evictable(key)), None)
    if found is not None:
        del keys[found]
    return found
