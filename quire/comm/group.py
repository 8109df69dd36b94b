"""A process group as layers see it: rank, size, and the two collectives they need."""

from __future__ import annotations

import torch
import torch.distributed as dist

from quire.errors import PlanError


class Group:
    """Ranks that share layers. A group of one does nothing and needs no set-up."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather_columns(self, x_TN: torch.Tensor) -> torch.Tensor:
        """[T, N] on each rank -> [T, size * N], in rank order."""
        if self.size == 1:
            return x_TN
        parts = [torch.empty_like(x_TN) for _ in range(self.size)]
        dist.all_gather(parts, x_TN.contiguous())
        return torch.cat(parts, dim=1)

    def shard(self, size: int, what: str) -> slice:
        """This rank's equal share of `size` items. Raises PlanError where they do not divide."""
        if size % self.size:
            raise PlanError(
                "cannot_shard",
                f"{what}: {size} cannot be shared equally by {self.size} ranks",
                fix="use a number of ranks that divides it",
            )
        share = size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def join(rank: int, size: int, address: str, timeout_seconds: float = 60.0) -> Group:
    """Join a gloo group; `address` is a file:// or tcp://127.0.0.1:port rendezvous."""
    from datetime import timedelta

    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return Group(rank, size)
