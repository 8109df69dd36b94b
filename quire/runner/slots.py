"""What a runner remembers of the request in each slot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.kv import BLOCK_SIZE
from quire.params import SamplingParams
from quire.step import Batch, Enter, Row


@dataclass
class Slot:
    """One request: its tokens so far (prompt, then everything sampled) and how to sample.

    `output_counts` and `prompt_tokens` are kept only where a penalty needs them.
    """

    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    seed: int
    choice: int
    end_tokens: list[int]
    bad_words: list[list[int]]
    output_counts: Counter[int] | None
    prompt_tokens: list[int] | None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.output_counts is not None:
            self.output_counts[token] += 1


def new_slot(enter: Enter) -> Slot:
    params = enter.params
    counted = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    penalised = counted != (0.0, 0.0, 1.0)
    return Slot(
        params=params,
        tokens=list(enter.tokens),
        num_prompt=enter.num_prompt,
        seed=enter.seed,
        choice=enter.choice,
        end_tokens=enter.end_tokens,
        bad_words=enter.bad_words,
        output_counts=Counter(enter.tokens[enter.num_prompt :]) if penalised else None,
        prompt_tokens=sorted(set(enter.tokens[: enter.num_prompt])) if penalised else None,
    )


class Slots:
    """All slots and their block tables, int32 [slots, max blocks] per KV group."""

    def __init__(self, num_slots: int, max_blocks: int, num_groups: int):
        self._slots: list[Slot | None] = [None] * num_slots
        self._filled = np.zeros((num_groups, num_slots), dtype=np.int64)
        self.tables = [np.zeros((num_slots, max_blocks), dtype=np.int32) for _ in range(num_groups)]

    def __getitem__(self, index: int) -> Slot:
        slot = self._slots[index]
        assert slot is not None, f"slot {index} is empty"
        return slot

    def apply(self, batch: Batch) -> None:
        """Leave, enter, and extend block tables, in the order of the contract."""
        for index in batch.leave:
            self._slots[index] = None
        for enter in batch.enter:
            self._slots[enter.slot] = new_slot(enter)
            for g, blocks in enumerate(enter.blocks):
                self._filled[g, enter.slot] = 0
                self._extend(g, enter.slot, blocks)
        for row in batch.rows:
            for g, blocks in enumerate(row.new_blocks):
                if blocks:
                    self._extend(g, row.slot, blocks)

    def reset(self) -> None:
        """Forget all requests."""
        self._slots = [None] * len(self._slots)

    def _extend(self, group: int, slot: int, blocks: list[int]) -> None:
        filled = self._filled[group, slot]
        self.tables[group][slot, filled : filled + len(blocks)] = blocks
        self._filled[group, slot] += len(blocks)


@dataclass
class Flat:
    """A Batch's rows laid out flat, as numpy arrays: T tokens, B rows."""

    tokens_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    query_start: npt.NDArray[np.int32]
    context_len: npt.NDArray[np.int32]
    block_tables: list[npt.NDArray[np.int32]]
    slots: list[npt.NDArray[np.int64]]


def flatten(rows: list[Row], slots: Slots) -> Flat:
    """Lay out the rows. Tokens come from the slots, which know sampled ones before the host."""
    lengths = np.array([len(r.tokens) for r in rows], dtype=np.int64)
    starts = np.array([r.start for r in rows], dtype=np.int64)
    query_start = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start[1:])
    tokens = [t for r in rows for t in slots[r.slot].tokens[r.start : r.start + len(r.tokens)]]
    owner_T = np.repeat(np.arange(len(rows)), lengths)
    positions_T = np.arange(len(tokens)) - np.repeat(query_start[:-1], lengths) + starts[owner_T]
    context_len = (starts + lengths).astype(np.int32)
    widest = -(-int(context_len.max(initial=0)) // BLOCK_SIZE)
    index = [r.slot for r in rows]
    block_tables, write_slots = [], []
    for table in slots.tables:
        mine = np.ascontiguousarray(table[index, :widest])
        block_tables.append(mine)
        blocks_T = mine[owner_T, positions_T // BLOCK_SIZE].astype(np.int64)
        write_slots.append(blocks_T * BLOCK_SIZE + positions_T % BLOCK_SIZE)
    return Flat(
        tokens_T=np.array(tokens, dtype=np.int64),
        positions_T=positions_T,
        query_start=query_start,
        context_len=context_len,
        block_tables=block_tables,
        slots=write_slots,
    )
