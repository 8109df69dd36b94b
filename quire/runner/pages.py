"""Pages between the pools of a CPU runner and host memory: plain copies."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

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


def byte_rows(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor as uint8 [blocks, bytes of a block], over the same memory."""
    return [tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in tensors]


class CpuPages:
    """Copies at once, on the thread that asks. A page in host memory is the bytes of its block in
    all tensors of the pool, one after the other."""

    rate = 2e9
    order_bytes = 32 * 2**20  # some ten milliseconds

    def __init__(self, pools: Sequence[Sequence[torch.Tensor]], slab: HostSlab):
        self._pools = [byte_rows(tensors) for tensors in pools]
        self._areas = slab.areas
        self._done: list[tuple[int, float]] = []

    @torch.inference_mode()
    def copy(self, order: Copies) -> None:
        """See Copies."""
        begun = time.perf_counter()
        blocks, slots = torch.tensor(order.blocks), torch.tensor(order.slots)
        area, offset = self._areas[order.pool], 0
        for rows in self._pools[order.pool]:
            columns = area[:, offset : offset + rows.shape[1]]
            offset += rows.shape[1]
            if order.store:
                columns[slots] = rows[blocks]
            else:
                rows[blocks] = columns[slots]
        self._done.append((order.number, time.perf_counter() - begun))

    def copied(self) -> list[tuple[int, float]]:
        """The orders since the last call, with their seconds."""
        done, self._done = self._done, []
        return done
