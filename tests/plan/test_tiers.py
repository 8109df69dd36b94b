"""Tiers in the plan: what they take and hold, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from plan.test_gpu import plan as gpu_plan
from plan.test_resolve import GEMMA, LLAMA, MACHINE, NATIVE, plan
from quire.config.parse import build_options
from quire.errors import PlanError
from quire.plan.facts import ModelFacts
from quire.plan.plan import Plan
from quire.plan.resolve import resolve
from quire.plan.tiers import LEAST_SLOTS, STAGING_BYTES, TierFacts

MIB = 2**20


def lines(made: Plan) -> dict[str, tuple[str, str]]:
    return {c.what: (c.chosen, c.reason) for c in made.choices if c.what.startswith("kv tier")}


def test_without_tiers_nothing_is_planned_for_them() -> None:
    made = plan()
    assert (made.tier_slots, made.tier_bytes, made.tier_rates) == ((), 0, ())
    assert not lines(made)


def test_dram_is_shared_by_the_pools_and_taken_from_the_machine() -> None:
    for hf in (LLAMA, GEMMA):
        made, without = plan(hf, kv_tiers="dram:64MiB"), plan(hf)
        pages = {g.pool: g.page_bytes for g in made.groups}
        assert made.tier_bytes == sum(n * pages[p] for p, n in enumerate(made.tier_slots))
        assert 64 * MIB - 2 * sum(pages.values()) <= made.tier_bytes <= 64 * MIB
        blocks = [n / sum(g.pool == p for g in made.groups) for p, n in enumerate(made.tier_slots)]
        assert max(blocks) - min(blocks) <= 1, "every pool holds as many blocks of tokens"
        assert made.total_bytes == without.total_bytes + made.tier_bytes
        tokens = int(min(blocks)) * 16
        assert abs(int(lines(made)["kv tier dram"][0].split("(")[1].split()[0]) - tokens) <= 16


def test_what_was_measured_is_shown() -> None:
    options = build_options({"kv_tiers": "dram:64MiB,fs:/cache:1GiB"})
    facts = [TierFacts(read=8e9), TierFacts(read=2.5e9, write=1.25e9)]
    made = resolve(options, ModelFacts("m", LLAMA, None), MACHINE, NATIVE, tiers=facts)
    assert "8.00 GB/s" in lines(made)["kv tier dram"][1]
    size, reason = lines(made)["kv tier fs"]
    assert size.startswith("1.0 GiB (") and "/cache" in reason
    assert "2.50 GB/s read" in reason and "1.25 GB/s written" in reason
    assert made.tier_rates == (8e9, 2.5e9)


def reason(kind: str, hf: dict[str, object], tiers: str, facts: list[TierFacts]) -> str:
    made = resolve(
        build_options({"kv_tiers": tiers}), ModelFacts("m", hf, None), MACHINE, NATIVE, tiers=facts
    )
    return lines(made)[f"kv tier {kind}"][1]


def test_it_says_how_slowly_prompts_must_compute_for_loading_to_pay() -> None:
    # Keys and values of 3 layers of 2 heads of 16 numbers of 2 bytes: 384 bytes a token.
    facts = [TierFacts(read=8e9), TierFacts(read=2e9, write=1e9)]
    tiers = "dram:64MiB,fs:/cache:1GiB"
    assert "less than 20,800,000 tokens/s" in reason("dram", LLAMA, tiers, facts)
    # From files it passes through DRAM as well: 1 / (1/8 + 1/2) = 1.6 GB/s.
    assert "less than 4,170,000 tokens/s" in reason("fs", LLAMA, tiers, facts)
    assert "at least where" not in reason("fs", LLAMA, tiers, facts)
    # What windows have passed is not loaded.
    assert "pays at least where prompts" in reason("fs", GEMMA, tiers, facts)
    assert "pays" not in lines(plan(kv_tiers="dram:64MiB"))["kv tier dram"][1]


def test_of_a_store_that_was_not_asked_it_says_what_is_assumed() -> None:
    told = reason("mooncake", LLAMA, "dram:64MiB,mooncake:/m.json", [TierFacts(8e9), TierFacts()])
    assert "/m.json" in told and "1.00 GB/s read assumed until it is used" in told
    assert "less than 2,310,000 tokens/s" in told  # 1 / (1/8 + 1/1) = 0.889 GB/s
    assert "measured" not in told
    made = plan(kv_tiers="dram:64MiB,mooncake:/m.json")
    assert made.tier_rates == (0.0, 1e9)


def test_pages_of_files_pass_through_some_dram() -> None:
    made = plan(kv_tiers="fs:/cache:1GiB")
    assert "pass through" in lines(made)["kv tier dram"][1]
    assert made.tier_bytes > 200 * MIB


def refused(**options: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(**options)  # type: ignore[arg-type]
    return caught.value


def test_too_small_too_large_and_useless_tiers_are_refused() -> None:
    page = sum(group.page_bytes for group in plan().groups)
    assert str(LEAST_SLOTS) in refused(kv_tiers=f"dram:{(LEAST_SLOTS - 1) * page}").why
    assert plan(kv_tiers=f"dram:{LEAST_SLOTS * page}").tier_slots == (LEAST_SLOTS,)
    assert refused(kv_tiers="dram:100TiB").code == "out_of_memory"
    error = refused(kv_tiers="dram:64MiB", enable_prefix_caching=False)
    assert error.code == "kv_tier" and "prefix cache" in error.what


def test_on_a_gpu_dram_is_the_hosts_and_staging_the_devices() -> None:
    made, without = gpu_plan(kv_tiers="dram:1GiB"), gpu_plan()
    assert made.state_bytes == without.state_bytes + STAGING_BYTES
    assert made.kv_bytes < without.kv_bytes
    assert "pinned" in lines(made)["kv tier dram"][1]
    with pytest.raises(PlanError, match="does not fit"):
        gpu_plan(kv_tiers="dram:100TiB")


def test_identities_do_not_depend_on_the_tiers() -> None:
    assert plan().cache_fingerprint == plan(kv_tiers="dram:64MiB").cache_fingerprint
    assert replace(plan(), tier_bytes=1).cache_fingerprint == plan().cache_fingerprint
