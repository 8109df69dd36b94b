"""Whole engines on a Mooncake store: a second one finds the blocks of the first, and a master that
dies and comes back changes no answer.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mooncake_cluster import Cluster
from test_tiers import answers, close, load

from quire.kernels import native

pytest.importorskip(
    "mooncake.store",
    reason="Mooncake's package, or a library that it needs, is not here (x86-64 Linux only)",
    exc_type=ImportError,
)
pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"determinism is the native kernels' promise: {native.why_not()}"
)


def test_engines_share_blocks_and_a_dead_master_changes_no_answer(
    tiny_llama: str, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path)
    try:
        tiers = f"dram:8MiB,mooncake:{cluster.config()}"
        first = load(tiny_llama, kv_tiers=tiers)
        expected, cached = answers(first)
        assert cached == [{}, {}]
        close(first)
        second = load(tiny_llama, kv_tiers=tiers)
        tier, deadline = second._engine.core.tiering.chain.levels[0].threads.tier, time.time() + 20
        while tier._client is None and time.time() < deadline:
            time.sleep(0.01)  # a lookup does not wait for the connection
        assert answers(second) == (expected, [{"mooncake": 96}, {"mooncake": 96}])
        cluster.kill(cluster.master)
        second._engine.core.scheduler.kv.clear_cache()
        second._engine.core.tiering.chain.dram.clear()
        assert answers(second) == (expected, [{}, {}])
        stats = second._engine.core.stats().tiers[1]
        assert sum(stats.errors.values()) > 0
        cluster.start_master()
        assert answers(second, 4)[0][:2] == expected
        close(second)
    finally:
        cluster.close()
