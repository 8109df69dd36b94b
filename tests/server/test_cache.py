"""Looking at the KV cache and emptying it: who may, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_harness import RunningServer, options, running

from quire.tiers.counts import TierStats

DRAM = TierStats("dram", capacity_bytes=100, used_bytes=40, pages=4, hits=7, loaded_bytes=30)
DISK = TierStats("fs", misses=3, errors={"EIO": 2, "checksum": 1}, state="off")


def as_user(server: RunningServer, method: str, key: str | None) -> tuple[int, dict]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with server.client(headers=headers) as http:
        answer = http.request(method, "/v1/cache")
        return answer.status_code, answer.json()


def test_the_cache_is_shown_and_cleared() -> None:
    with running() as server:
        server.engine.tiers = [DRAM, DISK]
        status, shown = as_user(server, "GET", None)
        assert status == 200
        assert shown["device"]["blocks_total"] == 100
        assert [tier["name"] for tier in shown["tiers"]] == ["dram", "fs"]
        assert shown["tiers"][0]["used_bytes"] == 40
        assert shown["tiers"][1]["errors"] == {"EIO": 2, "checksum": 1}
        assert as_user(server, "DELETE", None) == (200, {"cleared": True})
        assert server.engine.cleared == 1
        server.engine.clears = False
        assert as_user(server, "DELETE", None)[0] == 503
        assert as_user(server, "POST", None)[0] == 405


@pytest.mark.parametrize(
    ("admins", "allowed"), [("default", set()), ("alice", {"a"}), ("bob, alice", {"a", "b"})]
)
def test_only_keys_named_for_it_may(admins: str, allowed: set[str], tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice:key-a\nbob:key-b\n")
    with running(options(api_key_file=str(path), admin_keys=admins)) as server:
        for who in "ab":
            for method in ("GET", "DELETE"):
                status, body = as_user(server, method, f"key-{who}")
                assert status == (200 if who in allowed else 403)
                assert status == 200 or body["error"]["code"] == "not_admin"
        assert as_user(server, "DELETE", None)[0] == 401
        assert server.engine.cleared == len(allowed)


def test_the_single_key_may() -> None:
    with running(options(api_key="secret")) as server:
        assert as_user(server, "DELETE", "secret")[0] == 200


def test_without_keys_only_this_machine_may() -> None:
    with running(options(host="0.0.0.0", allow_unauthenticated=True)) as server:
        assert as_user(server, "DELETE", None)[0] == 403
        assert server.engine.cleared == 0


def test_usage_says_which_tier_cached_tokens_came_from() -> None:
    with running() as server, server.client() as http:
        body = {"prompt": ["abcd", "efgh"], "max_tokens": 1}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
        server.engine.cached_by_tier = {"device": 1, "fs": 2}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        details = usage["prompt_tokens_details"]
        assert details == {"cached_tokens": 6, "cached_tokens_by_tier": {"device": 2, "fs": 4}}


def test_metrics_have_every_tier_and_kind_of_error() -> None:
    with running() as server, server.client() as http:
        server.engine.tiers = [DRAM, DISK]
        text = http.get("/metrics").text
    found = {
        (s.name, *sorted(s.labels.values(), key=["dram", "fs", "EIO", "checksum"].index)): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if "kv_tier" in s.name
    }
    assert found["quire:kv_tier_used_bytes", "dram"] == 40
    assert found["quire:kv_tier_hits_total", "dram"] == 7
    assert found["quire:kv_tier_misses_total", "fs"] == 3
    assert found["quire:kv_tier_errors_total", "fs", "EIO"] == 2
    assert found["quire:kv_tier_on", "dram"] == 1 and found["quire:kv_tier_on", "fs"] == 0
