"""Queues are bounded, a hung job holds up only its thread, and a tier that only fails is left
alone for a while."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence

import pytest

from quire.tiers.cold import Damaged, Missing
from quire.tiers.counts import Rate
from quire.tiers.work import FUSE_FAULTS, LONGEST_REST, Asked, Fuse, Outcome, TierThreads, answer


def key(number: int) -> bytes:
    return number.to_bytes(4, "little")


class Pages:
    """A tier that has `there`, and counts what it is asked."""

    name, capacity, used, evictions = "pages", 0, 0, 0
    hands_on, evicted = False, None

    def __init__(self, *there: int):
        self.there = {key(number) for number in there}
        self.asked: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()

    def start(self) -> None: ...

    def present(self, identities: Sequence[bytes]) -> set[bytes]:
        self.asked += identities
        return self.there & set(identities)

    def load(self, identity: bytes, into: memoryview) -> None:
        self.gate.wait(20)
        if identity == key(98):
            raise Damaged("checksum", "rotten")
        if identity == key(97):
            raise OSError(5, "broken")
        if identity not in self.there:
            raise Missing
        into[:] = identity

    def store(self, identity: bytes, page: memoryview) -> bool:
        self.gate.wait(20)
        self.there.add(identity)
        return True

    def forget(self, identity: bytes) -> None:
        self.there.discard(identity)

    def clear(self) -> int:
        return 0

    def close(self) -> None: ...


def asked(*numbers: int, contiguous: bool = True, first: int = 0) -> Asked:
    places = list(range(first, first + len(numbers)))
    return Asked([key(number) for number in numbers], places, contiguous)


def test_a_contiguous_group_is_asked_about_up_to_its_first_gap() -> None:
    tier = Pages(*range(50), *range(60, 200))
    assert len(answer(tier, [asked(*range(200))])) == 50 + 4
    assert len(tier.asked) == 64


def test_other_groups_are_asked_about_what_can_be_of_use() -> None:
    tier = Pages(1, 2, *range(100, 110))
    window = asked(*range(100, 110), contiguous=False)
    found = answer(tier, [window, asked(1, 2, 3, 4)])
    assert found == {key(i) for i in (1, 2, 100, 101)}
    assert key(102) not in tier.asked


def collect(outcomes: queue.SimpleQueue[Outcome], count: int) -> list[Outcome]:
    found = [outcomes.get(timeout=10) for _ in range(count + 1)]  # and the start
    return [outcome for outcome in found if outcome.ticket != "start"]


def test_outcomes_tell_pages_faults_and_misses_apart() -> None:
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    threads = TierThreads(3, Pages(1), outcomes.put)
    threads.start()
    buffers = {number: bytearray(4) for number in (1, 2, 97, 98)}
    for number, buffer in buffers.items():
        assert threads.load(key(number), memoryview(buffer))
    found = {o.ticket: (o.error, o.fault) for o in collect(outcomes, 4)}
    assert found == {
        key(1): ("", False),
        key(2): ("missing", False),
        key(97): ("EIO", True),
        key(98): ("checksum", False),
    }
    assert buffers[1] == key(1)
    threads.close(1)


def test_a_full_queue_refuses_at_once_and_closing_does_not_wait_for_ever() -> None:
    tier, outcomes = Pages(1), queue.SimpleQueue[Outcome]()
    threads = TierThreads(0, tier, outcomes.put, readers=1, writers=1, limit=4)
    threads.start()
    tier.gate.clear()
    begun = time.monotonic()
    taken = [threads.load(key(1), memoryview(bytearray(4))) for _ in range(20)]
    assert 4 <= sum(taken) <= 5 and not taken[-1]
    assert threads.lookup("a", [asked(1)]) is False
    assert threads.store(key(5), memoryview(b"page"))
    threads.close(0.2)
    assert time.monotonic() - begun < 2
    tier.gate.set()


def test_a_fuse_blows_after_faults_in_a_row_and_rests_longer_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    fuse = Fuse("loading", lambda: now)
    with caplog.at_level(logging.WARNING, "quire.tiers"):
        for _ in range(FUSE_FAULTS - 1):
            fuse.fault("EIO", "broken")
        assert fuse.closed
        fuse.good()
        for _ in range(FUSE_FAULTS):
            fuse.fault("EIO", "broken")
        assert not fuse.closed
        assert "switched off for 30 s" in caplog.text and "EIO" in caplog.text
        rests = []
        for _ in range(8):
            begun = now
            while not fuse.closed:
                now += 1
            rests.append(now - begun)
            fuse.fault("EIO", "broken")
        assert rests[:3] == [30, 60, 120] and max(rests) == LONGEST_REST
        now += LONGEST_REST
        assert fuse.closed
        fuse.good()
        assert "works again" in caplog.text
    assert fuse.closed


def test_a_rate_follows_what_is_measured_and_doubt_leads_back() -> None:
    rate = Rate(1000.0)
    assert rate.seconds(500) == pytest.approx(0.5)
    for _ in range(50):
        rate.observe(10, 1.0)
    assert rate.value == pytest.approx(10, rel=0.01)
    for _ in range(200):
        rate.doubt()
    assert rate.value == pytest.approx(1000, rel=0.01)


def test_short_measurements_weigh_little() -> None:
    rate = Rate(1000.0)
    rate.observe(1000, 1.0)
    for _ in range(3):
        rate.observe(1, 1e-6)  # a million a second, for a microsecond
    assert rate.value == pytest.approx(1000, rel=0.02)
