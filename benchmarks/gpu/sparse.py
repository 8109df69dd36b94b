"""Compressed attention of DeepSeek V4: choosing entries and attending to them, in both modes.

python -m benchmarks.gpu.sparse           # Flash
python -m benchmarks.gpu.sparse Pro

Decode, one new token for each request: bytes that must be read, against the memory bus. Prompts:
operations, of causal pairs, against the MMAs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.attention import block_tables
from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, copies, random
from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys
from quire.kernels.triton.compressed.select_entries import scratch_of, select_entries
from quire.kernels.triton.compressed.sparse_attention import sparse_attention, states_of

WINDOW, INDEX_HEADS, INDEX_SIZE, KEYS = 128, 64, 128, PackedKeys(512, 64)
# Tokens of an entry in the layers that choose among them, and in those that take all.
SPARSE, DENSE = 4, 128
BLOCK_TOKENS, WINDOW_BLOCK = 256, 16
SCRATCH = 1 << 24  # numbers: 64 MiB


@dataclass(frozen=True)
class Model:
    name: str
    heads: int
    chosen: int


@dataclass(frozen=True)
class Batch:
    """`requests` with `new` tokens each, of `context` in all."""

    requests: int
    new: int
    context: int

    def __str__(self) -> str:
        return f"{self.requests} x {self.new} of {self.context}"

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.context - self.new, self.context).repeat(self.requests)

    def tokens(self) -> StepTokens:
        rows = torch.arange(self.requests)
        start = torch.arange(self.requests + 1, dtype=torch.int32) * self.new
        lengths = torch.full((self.requests,), self.context, dtype=torch.int32)
        parts = (self.positions, rows.repeat_interleave(self.new), start, lengths, rows)
        return StepTokens(*(part.to(DEVICE) for part in parts))


MODELS = (Model("Flash", 64, 512), Model("Pro", 128, 1024))
BATCHES = [Batch(b, 1, c) for b in (1, 8, 64) for c in (1024, 8192, 32768, 131072)] + [
    Batch(1, 8192, 8192), Batch(1, 2048, 32768), Batch(1, 2048, 131072),
]  # fmt: skip


def cache(tables: torch.Tensor, entries: Entries, per_block: int) -> Paged:
    """Memory for the blocks in `tables`, of some vectors again and again."""
    some = entries.pack(torch.randn(1024, entries.size), torch.uint8).to(DEVICE)
    slots = (int(tables.max()) + 1) * per_block
    memory = some[torch.randint(len(some), (slots,), device=DEVICE)]
    return Paged(memory, entries, tables, per_block)


def entry_cache(batch: Batch, ratio: int, entries: Entries) -> Paged:
    blocks = [-(-batch.context // BLOCK_TOKENS)] * batch.requests
    return cache(block_tables(blocks), entries, BLOCK_TOKENS // ratio)


def window_cache(batch: Batch) -> Paged:
    """Only the last blocks are ones of their own, as where a window has moved on."""
    kept = -(-(WINDOW + batch.new) // WINDOW_BLOCK) + 1
    block = torch.arange(-(-batch.context // WINDOW_BLOCK), dtype=torch.int32) % kept
    first = torch.arange(batch.requests, dtype=torch.int32) * kept
    return cache((first[:, None] + block).to(DEVICE), KEYS, WINDOW_BLOCK)


def choice(batch: Batch, count: int) -> torch.Tensor:
    """`count` entries for each token, spread over those that it sees."""
    visible_T = (batch.positions + 1) // SPARSE
    place = torch.arange(count)
    spread = (place + torch.rand(len(visible_T), count)) * (visible_T / count)[:, None]
    few_T = visible_T <= count
    first = place.where(place < visible_T[:, None], torch.tensor(-1))
    return torch.where(few_T[:, None], first, spread.long()).to(DEVICE, torch.int32)


def choosing(model: Model, batch: Batch) -> Timed:
    tokens, entries, kind = batch.requests * batch.new, batch.context // SPARSE, PackedIndex(128)
    nbytes = batch.requests * entries * kind.width + 4 * tokens * model.chosen
    nbytes += 2 * tokens * INDEX_HEADS * (INDEX_SIZE + 1)
    pairs = int(((batch.positions + 1) // SPARSE).sum())
    step, longest = batch.tokens(), -(-batch.context // BLOCK_TOKENS) * BLOCK_TOKENS // SPARSE
    scratch = torch.empty(max(SCRATCH, scratch_of(longest, model.chosen)), device=DEVICE)
    runs = [
        partial(
            select_entries, random(tokens, INDEX_HEADS, INDEX_SIZE), random(tokens, INDEX_HEADS),
            step, entry_cache(batch, SPARSE, kind), SPARSE, model.chosen, scratch=scratch,
        )
        for _ in range(copies(nbytes))
    ]  # fmt: skip
    name = f"choose {model.chosen}: {batch}"
    if batch.new == 1:
        return Timed(name, runs, nbytes=nbytes)
    return Timed(name, runs, flops=2.0 * pairs * INDEX_HEADS * INDEX_SIZE)


def attending(model: Model, batch: Batch, ratio: int, deterministic: bool) -> Timed:
    """`ratio` SPARSE: entries that are chosen; DENSE: all; 0: the window alone."""
    tokens, position_T = batch.requests * batch.new, batch.positions
    keys_T = (position_T + 1).clamp(max=WINDOW)
    if ratio:
        most = model.chosen if ratio == SPARSE else batch.context
        keys_T += ((position_T + 1) // ratio).clamp(max=most)
    keys = int(keys_T.sum())
    nbytes = keys * KEYS.width + 2 * 2 * tokens * model.heads * KEYS.size
    scratch = torch.empty(states_of(model.heads, KEYS.size, DEVICE), device=DEVICE)
    step, sinks, runs = batch.tokens(), torch.randn(model.heads, device=DEVICE), []
    for _ in range(copies(nbytes)):
        run = partial(
            sparse_attention, random(tokens, model.heads, KEYS.size), step, sinks,
            KEYS.size**-0.5, window_cache(batch), WINDOW, deterministic=deterministic,
            scratch=scratch,
        )  # fmt: skip
        if ratio:
            run = partial(run, compressed=entry_cache(batch, ratio, KEYS), ratio=ratio)
        if ratio == SPARSE:
            run = partial(run, chosen_TE=choice(batch, model.chosen))
        runs.append(run)
    kind = {SPARSE: "chosen", DENSE: "all", 0: "window"}[ratio]
    name = f"attend {kind}: {batch}{' deterministic' * deterministic}"
    if batch.new == 1:
        return Timed(name, runs, nbytes=nbytes)
    return Timed(name, runs, flops=4.0 * keys * model.heads * KEYS.size)


def cases(model: Model, batch: Batch) -> list[Timed]:
    return [choosing(model, batch)] + [
        attending(model, batch, ratio, deterministic)
        for deterministic in (False, True)
        for ratio in (0, SPARSE, DENSE)
    ]


if __name__ == "__main__":
    [wanted] = command(__doc__, model=[model.name for model in MODELS])
    for model in MODELS:
        if model.name == (wanted or "Flash"):
            for batch in BATCHES:
                report(cases(model, batch))
