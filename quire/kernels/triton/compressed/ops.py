"""The kernels of compressed attention and of streams, under the names that layers call."""

from __future__ import annotations

import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.triton.compressed.compress import compress
from quire.kernels.triton.compressed.rotate_and_insert import rotate_and_insert
from quire.kernels.triton.compressed.rotate_pairs import rotate_pairs
from quire.kernels.triton.compressed.select_entries import select_entries
from quire.kernels.triton.compressed.sparse_attention import sparse_attention
from quire.kernels.triton.streams.mix_streams import collapse_streams, mix_streams
from quire.kernels.triton.streams.write_streams import write_streams


class CompressedKernels:
    """As quire/kernels/reference/compressed/ops.py, for one GPU.

    `deterministic`: a token's bits depend on nothing but its request. `scratch` float32 is memory
    of select_entries and sparse_attention; who allocates caches sets it.
    """

    def __init__(self, deterministic: bool):
        self.deterministic = deterministic
        self.scratch = torch.empty(0)

    mix_streams = staticmethod(mix_streams)
    write_streams = staticmethod(write_streams)
    collapse_streams = staticmethod(collapse_streams)
    rotate_pairs = staticmethod(rotate_pairs)
    rotate_and_insert = staticmethod(rotate_and_insert)
    compress = staticmethod(compress)

    def select_entries(
        self,
        queries_THD: torch.Tensor,
        weights_TH: torch.Tensor,
        tokens: StepTokens,
        keys: Paged,
        ratio: int,
        count: int,
    ) -> torch.Tensor:
        return select_entries(
            queries_THD, weights_TH, tokens, keys, ratio, count, scratch=self.scratch
        )

    def sparse_attention(
        self,
        q_THD: torch.Tensor,
        tokens: StepTokens,
        sinks_H: torch.Tensor,
        scale: float,
        cos_sin: torch.Tensor,
        window: Paged,
        size: int,
        compressed: Paged | None = None,
        ratio: int = 0,
        chosen_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return sparse_attention(
            q_THD, tokens, sinks_H, scale, window, size, compressed, ratio, chosen_TE,
            deterministic=self.deterministic, scratch=self.scratch, cos_sin=cos_sin,
        )  # fmt: skip
