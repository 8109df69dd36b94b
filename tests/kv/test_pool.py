"""A pool gives out a block once, evicts the least recently used, and finds what was published."""

import random

import pytest

from quire.kv import NULL_BLOCK
from quire.kv.pool import BlockPool


def name(i: int) -> bytes:
    return i.to_bytes(32, "little")


def published(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    for block in blocks:
        pool.publish(block, name(block))
    return blocks


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.available, pool.held) == (0, 4)
    pool.release(NULL_BLOCK)
    assert pool.available == 0


@pytest.mark.parametrize("blocks", [-1, 0, 1])
def test_a_pool_without_a_block_to_give_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError):
        BlockPool(blocks)


def test_too_large_an_allocation_changes_nothing() -> None:
    pool = BlockPool(4)
    published(pool, 1)
    with pytest.raises(MemoryError, match="3 blocks wanted, 2 available"):
        pool.allocate(3)
    assert (pool.available, pool.held) == (2, 1)
    assert pool.allocate(0) == []
    pool.check_integrity()


def test_free_blocks_go_before_cached_ones_and_those_in_order_of_release() -> None:
    pool = BlockPool(6)
    a, b, c = published(pool, 3)
    (plain,) = pool.allocate(1)
    for block in (b, plain, c, a):
        pool.release(block)
    assert pool.available == 5
    assert pool.allocate(2) == [5, plain]
    assert [pool.find(name(x)) for x in (a, b, c)] == [a, b, c]
    assert pool.allocate(1) == [b]
    assert [pool.find(name(x)) for x in (a, b, c)] == [a, None, c]
    assert pool.allocate(2) == [c, a]
    assert pool.find(name(a)) is None
    pool.check_integrity()


def test_use_makes_a_cached_block_recent() -> None:
    pool = BlockPool(3)
    a, b = published(pool, 2)
    pool.release(a)
    pool.release(b)
    pool.acquire(a)
    pool.release(a)
    assert pool.allocate(1) == [b]


def test_a_shared_block_stays_until_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = published(pool, 1)
    pool.acquire(block)
    pool.release(block)
    assert pool.available == 0 and not pool.is_cached(block)
    pool.release(block)
    assert pool.available == 1 and pool.is_cached(block)
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.release(block)


def test_the_first_block_of_an_identity_stays() -> None:
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    pool.publish(a, name(9))
    pool.publish(b, name(9))
    pool.publish(a, name(8))
    assert pool.find(name(9)) == a and pool.find(name(8)) is None
    for block in (a, b, c):
        pool.release(block)
    pool.check_integrity()
    assert pool.allocate(2) == [b, c]


def test_discarded_blocks_are_not_found_and_keep_their_holders() -> None:
    pool = BlockPool(4)
    a, b, c = published(pool, 3)
    pool.release(a)
    pool.discard(a)
    pool.discard(b)
    pool.discard(b)
    assert [pool.find(name(x)) for x in (a, b, c)] == [None, None, c]
    assert (pool.available, pool.held) == (1, 2)
    pool.release(b)
    pool.check_integrity()
    pool.clear_cache()
    assert pool.find(name(c)) is None and pool.held == 1
    pool.check_integrity()


def test_any_sequence_of_operations_agrees_with_a_list_of_holders() -> None:
    rng, pool = random.Random(1), BlockPool(9)
    holders: list[int] = []  # one entry per reference
    for step in range(4000):
        dice = rng.randrange(6)
        free = 8 - len(set(holders))
        if dice == 0 and free:
            new = pool.allocate(rng.randint(1, free))
            assert not set(new) & set(holders) and len(set(new)) == len(new)
            holders += new
        elif dice == 1 and holders:
            block = holders.pop(rng.randrange(len(holders)))
            pool.release(block)
        elif dice == 2 and holders:
            pool.publish(rng.choice(holders), name(rng.randrange(12)))
        elif dice == 3:
            block = pool.find(name(rng.randrange(12)))
            if block is not None:
                assert pool.is_cached(block) == (block not in holders)
                pool.acquire(block)
                holders.append(block)
        elif dice == 4 and step % 7 == 0:
            pool.discard(rng.randint(1, 8))
        elif step % 500 == 0:
            pool.clear_cache()
        assert pool.counts() == [holders.count(b) for b in range(9)]
        assert pool.held == len(set(holders))
        pool.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.append(2),
        lambda pool: pool._free.popleft(),
        lambda pool: pool._cached.clear(),
        lambda pool: pool._index.clear(),
        lambda pool: pool._count.__setitem__(1, 0),
        lambda pool: pool._count.__setitem__(3, 1),
        lambda pool: pool._identity.__setitem__(3, None),
        lambda pool: pool._free.append(NULL_BLOCK),
    ],
)
def test_damage_is_noticed(damage) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(6)
    for block in published(pool, 3)[1:]:
        pool.release(block)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_slices_reach_every_block_and_start_again() -> None:
    pool = BlockPool(10)
    published(pool, 9)
    assert [pool.check_slice(4) for _ in range(6)] == [False, False, True] * 2
    pool._identity[9] = name(77)
    assert [pool.check_slice(4) for _ in range(2)] == [False, False]
    with pytest.raises(AssertionError):
        pool.check_slice(4)
