"""Steps, rotary tables and poisoned caches for the tests of compressed attention's kernels."""

from __future__ import annotations

import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import Entries, Plain
from quire.kernels.reference.compressed.ops import CompressedKernels
from quire.kernels.reference.norm.rms_norm import rms_norm

POSITIONS = 300


def no_linear(*args: object) -> torch.Tensor:
    raise AssertionError("these operations have no products")


REFERENCE = CompressedKernels(no_linear, rms_norm)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotary_table(rotary: int) -> torch.Tensor:
    angles = torch.arange(POSITIONS)[:, None] * 10.0 ** -torch.linspace(0, 4, rotary // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def poisoned_cache(slots: int, entries: Entries, dtype: torch.dtype, device: torch.device) -> Paged:
    """NaN, or bytes that mean NaN, as many before the cache, which nothing may be written to; no
    tables, which writing does not need."""
    packed = not isinstance(entries, Plain)
    shape, poison = (2 * slots, entries.width), 0xFF if packed else torch.nan
    memory = torch.full(shape, poison, dtype=torch.uint8 if packed else dtype, device=device)
    return Paged(memory[slots:], entries, torch.empty(0, 0, dtype=torch.int32), 1)


def untouched_before(cache: Paged) -> bool:
    """Whether the memory before a poisoned cache still is what it was."""
    base = cache.memory._base
    assert base is not None
    before = base[: len(base) // 2]
    return bool((before == 0xFF if before.dtype == torch.uint8 else before.isnan()).all())


def step_tokens(
    starts: list[int], counts: list[int], slots: list[int], padding: int, device: torch.device
) -> StepTokens:
    """Rows with `counts` tokens at positions from `starts` on, and tokens of padding behind."""
    spans = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
    positions = torch.cat([*spans, torch.zeros(padding, dtype=torch.int64)])
    rows = [row for row, n in enumerate(counts) for _ in range(n)] + [-1] * padding
    ends = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    context = torch.tensor(
        [s + n if n else 0 for s, n in zip(starts, counts, strict=True)], dtype=torch.int32
    )
    found = (positions, torch.tensor(rows, dtype=torch.int64), ends, context, torch.tensor(slots))
    return StepTokens(*(t.to(device) for t in found))
