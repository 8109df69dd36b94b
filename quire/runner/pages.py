"""Pages between the pools of a CPU runner and host memory: plain copies."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from quire.kernels.paged_tensors import WORD, PagedTensors
from quire.kv.groups import KVGroup
from quire.layers.build import CacheLayer
from quire.step import Copies
from quire.tiers.slab import HostSlab


def pool_tensors(
    caches: Sequence[CacheLayer], groups: Sequence[KVGroup]
) -> list[list[torch.Tensor]]:
    """The memory of each pool: tensors whose first dimension is the block, each once. All of a
    block in all of them is its page."""
    pools: list[dict[int, torch.Tensor]] = [{} for _ in range(1 + max(g.pool for g in groups))]
    for group in groups:
        for layer in group.layers:
            for tensor in caches[layer].tensors:
                pools[group.pool].setdefault(tensor.data_ptr(), tensor)
    return [list(tensors.values()) for tensors in pools]


class CpuPages:
    """Copies at once, on the thread that asks: with numpy, because torch would wait for all its
    threads at each of the many small copies. A page in host memory is a block's words in all
    tensors of its pool, one after the other."""

    rate = 2e9
    order_bytes = 32 * 2**20  # some ten milliseconds
    order_pages = 4096
    most_orders = 2

    def __init__(self, pools: Sequence[Sequence[torch.Tensor]], slab: HostSlab):
        self._pools = [[t.numpy() for t in PagedTensors.of(tensors).tensors] for tensors in pools]
        self._areas = [area.view(WORD).numpy() for area in slab.areas]
        self._done: list[tuple[int, float]] = []

    def copy(self, order: Copies) -> None:
        """See Copies."""
        begun, begins = time.perf_counter(), 0
        for rows in self._pools[order.pool]:
            columns = self._areas[order.pool][:, begins : begins + rows.shape[1]]
            begins += rows.shape[1]
            if order.store:
                columns[order.slots] = rows[order.blocks]
            else:
                rows[order.blocks] = columns[order.slots]
        self._done.append((order.number, time.perf_counter() - begun))

    def copied(self) -> list[tuple[int, float]]:
        """The orders since the last call, with their seconds."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing is held."""
