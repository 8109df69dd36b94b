"""Requests with vectors in paged caches, for tests of compressed attention: everything that nobody
may read is NaN, and block tables point elsewhere past each request's vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import Entries
from tests.kernels.triton.compressed_inputs import step_tokens

SPARE = 2  # blocks that nobody owns


def paged(
    lengths: Sequence[int],
    entries: Entries,
    per_block: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    values: Sequence[torch.Tensor] | None = None,
) -> Paged:
    """A cache with lengths[i] vectors of request i, random or `values`, in blocks of random
    order."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // per_block) for n in lengths]
    order = torch.randperm(sum(counts), generator=generator) + SPARE
    slots = (sum(counts) + SPARE) * per_block
    memory = torch.full((slots, entries.width), 255, dtype=torch.uint8)  # NaN in every format
    if dtype != torch.uint8:
        memory = torch.full((slots, entries.width), torch.nan, dtype=dtype)
    tables = torch.full((len(lengths), max([*counts, 0]) + 2), 2**30, dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        tables[row, : len(blocks)] = blocks
        index = torch.arange(lengths[row])
        mine = torch.randn(lengths[row], entries.size, generator=generator)
        if values is not None:
            mine = values[row]
        memory[blocks[index // per_block] * per_block + index % per_block] = entries.pack(
            mine, dtype
        )
    return Paged(memory.to(device), entries, tables.to(device), per_block)


def last_tokens(
    counts: Sequence[int], contexts: Sequence[int], padding: int, device: torch.device
) -> StepTokens:
    """The last counts[i] tokens of requests that have contexts[i] tokens, then padding."""
    starts = [c - n for n, c in zip(counts, contexts, strict=True)]
    return step_tokens(starts, list(counts), list(range(len(counts))), padding, device)


def on_cpu(tokens: StepTokens) -> StepTokens:
    return StepTokens(*(t.cpu() for t in vars(tokens).values()))


def paged_on_cpu(cache: Paged) -> Paged:
    return Paged(cache.memory.cpu(), cache.entries, cache.block_tables.cpu(), cache.per_block)
