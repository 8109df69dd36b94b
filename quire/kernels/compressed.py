"""What the kernels of compressed attention and of streams share: where things lie, and weights.

Shapes: T tokens and B rows of a step, n streams, D hidden size, M = n (n + 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quire.kernels.reference.compressed.entries import Entries


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step: `positions` int64 [T], and `rows` int64 [T], the row that each belongs
    to, -1 for padding behind the last row's tokens.

    `query_start` int32 [B + 1]: where each row's tokens begin; `context_len` int32 [B]: its tokens
    in all after this step; `state_slots` int64 [B]: the request slot, -1 for a row of padding,
    which has no tokens.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    state_slots: torch.Tensor


@dataclass(frozen=True)
class Paged:
    """Vectors of a layer in its cache: `memory` [slots, width], each stored as `entries` say. Block
    b of a row's request, named by `block_tables` int32 [B, blocks], holds `per_block` of them: its
    vectors b * per_block and following, in the slots from block * per_block on."""

    memory: torch.Tensor
    entries: Entries
    block_tables: torch.Tensor
    per_block: int


@dataclass(frozen=True)
class StreamWeights:
    """How a layer's mix of the streams is computed.

    `matrix` [M, n D] as Kernels.pack_exact gave it, `base` float32 [M], `scale` float32 [3]; for
    the sum that the head reads M is n, and the scale [1]. `eps` of the root mean square over all
    streams; `stream_eps` and `steps` as in reference/streams/mixing.py.
    """

    matrix: Any
    base: torch.Tensor
    scale: torch.Tensor
    streams: int
    eps: float
    stream_eps: float
    steps: int


@dataclass(frozen=True)
class Mix:
    """How a layer's result goes back to the streams: how much of it each gets, float32 [T, n], and
    how streams pass into each other, float32 [T, n, n] (from, to)."""

    writes: torch.Tensor
    matrix: torch.Tensor
