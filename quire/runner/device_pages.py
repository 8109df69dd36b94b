"""Pages between a GPU's pools and pinned host memory, on streams of their own.

A page lies in many tensors, so a kernel gathers pages into a staging buffer, from which long runs
are copied by the copy engines; and back. Stores need not wait for steps in flight: what they read
was complete when its step was committed, and is on loan until they are done. Loads wait for all
steps submitted before, which may still use the blocks that they write.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.kernels.paged_tensors import WORD, PagedTensors
from quire.kernels.triton.step.move_pages import move_pages
from quire.plan.tiers import STAGING_BYTES
from quire.step import Copies
from quire.tiers.slab import HostSlab

log = logging.getLogger("quire.tiers")


class _Instant:
    """A torch.cuda.Event where everything is done at once."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: _Instant) -> float:
        return 1000 * (end.time - self.time)


def _event(on_gpu: bool) -> Any:
    return torch.cuda.Event(enable_timing=True) if on_gpu else _Instant()  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unpin(addresses: list[int], slab: HostSlab) -> None:
    """`slab` owns what lies at the addresses, and lives until this has run."""
    for address in addresses:
        _runtime().cudaHostUnregister(address)


def slot_runs(slots: npt.NDArray[np.int64], chunk: int) -> Iterator[tuple[int, int, int]]:
    """(slot, row, length) of rows whose slots follow one another and were pinned together: `chunk`
    slots at a time. The longer they are the better: each is a copy, and a copy costs the engine
    thread some microseconds."""
    begins = np.flatnonzero((np.diff(slots) != 1) | (slots[1:] % chunk == 0)) + 1
    rows = np.concatenate(([0], begins, [len(slots)]))
    return zip(slots[rows[:-1]].tolist(), rows[:-1].tolist(), np.diff(rows).tolist(), strict=True)


@dataclass
class Flight:
    """What one order needs until it is done: its blocks on their way to the device, and events.
    `blocks` is `host`, seen by numpy."""

    host: torch.Tensor
    blocks: npt.NDArray[np.int32]
    device: torch.Tensor
    begun: Any  # torch.cuda.Event
    ended: Any
    number: int = 0


class DevicePages:
    """Copies on two side streams, one each way. Without a GPU (for tests in Triton's interpreter)
    everything runs at once.

    Host memory is pinned on a thread, piece by piece; what is not pinned yet is not used yet.
    """

    rate = 25e9
    order_bytes = 512 * 2**20
    order_pages = 4096
    most_orders = 8

    def __init__(self, pools: Sequence[Sequence[torch.Tensor]], slab: HostSlab):
        self._pools = [PagedTensors.of(tensors) for tensors in pools]
        self._slab = slab
        device = self._pools[0].table.device
        self._on_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self._on_gpu else []  # type: ignore[no-untyped-call]
        words = max(STAGING_BYTES // 2 // WORD.itemsize, *(p.page_words for p in self._pools))
        self._staging = [torch.empty(words, dtype=WORD, device=device) for _ in range(2)]
        self._rows = torch.arange(self.order_pages, dtype=torch.int32, device=device)
        self._free = [self._flight(device) for _ in range(self.most_orders)]
        self._flying: list[deque[Flight]] = [deque(), deque()]  # by direction
        self._pinned: list[int] = []
        # Memory that goes while it is pinned poisons whatever is mapped at its addresses next, so
        # it goes after it was unpinned, whether anybody calls `close` or not.
        self._unpin = weakref.finalize(self, _unpin, self._pinned, slab)
        self._unpin.atexit = False
        self._closing = threading.Event()
        for pages in self._pools:  # compiles the kernels; the null block belongs to nobody
            for store in (True, False):
                rows = self._staging[store][: pages.page_words].view(1, -1)
                move_pages(pages, self._free[0].device[:1].zero_(), rows, self._rows[:1], store)
        self._pinning = threading.Thread(target=self._pin, name="quire-pinning", daemon=True)
        if self._on_gpu:
            self._pinning.start()
        else:
            slab.pin(lambda address, size: None, self._closing.is_set)

    def _flight(self, device: torch.device) -> Flight:
        host = torch.zeros(self.order_pages, dtype=torch.int32, pin_memory=self._on_gpu)
        begun, ended = (_event(self._on_gpu) for _ in range(2))
        return Flight(host, host.numpy(), torch.zeros_like(host, device=device), begun, ended)

    @torch.inference_mode()
    def copy(self, order: Copies) -> None:
        """Launch what an order asks for. Raises what launching raises."""
        flight = self._free.pop()
        flight.number = order.number
        try:
            # In another order, pages whose slots follow one another could lie apart in staging.
            slots = np.array(order.slots, dtype=np.int64)
            places = np.argsort(slots)
            flight.blocks[: len(slots)] = np.array(order.blocks, dtype=np.int32)[places]
            slots = slots[places]
            if not self._on_gpu:
                self._launch(order, slots, flight)
            else:
                stream = self._streams[order.store]
                if not order.store:
                    stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._launch(order, slots, flight)
        except BaseException:
            self._free.append(flight)
            raise
        self._flying[order.store].append(flight)

    def _launch(self, order: Copies, slots: npt.NDArray[np.int64], flight: Flight) -> None:
        pages, store, count = self._pools[order.pool], order.store, len(slots)
        area = self._slab.areas[order.pool].view(WORD)
        most = len(self._staging[store]) // pages.page_words
        rows = self._staging[store][: most * pages.page_words].view(most, pages.page_words)
        flight.begun.record()
        flight.device[:count].copy_(flight.host[:count], non_blocking=True)
        for first in range(0, count, most):
            some = slots[first : first + most]
            blocks, places = flight.device[first : first + len(some)], self._rows[: len(some)]
            if store:
                move_pages(pages, blocks, rows, places, store)
            for slot, row, length in slot_runs(some, self._slab.chunk_slots[order.pool]):
                host, device = area[slot : slot + length], rows[row : row + length]
                (host if store else device).copy_(device if store else host, non_blocking=True)
            if not store:
                move_pages(pages, blocks, rows, places, store)
        flight.ended.record()

    def copied(self) -> list[tuple[int, float]]:
        """Orders that are done since the last call, with the seconds that they took."""
        done = []
        for flying in self._flying:
            while flying and flying[0].ended.query():
                flight = flying.popleft()
                done.append((flight.number, flight.begun.elapsed_time(flight.ended) / 1000))
                self._free.append(flight)
        return done

    # -- pinning -------------------------------------------------------------------------------

    def _pin(self) -> None:
        try:
            self._slab.pin(self._register, self._closing.is_set)
        except RuntimeError as error:
            mib = sum(
                n * size
                for n, size in zip(self._slab.usable, self._slab.page_bytes, strict=True)
            ) >> 20  # fmt: skip
            log.warning("only %d MiB of the DRAM tier could be pinned: %s", mib, error)

    def _register(self, address: int, size: int) -> None:
        code = int(_runtime().cudaHostRegister(address, size, 0))
        if code != 0:
            raise RuntimeError(f"cudaHostRegister gave error {code}")
        self._pinned.append(address)

    def close(self) -> None:
        """Wait for what is under way, and unpin."""
        self._closing.set()
        if self._on_gpu:
            self._pinning.join()
            for stream in self._streams:
                stream.synchronize()
            self._unpin()
