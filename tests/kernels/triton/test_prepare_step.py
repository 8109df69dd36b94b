"""A step's inputs against the reference and against quire.runner.slots.flatten."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from device_requests import POISON, request, rows_of, state_of

from quire.kernels.device_state import DeviceState, StepBuffers
from quire.kernels.reference.step.prepare_step import prepare_step as reference
from quire.kernels.triton.step.prepare_step import prepare_step
from quire.runner.slots import Slots, flatten
from quire.step import Batch, Row

GROUPS, MAX_LEN, MAX_BLOCKS, NUM_SLOTS = 2, 1300, 84, 6
LENGTHS = [1, 17, 640, 1290, 33]
CACHED = [0, 0, 0, 602, 32]
SIZES = [(16, 16), (16, 128), (48, 16)]


def state(device: torch.device, sizes: tuple[int, ...] = SIZES[0]) -> DeviceState:
    return state_of(
        [
            request(
                slot,
                [(31 * slot + i) % 47 for i in range(length)],
                blocks=[[100 * (slot + 1) + 7 * g + b for b in range(82)] for g in range(GROUPS)],
                cached=CACHED[slot],
            )
            for slot, length in enumerate(LENGTHS)
        ],
        device,
        slots=NUM_SLOTS,
        max_len=MAX_LEN,
        groups=sizes,
        max_blocks=MAX_BLOCKS,
    )


def poisoned(rows: int, tokens: int, device: torch.device) -> StepBuffers:
    out = StepBuffers.allocate(rows, tokens, GROUPS, MAX_BLOCKS, device)
    for field in fields(out):
        getattr(out, field.name).fill_(POISON)
    return out


CASES = {
    "nothing": ([], 0),
    "only padding": ([(-1, 0, 0, 0)] * 2, 3),
    "decode": ([(3, 1289, 1, 1), (0, 0, 1, 1), (4, 32, 1, 1)], 3),
    "decode with padding": ([(2, 639, 1, 1), (1, 16, 1, 1), (-1, 0, 0, 0)], 3),
    "one prompt": ([(2, 0, 640, 1)], 640),
    "mixed": ([(3, 600, 690, 1), (1, 16, 1, 1), (2, 3, 520, 0), (0, 0, 1, 1)], 1300),
    "drafts": ([(3, 1289, 4, 1 + 3 * 256), (1, 16, 1, 1), (4, 30, 5, 1 + 2 * 256)], 10),
    "unknown tokens": ([(1, 17, 1, 1), (4, 30, 5, 1)], 6),
}


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_step_equals_reference(
    case: str, sizes: tuple[int, ...], ahead: int, device: torch.device
) -> None:
    rows, tokens = CASES[case]
    at = state(device, sizes)
    # Views of larger buffers: what lies behind them must stay.
    found, wanted = (poisoned(len(rows) + 2, tokens + 3, device) for _ in range(2))
    prepare_step(at, rows_of(rows, device), found.view(len(rows), tokens), ahead)
    reference(at, rows_of(rows, device), wanted.view(len(rows), tokens), ahead)
    for field in fields(found):
        assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name


@pytest.mark.parametrize("sizes", SIZES[:2])
@pytest.mark.parametrize("case", ["decode", "one prompt", "mixed"])
def test_step_equals_the_eager_runners(
    case: str, sizes: tuple[int, ...], device: torch.device
) -> None:
    rows, tokens = CASES[case]
    at = state(device, sizes)
    found = poisoned(len(rows), tokens, device)
    prepare_step(at, rows_of(rows, device), found)
    slots = Slots(NUM_SLOTS, MAX_BLOCKS, GROUPS, sizes)
    enters = [
        request(
            s,
            at.history[s, :n].tolist(),
            blocks=[t[:82].tolist() for t in at.tables[s]],
            cached=CACHED[s],
        )
        for s, n in enumerate(LENGTHS)
    ]
    slots.apply(Batch(0, [], enters, []))
    nothing: list[list[int]] = [[]] * GROUPS
    wanted = flatten([Row(s, start, [0] * n, nothing, True) for s, start, n, _ in rows], slots)
    total = len(wanted.tokens_T)
    assert found.tokens[:total].tolist() == wanted.tokens_T.tolist()
    assert found.positions[:total].tolist() == wanted.positions_T.tolist()
    assert found.query_start.tolist() == wanted.query_start.tolist()
    assert found.context_len.tolist() == wanted.context_len.tolist()
    for g in range(GROUPS):
        # What the eager runner writes to the null block is not written here.
        written = [slot if slot >= sizes[g] else -1 for slot in wanted.slots[g].tolist()]
        assert found.slots[g, :total].tolist() == written
        for i, context in enumerate(wanted.context_len):
            needed = -(-int(context) // sizes[g])
            table = wanted.block_tables[g][i, :needed].tolist()
            assert found.block_tables[g, i, :needed].tolist() == table
            assert (found.block_tables[g, i, needed:] == POISON).all()
    assert found.state_slots.tolist() == wanted.state_slots.tolist()
    assert (found.slots[:, total:] == -1).all() and not found.tokens[total:].any()
    owners = [i for i, (_, _, count, _) in enumerate(rows) for _ in range(count)]
    assert found.rows.tolist() == owners + [-1] * (tokens - total)


def test_the_tokens_that_follow_have_the_places_of_those_before(device: torch.device) -> None:
    at = state(device)
    here, ahead = (poisoned(3, 5, device) for _ in range(2))
    rows = rows_of([(3, 600, 3, 1), (1, 15, 1, 1), (2, 3, 1, 0)], device)
    prepare_step(at, rows, here)
    prepare_step(at, rows, ahead, ahead=1)
    at_3 = at.history[3, 601:604].tolist()
    assert ahead.tokens.tolist() == [*at_3, int(at.history[1, 16]), int(at.history[2, 4])]
    assert torch.equal(ahead.positions, here.positions) and torch.equal(ahead.slots, here.slots)


def test_a_token_that_was_never_sampled_is_zero(device: torch.device) -> None:
    at = state(device)
    assert int(at.history[1, 17]) == POISON
    out = poisoned(1, 1, device)
    prepare_step(at, rows_of([(1, 17, 1, 1)], device), out)
    assert (out.tokens.tolist(), out.positions.tolist()) == ([0], [17])


def test_a_long_requests_blocks_are_all_there_in_a_step_of_one_token(device: torch.device) -> None:
    length, blocks = 66000, [list(range(7, 4133)), list(range(9, 4135))]
    at = state_of(
        [request(0, [5] * length, blocks=blocks)],
        device, slots=1, max_len=length, groups=(16, 16), max_blocks=4126,
    )  # fmt: skip
    out = StepBuffers.allocate(2, 2, 2, 4126, device)
    prepare_step(at, rows_of([(0, length - 1, 1, 1), (-1, 0, 0, 0)], device), out)
    assert out.block_tables[:, 0, :4125].tolist() == [table[:4125] for table in blocks]
    assert out.slots[:, 0].tolist() == [16 * table[4124] + 15 for table in blocks]
    assert out.slots[:, 1].tolist() == [-1, -1] and out.context_len.tolist() == [length, 0]


def test_the_bytes_of_a_steps_buffers_are_what_is_allocated() -> None:
    found = StepBuffers.allocate(5, 33, 3, 7, "cpu")
    tensors = [getattr(found, item.name) for item in fields(found)]
    assert StepBuffers.nbytes(5, 33, 3, 7) == sum(tensor.nbytes for tensor in tensors)
