"""The Mooncake tier against a real master and a real store on loopback."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mooncake_cluster import Cluster

from quire.errors import UsageError
from quire.tiers.cold import Damaged, Missing
from quire.tiers.mooncake import MooncakeError, MooncakeTier, read_config

pytest.importorskip(
    "mooncake.store",
    reason="Mooncake's package, or a library that it needs, is not here (x86-64 Linux only)",
    exc_type=ImportError,
)

PAGE = 300_000
PRINT = b"f" * 32


def identity(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def page(number: int) -> memoryview:
    return memoryview(random.Random(number).randbytes(PAGE))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("mooncake"))
    yield made
    made.close()


@pytest.fixture
def tier(cluster: Cluster) -> Iterator[MooncakeTier]:
    made = MooncakeTier(cluster.config(), PRINT, PAGE)
    made.start()
    yield made
    made.close()


def load(tier: MooncakeTier, number: int, size: int = PAGE) -> bytes:
    into = bytearray(size)
    tier.load(identity(number), memoryview(into))
    return bytes(into)


def test_a_page_comes_back_here_and_to_another_client(tier: MooncakeTier, cluster: Cluster) -> None:
    with pytest.raises(Missing):
        load(tier, 1)
    assert tier.store(identity(1), page(1))
    assert not tier.store(identity(1), page(1)), "it is there already"
    other = MooncakeTier(cluster.config(), PRINT, PAGE)
    assert other.present([identity(1), identity(2)]) == {identity(1)}
    for each in (tier, other):
        assert load(each, 1) == page(1)
    tier.forget(identity(1))
    tier.forget(identity(1))
    with pytest.raises(Missing):
        load(other, 1)
    other.close()


def test_another_model_or_secret_finds_nothing(tier: MooncakeTier, cluster: Cluster) -> None:
    tier.store(identity(3), page(3))
    model = MooncakeTier(cluster.config(), b"g" * 32, PAGE)
    with pytest.raises(Missing):
        load(model, 3)
    secret = str(cluster.directory / "other-secret")
    stranger = MooncakeTier(cluster.config("other.json", secret_file=secret), PRINT, PAGE)
    with pytest.raises(Missing):
        load(stranger, 3)
    value = tier._client.get(tier._key(identity(3)))
    assert tier._client.put(stranger._key(identity(3)), bytes(value)) == 0
    with pytest.raises(Damaged, match="another"):
        load(stranger, 3)
    model.store(identity(4), page(4))
    tier.store(identity(5), page(5))
    assert tier.clear() >= 1
    assert load(model, 4) == page(4)
    with pytest.raises(Missing):
        load(tier, 5)
    model.close()
    stranger.close()


@pytest.mark.parametrize("kind", ["shorter", "longer", "flipped", "swapped", "foreign"])
def test_a_value_that_is_not_the_page_is_a_miss_and_is_deleted(
    kind: str, tier: MooncakeTier
) -> None:
    for number in (11, 12):
        tier.store(identity(number), page(number))
    client, key = tier._client, tier._key(identity(11))
    value = bytearray(client.get(key))
    changed = {
        "shorter": value[:-1],
        "longer": value + b"x" * 500_000,
        "flipped": value[:-9] + bytes([value[-9] ^ 4]) + value[-8:],
        "swapped": client.get(tier._key(identity(12))),
        "foreign": b"not ours",
    }[kind]
    assert client.remove(key, True) == 0
    assert client.put(key, bytes(changed)) == 0
    with pytest.raises(Damaged):
        load(tier, 11)
    with pytest.raises(Missing):
        load(tier, 11)
    assert load(tier, 12) == page(12)
    tier.clear()


def test_a_dead_master_is_a_fault_and_a_new_one_is_found(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    tier = MooncakeTier(cluster.config(), PRINT, PAGE)
    try:
        assert tier.store(identity(1), page(1))
        cluster.kill(cluster.master)
        begun = time.monotonic()
        with pytest.raises(MooncakeError):
            tier.present([identity(1)])
        with pytest.raises(MooncakeError):
            load(tier, 1)
        assert time.monotonic() - begun < 20
        cluster.start_master()
        deadline = time.monotonic() + 40
        while True:
            try:
                tier.store(identity(2), page(2))
                break
            except MooncakeError:
                assert time.monotonic() < deadline, "it does not come back"
                time.sleep(0.2)
        assert load(tier, 2) == page(2)
    finally:
        tier.close()
        cluster.close()


def test_a_master_that_never_was_is_a_fault(tmp_path: Path, cluster: Cluster) -> None:
    tier = MooncakeTier(
        cluster.config("nobody.json", master_server_address="127.0.0.1:1"), PRINT, PAGE
    )
    with pytest.raises(ConnectionRefusedError):
        tier.start()
    tier.close()


def test_a_store_without_room_is_a_fault(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=16 * 2**20)
    tier = MooncakeTier(cluster.config(), PRINT, PAGE)
    stored = 0
    try:
        with pytest.raises(MooncakeError):
            for number in range(200):
                stored += tier.store(identity(number), page(number))
        assert stored > 20
    finally:
        tier.close()
        cluster.close()


def test_pages_that_memory_has_no_room_for_come_back_from_the_stores_disk(tmp_path: Path) -> None:
    disk, memory = tmp_path / "disk", 16 * 2**20
    disk.mkdir()
    cluster = Cluster(tmp_path, size=memory, disk=disk)
    tier = MooncakeTier(cluster.config(), PRINT, PAGE)
    stored: set[int] = set()
    try:
        deadline = time.monotonic() + 90
        while len(stored) * PAGE < memory * 5 // 4:
            assert time.monotonic() < deadline, "the disk takes nothing"
            number = len(stored)
            try:
                tier.store(identity(number), page(number))
                stored.add(number)
            except MooncakeError:  # full, until pages have gone to the disk
                time.sleep(0.1)
        assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) > memory // 4
        assert all(load(tier, number) == page(number) for number in stored)
    finally:
        tier.close()
        cluster.close()


def refused(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        MooncakeTier(path, PRINT, PAGE)
    assert caught.value.code == "kv_tier"
    return caught.value.why


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": "ib"}, "protocol"),
        ({"master_server_address": "here"}, "master_server_address"),
        ({"unknown": 1}, "unknown"),
        ({"global_segment_size": "many"}, "many"),
        ({"local_buffer_size": -1}, "-1"),
        ({"secret_file": "/no/such/directory/secret"}, "secret_file"),
        ({"metadata_server": None}, "metadata_server"),
    ],
)
def test_a_wrong_configuration_is_refused(
    change: dict[str, Any], told: str, cluster: Cluster
) -> None:
    assert told in refused(cluster.config("wrong.json", **change))


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert "No such file" in refused(str(path))
    path.write_text("{")
    assert refused(str(path))
    path.write_text(json.dumps({"master_server_address": "a"}))
    with pytest.raises(UsageError):
        read_config(str(path))
