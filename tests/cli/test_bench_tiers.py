"""`quire bench tiers`: what it measures comes from where it says."""

import json
from pathlib import Path

from .tools import IDS, Quire


def test_it_measures_each_way_back_conversations_and_steady_load(
    quire: Quire, ids_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    argv = ["--kv-tiers", f"dram:4MiB,fs:{tmp_path}/kv:64MiB", "--lengths", "64,9999"]
    argv += ["--kv-cache-memory", "192KiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    argv += ["--repeat", "1", "--overcommit", "2", "--output", str(file)]
    ran = quire("bench", "tiers", ids_model, *IDS, *argv)
    assert ran.code == 0, ran.err
    record = json.loads(file.read_text())
    assert record["left_out"] == [9999] and "9999" in ran.out
    assert [c["what"] for c in record["tiers"]] == ["kv tier dram", "kv tier fs"]
    (row,) = record["results"]["returns"]
    assert row["tokens"] == 64 and all(time > 0 for time in row["ttft_ms"].values())
    # A model this small may well compute faster than its pages come.
    assert row["sources"]["device"] == {"device": 48}
    assert set(row["sources"]["dram"]) <= {"dram"} and set(row["sources"]["below"]) <= {"fs"}
    assert row["sources"]["loaded"] == {"fs": 48}
    talk = record["results"]["conversations"]
    assert set(talk["off"]["cached_tokens"]) <= {"device"} and talk["order"] == "random"
    for name in ("off", "lru", "arc"):
        assert talk[name]["turns"] == 2 * talk["count"]
        assert sum(part["turns"] for part in talk[name]["by_source"].values()) == 2 * talk["count"]
    asked = [sum(talk[name]["pages"]["dram"].values()) for name in ("off", "lru", "arc")]
    assert asked[0] == 0 < min(asked[1:])
    for name in ("lru", "arc"):
        assert min(talk[name]["tiers_ms_per_step"].values()) > 0
    assert talk["off"]["tiers_ms_per_step"] == {"lookups": 0, "copies": 0}
    steady = record["results"]["steady"]
    assert steady["tokens_s_on"] > 0
    lookups, copies = (steady["tiers_ms_per_step"][kind] for kind in ("lookups", "copies"))
    assert lookups > 0 and copies > 0
    assert lookups + copies < steady["host_ms_per_step"]["on"], "they are a part of it"
    assert f"lookups {lookups} ms, stores and copies {copies} ms" in ran.out


def test_without_tiers_or_with_too_long_prompts_it_says_so(
    quire: Quire, ids_model: str, tmp_path: Path
) -> None:
    ran = quire("bench", "tiers", ids_model, *IDS)
    assert ran.code == 2 and "--kv-tiers" in ran.err
    ran = quire("bench", "tiers", ids_model, *IDS, "--returns", "sorted")
    assert ran.code == 2 and "--returns" in ran.err and "cyclic" in ran.err
    argv = ["--kv-tiers", "dram:4MiB", "--lengths", "100000"]
    ran = quire("bench", "tiers", ids_model, *IDS, *argv)
    assert ran.code == 2 and "--lengths" in ran.err
