"""Tiers under a runner that checks every byte of KV: outputs equal a reference whatever comes back
from where, late, wrong or not at all; and nothing is lost or held for ever.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mock_runner import VOCAB
from test_scheduler import BASES, LAYOUTS, MODEL_LEN, least_blocks, random_operation
from tiered import PAGE_BYTES, FlakyTier, TieredDriver

from quire.engine import tiering, visits
from quire.params import SamplingParams
from quire.tiers import work

FOREVER = SamplingParams(max_tokens=30, ignore_eos=True)


def random_tiered(rng: random.Random, faults: float) -> TieredDriver:
    groups = LAYOUTS[rng.choice(list(LAYOUTS))]
    budget = rng.choice([5, 16, 33, 64])
    blocks = [n + rng.choice([0, 1, 5, 20]) for n in least_blocks(groups, MODEL_LEN, budget)]
    count = rng.choice([0, 1, 1, 2])
    driver = TieredDriver(
        groups,
        blocks,
        depth=rng.choice([1, 2, 3]),
        budget=budget,
        slots=rng.choice([1, 2, 4]),
        rng=rng,
        tiers=[
            FlakyTier(random.Random(rng.random()), faults, rng.choice([4, 15, 10**9]))
            for _ in range(count)
        ],
        dram_slots=rng.choice([3, 8, 20, 60]),
        policy=rng.choice(["lru", "arc"]),
    )
    if rng.random() < 0.7:  # what is found is loaded, however fast the mock computes
        driver.tiering.observe = lambda tokens, seconds: None  # type: ignore[method-assign]
    return driver


def add_again(driver: TieredDriver, rng: random.Random) -> None:
    """The prompt of an earlier request, with something behind it."""
    if driver.asked:
        add = rng.choice(list(driver.asked.values())).add
        more = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(20))]
        tokens = (add.prompt_token_ids + more)[: MODEL_LEN - 1]
        params = SamplingParams(max_tokens=rng.randrange(1, 20))
        driver.add(tokens, params, tenant=add.tenant, cache_salt=add.cache_salt)


@contextmanager
def closing(driver: TieredDriver) -> Iterator[TieredDriver]:
    try:
        yield driver
    finally:
        driver.close()


@pytest.fixture(autouse=True)
def no_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier that fails is asked again at once, so that random faults stay faults."""
    monkeypatch.setattr(work, "FIRST_REST", 0.0)


def run_random(seed: int, operations: int) -> TieredDriver:
    rng = random.Random(seed)
    with closing(random_tiered(rng, rng.choice([0.0, 0.0, 0.1, 0.5]))) as driver:
        for _ in range(operations):
            dice = rng.random()
            if dice < 0.02:
                driver.kv.clear_cache()
                driver.tiering.clear()
            elif dice < 0.04:
                driver.copier.breaks = rng.random() < 0.5
            elif dice < 0.1:
                driver.kv.clear_cache()  # as if all had been evicted
            elif dice < 0.14:
                driver.tiering.advance()
            elif dice < 0.3:
                add_again(driver, rng)
            else:
                random_operation(driver, rng)
        driver.copier.breaks = False
        driver.drain()
    return driver


@pytest.mark.parametrize("seed", range(25))
def test_random_life_with_tiers_gives_reference_outputs_and_leaks_nothing(seed: int) -> None:
    run_random(seed, operations=120)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(25, 300))
def test_random_life_with_tiers_gives_reference_outputs_and_leaks_nothing_full(seed: int) -> None:
    run_random(seed, operations=200)


def test_random_lives_reach_what_they_are_meant_to_reach() -> None:
    seen = dict.fromkeys(["stored", "loaded", "fetched", "errors", "evictions", "hit"], 0)
    # How much is fetched depends on the threads of the tiers, and in ten lives it may be nothing.
    for seed in range(60):
        if seed >= 10 and min(seen.values()) > 0:
            break
        driver = run_random(seed, operations=120)
        stats = driver.tiering.stats()
        seen["stored"] += driver.copier.stored
        seen["loaded"] += driver.copier.loaded
        seen["evictions"] += stats[0].evictions
        seen["fetched"] += sum(tier.loaded_bytes for tier in stats[1:])
        seen["errors"] += sum(sum(tier.errors.values()) for tier in stats)
        seen["hit"] += driver.scheduler.stats().prefix_hit_tokens
    assert min(seen.values()) > 0, seen


