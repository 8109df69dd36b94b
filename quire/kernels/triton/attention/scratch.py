"""Memory that decode's programs hand states to each other through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.triton.attention.tiles import Tiles, decode_tiles, target_of
from quire.kernels.triton.launch import num_sms


def decode_programs(tiles: Tiles, device: torch.device) -> int:
    """As many as run at once."""
    return num_sms(device) * tiles.together


@dataclass(frozen=True)
class Scratch:
    """States handed between programs, one layer at a time; any layer whose share fits may use it.

    values float32: unnormalised sums of values, [states, query heads per KV head, D] of the layer
    at hand. sums float32: largest logits and sums of weights, [states, 2, query heads per KV head].
    arrived int32 [rows * Hkv]: programs that left theirs; zero between launches, which the kernel
    sees to. A launch that was cut short leaves it in disorder: call reset.
    """

    values: torch.Tensor
    sums: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        total_tokens: int,
        dtype: torch.dtype,
        deterministic: bool,
        device: torch.device,
    ) -> Scratch:
        """For up to `max_rows` requests of `total_tokens` tokens of context together.

        Contexts that add up to more (a shared prefix counts for every request) are served all the
        same: deterministic mode then computes requests that have no room in scratch without
        splitting them, so more slowly, and to the same bits. Otherwise `total_tokens` is not used.
        """
        states, group = _states(
            max_rows, heads, kv_heads, head_size, total_tokens, dtype, deterministic, device
        )
        return cls(
            torch.empty(states * group * head_size, dtype=torch.float32, device=device),
            torch.empty(states * group * 2, dtype=torch.float32, device=device),
            torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device),
        )

    @staticmethod
    def nbytes(
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        total_tokens: int,
        dtype: torch.dtype,
        deterministic: bool,
        device: torch.device,
    ) -> int:
        """Bytes that `allocate` of the same arguments takes. For layers of several shapes take the
        shape that needs the most, with the largest kv_heads."""
        states, group = _states(
            max_rows, heads, kv_heads, head_size, total_tokens, dtype, deterministic, device
        )
        return 4 * (states * group * (head_size + 2) + max_rows * kv_heads)

    def capacity(self, group: int, head_size: int) -> int:
        """States of a layer with `group` query heads per KV head that fit."""
        by_values = self.values.numel() // (group * head_size)
        return min(by_values, self.sums.numel() // (2 * group))

    def reset(self) -> None:
        """Forget programs that arrived: after a launch that failed."""
        self.arrived.zero_()


def _states(
    max_rows: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    total_tokens: int,
    dtype: torch.dtype,
    deterministic: bool,
    device: torch.device,
) -> tuple[int, int]:
    """(states, query heads per KV head). Deterministic: one per piece and KV head. Otherwise: two
    per program, for the head its run starts in and the one it ends in."""
    group = heads // kv_heads
    tiles = decode_tiles(group, head_size, dtype.itemsize, target_of(device), deterministic)
    if deterministic:
        return kv_heads * (total_tokens // tiles.piece + max_rows), group
    return 2 * decode_programs(tiles, device), group
