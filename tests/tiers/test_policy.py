"""What leaves first: LRU by its definition, ARC by the paper's promises."""

from __future__ import annotations

import random

import pytest

from quire.tiers.policy import POLICIES, Arc, Lru, Policy


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


class Cache:
    """A cache of `capacity` keys under a policy."""

    def __init__(self, policy: Policy, capacity: int):
        self.policy, self.capacity, self.resident = policy, capacity, set[bytes]()
        self.hits = 0

    def use(self, key: bytes) -> None:
        if key in self.resident:
            self.hits += 1
            self.policy.touch(key)
            return
        if len(self.resident) == self.capacity:
            victim = self.policy.evict(lambda _: True)
            assert victim is not None
            self.resident.remove(victim)
        self.resident.add(key)
        self.policy.insert(key)


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = Lru(9)
    for number in range(4):
        policy.insert(key(number))
    policy.touch(key(0))
    policy.remove(key(2))
    evicted = [policy.evict(lambda k: k != key(1)) for _ in range(3)]
    assert evicted == [key(3), key(0), None]
    assert len(policy) == 1


@pytest.mark.parametrize("name", list(POLICIES))
def test_residents_are_those_inserted_and_not_evicted_or_removed(name: str) -> None:
    rng = random.Random(1)
    cache = Cache(POLICIES[name](10), 10)
    for _ in range(5000):
        cache.use(key(int(rng.paretovariate(0.6))))
        if rng.random() < 0.1 and cache.resident:
            gone = rng.choice(sorted(cache.resident))
            cache.resident.remove(gone)
            cache.policy.remove(gone)
        assert len(cache.policy) == len(cache.resident)
        pinned = rng.choice(sorted(cache.resident)) if cache.resident else b""
        if rng.random() < 0.1:
            victim = cache.policy.evict(lambda k, p=pinned: k != p)
            assert victim != pinned
            cache.resident -= {victim}
            if pinned in cache.resident:
                cache.policy.release(pinned)
    everything = {cache.policy.evict(lambda _: True) for _ in range(len(cache.policy))}
    assert everything == cache.resident
    assert cache.policy.evict(lambda _: True) is None


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_key_that_may_not_go_is_looked_at_once_and_is_the_first_again_when_it_may(
    name: str,
) -> None:
    policy = POLICIES[name](100)
    keys = [key(number) for number in range(100)]
    for each in keys:
        policy.insert(each)
    pinned, asked = set(keys[:40]), list[bytes]()

    def evictable(key: bytes) -> bool:
        asked.append(key)
        return key not in pinned

    assert [policy.evict(evictable) for _ in range(20)] == keys[40:60]
    assert len(asked) == 60 and len(policy) == 80
    policy.release(keys[7])
    pinned.remove(keys[7])
    policy.remove(keys[8])
    policy.release(keys[99])  # was never refused, and keeps its turn
    assert [policy.evict(evictable) for _ in range(3)] == [keys[7], keys[60], keys[61]]
    policy.touch(keys[9])  # used while it may not go: no longer the oldest
    policy.release(keys[9])
    pinned.clear()
    for each in keys[:7] + keys[10:40]:
        policy.release(each)
    left = [policy.evict(evictable) for _ in range(len(policy))]
    assert set(left) == set(keys) - {keys[7], keys[8], *keys[40:62]} and left[-1] == keys[9]


def test_arc_remembers_no_more_than_twice_its_capacity() -> None:
    rng, arc = random.Random(2), Arc(20)
    cache = Cache(arc, 20)
    for _ in range(5000):
        cache.use(key(rng.choice([rng.randrange(15), rng.randrange(1000)])))
        assert len(arc._once) + len(arc._once_ghosts) <= 20
        assert arc._size_with_ghosts() <= 40
        assert 0 <= arc._target <= 20


def test_arc_keeps_what_is_used_often_through_a_flood_and_lru_does_not() -> None:
    hits = {}
    for name, make in POLICIES.items():
        cache = Cache(make(50), 50)
        for number in [*range(20), *range(20)]:
            cache.use(key(number))
        flood = iter(range(1000, 10**6))
        for _ in range(100):
            for number in range(20):
                cache.use(key(number))
            for _ in range(60):  # more than there is room for, each used once
                cache.use(key(next(flood)))
        hits[name] = cache.hits
    assert hits["lru"] == 40
    assert hits["arc"] > 1500, "most of the 2020 uses that could hit"


def test_arc_gives_room_to_recency_where_that_pays() -> None:
    arc = Arc(10)
    cache = Cache(arc, 10)
    for number in range(5):
        cache.use(key(number))
        cache.use(key(number))
    for number in [*range(100, 120), *range(110, 120)]:
        cache.use(key(number))
    assert arc._target > 0
