"""How fast a directory's disk is, measured in a tenth of a second."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time

PIECE_BYTES = 4 * 2**20
MOST_BYTES = 64 * 2**20
SECONDS = 0.1  # for writing, and for reading


def memory_rate() -> float:
    """Bytes a second of copying in this machine's memory."""
    source, target = bytes(32 * 2**20), bytearray(32 * 2**20)
    target[:] = source  # touches its pages
    begun = time.perf_counter()
    target[:] = source
    return len(source) / (time.perf_counter() - begun)


def disk_rates(directory: str) -> tuple[float, float]:
    """(bytes a second read, and written) of a file in `directory`, past the page cache where the
    filesystem allows it. Raises OSError."""
    with tempfile.TemporaryFile(dir=directory) as file, mmap.mmap(-1, PIECE_BYTES) as piece:
        handle = file.fileno()
        with contextlib.suppress(OSError):  # tmpfs and some others do not know O_DIRECT
            direct = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            os.dup2(direct, handle, inheritable=False)
            os.close(direct)
        piece.write(os.urandom(PIECE_BYTES))
        written, writing = _timed(lambda at: os.pwritev(handle, [piece], at), MOST_BYTES)
        os.fsync(handle)
        read, reading = _timed(lambda at: os.preadv(handle, [piece], at), written)
        return read / reading, written / writing


def _timed(move, most: int) -> tuple[int, float]:  # type: ignore[no-untyped-def]
    """Move pieces one after the other, for SECONDS or `most` bytes: (bytes, seconds)."""
    begun, moved = time.perf_counter(), 0
    while moved < most and time.perf_counter() - begun < SECONDS:
        moved += move(moved)
    return moved, time.perf_counter() - begun
