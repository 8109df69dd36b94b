"""The DRAM tier's slots belong to one page each, and pinned pages stay."""

from __future__ import annotations

import random

import pytest

from quire.tiers.dram import DramTier
from quire.tiers.slab import CHUNK_BYTES, MEMORY_PAGE, HostSlab, split


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_every_page_that_is_pinned(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    dram = DramTier(HostSlab([64, 256], [4, 6]), policy)
    written: dict[bytes, int] = {}  # of ready pages: what their first byte is
    pins: list[bytes] = []
    coming: dict[bytes, int] = {}
    for step in range(3000):
        identity, pool = key(rng.randrange(25)), rng.randrange(2)
        pool = identity[0] % 2
        dice = rng.random()
        if dice < 0.3:
            entry = dram.reserve(identity, pool)
            if entry is not None:
                assert identity not in coming and entry.pool == pool
                coming[identity] = step % 251
                dram.slab.view(pool, entry.slot)[0] = step % 251
        elif dice < 0.55 and coming:
            done = rng.choice(sorted(coming))
            if rng.random() < 0.8:
                dram.fill(done)
                written[done] = coming[done]
            else:
                dram.fail(done)
                written.pop(done, None)
            del coming[done]
        elif dice < 0.7:
            entry = dram.get(identity)
            if entry is not None and entry.ready:
                dram.pin(identity)
                pins.append(identity)
        elif dice < 0.9 and pins:
            dram.unpin(pins.pop(rng.randrange(len(pins))))
        elif dice < 0.93:
            dram.drop(identity)
            assert identity not in dram
        for pinned in pins:
            entry = dram.entry(pinned)
            assert dram.slab.view(entry.pool, entry.slot)[0] == written[pinned]
        assert dram.used <= dram.capacity
        dram.check_integrity()
    assert dram.evictions > 50


def test_a_full_tier_whose_pages_are_all_pinned_takes_no_more() -> None:
    dram = DramTier(HostSlab([64], [2]))
    assert dram.reserve(key(1), 0) and dram.reserve(key(2), 0)
    assert dram.reserve(key(3), 0) is None
    dram.fill(key(1))
    assert dram.reserve(key(1), 0) is None, "it is here"
    assert dram.reserve(key(3), 0)
    assert key(1) not in dram and key(2) in dram


def test_a_page_dropped_while_it_is_pinned_is_not_found_and_goes_later() -> None:
    dram = DramTier(HostSlab([64], [1]))
    dram.reserve(key(1), 0)
    dram.drop(key(1))
    assert key(1) not in dram and dram.get(key(1)) is None
    assert dram.reserve(key(1), 0) is None, "its bytes are still being written"
    dram.fill(key(1))
    assert key(1) not in dram and len(dram) == 0
    assert dram.reserve(key(1), 0)


def test_pinned_memory_is_used_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.tiers.slab.CHUNK_BYTES", 4 * MEMORY_PAGE)
    slab = HostSlab([MEMORY_PAGE, 3 * MEMORY_PAGE // 2], [10, 7], pinned=True)
    dram = DramTier(slab)
    assert dram.capacity == 0 and dram.reserve(key(1), 0) is None
    calls: list[tuple[int, int]] = []
    slab.pin(lambda address, size: calls.append((address, size)), lambda: len(calls) == 2)
    assert slab.usable == [4, 2]
    assert all(dram.reserve(key(i), 0) for i in range(4)) and dram.reserve(key(9), 0) is None
    calls.clear()
    slab.pin(lambda address, size: calls.append((address, size)), lambda: False)
    assert slab.usable == [10, 7]
    assert sum(size for _, size in calls) == 6 * MEMORY_PAGE + 5 * (3 * MEMORY_PAGE // 2)
    for address, _ in calls:
        assert address % MEMORY_PAGE == 0
    assert dram.reserve(key(9), 0)
    dram.check_integrity()


def test_chunks_are_whole_pages_of_memory() -> None:
    for page in (8, 64, 4096, 5000, 2359296, 2**30 + 8):
        (chunk,) = HostSlab([page], [0]).chunk_slots
        assert chunk >= 1 and chunk * page % MEMORY_PAGE == 0
        assert chunk * page <= max(CHUNK_BYTES, page * MEMORY_PAGE // 8)


def test_memory_is_shared_by_what_a_block_of_tokens_leaves() -> None:
    assert split(1000, [10, 10], [10, 40]) == [20, 80]
    assert split(1000, [10, 5], [10, 15]) == [40, 120]
