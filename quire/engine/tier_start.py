"""From `--kv-tiers` to open tiers: what a plan is told of them, and what an engine runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quire.config.options import Options
from quire.config.tiers import TierSpec, parse_tiers
from quire.engine.page_copies import Copier
from quire.engine.scheduler import Scheduler
from quire.engine.tiering import Tiering
from quire.plan.plan import Plan
from quire.plan.tiers import TierFacts
from quire.tiers.chain import Chain
from quire.tiers.cold import ColdTier
from quire.tiers.directory import TierDirectory
from quire.tiers.dram import DramTier
from quire.tiers.filesystem import FileTier
from quire.tiers.mooncake import MooncakeTier
from quire.tiers.probe import disk_rates, link_rates, memory_rate
from quire.tiers.slab import HostSlab


def measure_tiers(options: Options, gpu: bool) -> list[TierFacts]:
    """What a plan shows, one for each of `--kv-tiers`. `gpu`: there is one, so pages cross its
    link. Nothing is made that stays: a directory that is not there yet is measured by the one it
    will be in."""
    return [_measure(spec, gpu) for spec in parse_tiers(options.engine.kv_tiers or "")]


def _measure(spec: TierSpec, gpu: bool) -> TierFacts:
    if spec.kind == "dram" and gpu:
        try:
            return TierFacts(*link_rates())
        except RuntimeError:
            return TierFacts()  # a GPU without a few MiB: the plan will say what is missing
    if spec.kind == "dram":
        return TierFacts(read=memory_rate())
    if spec.kind == "fs":
        path = Path(spec.path).absolute()
        there = next(each for each in (path, *path.parents) if each.is_dir())
        try:
            return TierFacts(*disk_rates(str(there)))
        except OSError:
            return TierFacts()  # where it matters, opening the tier will say what is wrong
    return TierFacts()


def open_tiers(options: Options, plan: Plan) -> list[tuple[ColdTier, float]]:
    """Open what `--kv-tiers` names below DRAM; with the bytes a second that each is thought to
    give. Raises UsageError where one cannot be used."""
    cold: list[tuple[ColdTier, float]] = []
    specs = parse_tiers(options.engine.kv_tiers or "")
    for spec, rate in zip(specs, plan.tier_rates, strict=True):
        if spec.kind == "fs":
            number = 1 + sum(tier.name.startswith("fs") for tier, _ in cold)
            files = FileTier(
                TierDirectory(spec.path),
                spec.size,
                plan.cache_fingerprint,
                options.engine.kv_tier_fsync,
                f"fs{number}" if number > 1 else "fs",
            )
            cold.append((files, rate))
        elif spec.kind == "mooncake":
            largest = max(group.page_bytes for group in plan.groups)
            cold.append((MooncakeTier(spec.path, plan.cache_fingerprint, largest), rate))
    return cold


def make_tiering(
    options: Options,
    cold: Sequence[tuple[ColdTier, float]],
    scheduler: Scheduler,
    slab: HostSlab,
    copier: Copier,
) -> Tiering:
    """The tiers over a scheduler's blocks; `cold`: see open_tiers."""
    dram = DramTier(slab, options.engine.kv_tier_policy)
    return Tiering(scheduler.kv, Chain(dram, cold), copier, scheduler.step_tokens)


def make_slab(plan: Plan, pinned: bool) -> HostSlab:
    """Host memory for the pages of a plan's pools."""
    pages = {group.pool: group.page_bytes for group in plan.groups}
    return HostSlab([pages[pool] for pool in range(len(pages))], plan.tier_slots, pinned)
