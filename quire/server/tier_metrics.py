"""Prometheus metrics of the KV cache's tiers, by the label `tier`. docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quire.tiers.counts import TierStats

# Name -> (meaning, value).
GAUGES: dict[str, tuple[str, Callable[[TierStats], float]]] = {
    "kv_tier_capacity_bytes": ("bytes that the tier may hold", lambda s: s.capacity_bytes),
    "kv_tier_used_bytes": ("bytes that the tier holds", lambda s: s.used_bytes),
    "kv_tier_on": (
        "1 while the tier is used for loads and stores, 0 while faults keep it from one of them",
        lambda s: s.state == "on",
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[TierStats], float]]] = {
    "kv_tier_hits": ("pages that requests asked for and that were there", lambda s: s.hits),
    "kv_tier_misses": ("pages that requests asked for and that were not there", lambda s: s.misses),
    "kv_tier_loaded_bytes": ("bytes brought up", lambda s: s.loaded_bytes),
    "kv_tier_load_seconds": ("seconds of bringing up", lambda s: s.load_seconds),
    "kv_tier_stored_bytes": ("bytes brought down", lambda s: s.stored_bytes),
    "kv_tier_store_seconds": ("seconds of bringing down", lambda s: s.store_seconds),
    "kv_tier_evictions": ("pages that left for room", lambda s: s.evictions),
    "kv_tier_dropped": ("pages not stored because the tier was behind", lambda s: s.dropped),
}


def tier_metrics(tiers: Sequence[TierStats]) -> Iterator[Metric]:
    """Every metric, with a sample for each tier."""
    for table, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
        for name, (text, value) in table.items():
            metric = family(f"quire:{name}", text, labels=["tier"])
            for tier in tiers:
                metric.add_metric([tier.name], value(tier))
            yield metric
    errors = CounterMetricFamily("quire:kv_tier_errors", "faults by kind", labels=["tier", "kind"])
    for tier in tiers:
        for kind, count in tier.errors.items():
            errors.add_metric([tier.name, kind], count)
    yield errors