# -- by hand ---------------------------------------------------------------------------------------


def plain(**options: object) -> TieredDriver:
    """Blocks for little more than one request at a time; everything found is loaded."""
    options = {"groups": LAYOUTS["full"], "pool_blocks": [9], "budget": 64} | options
    driver = TieredDriver(**options)  # type: ignore[arg-type]
    driver.tiering.observe = lambda tokens, seconds: None  # type: ignore[method-assign]
    return driver


def prompt(seed: int, length: int = 60) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(2, VOCAB) for _ in range(length)]


def cached(driver: TieredDriver, tokens: list[int]) -> dict[str, int] | None:
    """Run a prompt alone; where its cached tokens came from."""
    asked = driver.add(tokens, SamplingParams(max_tokens=1, ignore_eos=True))
    driver.drain()
    assert asked.end is not None
    assert asked.end.cached_tokens == sum((asked.end.cached_by_tier or {}).values())
    return asked.end.cached_by_tier


def flood(driver: TieredDriver, first: int, count: int) -> None:
    for seed in range(first, first + count):
        cached(driver, prompt(seed))


def test_a_prompt_comes_back_from_the_device_from_dram_and_from_below() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=12)) as driver:
        assert cached(driver, prompt(1)) == {}
        assert cached(driver, prompt(1)) == {"device": 48}
        flood(driver, 2, 3)  # there are 8 blocks on the device
        assert cached(driver, prompt(1)) == {"dram": 48}
        flood(driver, 10, 4)  # 12 pages in DRAM
        assert cached(driver, prompt(1)) == {"flaky": 48}
        computed = driver.runner.tokens_computed
        assert cached(driver, prompt(1)[:50]) == {"device": 48}
        assert driver.runner.tokens_computed == computed + 2


def test_what_a_tier_evicts_comes_back_from_the_next() -> None:
    upper, lower = FlakyTier(random.Random(0), most=6), FlakyTier(random.Random(0))
    upper.name, lower.name = "upper", "lower"
    with closing(plain(tiers=[upper, lower], dram_slots=8)) as driver:
        cached(driver, prompt(1))
        driver.settle()
        assert len(upper.pages) == 3 and not lower.pages, "one copy of a page is enough"
        flood(driver, 10, 4)
        driver.settle()
        assert cached(driver, prompt(1)) == {"lower": 48}
        driver.settle()
        first, second = driver.tiering.stats()[1:]
        assert first.evictions >= 9 and second.stored_bytes >= 9 * PAGE_BYTES
        assert not second.dropped


def test_a_preempted_request_finds_its_own_blocks_in_the_tiers() -> None:
    with closing(plain(pool_blocks=[7], slots=2, dram_slots=50)) as driver:
        for base in BASES[:2]:
            driver.add(base[:40], SamplingParams(max_tokens=40, ignore_eos=True))
        driver.drain()
        assert driver.scheduler.stats().preemptions > 0
        assert driver.copier.loaded > 0


def test_a_request_that_waits_for_a_load_blocks_nobody() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(pool_blocks=[20], tiers=[tier], dram_slots=8, slots=2)) as driver:
        cached(driver, prompt(1))
        flood(driver, 10, 6)
        load = tier.load
        tier.load = lambda *a: (time.sleep(0.3), load(*a))  # type: ignore[method-assign]
        slow = driver.add(prompt(1), FOREVER)
        quick = driver.add(prompt(99), SamplingParams(max_tokens=5, ignore_eos=True))
        begun = time.monotonic()
        while quick.end is None:
            driver.iterate()
        assert time.monotonic() - begun < 0.25
        assert not slow.tokens
        driver.drain()


@pytest.mark.parametrize("hangs", ["lookup", "load"])
def test_a_tier_that_hangs_is_a_miss_after_its_deadline(
    hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "LONGEST_VISIT", 0.2)
    monkeypatch.setattr(tiering, "LOOKUP_SECONDS", 0.2)
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=8)) as driver:
        cached(driver, prompt(1))
        flood(driver, 2, 4)
        present = tier.present
        tier.delay = 1.0
        if hangs == "load":
            tier.present = lambda ids: (  # type: ignore[method-assign]
                {i for i in ids if i in tier.pages}
            )
        begun = time.monotonic()
        asked = driver.add(prompt(1), SamplingParams(max_tokens=1, ignore_eos=True))
        while asked.end is None:
            driver.iterate()
        assert time.monotonic() - begun < 0.9
        assert asked.end.cached_tokens == 0
        stats = driver.tiering.stats()[1]
        assert stats.errors["deadline"] == 1
        if hangs == "lookup":  # the next request does not wait for it again
            assert driver.tiering.chain.levels[0].late == 1
            driver.tiering.chain.levels[0].lookups.good()
            begun = time.monotonic()
            other = driver.add(prompt(50), SamplingParams(max_tokens=1, ignore_eos=True))
            while other.end is None:
                driver.iterate()
            assert time.monotonic() - begun < 0.9
        tier.delay, tier.present = 0.0, present  # type: ignore[method-assign]
        driver.drain()


