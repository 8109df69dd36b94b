"""Pages go down a chain of filesystem tiers and come up again, one copy at a time."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quire.tiers.block_file import HEADER_BYTES
from quire.tiers.chain import Chain
from quire.tiers.directory import TierDirectory
from quire.tiers.dram import DramTier
from quire.tiers.filesystem import FileTier
from quire.tiers.slab import HostSlab
from quire.tiers.work import FUSE_FAULTS

PAGE = 512
FILE = HEADER_BYTES + PAGE


def identity(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE)


class Tower:
    """DRAM of `slots` pages over filesystem tiers of so many files."""

    def __init__(self, path: Path, files: list[int], slots: int = 50):
        slab = HostSlab([PAGE], [slots])
        self.tiers = [
            FileTier(TierDirectory(str(path / str(i))), count * FILE, b"f" * 32, name=f"fs{i}")
            for i, count in enumerate(files)
        ]
        self.chain = Chain(DramTier(slab), [(tier, 1e9) for tier in self.tiers])
        self.until(lambda: all(not level.threads.writing for level in self.chain.levels))

    def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not reached():
            assert time.monotonic() < deadline
            self.chain.write()
            self.chain.wait(0.005)
            self.chain.poll()

    def put(self, *numbers: int) -> None:
        """Pages come from the device and go as far down as they do."""
        for number in numbers:
            entry = self.chain.dram.reserve(identity(number), 0)
            assert entry is not None
            self.chain.dram.slab.view(0, entry.slot)[:] = page(number)
            self.chain.arrived(identity(number))
            self.settle()

    def settle(self) -> None:
        levels = self.chain.levels
        self.until(lambda: not (self.chain.writing or any(x.threads.writing for x in levels)))
        self.chain.poll()

    def get(self, number: int, tier: int) -> bytes:
        """What comes up of a page from a tier, once it is out of DRAM."""
        self.chain.dram.drop(identity(number))
        assert self.chain.fetch(identity(number), 0, tier)
        self.until(lambda: not self.chain.reading)
        found = self.chain.dram.get(identity(number))
        assert found is not None and found.ready
        self.settle()
        return bytes(self.chain.dram.slab.view(0, found.slot))

    def there(self) -> list[set[int]]:
        """The numbers of the pages in each tier."""
        names = range(100)
        return [{i for i in names if tier.present([identity(i)])} for tier in self.tiers]


@pytest.fixture
def tower(tmp_path: Path) -> Iterator[Tower]:
    made = Tower(tmp_path, [3, 4, 100])
    yield made
    made.chain.close(5.0)


def test_pages_go_down_as_far_as_newer_ones_push_them_and_are_nowhere_twice(tower: Tower) -> None:
    tower.put(*range(10))
    assert tower.there() == [{7, 8, 9}, {3, 4, 5, 6}, {0, 1, 2}]
    stats = tower.chain.all_stats()[1:]
    assert [each.stored_bytes for each in stats] == [10 * PAGE, 7 * PAGE, 3 * PAGE]
    assert [each.evictions for each in stats] == [7, 3, 0]
    assert not any(each.dropped or each.errors for each in stats)


def test_what_a_smaller_first_has_no_room_for_at_the_start_goes_down(tmp_path: Path) -> None:
    tower = Tower(tmp_path, [8, 100])
    tower.put(*range(6))
    tower.chain.close(5.0)
    for number in range(6):  # a filesystem's clock may not tell them apart
        os.utime(tmp_path / "0" / "blocks" / tower.tiers[0]._name(identity(number)), (9, number))
    tower = Tower(tmp_path, [3, 100])
    assert tower.there() == [{3, 4, 5}, {0, 1, 2}]
    tower.chain.close(5.0)


def test_a_page_that_is_asked_for_goes_to_the_first_again(tower: Tower) -> None:
    tower.put(*range(10))
    assert tower.get(0, 2) == page(0) and tower.get(4, 1) == page(4)
    assert tower.there() == [{9, 0, 4}, {4, 6, 7, 8}, {0, 1, 2, 3, 5}]
    assert tower.chain.all_stats()[3].stored_bytes == 5 * PAGE


def test_a_page_that_the_next_has_is_not_written_again(tower: Tower) -> None:
    tower.put(*range(4))
    assert tower.there()[:2] == [{1, 2, 3}, {0}]
    assert tower.get(0, 1) == page(0)
    assert tower.there()[:2] == [{2, 3, 0}, {0, 1}]
    tower.put(4, 5, 6)  # pushes 0 out of the first again
    assert tower.there()[:2] == [{4, 5, 6}, {0, 1, 2, 3}]
    assert tower.chain.all_stats()[2].stored_bytes == 4 * PAGE


def test_clearing_reaches_what_is_handed_on_meanwhile(tower: Tower) -> None:
    tower.put(*range(6))
    gate, first = threading.Event(), tower.tiers[0]
    clear = first.clear
    first.clear = lambda: gate.wait(20) and clear()  # type: ignore[method-assign]
    tower.chain.clear()
    below = tower.chain.levels[1:]
    tower.until(lambda: not any(level.jobs or level.threads.writing for level in below))
    assert tower.there() == [{3, 4, 5}, set(), set()]
    first.store(identity(9), memoryview(page(9)))  # as another of its threads would
    tower.until(lambda: tower.there() == [{4, 5, 9}, {3}, set()])
    gate.set()
    tower.settle()
    assert tower.there() == [set(), set(), set()]


def test_a_page_in_doubt_goes_no_further(tower: Tower) -> None:
    tower.put(0, 1, 2)
    tower.tiers[0].forget = lambda identity: None  # type: ignore[method-assign]
    tower.chain.forget(identity(0))
    tower.put(3, 4)
    assert tower.there() == [{2, 3, 4}, {1}, set()]


def test_a_damaged_file_is_not_handed_on(tower: Tower, tmp_path: Path) -> None:
    tower.put(0, 1, 2)
    file = tmp_path / "0" / "blocks" / tower.tiers[0]._name(identity(1))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    tower.put(3, 4, 5)
    assert tower.there()[:2] == [{3, 4, 5}, {0, 2}]
    assert tower.chain.all_stats()[2].dropped == 1


def test_a_slow_tier_below_delays_nobody_and_what_it_cannot_take_is_counted(tmp_path: Path) -> None:
    tower = Tower(tmp_path, [2, 1000], slots=400)
    gate, lower = threading.Event(), tower.tiers[1]
    store = lower.store
    lower.store = lambda *a: gate.wait(20) and store(*a)  # type: ignore[method-assign]
    first = tower.chain.levels[0]
    for number in range(200):
        entry = tower.chain.dram.reserve(identity(number), 0)
        assert entry is not None
        tower.chain.dram.slab.view(0, entry.slot)[:] = page(number)
        tower.chain.arrived(identity(number))
    tower.until(lambda: not (tower.chain.writing or first.threads.writing))
    assert first.stats.stored_bytes == 200 * PAGE and not gate.is_set()
    gate.set()
    tower.settle()
    stats = tower.chain.all_stats()[2]
    assert stats.dropped > 50 and stats.stored_bytes == (198 - stats.dropped) * PAGE
    tower.chain.close(5.0)


def test_where_the_first_is_switched_off_the_next_gets_what_comes(tower: Tower) -> None:
    for _ in range(FUSE_FAULTS):
        tower.chain.levels[0].stores.fault("ENOSPC", "full")
    tower.put(1, 2)
    assert tower.there() == [set(), {1, 2}, set()]


def test_a_page_in_doubt_is_deleted_however_full_the_queue_is(tower: Tower) -> None:
    tower.put(0, 1)
    level, gate = tower.chain.levels[0], threading.Event()
    while level.threads.other("wait", lambda tier: gate.wait(20)):
        pass
    tower.chain.forget(identity(1))
    tower.chain.write()
    assert level.jobs and tower.there()[0] == {0, 1}
    gate.set()
    tower.settle()
    assert not level.jobs and tower.there()[0] == {0}
