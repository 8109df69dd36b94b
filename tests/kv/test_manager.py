"""Admission, growth, windows, hits and release, by hand arithmetic over 16-token blocks."""

import random

import pytest

from quire.kv import BLOCK_SIZE, NULL_BLOCK
from quire.kv.groups import KVGroup
from quire.kv.identity import BlockIdentity
from quire.kv.manager import KVManager

TOKENS = random.Random(3).sample(range(1000), 400)
FULL = KVGroup(index=0, window=None, layers=(0,), page_bytes=1)


def window(size: int, index: int = 1, pool: int = 0) -> KVGroup:
    return KVGroup(index=index, window=size, layers=(index,), page_bytes=1, pool=pool)


def manager(*groups: KVGroup, blocks: tuple[int, ...] = (100,), caching: bool = True) -> KVManager:
    return KVManager(groups or (FULL,), blocks, BlockIdentity(b"m"), caching)


def fill(kv: KVManager, request_id: str, tokens: list[int], step: int = 1000) -> int:
    """Admit a request and compute all its tokens. Returns the tokens hit."""
    hit = kv.admit(request_id, tokens, step)
    assert hit is not None
    computed = hit
    while computed < len(tokens):
        computed = min(len(tokens), computed + step)
        assert kv.grow(request_id, computed)
        kv.commit(request_id, tokens, computed, len(tokens))
        kv.check_integrity()
    return hit


def identities(kv: KVManager, group: int, tokens: list[int]) -> list[bytes]:
    chain, parent = [], kv.identity.root(group)
    for i in range(len(tokens) // BLOCK_SIZE):
        parent = kv.identity.block(parent, tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE])
        chain.append(parent)
    return chain


def forget(kv: KVManager, group: int, *indices: int) -> None:
    """Evict these blocks of TOKENS from the prefix index."""
    pool = kv.pools[kv.groups[group].pool]
    for index in indices:
        block = pool.find(identities(kv, group, TOKENS)[index])
        assert block is not None
        pool.discard(block)


# -- blocks held -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_a_prompt_takes_its_blocks_at_admission(tokens: int, blocks: int) -> None:
    kv = manager()
    assert kv.admit("a", TOKENS[:tokens], 8) == 0
    assert kv.usage() == (blocks, 99)
    assert kv.grow("a", tokens)
    assert kv.usage() == (blocks, 99)
    assert kv.grow("a", blocks * 16 + 1)
    assert kv.usage() == (blocks + 1, 99)
    kv.free("a")
    assert kv.usage() == (0, 99)
    kv.check_integrity()


def test_admission_is_all_or_nothing() -> None:
    kv = manager(FULL, window(32), blocks=(11,))
    # 80 tokens: 5 blocks, and for the window at 16 tokens a step (32+16)/16+1 = 4.
    assert kv.admit("a", TOKENS[:80], 16) == 0
    before = kv.usage()
    assert before == (5, 10)
    assert kv.admit("b", TOKENS[100:180], 16) is None
    assert kv.usage() == before
    kv.check_integrity()
    with pytest.raises(KeyError):
        kv.table("b")
    kv.free("a")
    assert kv.admit("b", TOKENS[100:180], 16) == 0


@pytest.mark.parametrize(("blocks", "fits"), [(9, False), (10, True)])
def test_fits_ever_counts_all_groups_of_a_pool_and_the_null_block(blocks: int, fits: bool) -> None:
    assert manager(FULL, window(32), blocks=(blocks,)).fits_ever(80, 16) is fits


def test_growth_is_all_or_nothing_over_pools() -> None:
    kv = manager(FULL, window(64, pool=1), blocks=(20, 4))
    assert kv.admit("a", TOKENS[:20], 16) == 0
    assert kv.grow("a", 48)
    assert kv.usage() == (6, 22)
    assert not kv.grow("a", 49)
    assert [len(table) for table in kv.table("a")] == [3, 3]
    kv.check_integrity()


def test_blocks_the_window_has_passed_are_given_back() -> None:
    kv = manager(window(20, index=0), blocks=(30,))
    kv.admit("a", TOKENS[:200], 16)
    for computed in range(16, 200, 16):
        assert kv.grow("a", computed)
        kv.commit("a", TOKENS, computed, 200)
        passed = (computed - 19) // 16 if computed >= 19 else 0
        table = kv.table("a")[0]
        assert [block == NULL_BLOCK for block in table] == [i < passed for i in range(len(table))]
        assert kv.usage()[0] == len(table) - passed
        kv.check_integrity()