@pytest.mark.parametrize("failing", ["present", "load", "store"])
def test_only_faults_in_a_row_switch_a_tier_off(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many of one kind as do so in a row, each followed by two that are good. Where
    lookups fail, what they ask for was never there, so that no load says that the tier works."""
    monkeypatch.setattr(work, "FIRST_REST", 30.0)
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=8)) as driver:
        for seed in (1, 2, 3):
            cached(driver, prompt(seed, 20))  # a page each
            flood(driver, 10 * seed, 3)
        calls, real = 0, getattr(tier, failing)

        def scattered(*given: object) -> object:
            nonlocal calls
            calls += 1
            if calls % 3 == 1:
                raise OSError(errno.EIO, "scattered")
            return real(*given)

        setattr(tier, failing, scattered)
        stats, seed = driver.tiering.stats()[1], 100
        while stats.errors.get("EIO", 0) < 2 * work.FUSE_FAULTS:
            for again in (1, 2, 3):
                if failing != "present":
                    cached(driver, prompt(again, 20))
                flood(driver, seed, 3)
                seed += 3
            stats = driver.tiering.stats()[1]
            assert stats.state == "on"


def test_loads_that_fail_switch_loading_off_though_lookups_are_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "FIRST_REST", 30.0)
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=8)) as driver:
        cached(driver, prompt(1, 20))
        flood(driver, 2, 4)
        tier.load = broken  # type: ignore[method-assign]
        for _ in range(work.FUSE_FAULTS):
            assert driver.tiering.stats()[1].state == "on"
            assert cached(driver, prompt(1, 20)) == {}
            driver.kv.clear_cache()
            driver.tiering.chain.dram.clear()
        assert driver.tiering.stats()[1].state == "stores only"


def broken(identity: bytes, into: memoryview) -> None:
    raise OSError(errno.EIO, "broken")


def test_answers_that_always_come_late_switch_a_tier_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "FIRST_REST", 30.0)
    monkeypatch.setattr(tiering, "LOOKUP_SECONDS", 0.02)
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=8)) as driver:
        tier.delay = 0.1
        for seed in range(work.FUSE_FAULTS):
            assert driver.tiering.stats()[1].state == "on"
            cached(driver, prompt(seed))  # which ends when the answer has come as well
        assert driver.tiering.stats()[1].state == "stores only"
        tier.delay = 0.0


def test_the_threads_time_is_told_apart_by_what_it_went_into() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=8)) as driver:
        tiering, spent = driver.tiering, {"look": 0, "write": 0}

        def slow(name: str) -> None:
            real = getattr(tiering.chain, name)

            def call(*given: object) -> object:
                spent[name] += 1
                time.sleep(0.002)
                return real(*given)

            setattr(tiering.chain, name, call)

        slow("look")
        slow("write")
        flood(driver, 1, 4)
        assert spent["look"] == 4 < spent["write"]
        assert 0.002 * spent["look"] < tiering.lookup_seconds < 0.002 * spent["write"]
        assert 0.002 * spent["write"] < tiering.copy_seconds


def test_loading_that_would_take_longer_than_computing_is_left_out() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=12)) as driver:
        cached(driver, prompt(1))
        flood(driver, 2, 4)
        del driver.tiering.observe
        for _ in range(50):
            driver.tiering.observe(64, 1e-6)
            driver.tiering.chain.levels[0].rate.observe(1, 1.0)
        assert cached(driver, prompt(1)) == {}
        assert tier.loads == 0
        for _ in range(50):
            driver.tiering.observe(64, 1.0)
        flood(driver, 12, 4)
        driver.tiering.chain.levels[0].rate.observe(1e12, 1.0)
        assert cached(driver, prompt(1)) == {"flaky": 48}


def test_a_suspect_does_not_wait_for_what_was_loaded_for_others() -> None:
    """It runs alone, so they would wait for it in turn."""
    with closing(plain(slots=1, dram_slots=40)) as driver:
        flood(driver, 1, 4)
        driver.settle()
        driver.kv.clear_cache()
        loaded, suspect = (driver.add(prompt(seed), FOREVER) for seed in (1, 2))
        first, second = driver.scheduler.requests.values()
        while not driver.tiering.ready(first, 1):
            driver.tiering.advance()
        assert not driver.tiering.ready(second, 1), "there is one slot"
        driver.scheduler.roster.suspects.add(second)  # as if a step with it had raised
        driver.drain()
        assert suspect.tokens == suspect.ref.tokens and loaded.tokens == loaded.ref.tokens


def test_two_requests_with_the_same_beginning_load_it_once() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(pool_blocks=[30], tiers=[tier], dram_slots=8, slots=4)) as driver:
        cached(driver, prompt(1))
        flood(driver, 10, 10)
        loads = tier.loads
        both = [driver.add([*prompt(1), i], FOREVER) for i in (2, 3)]
        driver.drain()
        assert [a.end.cached_tokens for a in both if a.end] == [48, 48]
        assert tier.loads == loads + 3


def test_blocks_are_held_until_their_copies_are_done() -> None:
    with closing(plain(pool_blocks=[6], dram_slots=8, slots=1)) as driver:
        driver.add(BASES[0][:40], SamplingParams(max_tokens=1))
        driver.iterate()
        driver.copier.rng = random.Random(0)
        driver.copier.work = lambda: None  # type: ignore[method-assign]
        driver.tiering.advance()
        assert len(driver.kv.loans) == 2
        held, total = driver.kv.usage()
        assert (held, total) == (2, 5), "the request has ended, its copies have not"
        driver.add(BASES[1][:70], SamplingParams(max_tokens=1))
        for _ in range(5):
            driver.iterate()
        assert not driver.pending, "its blocks are not to be had yet"
        del driver.copier.work
        driver.drain()


def test_copies_that_cannot_be_launched_cost_misses_and_switch_tiers_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "FIRST_REST", 30.0)
    with closing(plain(dram_slots=12)) as driver:
        driver.copier.breaks = True
        assert cached(driver, prompt(1)) == {}
        flood(driver, 2, 2)
        assert cached(driver, prompt(1)) == {}
        flood(driver, 5, 3)
        assert driver.tiering.stats()[0].errors["copy"] == 5
        assert driver.tiering.stats()[0].state == "off"
        driver.tiering._copies._fuse.good()
        driver.copier.breaks = False
        flood(driver, 10, 4)
        assert cached(driver, prompt(10)) == {"dram": 48}


def test_what_numbers_spoil_is_forgotten_in_every_tier() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(pool_blocks=[20], tiers=[tier], dram_slots=30, budget=16)) as driver:
        asked = driver.add(prompt(1), FOREVER, nan=55)
        driver.drain()
        assert asked.end is not None and asked.end.error is not None
        flood(driver, 2, 8)
        assert cached(driver, prompt(1)) == {}
        driver.settle()


def test_other_tenants_and_salts_find_nothing() -> None:
    with closing(plain(dram_slots=50)) as driver:
        cached(driver, prompt(1))
        flood(driver, 2, 3)
        for fields in ({"tenant": "t"}, {"cache_salt": "s"}):
            asked = driver.add(prompt(1), SamplingParams(max_tokens=1), **fields)
            driver.drain()
            assert asked.end is not None and asked.end.cached_tokens == 0
        assert cached(driver, prompt(1)) == {"dram": 48}


def test_prompt_logprobs_need_every_token_computed() -> None:
    with closing(plain(dram_slots=50)) as driver:
        cached(driver, prompt(1))
        flood(driver, 2, 3)
        params = SamplingParams(max_tokens=1, prompt_logprobs=1)
        asked = driver.add(prompt(1), params)
        driver.drain()
        assert asked.end is not None and asked.end.cached_tokens == 0


def test_clearing_forgets_everything_below_too() -> None:
    tier = FlakyTier(random.Random(0))
    with closing(plain(tiers=[tier], dram_slots=12)) as driver:
        cached(driver, prompt(1))
        driver.kv.clear_cache()
        driver.tiering.clear()
        driver.settle()
        deadline = time.monotonic() + 5
        while tier.pages and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cached(driver, prompt(1)) == {}
