"""Pages of every KV group go to host memory and come back as they were, beside running steps."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quire.engine.startup import Engine
from quire.engine.tiering import Tiering
from quire.engine.wire import Add
from quire.params import SamplingParams
from quire.runner import device_pages
from quire.runner.device_pages import DevicePages, slot_runs
from quire.runner.pages import CpuPages, pool_tensors
from quire.step import Copies
from quire.tiers.slab import HostSlab
from runner.engines import (
    DEVICE,
    FAMILIES,
    NGRAM,
    SMALL,
    TINY,
    TINY_DEEPSEEK_V3,
    TINY_DEEPSEEK_V4,
    Got,
    cramped,
    engine,
    repeating,
    requests,
    run,
)

WriteModel = Any


@pytest.fixture
def eager_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found is loaded: tiny models compute faster than anything is read."""
    monkeypatch.setattr(Tiering, "observe", lambda self, tokens, seconds: None)


def random_pools(device: torch.device) -> list[list[torch.Tensor]]:
    """Two pools of tensors as unlike as caches can be."""
    generator = torch.Generator().manual_seed(1)
    shapes = [[(9, 2, 8, 16), (9, 2, 16, 8)], [(5, 16, 36)]]
    return [
        [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in pool]
        for pool in shapes
    ]


def page_bytes(pools: list[list[torch.Tensor]]) -> list[int]:
    return [sum(t[0].nbytes for t in pool) for pool in pools]


def settled(pages: CpuPages | DevicePages, count: int) -> list[int]:
    done: list[int] = []
    deadline = time.monotonic() + 30
    while len(done) < count:
        assert time.monotonic() < deadline
        found = pages.copied()
        assert all(seconds >= 0 for _, seconds in found)
        done += [number for number, _ in found]
    return done


@pytest.mark.parametrize("kind", [CpuPages, DevicePages])
def test_pages_come_back_to_other_blocks_as_they_were(
    kind: type[CpuPages] | type[DevicePages],
) -> None:
    pools = random_pools(DEVICE if kind is DevicePages else torch.device("cpu"))
    slab = HostSlab(page_bytes(pools), [12, 12], pinned=kind is DevicePages)
    before = [[tensor.clone() for tensor in pool] for pool in pools]
    pages = kind(pools, slab)
    while slab.usable != [12, 12]:
        time.sleep(0.01)
    pages.copy(Copies(1, True, 0, [1, 3, 8], [0, 1, 11]))
    pages.copy(Copies(2, True, 1, [2, 4], [5, 6]))
    assert sorted(settled(pages, 2)) == [1, 2]
    for pool in pools:
        for tensor in pool:
            tensor.fill_(7.0)
    pages.copy(Copies(3, False, 0, [5, 6, 7], [11, 0, 1]))
    pages.copy(Copies(4, False, 1, [3], [6]))
    assert sorted(settled(pages, 2)) == [3, 4]
    for tensor, old in zip(pools[0], before[0], strict=True):
        assert torch.equal(tensor[[5, 6, 7]], old[[8, 1, 3]])
        assert (tensor[[0, 1, 2, 3, 4, 8]] == 7).all()
    assert torch.equal(pools[1][0][3], before[1][0][4])
    pages.close()


@pytest.mark.parametrize(
    ("slots", "runs"),
    [
        ([5], [(5, 0, 1)]),
        ([3, 4, 5, 9, 10], [(3, 0, 3), (9, 3, 2)]),
        ([6, 7, 8, 9], [(6, 0, 2), (8, 2, 2)]),  # pinned in pieces of 8
        ([0, 2, 4], [(0, 0, 1), (2, 1, 1), (4, 2, 1)]),
    ],
)
def test_slots_that_follow_one_another_are_one_copy(
    slots: list[int], runs: list[tuple[int, int, int]]
) -> None:
    assert list(slot_runs(np.array(slots), 8)) == runs


def test_there_is_a_copy_for_each_range_of_slots_in_whatever_order_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = random_pools(DEVICE)
    slab = HostSlab(page_bytes(pools), [12, 12], pinned=DEVICE.type == "cuda")
    pages = DevicePages(pools, slab)
    while slab.usable != [12, 12]:
        time.sleep(0.001)
    before = [tensor.clone() for tensor in pools[0]]
    copies: list[int] = []

    def counted(slots: Any, chunk: int) -> list[tuple[int, int, int]]:
        found = list(slot_runs(slots, chunk))
        copies.append(len(found))
        return found

    monkeypatch.setattr(device_pages, "slot_runs", counted)
    blocks, slots = [8, 2, 5, 1, 3, 7], [9, 1, 3, 10, 2, 6]  # ranges: 1 to 3, 6, 9 to 10
    pages.copy(Copies(1, True, 0, blocks, slots))
    assert settled(pages, 1) == [1]
    for tensor in pools[0]:
        tensor.fill_(7.0)
    pages.copy(Copies(2, False, 0, blocks[::-1], slots[::-1]))
    assert settled(pages, 1) == [2] and copies == [3, 3]
    for tensor, old in zip(pools[0], before, strict=True):
        assert torch.equal(tensor[blocks], old[blocks]) and (tensor[[0, 4, 6]] == 7).all()
    pages.close()


def test_a_page_is_all_that_a_block_has_in_its_groups_layers(write_model: WriteModel) -> None:
    for family, changes in FAMILIES.items():
        made = engine(write_model(**changes), "cpu", kernels="reference")
        pools = pool_tensors(made.build.caches, made.plan.groups)
        for group in made.plan.groups:
            blocks = {tensor.shape[0] for tensor in pools[group.pool]}
            assert blocks == {made.plan.pool_blocks[group.pool]}, family
            assert sum(t[0].nbytes for t in pools[group.pool]) == group.page_bytes


