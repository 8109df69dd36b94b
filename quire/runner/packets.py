"""Runs of int32 on their way to the device: packed into packets, sent through pinned memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from quire.kernels.device_state import RUN_WORDS

PIECE = 4096  # longer runs are cut, so that many programs share them

Run = tuple[int, "array[int]"]  # where in the arena, and what: type code "i"


class PacketRing:
    """Packs runs into packets and brings them to the device.

    A packet is int32: a table of runs (RUN_WORDS each), then their values. Packets live in pinned
    buffers of `capacity` int32 that are used in turn; one is used again when the device has read
    what was in it.
    """

    def __init__(self, device: torch.device, capacity: int = 2**16, depth: int = 8):
        assert capacity >= RUN_WORDS + 1
        on_gpu = device.type == "cuda"
        self._capacity = capacity
        self._hosts = [
            torch.zeros(capacity, dtype=torch.int32, pin_memory=on_gpu) for _ in range(depth)
        ]
        self._arrays = [host.numpy() for host in self._hosts]
        self._devices = [
            torch.zeros(capacity, dtype=torch.int32, device=device) if on_gpu else host
            for host in self._hosts
        ]
        event: Callable[[], torch.cuda.Event] = torch.cuda.Event
        self._read = [event() if on_gpu else None for _ in range(depth)]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Of memory on the device."""
        return 4 * self._capacity * len(self._devices)

    def send(self, runs: Iterable[Run]) -> Iterator[tuple[torch.Tensor, int]]:
        """Packets on the device, each with its number of runs: the arguments of `apply_runs`, to
        be launched on the current stream before the next packet is asked for."""
        packet: list[Run] = []
        size = 0
        room = min(PIECE, self._capacity - RUN_WORDS)
        for offset, values in runs:
            for start in range(0, len(values), room):
                piece = values[start : start + room]
                needed = RUN_WORDS + len(piece)
                if size + needed > self._capacity:
                    yield self._pack(packet)
                    packet, size = [], 0
                packet.append((offset + start, piece))
                size += needed
        if packet:
            yield self._pack(packet)

    def _pack(self, runs: list[Run]) -> tuple[torch.Tensor, int]:
        index, self._next = self._next, (self._next + 1) % len(self._hosts)
        read = self._read[index]
        if read is not None:
            read.synchronize()  # returns at once unless the device is `depth` packets behind
        table, payload = array("q"), array("i")
        first = RUN_WORDS * len(runs)
        for offset, values in runs:
            table.extend((offset, first + len(payload) | len(values) << 32))
            payload += values
        end = first + len(payload)
        host = self._arrays[index]
        host[:first] = np.frombuffer(table, dtype=np.int32)
        host[first:end] = np.frombuffer(payload, dtype=np.int32)
        packet = self._devices[index]
        if read is not None:
            packet[:end].copy_(self._hosts[index][:end], non_blocking=True)
            read.record()
        return packet, len(runs)
