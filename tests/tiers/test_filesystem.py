"""The filesystem tier gives the right bytes or a miss, whatever happens to its files."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quire.errors import UsageError
from quire.tiers import filesystem
from quire.tiers.block_file import HEADER_BYTES, PageHeader
from quire.tiers.cold import Damaged, Missing
from quire.tiers.directory import TierDirectory
from quire.tiers.filesystem import FileTier

PAGE = 5000
FILE = HEADER_BYTES + PAGE
PRINT = b"f" * 32


def identity(number: int) -> bytes:
    return number.to_bytes(4, "little") * 8


def page(number: int, size: int = PAGE) -> memoryview:
    return memoryview(random.Random(number).randbytes(size))


def open_tier(
    path: Path, capacity: int = 100 * FILE, fingerprint: bytes = PRINT, **options: Any
) -> FileTier:
    tier = FileTier(TierDirectory(str(path)), capacity, fingerprint, **options)
    tier.start()
    return tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[FileTier]:
    made = open_tier(tmp_path / "kv")
    yield made
    made.close()


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    return tmp_path / "kv" / "blocks"


def file_of(blocks: Path, number: int) -> Path:
    header = PageHeader(PRINT, (blocks.parent / "secret").read_bytes())
    return blocks / f"{PRINT[:8].hex()}-{header.name(identity(number))}.v1"


def load(tier: FileTier, number: int, size: int = PAGE) -> bytes:
    into = bytearray(b"\xee" * size)
    tier.load(identity(number), memoryview(into))
    return bytes(into)


def test_a_page_comes_back_here_and_in_another_process(tier: FileTier, tmp_path: Path) -> None:
    assert tier.present([identity(1)]) == set()
    with pytest.raises(Missing):
        load(tier, 1)
    assert tier.store(identity(1), page(1))
    assert not tier.store(identity(1), page(1)), "it is there already"
    other = open_tier(tmp_path / "kv")
    assert tier.store(identity(2), page(2))
    for each in (tier, other):
        assert each.present([identity(i) for i in (1, 2, 3)]) == {identity(1), identity(2)}
        assert load(each, 1) == page(1) and load(each, 2) == page(2)
    assert tier.used == 2 * FILE and tier.count == 2
    other.close()


# -- damage ----------------------------------------------------------------------------------------


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def link_elsewhere(path: Path) -> None:
    """A link to a file that is right in itself."""
    moved = path.parent.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: os.truncate(path, HEADER_BYTES // 2),
    "cut in the page": lambda path: os.truncate(path, FILE - 1),
    "one byte longer": lambda path: os.truncate(path, FILE + 1),
    "oversized": lambda path: os.truncate(path, 2**40),
    "zero-filled": lambda path: path.write_bytes(bytes(FILE)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(FILE)),
    "a bit of the magic": flip(0),
    "a bit of the version": flip(8),
    "a bit of the length": flip(16),
    "a bit of the fingerprint": flip(30),
    "a bit of the identity": flip(60),
    "a bit of the checksum": flip(HEADER_BYTES - 1),
    "the page's first bit": flip(HEADER_BYTES),
    "the page's last bit": flip(FILE - 1),
    "a link": link_elsewhere,
    "a dangling link": replace_by(lambda path: path.symlink_to("nowhere")),
    "a link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "a pipe": replace_by(os.mkfifo),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_file_is_a_miss_and_is_deleted(kind: str, tier: FileTier, blocks: Path) -> None:
    for number in (1, 2):
        tier.store(identity(number), page(number))
    file = file_of(blocks, 1)
    DAMAGE[kind](file)
    with pytest.raises(Damaged):
        load(tier, 1)
    assert not os.path.lexists(file)
    with pytest.raises(Missing):
        load(tier, 1)
    assert load(tier, 2) == page(2)
    assert tier.store(identity(1), page(1))
    assert load(tier, 1) == page(1)


def test_swapped_files_are_both_misses(tier: FileTier, blocks: Path) -> None:
    for number in (1, 2):
        tier.store(identity(number), page(number))
    one, two = file_of(blocks, 1), file_of(blocks, 2)
    one.rename(blocks / "aside")
    two.rename(one)
    (blocks / "aside").rename(two)
    for number in (1, 2):
        with pytest.raises(Damaged, match="another"):
            load(tier, number)


def test_a_file_of_another_root_or_length_is_a_miss(
    tier: FileTier, blocks: Path, tmp_path: Path
) -> None:
    foreign = open_tier(tmp_path / "other")
    foreign.store(identity(1), page(1))
    shutil.copy(file_of(tmp_path / "other" / "blocks", 1), blocks)
    with pytest.raises(Missing):
        load(tier, 1)
    (blocks / file_of(tmp_path / "other" / "blocks", 1).name).rename(file_of(blocks, 1))
    with pytest.raises(Damaged, match="another"):
        load(tier, 1)
    tier.store(identity(2), page(2))
    with pytest.raises(Damaged):
        load(tier, 2, PAGE - 8)
    foreign.close()


def test_a_directory_in_the_place_of_a_file_is_a_miss(tier: FileTier, blocks: Path) -> None:
    tier.store(identity(1), page(1))
    file = file_of(blocks, 1)
    file.unlink()
    file.mkdir()
    with pytest.raises(Damaged):
        load(tier, 1)


@pytest.mark.parametrize("part", range(4))
def test_every_part_of_the_identity_counts(part: int, tmp_path: Path) -> None:
    """A tier opened with another fingerprint finds nothing, whatever part of it differs."""
    first = open_tier(tmp_path / "kv")
    first.store(identity(1), page(1))
    fingerprint = bytearray(PRINT)
    fingerprint[8 * part] ^= 1
    other = open_tier(tmp_path / "kv", fingerprint=bytes(fingerprint))
    with pytest.raises((Missing, Damaged)):
        load(other, 1)
    first.close()
    other.close()


# -- faults ----------------------------------------------------------------------------------------


class Failing:
    """A function of `os` that raises for a while."""

    def __init__(self, name: str, number: int, monkeypatch: pytest.MonkeyPatch):
        self.real, self.number, self.on = getattr(os, name), number, True
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.on:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EINTR, errno.ESTALE])
@pytest.mark.parametrize("name", ["open", "readv", "fstat"])
def test_a_fault_while_reading_deletes_nothing(
    name: str, number: int, tier: FileTier, blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.store(identity(1), page(1))
    fault = Failing(name, number, monkeypatch)
    with pytest.raises(OSError) as caught:
        load(tier, 1)
    assert caught.value.errno == number
    fault.on = False
    assert load(tier, 1) == page(1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("name", ["open", "writev", "rename"])
def test_a_fault_while_writing_leaves_nothing_behind(
    name: str, number: int, tier: FileTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Failing(name, number, monkeypatch)
    with pytest.raises(OSError) as caught:
        tier.store(identity(1), page(1))
    assert caught.value.errno == number
    fault.on = False
    assert [path.suffix for path in (tmp_path / "kv" / "writers").iterdir()] == [".lock"]
    assert tier.used == 0 and tier.count == 0
    assert tier.store(identity(1), page(1))
    assert load(tier, 1) == page(1)


def test_short_reads_and_writes_are_continued(
    tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    readv, writev = os.readv, os.writev
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:37]]))
    monkeypatch.setattr(
        os, "readv", lambda fd, into: readv(fd, [memoryview(into[0]).cast("B")[:37]])
    )
    assert tier.store(identity(1), page(1))
    assert load(tier, 1) == page(1)


def test_a_limit_on_file_sizes_is_a_fault(tmp_path: Path) -> None:
    code = (
        "import resource, sys; sys.path.insert(0, 'tests/tiers'); import test_filesystem as t;"
        "from pathlib import Path; tier = t.open_tier(Path(sys.argv[1]));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: tier.store(t.identity(1), t.page(1))\n"
        "except OSError as error: print(error.errno, tier.used)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kv")],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == [str(errno.EFBIG), "0"], done.stderr


def test_a_directory_that_is_removed_under_way_is_misses_and_faults(
    tier: FileTier, tmp_path: Path
) -> None:
    tier.store(identity(1), page(1))
    shutil.rmtree(tmp_path / "kv")
    with pytest.raises(Missing):
        load(tier, 1)
    assert tier.present([identity(1)]) == set()
    with pytest.raises(OSError):
        tier.store(identity(2), page(2))


@pytest.mark.parametrize("point", ["write", "rename"])
def test_a_process_killed_while_it_stores_leaves_nothing_that_is_found(
    point: str, tmp_path: Path
) -> None:
    name = {"write": "writev", "rename": "rename"}[point]
    code = (
        "import os, signal, sys; sys.path.insert(0, 'tests/tiers'); import test_filesystem as t;"
        "from pathlib import Path; tier = t.open_tier(Path(sys.argv[1]));"
        "tier.store(t.identity(1), t.page(1)); real = os.writev\n"
        f"os.{name} = lambda fd, *a, **k: ({point == 'write'} and real(fd, [a[0][1][:99]]),"
        "os.kill(os.getpid(), signal.SIGKILL))\n"
        "tier.store(t.identity(2), t.page(2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kv")],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    writers = tmp_path / "kv" / "writers"
    assert len(list(writers.glob("*.tmp"))) == 1
    tier = open_tier(tmp_path / "kv")
    assert not list(writers.glob("*.tmp"))
    assert load(tier, 1) == page(1)
    with pytest.raises(Missing):
        load(tier, 2)
    tier.close()
    assert not list(writers.iterdir())


def test_files_of_a_living_process_are_not_swept(tier: FileTier, tmp_path: Path) -> None:
    handle, name = tier._directory.temporary(7)
    open_tier(tmp_path / "kv").close()
    assert (tmp_path / "kv" / "writers" / name).exists()
    os.close(handle)


def test_a_page_is_not_named_before_it_is_on_the_disk_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, _n=name, _r=real, **k: (calls.append(_n), _r(*a, **k))[1]
        )
    tier = open_tier(tmp_path / "kv", fsync=True)
    calls.clear()
    tier.store(identity(1), page(1))
    assert calls == ["fsync", "rename"]
    tier.close()


# -- room ------------------------------------------------------------------------------------------


def test_the_files_used_longest_ago_make_room(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv", capacity=3 * FILE)
    for number in (1, 2, 3):
        tier.store(identity(number), page(number))
    assert load(tier, 1) == page(1)
    tier.store(identity(4), page(4))
    there = tier.present([identity(i) for i in range(9)])
    assert identity(1) in there and identity(4) in there and identity(2) not in there
    assert tier.used <= 3 * FILE
    assert tier.evictions == 3 - len(there) + 1
    with pytest.raises(OSError):
        tier.store(identity(5), page(5, 4 * FILE))
    tier.close()


def test_a_page_larger_than_the_tier_drives_nothing_out(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv", capacity=2 * FILE)
    tier.store(identity(1), page(1))
    with pytest.raises(OSError, match="larger"):
        tier.store(identity(2), page(2, 3 * PAGE))
    assert tier.evictions == 0 and load(tier, 1) == page(1)
    tier.close()


def test_what_makes_room_is_handed_on_where_somebody_takes_it(tmp_path: Path) -> None:
    other = open_tier(tmp_path / "kv", fingerprint=b"g" * 32)
    other.store(identity(9), page(9))
    other.close()
    (tmp_path / "kv" / "blocks" / f"{PRINT[:8].hex()}-no.v1").write_bytes(b"x")
    tier = open_tier(tmp_path / "kv", capacity=4 * FILE)
    taken: list[tuple[bytes, memoryview | None]] = []
    tier.evicted = lambda gone, what: taken.append((gone, what))
    for number in range(3):
        tier.store(identity(number), page(number))
    assert taken == [], "other models' files make room first, and are nobody's here"
    flip(HEADER_BYTES + 7)(file_of(tmp_path / "kv" / "blocks", 1))
    for number in range(3, 7):
        tier.store(identity(number), page(number))
        assert tier.used <= 4 * FILE
    assert taken == [(identity(0), page(0)), (identity(1), None), (identity(2), page(2))]
    assert tier.used == 4 * FILE, "no more leaves than what comes needs"
    tier.close()


def test_a_file_that_another_process_has_deleted_makes_room_and_is_not_handed_on(
    tmp_path: Path,
) -> None:
    tier = open_tier(tmp_path / "kv", capacity=2 * FILE)
    taken: list[bytes] = []
    tier.evicted = lambda gone, what: taken.append(gone)
    tier.store(identity(0), page(0))
    tier.store(identity(1), page(1))
    file_of(tmp_path / "kv" / "blocks", 0).unlink()
    tier.store(identity(2), page(2))
    assert taken == [] and tier.evictions == 0 and tier.used == 2 * FILE
    assert load(tier, 1) == page(1) and load(tier, 2) == page(2)
    tier.close()


def test_a_fault_while_a_page_is_handed_on_deletes_nothing_and_another_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(tmp_path / "kv", capacity=2 * FILE)
    taken: list[bytes] = []
    tier.evicted = lambda gone, what: taken.append(gone)
    tier.store(identity(0), page(0))
    tier.store(identity(1), page(1))
    fault = Failing("readv", errno.EIO, monkeypatch)
    with pytest.raises(OSError) as caught:
        tier.store(identity(2), page(2))
    assert caught.value.errno == errno.EIO and taken == [] and tier.used == 2 * FILE
    fault.on = False
    tier.store(identity(2), page(2))
    assert taken == [identity(1)] and load(tier, 0) == page(0) and load(tier, 2) == page(2)
    tier.close()


def test_the_index_is_rebuilt_with_the_order_of_use(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv")
    for number in (1, 2, 3):
        tier.store(identity(number), page(number))
    for age, number in ((500, 1), (900, 2), (700, 3)):
        when = time.time() - age
        os.utime(file_of(tmp_path / "kv" / "blocks", number), (when, when))
    tier.close()
    tier = open_tier(tmp_path / "kv")
    assert load(tier, 2) == page(2)  # renews it
    tier.close()
    tier = open_tier(tmp_path / "kv", capacity=2 * FILE)
    assert tier.used <= 2 * FILE
    assert tier.present([identity(i) for i in (1, 2, 3)]) <= {identity(2), identity(3)}
    assert load(tier, 2) == page(2)
    tier.close()


def test_files_of_other_processes_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "RESCAN_SECONDS", 0.0)
    one, two = (open_tier(tmp_path / "kv", capacity=4 * FILE) for _ in range(2))
    for number in range(8):
        (one if number % 2 else two).store(identity(number), page(number))
    assert len(list((tmp_path / "kv" / "blocks").iterdir())) <= 4
    one.close()
    two.close()


def test_clearing_leaves_other_models_alone(tmp_path: Path) -> None:
    ours, theirs = open_tier(tmp_path / "kv"), open_tier(tmp_path / "kv", fingerprint=b"g" * 32)
    ours.store(identity(1), page(1))
    theirs.store(identity(2), page(2))
    (tmp_path / "kv" / "blocks" / "notes.txt").write_text("not ours")
    assert ours.clear() == 1
    assert load(theirs, 2) == page(2)
    assert (tmp_path / "kv" / "blocks" / "notes.txt").exists()
    with pytest.raises(Missing):
        load(ours, 1)
    ours.close()
    theirs.close()


def test_what_is_written_while_the_tier_is_cleared_goes_too(
    tier: FileTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = TierDirectory.publish

    def late(directory: TierDirectory, temporary: str, name: str) -> None:
        tier.clear()
        publish(directory, temporary, name)

    with monkeypatch.context() as patch:
        patch.setattr(TierDirectory, "publish", late)
        assert not tier.store(identity(1), page(1))
    assert not tier.present([identity(1)]) and tier.used == 0
    assert tier.store(identity(1), page(1)) and load(tier, 1) == page(1)


def test_many_threads_and_handles_on_one_directory_never_see_wrong_bytes(tmp_path: Path) -> None:
    tiers = [open_tier(tmp_path / "kv", capacity=12 * FILE) for _ in range(2)]
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng, tier = random.Random(seed), tiers[seed % 2]
        for _ in range(150):
            number = rng.randrange(20)
            try:
                if rng.random() < 0.5:
                    tier.store(identity(number), page(number))
                elif load(tier, number) != page(number):
                    wrong.append(f"page {number}")
                if rng.random() < 0.02:
                    tier.forget(identity(number))
            except Missing:
                pass
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    for each in tiers:
        each.close()


# -- privacy ---------------------------------------------------------------------------------------


def test_everything_is_private_to_the_user(tier: FileTier, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        tier.store(identity(1), page(1))
        open_tier(tmp_path / "second").close()
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_neither_name_nor_header_tells_the_identity_without_the_secret(
    tier: FileTier, blocks: Path, tmp_path: Path
) -> None:
    """Who could guess a prompt could compute its identity."""
    tier.store(identity(1), page(1))
    other = open_tier(tmp_path / "other")
    other.store(identity(1), page(1))
    mine, theirs = file_of(blocks, 1), file_of(tmp_path / "other" / "blocks", 1)
    assert mine.name != theirs.name and identity(1).hex() not in mine.name
    headers = [path.read_bytes()[:HEADER_BYTES] for path in (mine, theirs)]
    assert headers[0][56:88] != headers[1][56:88]
    assert not any(identity(1)[:8] in header for header in headers)
    other.close()


def test_names_do_not_leave_the_directory(tier: FileTier, blocks: Path) -> None:
    for raw in (b"../../../../etc/passwd".ljust(32, b"/"), b"\0" * 32, b"." * 32):
        tier.store(raw, page(1))
    assert len(list(blocks.iterdir())) == 3
    assert all(path.name.endswith(".v1") and "/" not in path.name for path in blocks.iterdir())


def refuse(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        TierDirectory(str(path))
    assert caught.value.code == "kv_tier"
    return caught.value.why


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o777)
    assert "other users" in refuse(path)


def test_a_file_or_a_link_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refuse(tmp_path / "file")
    root = tmp_path / "kv"
    root.mkdir(mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    (root / "blocks").symlink_to(tmp_path / "elsewhere")
    assert refuse(root)


@pytest.mark.parametrize("kind", ["short", "long", "readable", "link"])
def test_a_secret_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    open_tier(tmp_path / "kv").close()
    secret = tmp_path / "kv" / "secret"
    if kind == "short":
        secret.write_bytes(b"x" * 31)
    elif kind == "long":
        secret.write_bytes(b"x" * 33)
    elif kind == "readable":
        secret.chmod(0o644)
    else:
        secret.rename(tmp_path / "aside")
        secret.symlink_to(tmp_path / "aside")
    assert "secret" in refuse(tmp_path / "kv") or kind == "link"


def test_processes_that_start_together_have_one_secret(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(TierDirectory(str(tmp_path / "kv")).secret))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8 and len(set(found)) == 1
    assert sorted(path.name for path in (tmp_path / "kv").iterdir()) == [
        "blocks", "secret", "writers",
    ]  # fmt: skip
