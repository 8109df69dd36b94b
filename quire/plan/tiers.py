"""Tiers of the KV cache in a plan: what they hold, how fast they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

from quire.config.options import Options
from quire.config.tiers import TierSpec, parse_tiers
from quire.errors import PlanError
from quire.hardware.machine import Machine
from quire.kv.groups import KVGroup
from quire.plan.place import Place
from quire.plan.plan import Choice, format_bytes
from quire.tiers.slab import split

# Host memory that pages pass through where no DRAM tier is named.
PASSAGE_BYTES = 256 * 2**20
# On the device, between its pools and the copies to host memory (quire/runner/device_pages.py).
STAGING_BYTES = 2 * 64 * 2**20
# Fewer pages of a pool than this cannot be read and written at the same time.
LEAST_SLOTS = 8
# Bytes a second that a tier below DRAM is thought to give where nothing was measured.
ASSUMED_RATE = 1e9


@dataclass(frozen=True)
class TierFacts:
    """What was measured of the tiers, in the order of `--kv-tiers`: bytes a second read and
    written; None where it was not."""

    read: float | None = None
    write: float | None = None


def tiers_of(options: Options) -> tuple[TierSpec, ...]:
    """The tiers asked for, with DRAM as the first: pages pass through it."""
    specs = parse_tiers(options.engine.kv_tiers or "")
    if specs and specs[0].kind != "dram":
        specs = (TierSpec("dram", size=PASSAGE_BYTES), *specs)
    return specs


def tier_rates(options: Options, facts: Sequence[TierFacts]) -> tuple[float, ...]:
    """Bytes a second read of each of `--kv-tiers`, assumed where that was not measured."""
    return tuple(_rate(spec, fact) for spec, fact in _known(options, facts).items())


def _known(options: Options, facts: Sequence[TierFacts]) -> dict[TierSpec, TierFacts]:
    """What was measured of each of `--kv-tiers`, which is nothing of those behind the last of
    `facts`."""
    specs = parse_tiers(options.engine.kv_tiers or "")
    return dict.fromkeys(specs, TierFacts()) | dict(zip(specs, facts, strict=False))


def _rate(spec: TierSpec, facts: TierFacts) -> float:
    """Bytes a second; 0 of DRAM that was not measured, whose copier has a guess of its own."""
    return facts.read or (0.0 if spec.kind == "dram" else ASSUMED_RATE)


def plan_tiers(
    options: Options,
    groups: Sequence[KVGroup],
    place: Place,
    machine: Machine,
    facts: Sequence[TierFacts],
    choices: list[Choice],
) -> tuple[Place, tuple[int, ...]]:
    """The place with what the tiers leave of its memory, and pages of each pool in host memory.

    Raises PlanError.
    """
    specs = tiers_of(options)
    if not specs:
        return place, ()
    if not options.engine.enable_prefix_caching:
        raise PlanError(
            "kv_tier",
            "--kv-tiers: there is nothing to keep without the prefix cache",
            fix="leave out --no-enable-prefix-caching, or --kv-tiers",
        )
    pages, flow = _flow(groups)
    slots = tuple(split(specs[0].size, pages, flow))
    used = sum(n * size for n, size in zip(slots, pages, strict=True))
    if min(slots) < LEAST_SLOTS:
        raise PlanError(
            "kv_tier",
            f"--kv-tiers: a DRAM tier of {format_bytes(specs[0].size)} is too small",
            why=f"it must hold {LEAST_SLOTS} pages of each pool, "
            f"{format_bytes(LEAST_SLOTS * sum(pages))} for this model",
            fix="make it larger",
        )
    place = _with_memory(place, machine, used)
    asked = _known(options, facts)
    dram = _rate(specs[0], asked.get(specs[0], TierFacts()))
    for spec in specs:
        tokens, fact = spec.size // sum(flow) * _span(groups), asked.get(spec, TierFacts())
        size, reason = _describe(spec, tokens, fact, place)
        rates = [dram] if spec.kind == "dram" else [dram, _rate(spec, fact)]
        reason += _pays(groups, sum(flow) / _span(groups), [rate for rate in rates if rate])
        if spec not in asked:
            reason = f"pages of the other tiers pass through it; {reason}"
        choices.append(Choice(f"kv tier {spec.kind}", size, reason))
    return place, slots


def _flow(groups: Sequence[KVGroup]) -> tuple[list[int], list[int]]:
    """Of each pool: bytes of a page, and bytes that `_span` tokens leave in all its groups."""
    pools, span = 1 + max(group.pool for group in groups), _span(groups)
    pages, flow = [0] * pools, [0] * pools
    for group in groups:
        pages[group.pool] = group.page_bytes
        flow[group.pool] += group.page_bytes * (span // group.block_size)
    return pages, flow


def _span(groups: Sequence[KVGroup]) -> int:
    """The fewest tokens that are whole blocks of every group."""
    return lcm(*(group.block_size for group in groups))


def _with_memory(place: Place, machine: Machine, size: int) -> Place:
    """The place without the memory of the DRAM tier (on a GPU: of the staging buffers)."""
    gpu = place.device != "cpu"
    room = machine.available_bytes - size if gpu else place.room - size
    if room <= 0:
        raise PlanError(
            "out_of_memory",
            f"a DRAM tier of {format_bytes(size)} does not fit",
            why=f"{format_bytes(machine.available_bytes if gpu else place.room)} of this machine's "
            "memory are left",
            fix="make the dram tier of --kv-tiers smaller",
        )
    if not gpu:
        return replace(place, room=room)
    return replace(
        place, room=place.room - STAGING_BYTES, state_bytes=place.state_bytes + STAGING_BYTES
    )


def _describe(spec: TierSpec, tokens: int, facts: TierFacts, place: Place) -> tuple[str, str]:
    """(what it is, how fast)."""
    size = format_bytes(spec.size) if spec.size else "as its configuration says"
    if spec.size:
        size += f" ({tokens} tokens)"
    if spec.kind == "dram":
        on_gpu = place.device != "cpu"
        how = "pinned, copied on streams of its own" if on_gpu else "copied in memory"
        return size, how + _speed(facts)
    if facts.read is None:
        assumed = f"{_rate(spec, facts) / 1e9:.2f} GB/s read assumed until it is used"
        return size, f"{spec.path}; {assumed}"
    return size, spec.path + _speed(facts)


def _speed(facts: TierFacts) -> str:
    parts = [
        f"{rate / 1e9:.2f} GB/s {what}"
        for what, rate in (("read", facts.read), ("written", facts.write))
        if rate is not None
    ]
    return "; measured " + ", ".join(parts) if parts else ""


def _pays(groups: Sequence[KVGroup], token_bytes: float, rates: Sequence[float]) -> str:
    """What follows for requests from the rates at which pages pass, one after the other: where
    computing takes longer (quire/engine/visits.py measures both). A token that a window has passed
    is not loaded, so then it pays sooner."""
    if not rates:
        return ""
    tokens = float(f"{1 / (token_bytes * sum(1 / rate for rate in rates)):.3g}")
    least = "at least " if any(group.window for group in groups) else ""
    return f"; loading pays {least}where prompts compute at less than {tokens:,.0f} tokens/s"
