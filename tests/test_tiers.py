"""Tiers on gives the output of tiers off, bit for bit, and a second start finds what the first has
left: whole engines on the CPU, tiny pools, tiny tiers, files that rot and a disk that fails.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_determinism import Bits, bits, cases, load, run, tight_memory

from quire import LLM, SamplingParams
from quire.engine.tiering import Tiering
from quire.kernels import native

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"determinism is the native kernels' promise: {native.why_not()}"
)
SMALL = {"max_num_seqs": 4, "max_model_len": 176, "max_num_batched_tokens": 64}


@pytest.fixture
def eager_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found is loaded: tiny models compute faster than any disk reads."""
    monkeypatch.setattr(Tiering, "observe", lambda self, tokens, seconds: None)


def small(model: str, dtype: str, **options: Any) -> LLM:
    """`dtype` "fp8": of the cache, under float32."""
    sizes: dict[str, Any] = SMALL
    if dtype == "fp8":
        dtype, sizes = "float32", SMALL | {"kv_cache_dtype": "fp8"}
    room = tight_memory(model, dtype, sizes)
    return load(model, dtype=dtype, kv_cache_memory=room, **sizes | options)


def close(llm: LLM) -> None:
    llm._engine.core.close()


def loaded(llm: LLM) -> dict[str, int]:
    return {tier.name: tier.loaded_bytes for tier in llm._engine.core.stats().tiers}


@pytest.mark.usefixtures("eager_loads")
@pytest.mark.parametrize(
    ("model", "dtype", "policy"),
    [
        ("tiny_llama", "bfloat16", "lru"),
        ("tiny_gemma", "float32", "arc"),
        ("tiny_llama", "fp8", "lru"),
        ("tiny_latents", "bfloat16", "lru"),
        pytest.param("tiny_llama", "float32", "arc", marks=pytest.mark.full),
        pytest.param("tiny_gemma", "bfloat16", "lru", marks=pytest.mark.full),
        pytest.param("tiny_moe", "float32", "lru", marks=pytest.mark.full),
        pytest.param("tiny_deepseek", "float32", "arc", marks=pytest.mark.full),
    ],
)
def test_bits_are_those_without_tiers(
    model: str, dtype: str, policy: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    given = cases(seed=5, count=10)
    expected = run(small(path, dtype, enable_prefix_caching=False), given)
    page = small(path, dtype).plan.groups[0].page_bytes
    tiers = f"dram:{40 * page}B,fs:{tmp_path}/kv:{200 * page}B"
    guesses = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    ways = [{}, {"async_scheduling": True}, {"max_num_batched_tokens": 7} | guesses]
    for i, options in enumerate(ways):
        llm = small(path, dtype, kv_tiers=tiers, kv_tier_policy=policy, **options)
        order = list(range(len(given)))
        for _ in range(3):
            random.Random(i).shuffle(order)
            found = run(llm, [given[j] for j in order])
            for j, got in zip(order, found, strict=True):
                assert got == expected[j], f"{options}, request {j}"
        assert loaded(llm)["dram"] > 0
        if i > 0:
            assert loaded(llm)["fs"] > 0, "it began with what the first has left"
        llm._engine.core.tiering.chain.dram.check_integrity()
        close(llm)


@pytest.mark.usefixtures("eager_loads")
def test_bits_are_those_without_tiers_while_files_rot_and_the_disk_fails(
    tiny_gemma: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, given = random.Random(9), cases(seed=6, count=8)
    expected = run(small(tiny_gemma, "float32", enable_prefix_caching=False), given)
    monkeypatch.setattr("quire.tiers.work.FIRST_REST", 0.05)
    page = small(tiny_gemma, "float32").plan.groups[0].page_bytes
    llm = small(tiny_gemma, "float32", kv_tiers=f"dram:{30 * page}B,fs:{tmp_path}/kv:1GiB")
    for name in ("readv", "writev", "open"):
        real = getattr(os, name)

        def flaky(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            ours = "dir_fd" in kwargs or isinstance(args[1], list)
            if ours and rng.random() < 0.05:
                raise OSError(rng.choice([errno.EIO, errno.ENOSPC, errno.EMFILE]), "no luck")
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, flaky)
    for _ in range(8):
        assert run(llm, given) == expected
        for file in (tmp_path / "kv" / "blocks").iterdir():
            if rng.random() < 0.1:
                data = bytearray(file.read_bytes())
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                file.write_bytes(data[: rng.choice([len(data), len(data), len(data) - 1])])
    stats = llm._engine.core.stats().tiers[1]
    assert stats.loaded_bytes > 0
    assert {"checksum", "length"} & set(stats.errors)
    assert {"EIO", "ENOSPC", "EMFILE"} & set(stats.errors)
    close(llm)


def prompts(count: int) -> list[dict[str, list[int]]]:
    rng = random.Random(3)
    return [{"prompt_token_ids": [rng.randrange(3, 320) for _ in range(100)]} for _ in range(count)]


def answers(llm: LLM, count: int = 2) -> tuple[list[Bits], list[dict[str, int] | None]]:
    params = SamplingParams(max_tokens=8, logprobs=1, ignore_eos=True, temperature=0)
    outputs = llm.generate(prompts(count), params, use_tqdm=False)
    return [bits(o) for o in outputs], [o.cached_tokens_by_tier for o in outputs]


@pytest.fixture
def kept(tiny_llama: str, tmp_path: Path) -> Iterator[tuple[str, str, list[Bits]]]:
    """A model, tiers that a first start has filled, and what it answered."""
    tiers = f"fs:{tmp_path}/kv:1GiB"
    llm = load(tiny_llama, kv_tiers=tiers)
    expected, cached = answers(llm)
    assert cached == [{}, {}]
    close(llm)
    yield tiny_llama, tiers, expected


def test_a_second_start_reports_the_cached_tokens_of_its_first_request(
    kept: tuple[str, str, list[Bits]],
) -> None:
    model, tiers, expected = kept
    llm = load(model, kv_tiers=tiers)
    assert answers(llm) == (expected, [{"fs": 96}, {"fs": 96}])
    assert answers(llm) == (expected, [{"device": 96}, {"device": 96}])
    close(llm)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "float32"},
        {"kv_cache_dtype": "fp8"},
        {"kernels": "reference"},
    ],
    ids=str,
)
def test_another_identity_finds_nothing(
    changed: dict[str, Any], kept: tuple[str, str, list[Bits]]
) -> None:
    model, tiers, _ = kept
    llm = load(model, kv_tiers=tiers, **changed)
    assert answers(llm)[1] == [{}, {}]
    close(llm)


