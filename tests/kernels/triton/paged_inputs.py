"""Requests in a paged cache, for tests of attention: everything that nobody may read is NaN, and
block tables point elsewhere past each context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.kernels.reference.attention.fp8_cache import (
    FP8_CACHE,
    codes_and_scales,
    encode_heads,
    packed_width,
)

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
SPARE = 3  # blocks that nobody owns; the first is the null block


@dataclass(frozen=True)
class Shape:
    """Of queries and caches, `cache` being the queries' dtype where it is None."""

    heads: int
    kv_heads: int
    d: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None


class PagedRequests:
    """Requests of `contexts` tokens with queries of `width` values in `dtype`. `cache` [blocks, N,
    16, D] has N rows of D values for every token, in blocks of random order; as codes and scales
    where `cache` is FP8_CACHE."""

    def __init__(
        self,
        contexts: Sequence[int],
        width: int,
        dtype: torch.dtype,
        rows: int,
        size: int,
        cache: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ):
        self.contexts, self.width, self.dtype = list(contexts), width, dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        counts = [-(-c // 16) for c in contexts]
        order = torch.randperm(sum(counts), generator=self.generator) + SPARE
        blocks_in_all, fp8 = sum(counts) + SPARE, cache == FP8_CACHE
        if fp8:  # of ones, a scale is NaN
            filled = torch.full((blocks_in_all, rows, 16, packed_width(size)), 255, dtype=cache)
            stored = codes_and_scales(filled)
        else:
            filled = torch.full((blocks_in_all, rows, 16, size), torch.nan, dtype=cache)
        tables = torch.full((len(counts), max([*counts, 0]) + 2), 2**30, dtype=torch.int32)
        tables[:, -1] = 0
        self.queries = []  # of every position, so that any of them can be asked for
        for b, blocks in enumerate(order.split(counts)):
            tables[b, : counts[b]] = blocks
            token = torch.arange(contexts[b])
            values = torch.randn(contexts[b], rows, size, generator=self.generator)
            place = blocks[token // 16], slice(None), token % 16
            if fp8:
                for part, coded in zip(stored, encode_heads(values), strict=True):
                    part[place] = coded
            else:
                filled[place] = values.to(cache)
            queries = torch.randn(contexts[b], width, generator=self.generator)
            self.queries.append(queries.to(device, dtype))
        self.tables, self.cache = tables.to(device), filled.to(device)

    def inputs(
        self, counts: Sequence[int], contexts: Sequence[int], rows: Sequence[int], padding: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(q, block tables, query_start, context_len) of the last counts[i] queries of request
        rows[i] when it has contexts[i] tokens, then `padding` rows of NaN. q is columns of wider
        rows."""
        q = torch.full((sum(counts) + padding, self.width + 8), torch.nan, dtype=self.dtype)
        q = q.to(self.device)[:, : self.width]
        parts = [self.queries[b][c - n : c] for b, c, n in zip(rows, contexts, counts, strict=True)]
        q[: sum(counts)] = torch.cat(parts)
        start = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        length = torch.tensor(contexts, dtype=torch.int32, device=self.device)
        return q, self.tables[list(rows)], start.to(self.device), length

    def nowhere(self, tokens: int, width: int) -> torch.Tensor:
        """Where results go: NaN, and columns of wider rows."""
        wide = torch.full((tokens, width + 16), torch.nan, dtype=self.dtype)
        return wide.to(self.device)[:, :width]
