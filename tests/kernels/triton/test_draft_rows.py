"""The rows of a drafting model, and its drafts: against the references and by hand."""

from __future__ import annotations

import random

import pytest
import torch
from device_requests import POISON, copy_of, request, rows_of, state_of

from quire.kernels.device_state import DeviceState, RowFlag
from quire.kernels.reference.step.draft_rows import draft_rows as rows_reference
from quire.kernels.reference.step.keep_drafts import keep_drafts as keep_reference
from quire.kernels.sampling import Status
from quire.kernels.triton.step.draft_rows import draft_rows
from quire.kernels.triton.step.keep_drafts import keep_drafts

SAMPLE, DRAFTS, BEHIND, PROPOSE = (int(flag) for flag in RowFlag)
Row = tuple[int, int, int, int]


def state(lengths: list[int], device: torch.device) -> DeviceState:
    return state_of([request(s, [1] * n) for s, n in enumerate(lengths)], device, max_len=30)


def rows_behind(at: DeviceState, rows: list[Row], behind: int, lags: bool = False) -> list[Row]:
    """Kernel and reference must agree."""
    table = rows_of(rows, at.device)
    found, wanted = (torch.full_like(table, POISON) for _ in range(2))
    draft_rows(at, table, behind, found, lags)
    rows_reference(at, table, behind, wanted, lags)
    assert torch.equal(found, wanted)
    return [tuple(row) for row in found.tolist()]


def test_what_counts_is_read_and_then_one_draft_after_the_other(device: torch.device) -> None:
    at = state([9, 9, 9, 20], device)
    rows = [
        (0, 5, 4, SAMPLE + 3 * DRAFTS + 3 * PROPOSE),  # tokens 5 to 8: all but one are drafts
        (1, 5, 4, SAMPLE + 3 * DRAFTS),  # no drafts are wanted: token 8 has no block
        (2, 8, 1, SAMPLE + PROPOSE),  # failed: it has no token more
        (3, 0, 16, 0),  # a prompt's beginning
        (-1, 0, 0, 0),
    ]
    last = [(3, 0, 16, 0), (-1, 0, 0, 0)]
    assert rows_behind(at, rows, 0) == [(0, 5, 4, SAMPLE), (1, 5, 3, 0), (2, 8, 1, SAMPLE), *last]
    one = [(3, 15, 1, 0), (-1, 0, 0, 0)]
    for behind, known in ((1, 1), (2, 2), (3, 2)):  # two drafts are read, the third only made
        assert rows_behind(at, rows, behind) == [
            (0, 8 + known, 1, SAMPLE + (DRAFTS + BEHIND) * known),
            (1, 7, 1, 0),
            (2, 8, 1, SAMPLE),
            *one,
        ]


def test_a_module_that_is_told_the_next_token_is_one_behind(device: torch.device) -> None:
    at = state([9, 9, 9, 20], device)
    rows = [
        (0, 5, 5, SAMPLE + 4 * DRAFTS + 3 * PROPOSE),  # tokens 5 to 7 stand, the next one is known
        (1, 5, 4, SAMPLE + 3 * DRAFTS),
        (2, 8, 1, SAMPLE + PROPOSE),  # failed: what follows its token is not known
        (3, 0, 16, 0),
        (-1, 0, 0, 0),
    ]
    last = [(3, 0, 16, 0), (-1, 0, 0, 0)]
    read = [(0, 5, 3, SAMPLE), (1, 5, 3, 0), (2, 8, 1, SAMPLE), *last]
    assert rows_behind(at, rows, 0, lags=True) == read
    one = [(3, 15, 1, 0), (-1, 0, 0, 0)]
    for behind, known in ((1, 1), (2, 2), (3, 2)):
        assert rows_behind(at, rows, behind, lags=True) == [
            (0, 7 + known, 1, SAMPLE + (DRAFTS + BEHIND) * known),
            (1, 7, 1, 0),
            (2, 8, 1, SAMPLE),
            *one,
        ]


@pytest.mark.parametrize("seed", range(4))
def test_any_rows_equal_the_reference(seed: int, device: torch.device) -> None:
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, 25) for _ in range(6)]
    at = state(lengths, device)
    rows: list[Row] = []
    for slot in range(numbers.randint(0, 6)):
        start = numbers.randrange(lengths[slot])
        count = numbers.randint(1, lengths[slot] - start)
        flags = numbers.choice([0, SAMPLE, SAMPLE + numbers.randint(1, 4) * PROPOSE])
        flags += DRAFTS * numbers.randint(0, count - 1) if flags else 0
        rows.append((numbers.choice([slot, slot, -1]), start, count, flags))
    for behind in range(5):
        rows_behind(at, rows, behind, lags=True)
        table = rows_behind(at, rows, behind)
        assert behind == 0 or all(row[2] == 1 for row in table if row[0] >= 0)
        check_keep(at, table, behind, numbers)


def check_keep(at: DeviceState, rows: list[Row], behind: int, numbers: random.Random) -> list[int]:
    wanted_state = copy_of(at)
    tokens = [numbers.randrange(50) for _ in rows]
    status = [int(numbers.choice([Status.OK, Status.OK, Status.NAN])) for _ in rows]
    given = [torch.tensor(each, dtype=torch.int32, device=at.device) for each in (tokens, status)]
    found, wanted = (torch.full_like(given[0], POISON) for _ in range(2))
    table = rows_of(rows, at.device)
    keep_drafts(at, table, behind, *given, found)
    keep_reference(wanted_state, table, behind, *given, wanted)
    assert torch.equal(found, wanted)
    assert torch.equal(at.arena, wanted_state.arena)
    kept: list[int] = found.tolist()
    for row, token, ok, got in zip(rows, tokens, status, kept, strict=True):
        mine = row[0] >= 0 and row[3] & SAMPLE and row[3] // BEHIND == behind
        assert got == (token if mine and ok == Status.OK else -1)
    return kept


def test_drafts_lie_behind_what_is_known_and_within_the_history(device: torch.device) -> None:
    at = state([9, 30], device)
    rows = [(0, 10, 1, SAMPLE + 2 * (DRAFTS + BEHIND)), (1, 29, 1, SAMPLE + DRAFTS + BEHIND)]
    tokens, status = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([7, 8], [0, 0]))
    kept = torch.zeros_like(tokens)
    before = at.arena.clone()
    keep_drafts(at, rows_of(rows, device), 2, tokens, status, kept)
    assert kept.tolist() == [7, -1] and int(at.history[0, 11]) == 7
    keep_drafts(at, rows_of(rows, device), 1, tokens, status, kept)
    assert kept.tolist() == [-1, 8], "the last place behind the context is none of the history"
    changed = (at.arena != before).nonzero().flatten().tolist()
    assert changed == [at.layout.offset(0, "history", 11)]
