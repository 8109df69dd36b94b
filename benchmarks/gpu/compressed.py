"""Queries, keys and compressed entries of DeepSeek V4 Flash.

python -m benchmarks.gpu.compressed
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, TOKENS, copies, random
from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys
from quire.kernels.triton.compressed.compress import compress
from quire.kernels.triton.compressed.insert_keys import insert_keys
from quire.kernels.triton.compressed.rotate_pairs import rotate_pairs

HEADS, SIZE, INDEX_SIZE, ROTARY, SPARE = 64, 512, 128, 64, 32
POSITIONS, SLOTS = 32768, 65536
KEYS = PackedKeys(SIZE, ROTARY)


def table() -> torch.Tensor:
    return torch.rand(POSITIONS, ROTARY, device=DEVICE)


def cache(entries: Entries) -> Paged:
    memory = torch.empty(SLOTS, entries.width, dtype=torch.uint8, device=DEVICE)
    return Paged(memory, entries, torch.empty(0, 0, dtype=torch.int32, device=DEVICE), 1)


def step(rows: int, count: int, end: int) -> StepTokens:
    """`count` tokens of each row, the last at position end - 1."""
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * count
    positions = torch.arange(end - count, end, device=DEVICE).repeat(rows)
    row = torch.arange(rows, device=DEVICE)
    ends = torch.full((rows,), end, dtype=torch.int32, device=DEVICE)
    return StepTokens(positions, row.repeat_interleave(count), starts, ends, row)


def rotating(t: int, norm: bool) -> Timed:
    """Queries with their norm, and what attention gives, turned back."""
    touched = SIZE if norm else ROTARY
    nbytes = t * (2 * 2 * HEADS * touched + 4 * ROTARY)
    positions, angles = torch.randint(POSITIONS, (t,), device=DEVICE), table()
    runs = [
        partial(rotate_pairs, random(t, HEADS * SIZE).view(t, HEADS, SIZE), angles, positions,
                not norm, 1e-6 if norm else None)
        for _ in range(copies(nbytes))
    ]  # fmt: skip
    return Timed(f"rotate_pairs norm {norm} T {t}", runs, nbytes)


def inserting(t: int) -> Timed:
    nbytes = t * (2 * SIZE + KEYS.width + 4 * ROTARY)
    norm, angles, into = torch.randn(SIZE, device=DEVICE), table(), cache(KEYS)
    tokens = step(t, 1, POSITIONS)
    runs: list[Callable[[], object]] = []
    for _ in range(copies(nbytes)):
        slots = torch.randperm(SLOTS, device=DEVICE)[:t]
        runs.append(partial(insert_keys, random(t, SIZE), norm, 1e-6, angles, tokens, slots, into))
    return Timed(f"insert_keys T {t}", runs, nbytes)


def compressing(
    kind: Entries, ratio: int, overlap: bool, rows: int, count: int, complete: bool
) -> Timed:
    """Every row's last token completes an entry, or with one token each none does."""
    width, span = (2 * kind.size, 2 * ratio) if overlap else (kind.size, ratio)
    t, length = rows * count, span + SPARE
    entries = rows * (count // ratio if count > 1 else int(complete))
    kept = rows * min(count, length)
    pooled = span if count == 1 else ratio * width // kind.size
    nbytes = 4 * 2 * (2 * kept * width + entries * pooled * kind.size) + entries * kind.width
    end = POSITIONS if complete else POSITIONS - 1
    tokens, norm, into = step(rows, count, end), torch.randn(kind.size, device=DEVICE), cache(kind)
    places, angles = torch.randn(ratio, width, device=DEVICE), table()
    slots = torch.arange(t, device=DEVICE)
    runs = [
        partial(compress, torch.randn(t, 2, width, device=DEVICE), places,
                torch.randn(rows, length, 2, width, device=DEVICE), norm, 1e-6, angles, tokens,
                slots, into, ratio, overlap)
        for _ in range(copies(nbytes))
    ]  # fmt: skip
    name = f"compress {kind.size} by {ratio} rows {rows} x {count} entries {entries}"
    return Timed(name, runs, nbytes)


if __name__ == "__main__":
    command(__doc__)
    report([rotating(t, norm) for norm in (True, False) for t in TOKENS])
    report([inserting(t) for t in TOKENS])
    for layer in ((KEYS, 4, True), (PackedIndex(INDEX_SIZE), 4, True), (KEYS, 128, False)):
        small = [(rows, 1, complete) for complete in (False, True) for rows in (1, 8, 64, 256)]
        report([compressing(*layer, *sizes) for sizes in (*small, (1, 8192, True))])
