"""Pages between the KV cache and the DRAM tier, against plain copies of pinned memory.

    python -m benchmarks.gpu.pages

Pages of Qwen3-8B (2.25 MiB, in 72 tensors), by orders of 512 MiB as an engine gives them: to slots
that follow one another, and to slots in random order, which is the worst. GB/s each way, both ways
at once, and the share of what one large copy reaches that way.
"""

from __future__ import annotations

import random
import time

import torch

from benchmarks.gpu.harness import command
from benchmarks.gpu.shapes import DEVICE
from quire.runner.device_pages import DevicePages
from quire.step import Copies
from quire.tiers.probe import link_rates
from quire.tiers.slab import HostSlab

LAYERS, KV_HEADS, HEAD_SIZE, BLOCK = 36, 8, 128, 16
SLOTS, ORDERS = 1024, 8
REPEATS = 5


class Pages:
    """A cache of SLOTS blocks, and as many slots in host memory."""

    def __init__(self) -> None:
        shape = SLOTS, KV_HEADS, BLOCK, HEAD_SIZE
        tensors = [
            torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2 * LAYERS)
        ]
        self.page = sum(tensor[0].nbytes for tensor in tensors)
        self.count = DevicePages.order_bytes // self.page
        slab = HostSlab([self.page], [SLOTS], pinned=True)
        self.pages = DevicePages([tensors], slab)
        while slab.usable != [SLOTS]:
            time.sleep(0.01)

    def rate(self, ways: tuple[bool, ...], shuffled: bool) -> float:
        """Bytes a second of ORDERS orders, those ways (True: to the host) in turn."""
        slots = list(range(SLOTS))
        if shuffled:
            random.Random(0).shuffle(slots)
        found = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            begun, left = time.perf_counter(), ORDERS
            for number in range(ORDERS):
                first = number % (SLOTS // self.count) * self.count
                some = slots[first : first + self.count]
                self.pages.copy(Copies(number, ways[number % len(ways)], 0, some, some))
            while left:
                left -= len(self.pages.copied())
            found.append(ORDERS * self.count * self.page / (time.perf_counter() - begun))
        return sorted(found)[REPEATS // 2]


def main() -> None:
    command(__doc__)
    to_device, to_host = link_rates(DevicePages.order_bytes)
    pages = Pages()
    print(f"one copy: {to_host / 1e9:.1f} GB/s to the host, {to_device / 1e9:.1f} to the device")
    print(f"{'slots':<10}{'to the host':>18}{'to the device':>18}{'both at once':>16}")
    for name, shuffled in (("in a row", False), ("shuffled", True)):
        store, load = pages.rate((True,), shuffled), pages.rate((False,), shuffled)
        both = pages.rate((True, False), shuffled)
        cells = [(store, to_host), (load, to_device)]
        shares = "".join(f"{a / 1e9:>11.1f} ({a / b:4.0%})" for a, b in cells)
        print(f"{name:<10}{shares}{both / 1e9:>16.1f}", flush=True)
    pages.pages.close()


if __name__ == "__main__":
    main()
