"""What the GPU sampler writes: its results, and the memory it works in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch

from quire.kernels.device_state import MAX_LOGPROBS

# Tokens of the vocabulary that one program works on, and those of them that share a maximum. They
# never vary: a row's bits are a function of them, and must not depend on the batch.
TILE = 2048
SUBTILE = 128
# Tokens that may be chosen are listed when they are no more than this. Where they are more, which
# takes a nearly flat distribution, the whole vocabulary is searched instead.
CANDIDATES = 8192
PICKS = 128  # a power of two of at least MAX_LOGPROBS


class Status(IntEnum):
    OK = 0
    NAN = 1  # the logits hold NaN, or the largest is infinite
    FORBIDDEN = 2  # no token is allowed
    SKIPPED = 3  # no slot, or a row that does not sample


@dataclass
class SampleOutputs:
    """What sampling B rows gave: `tokens` int32 [B] (-1 unless `status` is OK), `status` int32 [B].

    Of rows that ask for log-probabilities also `logprob` float32 [B] and `rank` int32 [B] of the
    token, and the most likely tokens `top_ids` int32 and `top_logprobs` float32 [B, 100], as many
    as are asked for.
    """

    tokens: torch.Tensor
    status: torch.Tensor
    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device | str) -> SampleOutputs:
        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Side by side, so that both are copied at once, and each from a multiple of 16 bytes on.
        tokens, status = zeros(torch.int32, 2, -(-rows // 4) * 4)[:, :rows]
        return cls(
            tokens,
            status,
            zeros(torch.float32, rows),
            zeros(torch.int32, rows),
            zeros(torch.int32, rows, MAX_LOGPROBS),
            zeros(torch.float32, rows, MAX_LOGPROBS),
        )

    def chosen(self) -> torch.Tensor:
        """`tokens` and `status`, which `allocate` made side by side, and their padding as one
        tensor int32 [2, >= B]."""
        apart = (self.status.data_ptr() - self.tokens.data_ptr()) // self.tokens.itemsize
        return self.tokens.as_strided((2, apart), (apart, 1))

    def view(self, rows: int) -> SampleOutputs:
        """The same memory, for that many rows."""
        return SampleOutputs(*(getattr(self, field.name)[:rows] for field in fields(self)))


@dataclass
class Scratch:
    """Working memory of the sampler for B rows; nothing in it outlives a call.

    `logits` float32 [B, V]: after penalties and everything else before the temperature. Per tile:
    `tile_max`, `tile_sum` (of exp(logit - maximum)) of the raw logits; `pick` float32 and
    `pick_id`: the tile's choice; `tile_mass` int64. Per subtile: `subtile_max` float32. The
    candidates `list_key`, `list_id` int32 [B, CANDIDATES]. Per row: `count` of the candidates,
    `cut` (their largest key), `largest` and `logsumexp`, PICKS pairs `best_key`, `best_id`,
    and how many log-probabilities are `wanted` (-1: not even the token's own).
    """

    logits: torch.Tensor
    tile_max: torch.Tensor
    tile_sum: torch.Tensor
    pick: torch.Tensor
    pick_id: torch.Tensor
    tile_mass: torch.Tensor
    subtile_max: torch.Tensor
    list_key: torch.Tensor
    list_id: torch.Tensor
    count: torch.Tensor
    cut: torch.Tensor
    largest: torch.Tensor
    logsumexp: torch.Tensor
    best_key: torch.Tensor
    best_id: torch.Tensor
    wanted: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device | str) -> Scratch:
        return cls(
            *(
                torch.zeros(shape, dtype=dtype, device=device)
                for shape, dtype in _shapes(rows, vocab_size)
            )
        )

    @staticmethod
    def nbytes(rows: int, vocab_size: int) -> int:
        """What `allocate` takes."""
        return sum(
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in _shapes(rows, vocab_size)
        )


def num_tiles(vocab_size: int) -> int:
    return -(-vocab_size // TILE)


def _shapes(rows: int, vocab_size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of the fields of Scratch."""
    tiles = (rows, num_tiles(vocab_size))
    subtiles = (rows, num_tiles(vocab_size) * (TILE // SUBTILE))
    return [
        ((rows, vocab_size), torch.float32),
        (tiles, torch.float32),
        (tiles, torch.float32),
        (tiles, torch.float32),
        (tiles, torch.int32),
        (tiles, torch.int64),
        (subtiles, torch.float32),
        ((rows, CANDIDATES), torch.int32),
        ((rows, CANDIDATES), torch.int32),
        ((rows,), torch.int32),
        ((rows,), torch.int32),
        ((rows,), torch.float32),
        ((rows,), torch.float32),
        ((rows, PICKS), torch.int32),
        ((rows, PICKS), torch.int32),
        ((rows,), torch.int32),
    ]