TEXTS = ["model_fingerprint", "architecture", "dtype", "kv_dtype", "weight_formats", "kernels"]
TEXTS += ["isa", "device", "moe_routing"]


@pytest.mark.parametrize(
    "change",
    [*({name: "another"} for name in TEXTS), {"deterministic": False}, {"numerics_version": 0},
     {"ranks": 2}, {"groups": ()}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_part_of_the_plan_that_decides_bits_is_in_the_identity(
    change: dict[str, Any], tiny_llama: str
) -> None:
    plan = load(tiny_llama).plan
    assert replace(plan, **change).cache_fingerprint != plan.cache_fingerprint


def test_another_root_has_another_key(tiny_llama: str, tmp_path: Path) -> None:
    names = []
    for root in ("a", "b"):
        llm = load(tiny_llama, kv_tiers=f"fs:{tmp_path}/{root}:1GiB")
        answers(llm)
        close(llm)
        names.append({path.name for path in (tmp_path / root / "blocks").iterdir()})
    assert names[0] and not names[0] & names[1]


def test_engines_that_share_any_one_of_their_directories_find_what_it_has(
    kept: tuple[str, str, list[Bits]], tmp_path: Path
) -> None:
    """Though another is their first: each directory has a secret of its own."""
    model, shared, expected = kept
    for own in ("a", "b"):
        llm = load(model, kv_tiers=f"fs:{tmp_path}/{own}:1GiB,{shared}")
        assert answers(llm) == (expected, [{"fs2": 96}, {"fs2": 96}])
        close(llm)
