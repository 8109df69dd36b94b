"""How fast this machine's memory, its link to the GPU and a directory's disk are, each measured in
a tenth of a second or two."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
import time

PROBE_BYTES = 32 * 2**20  # copied in memory
PIECE_BYTES = 4 * 2**20
MOST_BYTES = 64 * 2**20
SECONDS = 0.1  # for writing, and for reading


def memory_rate() -> float:
    """Bytes a second of copying in this machine's memory."""
    source, target = bytearray(PROBE_BYTES), memoryview(bytearray(PROBE_BYTES))
    best = math.inf
    for _ in range(3):  # the first time touches pages; a view takes no copy of its own in between
        begun = time.perf_counter()
        target[:] = source
        best = min(best, time.perf_counter() - begun)
    return PROBE_BYTES / best


def link_rates(size: int = PROBE_BYTES) -> tuple[float, float]:
    """Bytes a second that the GPU copies from this machine's pinned memory, and to it, `size` at a
    time. Needs one that torch sees."""
    import torch

    host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros_like(host, device="cuda")

    def rate(source: torch.Tensor, target: torch.Tensor) -> float:
        best = math.inf
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        return size / best

    return rate(host, device), rate(device, host)


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