def bits(found: dict[str, Got]) -> dict[str, tuple[Any, ...]]:
    return {name: (got.tokens, got.logprobs, got.reason) for name, got in found.items()}


def tiers(path: Path, made: Engine, dram: int = 24) -> str:
    page = sum(group.page_bytes for group in made.plan.groups)
    return f"dram:{dram * page}B,fs:{path}/kv:64MiB"


FP8 = {"kv_cache_dtype": "fp8"}
DRAFTS = {"speculative_config": NGRAM}


@pytest.mark.full
@pytest.mark.usefixtures("eager_loads")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(TINY, {}, id="llama"),
        pytest.param(TINY, FP8, id="FP8 cache"),
        pytest.param(TINY, DRAFTS, id="drafts"),
        pytest.param(TINY_DEEPSEEK_V3, {}, id="deepseek_v3"),
        pytest.param(TINY_DEEPSEEK_V4, {}, id="deepseek_v4"),
        pytest.param(TINY_DEEPSEEK_V4, FP8, id="deepseek_v4, FP8 cache"),
    ],
)
def test_a_tiny_model_on_the_gpu_runner_gives_the_same_with_tiers(
    write_model: WriteModel, family: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = write_model(**family)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, ignore_eos=True)
    # Hits can end at 32. More than half of all tokens, so that drafts follow one that comes again.
    adds = [Add("a", list(range(3, 39)), params, seed=1)]
    given = {"deterministic": True, "warm": False, **SMALL, **options}
    plain = cramped(model, **given)
    expected = bits(run(plain, adds))
    made = engine(
        model, "cuda", kv_cache_memory=plain.plan.kv_bytes, kv_tiers=tiers(tmp_path, plain), **given
    )
    for _ in range(2):
        assert bits(run(made, adds)) == expected
        made.core.scheduler.kv.clear_cache()  # as if it had been evicted
    assert made.core.stats().tiers[0].loaded_bytes > 0
    assert (made.core.scheduler.stats().draft_tokens > 0) == (options is DRAFTS)
    made.core.close()


@pytest.mark.gpu
@pytest.mark.usefixtures("eager_loads")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(pytest.param(name, {}, id=name) for name in ("llama", "gemma3", "mistral")),
        *(pytest.param(name, {}, id=name) for name in ("deepseek_v3", "deepseek_v4")),
        *(pytest.param(name, FP8, id=f"{name}, FP8 cache") for name in ("gemma3", "deepseek_v4")),
        *(pytest.param(name, DRAFTS, id=f"{name}, drafts") for name in ("llama", "deepseek_v4")),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_bits_on_a_gpu_are_those_without_tiers(
    write_model: WriteModel,
    family: str,
    options: dict[str, Any],
    asynchronous: bool,
    tmp_path: Path,
) -> None:
    """Under load, with pools so small that blocks are taken as soon as they are given back."""
    model = write_model(**FAMILIES[family])
    given = {"deterministic": True, "async_scheduling": asynchronous, **options}
    plain = cramped(model, enable_prefix_caching=False, **given)
    adds = repeating(requests(40, 3), 3)
    expected = bits(run(plain, adds))
    made = cramped(model, kv_tiers=tiers(tmp_path, plain), **given)
    for seed in range(6):
        random.Random(seed).shuffle(adds)
        assert bits(run(made, adds, seed=seed)) == expected
    stats = made.core.stats().tiers
    assert stats[0].loaded_bytes > 0 and stats[1].loaded_bytes > 0
    assert not stats[0].errors
    assert (made.core.scheduler.stats().draft_tokens > 0) == (options is DRAFTS)
    made.core.close()


@pytest.mark.gpu
def test_copies_reach_four_fifths_of_the_links_bandwidth() -> None:
    """Pages like those of a model of 8 billion parameters: 72 tensors, 2.25 MiB a block."""
    if DEVICE.type != "cuda":
        pytest.skip("there is no link")
    pools = [
        [torch.zeros((600, 8, 16, 128), dtype=torch.bfloat16, device=DEVICE) for _ in range(72)]
    ]
    slab = HostSlab(page_bytes(pools), [512], pinned=True)
    pages = DevicePages(pools, slab)
    while slab.usable != [512]:
        time.sleep(0.01)
    size = 200 * page_bytes(pools)[0]
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    for number, store in enumerate([True, False] * 3):
        pages.copy(Copies(number, store, 0, list(range(1, 201)), list(range(200))))
        torch.cuda.synchronize()
        ((_, seconds),) = pages.copied()
        begun = time.perf_counter()
        (host if store else device).copy_(device if store else host, non_blocking=True)
        torch.cuda.synchronize()
        plain = time.perf_counter() - begun
        rate, ceiling = size / seconds / 1e9, size / plain / 1e9
        print(f"{'store' if store else 'load'} {rate:.1f} GB/s of {ceiling:.1f} GB/s")
        assert number < 2 or rate > 0.8 * ceiling
    pages.close()


@pytest.mark.gpu
def test_memory_is_unpinned_before_it_goes_even_where_nobody_closes() -> None:
    """What stays pinned makes the next pages that are mapped at its addresses useless."""
    if DEVICE.type != "cuda":
        pytest.skip("nothing is pinned")
    pools = random_pools(DEVICE)
    for _ in range(20):
        slab = HostSlab(page_bytes(pools), [4096, 4096], pinned=True)
        pages = DevicePages(pools, slab)
        while slab.usable != [4096, 4096]:
            time.sleep(0.001)
        assert (pinned := pages._pinned)
        pages._pinning.join()  # whose thread holds the pages
        unpinned = pages._unpin
        del pages, slab
        gc.collect()
        assert not unpinned.alive and pinned
        torch.zeros(2**20, pin_memory=True)
