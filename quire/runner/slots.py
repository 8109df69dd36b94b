"""What a runner remembers of the request in each slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from quire.kv import BLOCK_SIZE
from quire.params import SamplingParams
from quire.step import Batch, Enter, Row, draft_tokens


class TokenCounts:
    """How often each token was sampled, as tensors that grow with the number of distinct ones."""

    def __init__(self, tokens: Iterable[int] = ()):
        self._places: dict[int, int] = {}
        self._ids = np.zeros(16, dtype=np.int64)
        self._counts = np.zeros(16, dtype=np.float32)
        for token in tokens:
            self.add(token)

    def copy(self) -> TokenCounts:
        """The same counts, to go on by themselves."""
        made = TokenCounts()
        made._places, made._ids = dict(self._places), self._ids.copy()
        made._counts = self._counts.copy()
        return made

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> torch.Tensor:
        """int64 [distinct tokens], in order of first appearance."""
        return torch.from_numpy(self._ids[: len(self._places)])

    @property
    def counts(self) -> torch.Tensor:
        """float32, one for each of `ids`."""
        return torch.from_numpy(self._counts[: len(self._places)])


@dataclass
class Slot:
    """One request: its tokens so far (prompt, then everything sampled) and how to sample.

    What a row of logits is indexed by is made once: `allowed`, `ends` and `bias_ids` (int64, None
    where the parameter is not given), `bias` their values. `output_counts` and `prompt_ids` (the
    prompt's distinct tokens) are kept only where a penalty needs them. `mask` bool [V]: tokens that
    the step being sampled may choose, None where its row is not gated.
    """

    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    seed: int
    choice: int
    bad_words: list[list[int]]
    ends: torch.Tensor | None
    allowed: torch.Tensor | None
    bias_ids: torch.Tensor | None
    bias: torch.Tensor | None
    output_counts: TokenCounts | None
    prompt_ids: torch.Tensor | None
    mask: torch.Tensor | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def branch(self) -> Slot:
        """The same request, to go on by guesses while this one stays."""
        counts = None if self.output_counts is None else self.output_counts.copy()
        return replace(self, tokens=list(self.tokens), output_counts=counts)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.output_counts is not None:
            self.output_counts.add(token)


def new_slot(enter: Enter) -> Slot:
    params = enter.params
    counted = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    penalised = counted != (0.0, 0.0, 1.0)
    prompt = enter.tokens[: enter.num_prompt]
    bias = params.logit_bias
    return Slot(
        params=params,
        tokens=list(enter.tokens),
        num_prompt=enter.num_prompt,
        seed=enter.seed,
        choice=enter.choice,
        bad_words=enter.bad_words,
        ends=_index(enter.end_tokens),
        allowed=_index(params.allowed_token_ids),
        bias_ids=_index(bias),
        bias=torch.tensor(list(bias.values()), dtype=torch.float32) if bias else None,
        output_counts=TokenCounts(enter.tokens[enter.num_prompt :]) if penalised else None,
        prompt_ids=torch.tensor(sorted(set(prompt))) if penalised else None,
    )


def _index(tokens: Collection[int] | None) -> torch.Tensor | None:
    return torch.tensor(list(tokens), dtype=torch.int64) if tokens else None


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


def _tokens(row: Row, known: list[int]) -> list[int]:
    """Of a row, whose slot knows these. A row that failed has appended nothing, and the step after
    it may be scheduled already: its result will be dropped, whatever token stands there."""
    count = len(row.tokens) - row.drafts
    found = known[row.start : row.start + count]
    if len(found) < count:
        found += [0] * (count - len(found))
    return found + draft_tokens(row) if row.drafts else found


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
    tokens = [token for row in rows for token in _tokens(row, slots[row.slot].tokens)]
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
