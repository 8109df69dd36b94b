"""What slots remember over steps, and how a batch's rows are laid out flat."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from quire.kv import BLOCK_SIZE
from quire.params import SamplingParams
from quire.runner.slots import Slots, TokenCounts, flatten, new_slot
from quire.step import DEVICE_TOKEN, Batch, Enter, Row

PLAIN = SamplingParams()


def enter(
    slot: int, tokens: list[int], blocks: list[list[int]], prompt: int | None = None
) -> Enter:
    count = len(tokens) if prompt is None else prompt
    return Enter(slot, PLAIN, tokens, count, 0, 0, blocks, [], [])


def test_leave_comes_before_enter_so_a_slot_can_change_hands_in_one_step() -> None:
    slots = Slots(2, 4, 1)
    slots.apply(Batch(1, [], [enter(0, [1], [[5, 6]])], []))
    slots.apply(Batch(2, [0], [enter(0, [7, 8], [[9]])], []))
    assert slots[0].tokens == [7, 8]
    assert slots.tables[0][0, :1].tolist() == [9]
    slots.apply(Batch(3, [], [], [Row(0, 0, [7, 8], [[3, 4]], sample=True)]))
    assert slots.tables[0][0, :3].tolist() == [9, 3, 4], "the table starts anew with its owner"


def test_every_group_has_a_table_of_its_own() -> None:
    slots = Slots(1, 4, 2)
    slots.apply(Batch(1, [], [enter(0, [1], [[1, 2], [3]])], [Row(0, 0, [1], [[], [4]], True)]))
    assert slots.tables[0][0].tolist() == [1, 2, 0, 0]
    assert slots.tables[1][0].tolist() == [3, 4, 0, 0]


def test_penalty_counts_start_from_the_committed_output() -> None:
    params = SamplingParams(frequency_penalty=0.5)
    slot = new_slot(Enter(0, params, [9, 9, 4, 4, 2], 2, 0, 0, [], [], []))
    assert slot.output_counts is not None and slot.prompt_ids is not None
    assert slot.prompt_ids.tolist() == [9]
    assert slot.output_counts.ids.tolist() == [4, 2]
    assert slot.output_counts.counts.tolist() == [2, 1]
    slot.append(2)
    assert slot.output_counts.counts.tolist() == [2, 2]
    assert (slot.num_output, slot.tokens[-1]) == (4, 2)
    assert new_slot(enter(0, [1], [])).output_counts is None


def test_counts_grow_with_the_number_of_distinct_tokens() -> None:
    tokens = [i * i % 101 for i in range(300)]
    counts, expected = TokenCounts(tokens[:7]), Counter(tokens)
    for token in tokens[7:]:
        counts.add(token)
    assert counts.ids.tolist() == list(expected)
    assert counts.counts.tolist() == list(expected.values())


def test_reset_forgets_all_requests() -> None:
    slots = Slots(1, 4, 1)
    slots.apply(Batch(1, [], [enter(0, [1], [[1]])], []))
    slots.reset()
    with pytest.raises(AssertionError):
        slots[0]


def test_a_token_still_on_the_device_is_read_from_the_slot() -> None:
    slots = Slots(1, 4, 1)
    slots.apply(Batch(1, [], [enter(0, [5, 6], [[1]])], []))
    slots[0].append(8)
    flat = flatten([Row(0, 2, [DEVICE_TOKEN], [[]], True)], slots)
    assert (flat.tokens_T.tolist(), flat.positions_T.tolist()) == ([8], [2])


def test_rows_are_laid_out_with_positions_contexts_and_slots_of_the_cache() -> None:
    generator = random.Random(2)
    groups, most = 2, 6
    slots = Slots(8, most, groups)
    blocks = list(range(1, 200))
    generator.shuffle(blocks)
    tables, enters, rows = {}, [], []
    for index in (5, 0, 3, 7):
        length = generator.randrange(1, most * BLOCK_SIZE)
        start = generator.randrange(length)
        tables[index] = [[blocks.pop() for _ in range(most)] for _ in range(groups)]
        tokens = [generator.randrange(1000) for _ in range(length)]
        enters.append(enter(index, tokens, tables[index]))
        stop = generator.randrange(start + 1, length + 1)
        rows.append(Row(index, start, tokens[start:stop], [[], []], stop == length))
    slots.apply(Batch(1, [], enters, rows))
    flat = flatten(rows, slots)
    expected_tokens, positions, places = [], [], [[], []]  # type: ignore[var-annotated]
    for row in rows:
        for i, token in enumerate(row.tokens):
            position = row.start + i
            expected_tokens.append(token)
            positions.append(position)
            for g in range(groups):
                block = tables[row.slot][g][position // BLOCK_SIZE]
                places[g].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
    assert flat.tokens_T.tolist() == expected_tokens
    assert flat.positions_T.tolist() == positions
    assert [s.tolist() for s in flat.slots] == places
    assert np.diff(flat.query_start).tolist() == [len(r.tokens) for r in rows]
    assert flat.context_len.tolist() == [r.start + len(r.tokens) for r in rows]
    for g in range(groups):
        for row, table in zip(rows, flat.block_tables[g], strict=True):
            used = -(-(row.start + len(row.tokens)) // BLOCK_SIZE)
            assert table[:used].tolist() == tables[row.slot][g][:used]
    assert flat.tokens_T.dtype == flat.positions_T.dtype == np.int64
    assert flat.query_start.dtype == flat.context_len.dtype == np.int32
