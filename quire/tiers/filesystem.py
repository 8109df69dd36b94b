"""The filesystem tier: a file per page, in a directory that several processes may share."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

from quire.tiers.block_file import HEADER_BYTES, PageHeader
from quire.tiers.cold import Damaged, Evicted, Missing
from quire.tiers.directory import TierDirectory

SUFFIX = ".v1"  # files of another format version have other names, and are left alone
# Other processes' files are counted this often, while this one writes.
RESCAN_SECONDS = 15.0
# Eviction goes below the bound by this part of it, so that it is not needed for every file.
SLACK = 0.02
# A file's time of use is renewed at most this often.
TOUCH_SECONDS = 60.0
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR)


class FileTier:
    """`capacity` bounds the bytes of all files; files used longest ago go first. An index of names
    saves asking the disk for what was seen; a name in it may have been deleted by another process,
    and one that is missing may have been written by one."""

    hands_on = True
    evicted: Evicted | None = None

    def __init__(
        self,
        directory: TierDirectory,
        capacity: int,
        fingerprint: bytes,
        fsync: bool = False,
        name: str = "fs",
    ):
        self.name = name
        self.capacity = capacity
        self.fsync = fsync
        self._directory = directory
        self._header = PageHeader(fingerprint, directory.secret)
        # Other models may keep their files here: what `clear` may delete begins with this.
        self._prefix = fingerprint[:8].hex()
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # of all that follows
        self._index: OrderedDict[str, int] = OrderedDict()  # sizes, used longest ago first
        self._used = self._evictions = self._clears = 0
        self._scanned = -RESCAN_SECONDS
        self._scanning = threading.Lock()

    @property
    def used(self) -> int:
        return self._used

    @property
    def count(self) -> int:
        return len(self._index)

    @property
    def evictions(self) -> int:
        return self._evictions

    def start(self) -> None:
        self._directory.sweep()
        self._scan()
        self._make_room(0)

    # -- pages ---------------------------------------------------------------------------------

    def present(self, identities: Sequence[bytes]) -> set[bytes]:
        found = set()
        for identity in identities:
            name = self._name(identity)
            if name in self._index:
                found.add(identity)
                continue
            with contextlib.suppress(FileNotFoundError):
                self._learn(name, self._directory.block_stat(name).st_size)
                found.add(identity)
        return found

    def load(self, identity: bytes, into: memoryview) -> None:
        name = self._name(identity)
        try:
            self._header.check(self._read(name, into), identity, into)
        except FileNotFoundError:
            self._unlearn(name)
            raise Missing from None
        except Damaged:
            with contextlib.suppress(OSError):  # where it cannot be deleted it stays a miss
                self._delete(name)
            raise
        self._use(name)

    def _read(self, name: str, into: memoryview) -> bytearray:
        """Read the page of a file, which is not checked yet; returns its header."""
        try:
            handle = self._directory.open_block(name)
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise Damaged("not_a_file", "a link or another special file") from None
            raise
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise Damaged("not_a_file", "no plain file")
            if found.st_size != HEADER_BYTES + len(into):
                raise Damaged("length", f"{found.st_size} bytes")
            header = bytearray(HEADER_BYTES)
            _fill(handle, header, into)
            if time.time() - found.st_mtime > TOUCH_SECONDS:
                with contextlib.suppress(OSError):  # a read-only directory serves as well
                    os.utime(handle)
            return header
        finally:
            os.close(handle)

    def store(self, identity: bytes, page: memoryview) -> bool:
        name = self._name(identity)
        if self.present([identity]):
            return False
        size, clears = HEADER_BYTES + len(page), self._clears
        self._make_room(size)
        handle, temporary = self._directory.temporary(next(self._numbers))
        try:
            try:
                _write(handle, self._header.make(identity, page), page)
                if self.fsync:
                    os.fsync(handle)
            finally:
                os.close(handle)
            self._directory.publish(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self._directory.discard(temporary)
            raise
        self._learn(name, size)
        if clears != self._clears:  # it may have come too late for `clear` to see it
            self._delete(name)
            return False
        return True

    def forget(self, identity: bytes) -> None:
        self._delete(self._name(identity))

    def clear(self) -> int:
        with self._lock:
            self._clears += 1
        self._scan()
        with self._lock:
            names = [name for name in self._index if name.startswith(self._prefix)]
        for name in names:
            self._delete(name)
        return len(names)

    def close(self) -> None:
        self._directory.close()

    def _name(self, identity: bytes) -> str:
        return f"{self._prefix}-{self._header.name(identity)}{SUFFIX}"

    # -- index and room --------------------------------------------------------------------------

    def _learn(self, name: str, size: int) -> None:
        with self._lock:
            self._used += size - self._index.pop(name, 0)
            self._index[name] = size

    def _use(self, name: str) -> None:
        with self._lock:
            if name in self._index:
                self._index.move_to_end(name)

    def _unlearn(self, name: str) -> None:
        with self._lock:
            self._used -= self._index.pop(name, 0)

    def _delete(self, name: str) -> None:
        self._directory.delete_block(name)
        self._unlearn(name)

    def _scan(self) -> None:
        """See what is there, which other processes change too."""
        self._scanned = time.monotonic()
        found = [
            (each.st_mtime, name, each.st_size)
            for name, each in self._directory.scan_blocks()
            if name.endswith(SUFFIX)
        ]
        with self._lock:
            self._index = OrderedDict((name, size) for _, name, size in sorted(found))
            self._used = sum(self._index.values())

    def _make_room(self, size: int) -> None:
        """Delete the files used longest ago until `size` more bytes are within the bound."""
        if size > self.capacity:
            raise OSError(errno.EFBIG, "a page is larger than the tier")
        if self._used + size > self.capacity or self._scan_is_due():
            with self._scanning:
                if self._scan_is_due():
                    self._scan()
                bound = self.capacity
                # What is handed on leaves as fast as what comes, so that a tier below keeps up.
                if self._used + size > bound and self.evicted is None:
                    bound -= int(SLACK * bound)
                while self._used + size > bound and (oldest := self._oldest()):
                    self._evict(oldest)

    def _oldest(self) -> str | None:
        with self._lock:
            return next(iter(self._index), None)

    def _evict(self, name: str) -> None:
        """Delete a file for room; a page of this model is handed on. Raises OSError where it cannot
        be read."""
        identity: bytes | None = None
        page: memoryview | None = None
        if self.evicted is not None and name.startswith(self._prefix):
            page = memoryview(bytearray(max(0, self._index.get(name, 0) - HEADER_BYTES)))
            try:
                header = self._read(name, page)
                identity = self._header.identity(header, name[len(self._prefix) + 1 : -len(SUFFIX)])
                if identity is not None:
                    self._header.check(header, identity, page)
            except FileNotFoundError:  # another process was first, which hands it on
                self._unlearn(name)
                return
            except Damaged:
                page = None
            except OSError:  # which deletes nothing: the next time another file makes room
                self._use(name)
                raise
        self._delete(name)
        self._evictions += 1
        if self.evicted is not None and identity is not None:
            self.evicted(identity, page)

    def _scan_is_due(self) -> bool:
        return time.monotonic() - self._scanned >= RESCAN_SECONDS


def _fill(handle: int, header: bytearray, page: memoryview) -> None:
    """Read header and page whole. Raises Damaged where the file ends before."""
    got = os.readv(handle, [header, page])
    total = len(header) + len(page)
    while got < total:
        into = page[got - len(header) :] if got >= len(header) else memoryview(header)[got:]
        more = os.readv(handle, [into])
        if more == 0:
            raise Damaged("length", "the file ended while it was read")
        got += more


def _write(handle: int, header: bytes, page: memoryview) -> None:
    """Write header and page whole, however much one call takes."""
    parts = [memoryview(header), page]
    while parts:
        written = os.writev(handle, parts)
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]
