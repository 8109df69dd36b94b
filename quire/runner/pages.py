"""Pages between the pools of a CPU runner and host memory: plain copies."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from quire.kernels.paged_tensors import WORD, PagedTensors
from quire.kernels.reference.step.move_pages import move_pages
from quire.kv.groups import KVGroup
from quire.layers.build import Build
from quire.step import Copies
from quire.tiers.slab import HostSlab


def pool_tensors(build: Build, groups: Sequence[KVGroup]) -> list[list[torch.Tensor]]:
    """The memory of each pool: tensors whose first dimension is the block, each once. All of a
    block in all of them is its page."""
    pools: list[dict[int, torch.Tensor]] = [{} for _ in range(1 + max(g.pool for g in groups))]
    for group in groups:
        for layer in group.layers:
            for tensor in build.caches[layer].tensors:
                pools[group.pool].setdefault(tensor.data_ptr(), tensor)
    return [list(tensors.values()) for tensors in pools]


class CpuPages:
    """Copies at once, on the thread that asks."""

    rate = 2e9
    order_bytes = 32 * 2**20  # some ten milliseconds
    order_pages = 4096
    most_orders = 2

    def __init__(self, pools: Sequence[Sequence[torch.Tensor]], slab: HostSlab):
        self._pools = [PagedTensors.of(tensors) for tensors in pools]
        self._areas = [area.view(WORD) for area in slab.areas]
        self._done: list[tuple[int, float]] = []

    @torch.inference_mode()
    def copy(self, order: Copies) -> None:
        """See Copies."""
        begun = time.perf_counter()
        blocks, slots = torch.tensor(order.blocks), torch.tensor(order.slots)
        move_pages(self._pools[order.pool], blocks, self._areas[order.pool], slots, order.store)
        self._done.append((order.number, time.perf_counter() - begun))

    def copied(self) -> list[tuple[int, float]]:
        """The orders since the last call, with their seconds."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing is held."""
