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

    def release(self, key: bytes) -> None:
        """A key that `evictable` may have refused could go now."""

    def __len__(self) -> int: ...


class Keys:
    """Keys, the one used longest ago first. One that may not go when its turn comes is set aside
    until it is released: a writer that is behind holds just the oldest, and they would be looked at
    for every key that leaves."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._aside: set[bytes] = set()

    def append(self, key: bytes) -> None:
        """A key that is not among them becomes the last."""
        self._keys[key] = None

    def remove(self, key: bytes) -> None:
        if key in self._aside:
            self._aside.remove(key)
        else:
            del self._keys[key]

    def take(self, evictable: Evictable) -> bytes | None:
        """Remove the first that may go."""
        while self._keys:
            key, _ = self._keys.popitem(last=False)
            if evictable(key):
                return key
            self._aside.add(key)
        return None

    def release(self, key: bytes) -> None:
        """Where the key was set aside, it is the first again."""
        if key in self._aside:
            self._aside.remove(key)
            self._keys[key] = None
            self._keys.move_to_end(key, last=False)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys or key in self._aside

    def __len__(self) -> int:
        return len(self._keys) + len(self._aside)


class Lru:
    """The key used longest ago leaves first."""

    def __init__(self, capacity: int):
        self._keys = Keys()

    def insert(self, key: bytes) -> None:
        self._keys.append(key)

    def touch(self, key: bytes) -> None:
        self._keys.remove(key)
        self._keys.append(key)

    def remove(self, key: bytes) -> None:
        self._keys.remove(key)

    def evict(self, evictable: Evictable) -> bytes | None:
        return self._keys.take(evictable)

    def release(self, key: bytes) -> None:
        self._keys.release(key)

    def __len__(self) -> int:
        return len(self._keys)


class Arc:
    """Adaptive replacement (Megiddo and Modha, FAST 2003): keys used once and keys used again are
    kept apart, and ghosts of evicted keys say which of the two deserves more room, so a flood of
    keys that are used once does not displace the others."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._once = Keys()  # T1
        self._often = Keys()  # T2
        self._once_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B1
        self._often_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B2
        self._target = 0.0  # of T1's size: p in the paper

    def insert(self, key: bytes) -> None:
        once, often = len(self._once_ghosts), len(self._often_ghosts)
        if key in self._once_ghosts:
            self._target = min(self._capacity, self._target + max(1.0, often / once))
            del self._once_ghosts[key]
            self._often.append(key)
        elif key in self._often_ghosts:
            self._target = max(0.0, self._target - max(1.0, once / often))
            del self._often_ghosts[key]
            self._often.append(key)
        else:
            self._once.append(key)
        self._forget_ghosts()

    def touch(self, key: bytes) -> None:
        self.remove(key)
        self._often.append(key)

    def remove(self, key: bytes) -> None:
        (self._once if key in self._once else self._often).remove(key)

    def release(self, key: bytes) -> None:
        (self._once if key in self._once else self._often).release(key)

    def evict(self, evictable: Evictable) -> bytes | None:
        first = (self._once, self._once_ghosts)
        second = (self._often, self._often_ghosts)
        if len(self._once) <= self._target and self._often:
            first, second = second, first
        for resident, ghosts in (first, second):
            key = resident.take(evictable)
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
