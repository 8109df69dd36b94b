"""Runs of int32 on their way to the device: packed into packets, sent through pinned memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator

import torch

from quire.kernels.device_state import RUN_WORDS

PIECE = 4096  # longer runs are cut, so that many programs share them
SMALL = 2**13  # int32 of a packet that may be taken

Run = tuple[int, "array[int]"]  # where in the arena, and what: type code "i"
Take = Callable[[int], bool]


class PacketRing:
    """Packs runs into packets and brings them to the device.

    A packet is int32: a table of runs (RUN_WORDS each), then their values. Packets live in pinned
    buffers of `capacity` int32 that are used in turn; one is used again when the device has read
    what was in it. A packet has at least `least` runs, the last ones empty: those of most steps
    are alike but for their numbers then, so that one who has seen them before may `take` them.
    """

    def __init__(self, device: torch.device, capacity: int = 2**16, depth: int = 8, least: int = 0):
        self._room = min(PIECE, capacity - RUN_WORDS * (least + 1))
        assert self._room > 0
        on_gpu = device.type == "cuda"
        self._capacity, self._least = capacity, least
        self._hosts = [
            torch.zeros(capacity, dtype=torch.int32, pin_memory=on_gpu) for _ in range(depth)
        ]
        # The same memory, for the packets' values and for their tables; faster than numpy's arrays.
        self._values = [host.numpy().data for host in self._hosts]
        whole = capacity // 2 * 2
        self._tables = [values[:whole].cast("B").cast("q") for values in self._values]
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

    def send(
        self, runs: Iterable[Run], take: Take = lambda place: False
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Packets on the device, each with its number of runs: the arguments of `apply_runs`, to
        be launched on the current stream before the next packet is asked for.

        `take` is asked first for a packet of `least` runs and at most SMALL int32: given its place
        in the ring, it launches what `small` gives of it, and `apply_runs`, or says False.
        """
        packet: list[Run] = []
        begin = size = RUN_WORDS * self._least
        for run in runs:
            for piece in (run,) if len(run[1]) <= self._room else self._cut(run):
                needed = RUN_WORDS + len(piece[1])
                if size + needed > self._capacity:
                    yield from self._send(packet, take)
                    packet, size = [], begin
                packet.append(piece)
                size += needed
        if packet:
            yield from self._send(packet, take)

    def small(self, place: int) -> tuple[torch.Tensor, int]:
        """Bring the first SMALL int32 of a packet to the device: the arguments of `apply_runs`."""
        return self._copied(place, SMALL), self._least

    def empty(self) -> Iterator[int]:
        """The places of all packets, each without runs until the next is asked for: what is
        launched of it meanwhile changes nothing."""
        for _ in self._hosts:
            place = self._next_place()
            self._fill(place, [])
            yield place
            self._reading(place)

    def _cut(self, run: Run) -> list[Run]:
        offset, values = run
        starts = range(0, len(values), self._room)
        return [(offset + start, values[start : start + self._room]) for start in starts]

    def _send(self, runs: list[Run], take: Take) -> Iterator[tuple[torch.Tensor, int]]:
        place = self._next_place()
        size = self._fill(place, runs)
        if len(runs) <= self._least and size <= SMALL and take(place):
            self._reading(place)
            return
        packet = self._copied(place, size)
        self._reading(place)
        yield packet, max(len(runs), self._least)

    def _next_place(self) -> int:
        place, self._next = self._next, (self._next + 1) % len(self._hosts)
        read = self._read[place]
        if read is not None:
            read.synchronize()  # returns at once unless the device is `depth` packets behind
        return place

    def _fill(self, place: int, runs: list[Run]) -> int:
        """Write a packet to host memory; its size in int32."""
        count = max(len(runs), self._least)
        table, payload = array("q"), array("i")
        first = RUN_WORDS * count
        for offset, values in runs:
            table.append(offset)
            table.append(first + len(payload) | len(values) << 32)
            payload += values
        table.frombytes(bytes(4 * RUN_WORDS * (count - len(runs))))
        end = first + len(payload)
        self._tables[place][: len(table)] = table
        self._values[place][first:end] = payload
        return end

    def _copied(self, place: int, size: int) -> torch.Tensor:
        packet, host = self._devices[place], self._hosts[place]
        if packet is not host:
            packet[:size].copy_(host[:size], non_blocking=True)
        return packet

    def _reading(self, place: int) -> None:
        """What reads a packet in host memory has been launched."""
        read = self._read[place]
        if read is not None:
            read.record()
