"""Prometheus metrics under Quire's names, with vLLM's names as aliases. docs/metrics.md lists them.

Counters and gauges of the engine are read when scraped; latencies are observed as deltas pass.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from quire.engine.api import EngineStats
from quire.server.tier_metrics import tier_metrics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)

# Name without prefix -> (vLLM's name without prefix, meaning, value).
GAUGES: dict[str, tuple[str | None, str, Callable[[EngineStats], float]]] = {
    "requests_running": ("num_requests_running", "requests being computed", lambda s: s.running),
    "requests_waiting": ("num_requests_waiting", "requests in the queue", lambda s: s.waiting),
    "kv_cache_usage_perc": (
        "kv_cache_usage_perc",
        "part of KV blocks in use, 0 to 1",
        lambda s: s.kv_blocks_used / s.kv_blocks_total if s.kv_blocks_total else 0.0,
    ),
    "step_age_seconds": (
        None,
        "how long the engine has been in the same step",
        lambda s: s.step_age,
    ),
}
COUNTERS: dict[str, tuple[str | None, str, Callable[[EngineStats], float]]] = {
    "prompt_tokens": ("prompt_tokens", "prompt tokens", lambda s: s.prompt_tokens),
    "generation_tokens": ("generation_tokens", "tokens generated", lambda s: s.generated_tokens),
    "prefix_cache_queries": (
        "prefix_cache_queries",
        "prompt tokens looked up in the prefix cache",
        lambda s: s.prefix_query_tokens,
    ),
    "prefix_cache_hits": (
        "prefix_cache_hits",
        "prompt tokens found in the prefix cache",
        lambda s: s.prefix_hit_tokens,
    ),
    "num_preemptions": ("num_preemptions", "requests preempted", lambda s: s.preemptions),
    "engine_steps": (None, "engine steps", lambda s: s.steps),
    "draft_rows": (
        "spec_decode_num_drafts",
        "rows of steps that had drafts",
        lambda s: s.draft_rows,
    ),
    "draft_tokens": (
        "spec_decode_num_draft_tokens",
        "tokens drafted",
        lambda s: s.draft_tokens,
    ),
    "accepted_tokens": (
        "spec_decode_num_accepted_tokens",
        "drafts that were accepted",
        lambda s: s.accepted_tokens,
    ),
}
# Name -> (vLLM's name, meaning, label that numbers the values, values).
NUMBERED: dict[str, tuple[str | None, str, str, Callable[[EngineStats], Sequence[float]]]] = {
    "accepted_tokens_per_pos": (
        "spec_decode_num_accepted_tokens_per_pos",
        "drafts that were accepted, by their place in a row",
        "position",
        lambda s: s.accepted_at,
    ),
}
HISTOGRAMS: dict[str, tuple[str | None, str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": (
        "time_to_first_token_seconds",
        "from a request's arrival at the engine to its first token",
        _LONG,
    ),
    "inter_token_latency_seconds": (
        "inter_token_latency_seconds",
        "between two tokens of a choice",
        _SHORT,
    ),
    "e2e_request_latency_seconds": (
        "e2e_request_latency_seconds",
        "from a request's arrival at the engine to its last token",
        _LONG,
    ),
    "event_loop_lag_seconds": (None, "how late the server's event loop wakes up", _SHORT),
}
# Name -> (vLLM's name, meaning, labels).
LABELLED: dict[str, tuple[str | None, str, list[str]]] = {
    "request_success": ("request_success", "choices that ended", ["finished_reason"]),
    "http_responses": (None, "HTTP answers", ["path", "status"]),
    "connections_refused": (None, "connections ended by a limit", ["reason"]),
}
LAG_INTERVAL_SECONDS = 0.1


class Histogram:
    """Counts of observations up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus wants them."""
        total, result = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            result.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return result


class Metrics(Collector):
    """All metrics of one server, in a registry of its own. Used on the event loop only."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(item[2]) for name, item in HISTOGRAMS.items()}
        self.labelled: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in LABELLED}
        self._stats = EngineStats()
        self._model = ""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def count(self, name: str, *labels: str) -> None:
        """Add one to a counter of `LABELLED`."""
        self.labelled[name][labels] += 1

    def track(self) -> RequestClock:
        """A clock for one request that starts now."""
        return RequestClock(self)

    def render(self, stats: EngineStats | None, model: str) -> bytes:
        """The text that Prometheus scrapes. `stats` is None while the engine loads."""
        self._stats = stats or EngineStats()
        self._model = model
        return generate_latest(self._registry)

    async def watch_event_loop(self) -> None:
        """Measure the loop's lag for ever (a task of `serve`)."""
        lag = self.histograms["event_loop_lag_seconds"]
        while True:
            due = time.perf_counter() + LAG_INTERVAL_SECONDS
            await asyncio.sleep(LAG_INTERVAL_SECONDS)
            lag.observe(max(0.0, time.perf_counter() - due))

    def collect(self) -> Iterator[Metric]:
        """Every metric under each of its names. Called by the registry."""
        for table, family in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for name, (alias, text, value) in table.items():
                for full, labels, values in self._names(name, alias):
                    metric = family(full, text, labels=labels)
                    metric.add_metric(values, value(self._stats))
                    yield metric
        yield from tier_metrics(self._stats.tiers)
        for name, (alias, text, label, many) in NUMBERED.items():
            for full, labels, values in self._names(name, alias):
                numbered = CounterMetricFamily(full, text, labels=[*labels, label])
                for i, number in enumerate(many(self._stats)):
                    numbered.add_metric([*values, str(i)], number)
                yield numbered
        for name, (alias, text, _) in HISTOGRAMS.items():
            data = self.histograms[name]
            for full, labels, values in self._names(name, alias):
                histogram = HistogramMetricFamily(full, text, labels=labels)
                histogram.add_metric(values, data.buckets(), data.sum)
                yield histogram
        for name, (alias, text, extra) in LABELLED.items():
            for full, labels, values in self._names(name, alias):
                counter = CounterMetricFamily(full, text, labels=labels + extra)
                for key, number in self.labelled[name].items():
                    counter.add_metric([*values, *key], number)
                yield counter

    def _names(self, name: str, alias: str | None) -> Iterator[tuple[str, list[str], list[str]]]:
        yield f"quire:{name}", [], []
        if alias is not None:
            yield f"vllm:{alias}", ["model_name"], [self._model]


class RequestClock:
    """Latencies of one request, told of each delta as it passes."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def tokens(self, choice: int, count: int, finish_reason: str | None) -> None:
        """`count` new tokens of a choice, which ended if `finish_reason` is given."""
        now = time.perf_counter()
        histograms = self._metrics.histograms
        if count:
            last = self._last.get(choice)
            if last is None:
                histograms["time_to_first_token_seconds"].observe(now - self._start)
            else:
                gap = (now - last) / count
                histograms["inter_token_latency_seconds"].observe(gap, count)
            self._last[choice] = now
        if finish_reason is not None:
            histograms["e2e_request_latency_seconds"].observe(now - self._start)
            self._metrics.count("request_success", finish_reason)
