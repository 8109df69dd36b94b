"""Memory that decode's programs hand states to each other through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.triton.attention.tiles import (
    Tiles,
    decode_tiles,
    head_tiles,
    latent_tiles,
    target_of,
)
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
    sees to. A launch that was cut short leaves it in disorder: call reset. marks int32
    [1 + rows * Hkv]: how a launch cut its work. Where layers keep latents, tiles of query heads
    stand for KV heads, and D is the latents' rank.
    """

    values: torch.Tensor
    sums: torch.Tensor
    arrived: torch.Tensor
    marks: torch.Tensor

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rank: int = 0,
        *,
        total_tokens: int,
        dtype: torch.dtype,
        deterministic: bool,
        device: torch.device,
    ) -> Scratch:
        """For up to `max_rows` requests of `total_tokens` tokens of context together. `rank`: the
        layers keep latents, of so many values.

        Contexts that add up to more (a shared prefix counts for every request) are served all the
        same: deterministic mode then computes requests that have no room in scratch without
        splitting them, so more slowly, and to the same bits. Otherwise `total_tokens` is not used.
        """
        need = _Need.of(
            max_rows, heads, kv_heads, head_size, rank, total_tokens, dtype, deterministic, device
        )
        return cls(
            torch.empty(need.states * need.group * need.size, dtype=torch.float32, device=device),
            torch.empty(need.states * need.group * 2, dtype=torch.float32, device=device),
            torch.zeros(need.rows, dtype=torch.int32, device=device),
            torch.zeros(1 + need.rows, dtype=torch.int32, device=device),
        )

    @staticmethod
    def nbytes(
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rank: int = 0,
        *,
        total_tokens: int,
        dtype: torch.dtype,
        deterministic: bool,
        device: torch.device,
    ) -> int:
        """Bytes that `allocate` of the same arguments takes. For layers of several shapes take the
        shape that needs the most, with the largest kv_heads."""
        need = _Need.of(
            max_rows, heads, kv_heads, head_size, rank, total_tokens, dtype, deterministic, device
        )
        return 4 * (need.states * need.group * (need.size + 2) + 2 * need.rows + 1)

    def capacity(self, group: int, head_size: int) -> int:
        """States of a layer with `group` query heads per KV head that fit."""
        by_values = self.values.numel() // (group * head_size)
        return min(by_values, self.sums.numel() // (2 * group))

    def reset(self) -> None:
        """Forget programs that arrived: after a launch that failed."""
        self.arrived.zero_()


@dataclass(frozen=True)
class _Need:
    """`states` of `group` query heads with values of `size`, `rows` of requests and KV heads."""

    states: int
    group: int
    size: int
    rows: int

    @classmethod
    def of(
        cls,
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rank: int,
        total_tokens: int,
        dtype: torch.dtype,
        deterministic: bool,
        device: torch.device,
    ) -> _Need:
        """States: deterministic, one per piece and KV head; otherwise two per program, for the head
        its run starts in and the one it ends in."""
        target = target_of(device)
        if rank:
            kv_heads = head_tiles(heads, target, deterministic)
            tiles = latent_tiles(heads // kv_heads, dtype.itemsize, target, deterministic)
        else:
            # Of a cache in e4m3, which has the most programs.
            tiles = decode_tiles(
                heads // kv_heads, head_size, dtype.itemsize, target, deterministic, 1
            )
        states = 2 * decode_programs(tiles, device)
        if deterministic:
            states = kv_heads * (total_tokens // tiles.piece + max_rows)
        return cls(states, heads // kv_heads, rank or head_size, max_rows * kv_heads)
