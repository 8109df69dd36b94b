"""Which drafts stand, on the device: against the reference and by hand."""

from __future__ import annotations

import random

import pytest
import torch
from device_requests import copy_of, request, rows_of, state_of

from quire.kernels.device_state import DeviceState, RowFlag
from quire.kernels.reference.sampling.accept import accept as reference
from quire.kernels.sampling import SampleOutputs, Status
from quire.kernels.triton.sampling.accept import accept
from quire.params import SamplingParams

Row = tuple[int, list[int], list[int], list[int]]  # slot, drafts, tokens sampled, their status
OK = int(Status.OK)


def given(rows: list[Row], device: torch.device) -> tuple[torch.Tensor, DeviceState, SampleOutputs]:
    """Of slots with a prompt of 4 tokens and two of output, every second one penalised."""
    penalised = SamplingParams(presence_penalty=1.0)
    state = state_of(
        [
            request(slot, [1, 2, 2, 3, 5, 6], 4, penalised if slot % 2 else SamplingParams())
            for slot in range(6)
        ],
        device,
        max_len=9,
    )
    table, tokens, status = [], [], []
    for slot, drafts, sampled, errors in rows:
        if slot >= 0:
            state.history[slot, 6 : 6 + len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
        for behind in range(len(drafts) + 1):
            flags = RowFlag.DRAFTS * len(drafts) + RowFlag.BEHIND * behind
            table.append((slot, 99, 99, flags + (RowFlag.SAMPLE if sampled else 0)))
        tokens += sampled or [-1] * (len(drafts) + 1)
        status += errors or [int(Status.SKIPPED)] * (len(drafts) + 1)
    out = SampleOutputs.allocate(len(table), device)
    out.tokens[:] = torch.tensor(tokens, dtype=torch.int32)
    out.status[:] = torch.tensor(status, dtype=torch.int32)
    return rows_of(table, device), state, out


def check(rows: list[Row], device: torch.device) -> DeviceState:
    table, state, out = given(rows, device)
    wanted = copy_of(state)
    accept(table, state, out)
    reference(table, wanted, out)
    assert torch.equal(state.arena, wanted.arena)
    assert torch.equal(state.counts, wanted.counts)
    return state


def test_tokens_are_appended_up_to_the_first_that_is_no_draft(device: torch.device) -> None:
    nan = int(Status.NAN)
    state = check(
        [
            (1, [7, 8], [7, 8, 9], [OK, OK, OK]),
            (0, [7, 8], [7, 4, 9], [OK, OK, OK]),
            (-1, [7], [], []),
            (3, [7, 7], [7, 7, 9], [OK, OK, nan]),
            (2, [], [4], [OK]),
            (4, [7, 8], [-1, 8, 9], [nan, OK, OK]),
            (5, [7], [], []),
        ],
        device,
    )
    assert state.length[:6].tolist() == [8, 9, 7, 8, 6, 6]
    assert state.history[1, 6:9].tolist() == [7, 8, 9]
    assert state.history[0, 6:8].tolist() == [7, 4]
    assert state.history[3, 6:8].tolist() == [7, 7]
    assert [int(state.counts[1, token]) for token in (7, 8, 9)] == [1, 1, 1]
    assert int(state.counts[3, 7]) == 2


def test_a_slot_takes_its_last_token_and_none_beyond(device: torch.device) -> None:
    """History holds one token more than the context."""
    state = check([(0, [7, 8, 9], [7, 8, 9, 4], [OK] * 4)], device)
    assert state.length[0] == 10 and state.history[0, 6:10].tolist() == [7, 8, 9, 4]


@pytest.mark.parametrize("seed", range(6))
def test_any_rows_equal_the_reference(seed: int, device: torch.device) -> None:
    numbers = random.Random(seed)
    rows: list[Row] = []
    for slot in numbers.sample([0, 1, 2, 3, 4, 5, -1], numbers.randint(0, 7)):
        drafts = [numbers.randrange(3) for _ in range(numbers.randint(0, 3))]
        if slot < 0 or numbers.random() < 0.1:
            rows.append((slot, drafts, [], []))
            continue
        sampled = [numbers.randrange(3) for _ in range(len(drafts) + 1)]
        status = [OK if numbers.random() < 0.8 else int(Status.NAN) for _ in sampled]
        rows.append((slot, drafts, sampled, status))
    check(rows, device)
