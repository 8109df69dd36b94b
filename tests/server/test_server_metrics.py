"""Metrics: names as documented, aliases with equal values, counts that match what was asked."""

from __future__ import annotations

import re
from pathlib import Path

from fake_engine import MODEL
from prometheus_client.parser import text_string_to_metric_families
from server_harness import RunningServer, running

from quire.engine.api import EngineStats
from quire.server.metrics import COUNTERS, GAUGES, HISTOGRAMS, LABELLED, Histogram, Metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def samples(server: RunningServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with server.client() as http:
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(answer.text)
        for s in family.samples
    }


def test_documented_names_are_the_exported_names() -> None:
    exported = {metric.name for metric in Metrics().collect()}
    counters = {n for m in Metrics().collect() if m.type == "counter" for n in [m.name]}
    exported = {name + "_total" if name in counters else name for name in exported}
    documented = set(re.findall(r"`((?:quire|vllm):[a-z0-9_]+)", DOCS.read_text()))
    assert documented == exported


def test_requests_are_counted_and_timed() -> None:
    with running() as server, server.client() as http:
        server.engine.delay = 0.01
        body = {"prompt": "abcd", "max_tokens": 5, "stream": True}
        for _ in range(3):
            http.post("/v1/completions", json=body)
        http.post("/v1/completions", json={"prompt": ""})
        found = samples(server)
    model = (("model_name", MODEL),)
    assert found["quire:prompt_tokens_total", ()] == found["vllm:prompt_tokens_total", model] == 12
    assert found["quire:time_to_first_token_seconds_count", ()] == 3
    assert found["vllm:e2e_request_latency_seconds_count", model] == 3
    assert found["quire:inter_token_latency_seconds_count", ()] == 12
    mean = found["quire:inter_token_latency_seconds_sum", ()] / 12
    assert 0.005 < mean < 0.1
    assert found["quire:request_success_total", (("finished_reason", "length"),)] == 3
    refused = (("path", "/v1/completions"), ("status", "400"))
    assert found["quire:http_responses_total", refused] == 1


def test_every_alias_has_the_value_of_its_metric() -> None:
    with running() as server:
        found = samples(server)
    assert found["quire:kv_cache_usage_perc", ()] == 0.25
    model = (("model_name", MODEL),)
    for table, end in ((GAUGES, ""), (COUNTERS, "_total")):
        for name, (alias, _, _) in table.items():
            if alias is not None:
                assert found[f"vllm:{alias}{end}", model] == found[f"quire:{name}{end}", ()]
    assert {n for n, item in (HISTOGRAMS | LABELLED).items() if item[0] is not None} == {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_success",
    }


def test_accepted_drafts_are_counted_by_their_place() -> None:
    stats = EngineStats(draft_rows=5, draft_tokens=14, accepted_at=[4, 2, 0])
    text = Metrics().render(stats, "m").decode()
    for line in (
        "quire:draft_rows_total 5.0",
        'vllm:spec_decode_num_draft_tokens_total{model_name="m"} 14.0',
        "quire:accepted_tokens_total 6.0",
        'quire:accepted_tokens_per_pos_total{position="1"} 2.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"} 4.0',
    ):
        assert line in text.splitlines()


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.1, 1), (0.5, 2), (5.0, 3)):
        histogram.observe(value, times)
    assert histogram.buckets() == [("0.1", 1.0), ("1.0", 3.0), ("+Inf", 6.0)]
    assert histogram.sum == 0.1 + 1.0 + 15.0