@pytest.mark.parametrize("windows", [(), (7,), (16, 33)])
def test_commit_has_nothing_to_do_below_what_it_returns(windows: tuple[int, ...]) -> None:
    groups = [FULL, *(window(w, i + 1) for i, w in enumerate(windows))]
    kv, every = manager(*groups), manager(*groups)
    for each in (kv, every):
        each.admit("a", TOKENS[:300], 1)
    due = 0
    for computed in range(1, 300):
        for each in (kv, every):
            assert each.grow("a", computed)
        every.commit("a", TOKENS, computed, 300)
        if computed >= due:
            due = kv.commit("a", TOKENS, computed, 300)
            assert due > computed
        assert kv.table("a") == every.table("a")
        assert kv.pools[0]._index == every.pools[0]._index
    assert windows or due == 304


# -- hits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("again", "hit"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (80, 64), (100, 80)]
)
def test_a_hit_is_whole_blocks_and_leaves_a_token_to_compute(again: int, hit: int) -> None:
    kv = manager()
    fill(kv, "a", TOKENS[:90])  # 5 full blocks and 10 tokens
    assert kv.admit("b", TOKENS[:again], 1000) == hit
    assert kv.table("b")[0][: hit // 16] == kv.table("a")[0][: hit // 16]
    assert not set(kv.table("b")[0][hit // 16 :]) & set(kv.table("a")[0])
    kv.check_integrity()


def test_hits_end_at_the_first_other_token_tenant_salt_or_refusal() -> None:
    kv = manager()
    fill(kv, "a", TOKENS[:90])
    other = [*TOKENS[:40], 5, *TOKENS[41:90]]
    assert kv.admit("b", other, 1000) == 32
    assert kv.admit("c", TOKENS[:90], 1000, tenant="t") == 0
    assert kv.admit("d", TOKENS[:90], 1000, salt="t") == 0
    assert kv.admit("e", TOKENS[:90], 1000, use_cache=False) == 0
    assert kv.admit("f", TOKENS[:90], 1000) == 80


def test_only_valid_tokens_are_published() -> None:
    kv = manager()
    kv.admit("a", TOKENS[:90], 1000)
    kv.commit("a", TOKENS, 90, 47)
    assert len(kv.pools[0]._index) == 2
    kv.commit("a", TOKENS, 70, 90)
    assert len(kv.pools[0]._index) == 4


def test_without_caching_nothing_is_published_or_found() -> None:
    kv = manager(caching=False)
    assert fill(kv, "a", TOKENS[:90]) == 0
    assert not kv.pools[0]._index
    assert fill(kv, "b", TOKENS[:90]) == 0
    assert kv.usage()[0] == 12


def test_a_window_group_needs_only_the_window_before_the_boundary() -> None:
    kv = manager(FULL, window(32), blocks=(100,))
    fill(kv, "a", TOKENS[:160], step=16)
    kv.free("a")
    forget(kv, 1, 0, 1, 2, 3)
    # Boundary 9 (144 tokens, one left to compute): the query at 144 reads 113..144: blocks 7, 8.
    assert kv.admit("b", TOKENS[:160], 1000) == 144
    assert kv.table("b")[1][:9] == [NULL_BLOCK] * 7 + kv.table("b")[1][7:9]
    assert NULL_BLOCK not in kv.table("b")[1][7:9]
    kv.check_integrity()


@pytest.mark.parametrize(
    ("full_gone", "window_gone", "hit"),
    [
        ((), (8,), 8),  # boundary 8 reads blocks 6 and 7
        ((), (7,), 7),
        ((), (7, 6, 4), 4),  # 7 reads 5, 6; 6 reads 4, 5; 5 reads 3, 4; 4 reads 2, 3
        ((), tuple(range(9)), 0),
        ((5,), (), 5),
        ((5,), (4,), 4),
        ((5,), (3,), 3),  # 5 and 4 read block 3; 3 reads 1 and 2
        ((0,), (), 0),
        ((6,), (4, 2), 2),  # 6 reads 4, 5; 4 reads 2, 3; 2 reads 0, 1
    ],
)
def test_the_hit_is_the_longest_boundary_where_every_group_has_what_it_reads(
    full_gone: tuple[int, ...], window_gone: tuple[int, ...], hit: int
) -> None:
    kv = manager(FULL, window(32))
    fill(kv, "a", TOKENS[:160], step=1000)
    kv.free("a")
    forget(kv, 0, *full_gone)
    forget(kv, 1, *window_gone)
    assert kv.admit("b", TOKENS[:160], 1000) == 16 * hit


def test_the_hit_equals_trying_every_boundary() -> None:
    rng = random.Random(5)
    groups = (FULL, window(20), window(50, index=2))
    for _ in range(60):
        kv = manager(*groups)
        fill(kv, "a", TOKENS[:160])
        kv.free("a")
        have = []
        for g in range(3):
            gone = [i for i in range(10) if rng.random() < 0.15]
            forget(kv, g, *gone)
            have.append([i not in gone for i in range(10)])
        best = max(
            boundary
            for boundary in range(10)
            if all(
                have[g][position // BLOCK_SIZE]
                for g, group in enumerate(groups)
                for position in range(boundary * BLOCK_SIZE)
                if group.window is None or boundary * BLOCK_SIZE - position < group.window
            )
        )
        assert kv.admit("b", TOKENS[:160], 1000) == 16 * best
        kv.check_integrity()


def test_hit_blocks_nobody_holds_count_against_what_is_available() -> None:
    kv = manager(blocks=(9,))  # 8 blocks
    fill(kv, "a", TOKENS[:64])
    kv.free("a")
    fill(kv, "x", TOKENS[200:232])  # 2 blocks
    # 112 tokens: 7 blocks of which 4 are found but held by nobody; 6 are left.
    assert kv.admit("b", TOKENS[:112], 1000) is None
    assert kv.usage() == (2, 8)
    assert kv.admit("b", TOKENS[:96], 1000) == 64
    assert kv.usage() == (8, 8)
    kv.check_integrity()


def test_hit_blocks_others_hold_are_shared_for_nothing() -> None:
    kv = manager(blocks=(9,))
    fill(kv, "a", TOKENS[:96])  # 6 of 8
    assert kv.admit("b", TOKENS[:112], 1000) == 96
    assert kv.usage() == (7, 8)


def test_identities_kept_by_the_caller_give_the_same_hits() -> None:
    kv = manager(FULL, window(32))
    fill(kv, "a", TOKENS[:160])
    kept: list[list[bytes]] = []
    assert kv.admit("b", TOKENS[:100], 1000, identities=kept) == 96
    assert [len(chain) for chain in kept] == [6, 6]
    kv.free("b")
    assert kv.admit("b", TOKENS[:160], 1000, identities=kept) == 144
    assert kept == [identities(kv, g, TOKENS[:160]) for g in (0, 1)]


# -- blocks of other sizes -------------------------------------------------------------------------

PAGES = KVGroup(index=1, window=None, layers=(1,), page_bytes=1, pool=1, block_size=64)
CHECKED = KVGroup(index=0, window=20, layers=(0,), page_bytes=1, checkpoint=128)


def test_each_group_has_blocks_of_its_own_size() -> None:
    kv = manager(FULL, PAGES, blocks=(100, 100))
    assert kv.hit_tokens == 64 and kv.coarsest == 1
    assert kv.admit("a", TOKENS[:65], 1000) == 0
    assert [len(table) for table in kv.table("a")] == [5, 2]
    assert kv.grow("a", 128) and [len(table) for table in kv.table("a")] == [8, 2]
    assert kv.grow("a", 129) and [len(table) for table in kv.table("a")] == [9, 3]
    kv.commit("a", TOKENS, 127, 400)
    assert [len(pool._index) for pool in kv.pools] == [7, 1]
    kv.commit("a", TOKENS, 128, 400)
    assert [len(pool._index) for pool in kv.pools] == [8, 2]
    kv.check_integrity()


@pytest.mark.parametrize(("again", "hit"), [(64, 0), (65, 64), (128, 64), (129, 128), (400, 128)])
def test_hits_end_where_blocks_of_all_groups_do(again: int, hit: int) -> None:
    kv = manager(FULL, PAGES, blocks=(100, 100))
    fill(kv, "a", TOKENS[:190], step=16)
    assert kv.admit("b", TOKENS[:again], 1000) == hit
    assert kv.table("b")[0][: hit // 16] == kv.table("a")[0][: hit // 16]
    assert kv.table("b")[1][: hit // 64] == kv.table("a")[1][: hit // 64]
    kv.check_integrity()


def test_a_group_with_small_blocks_lowers_the_hit_to_a_border_of_all() -> None:
    kv = manager(FULL, PAGES, blocks=(100, 100))
    fill(kv, "a", TOKENS[:300])
    kv.free("a")
    forget(kv, 0, 9)  # of tokens 144 to 159
    assert kv.admit("b", TOKENS[:300], 1000) == 128


def test_windows_that_are_not_kept_free_their_blocks() -> None:
    kv = manager(CHECKED, PAGES, blocks=(100, 100))
    fill(kv, "a", TOKENS[:380], step=16)
    kv.free("a")
    # Kept are blocks 6 and 7 before 128, 14 and 15 before 256, 18 and 19 before 320, the last
    # border of a prompt of 380 tokens, and 22, since 384 might have come. A request of 300 tokens
    # can use 256, one of 250 only 128.
    assert len(kv.pools[0]._index) == 7
    for length, hit in ((380, 320), (321, 320), (300, 256), (250, 128), (128, 0)):
        assert kv.admit("b", TOKENS[:length], 1000) == hit
        kv.free("b")
    kv.check_integrity()


def test_hits_of_random_sizes_equal_trying_every_boundary() -> None:
    rng = random.Random(6)
    for _ in range(40):
        sizes = [rng.choice([16, 32, 48, 64]) for _ in range(3)]
        groups = tuple(
            KVGroup(i, rng.choice([None, 20, 70]), (i,), 1, i, block_size=size)
            for i, size in enumerate(sizes)
        )
        kv = manager(*groups, blocks=(100, 100, 100))
        fill(kv, "a", TOKENS[:390])
        kv.free("a")
        have = []
        for pool, size in zip(kv.pools, sizes, strict=True):
            gone = [block for block in pool._index.values() if rng.random() < 0.1]
            there = list(pool._index.values())
            assert len(there) == 390 // size
            have.append([block not in gone for block in there])
            for block in gone:
                pool.discard(block)
        best = max(
            boundary
            for boundary in range(0, 390, kv.hit_tokens)
            if all(
                have[g][position // group.block_size]
                for g, group in enumerate(groups)
                for position in range(boundary)
                if group.window is None or boundary - position < group.window
            )
        )
        assert kv.admit("b", TOKENS[:390], 1000) == best
        kv.check_integrity()


# -- release ---------------------------------------------------------------------------------------


def test_ends_are_evicted_before_beginnings() -> None:
    kv = manager(blocks=(6,))
    fill(kv, "a", TOKENS[:80])
    kv.free("a")
    chain = identities(kv, 0, TOKENS[:80])
    for left in (4, 3, 2, 1, 0):
        kv.pools[0].allocate(1)
        assert [kv.pools[0].find(c) is not None for c in chain] == [i < left for i in range(5)]


def test_the_longest_unused_request_is_evicted_first() -> None:
    kv = manager(blocks=(7,))
    fill(kv, "a", TOKENS[:48])
    fill(kv, "b", TOKENS[100:148])
    kv.free("b")
    kv.free("a")
    assert fill(kv, "c", TOKENS[200:248]) == 0
    assert kv.admit("a", TOKENS[:48], 1000) == 32
    kv.free("a")
    assert kv.admit("b", TOKENS[100:148], 1000) == 0


def test_discard_makes_unfindable_what_a_request_computed_and_not_what_it_found() -> None:
    kv = manager()
    fill(kv, "a", TOKENS[:64])
    assert fill(kv, "b", TOKENS[:100]) == 64
    assert fill(kv, "c", TOKENS[:200]) == 96
    kv.discard("b")
    kv.check_integrity()
    # Block 4 and 5 were b's, so that they are gone although c holds them; 0 to 3 are a's.
    assert kv.admit("d", TOKENS[:100], 1000) == 64
    kv.free("d")
    kv.discard("a")
    kv.check_integrity()
    assert kv.admit("d", TOKENS[:100], 1000) == 0
    kv.free("d")
    kv.free("c")
    kv.check_integrity()
    assert kv.usage()[0] == 0


def test_clear_cache_leaves_running_requests_their_blocks() -> None:
    kv = manager()
    fill(kv, "a", TOKENS[:64])
    kv.clear_cache()
    kv.check_integrity()
    assert kv.usage()[0] == 4
    assert kv.admit("b", TOKENS[:64], 1000) == 0
    kv.free("a")
    kv.free("b")
    kv.check_integrity()
    assert kv.usage()[0] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda kv: kv.table("a")[0].append(50),
        lambda kv: kv.table("a")[0].pop(),
        lambda kv: kv.table("a")[0].__setitem__(0, kv.table("a")[0][1]),
        lambda kv: kv.pools[0].release(kv.table("a")[0][0]),
        lambda kv: kv.pools[0].allocate(1),
    ],
)
def test_tables_and_pools_that_disagree_are_noticed(damage) -> None:  # type: ignore[no-untyped-def]
    kv = manager()
    fill(kv, "a", TOKENS[:64])
    kv.check_integrity()
    damage(kv)
    with pytest.raises(AssertionError):
        kv.check_integrity()


def test_slices_visit_every_pool() -> None:
    kv = manager(FULL, window(32, pool=1), blocks=(20, 20))
    for _ in range(4):
        kv.check_slice()
    kv.pools[1]._identity[7] = b"lost"
    with pytest.raises(AssertionError):
        for _ in range(2):
            kv.check_slice()
