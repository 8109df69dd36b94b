"""What a device step gave, read back: tokens, errors and log-probabilities of the right rows."""

from __future__ import annotations

import math

import pytest
import torch

from quire.kernels.sampling import SampleOutputs, Status
from quire.runner.diffs import Columns
from quire.runner.pending import DevicePending, HostOutputs, token_logprobs
from quire.step import FORBIDDEN_ERROR, NAN_ERROR, Row, RowResult


def outputs(tokens: list[int], status: list[int]) -> SampleOutputs:
    """Outputs for one row more than these, which no step uses."""
    made = SampleOutputs.allocate(len(tokens) + 1, "cpu")
    made.tokens[:-1], made.status[:-1] = torch.tensor(tokens), torch.tensor(status)
    made.tokens[-1] = made.status[-1] = 77
    return made


def decode(*slots: int) -> list[Row]:
    return [Row(slot, 4, [9], [[]], True) for slot in slots]


def pending(
    rows: list[Row], made: SampleOutputs, spoiled: list[int], logprobs: bool = False
) -> DevicePending:
    columns = Columns.of(rows)
    flags = torch.tensor([*spoiled, 1, 1], dtype=torch.int32)  # what follows is padding
    host = HostOutputs(made, flags)
    host.copy(len(columns.sampling), logprobs, 0 if columns.decode else columns.num_tokens)
    return DevicePending(3, columns, host, {})


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 255])
def test_tokens_and_status_are_one_aligned_piece_of_memory(rows: int) -> None:
    made = SampleOutputs.allocate(rows, "cpu")
    made.tokens.fill_(5)
    made.status.fill_(6)
    both = made.chosen()
    assert both.is_contiguous()
    assert both[:, :rows].tolist() == [[5] * rows, [6] * rows]
    assert not both[:, rows:].any()
    assert (made.status.data_ptr() - made.tokens.data_ptr()) % 16 == 0
    assert torch.equal(made.view(1).chosen(), both)


def test_a_decode_step_gives_a_token_or_an_error_to_each_row() -> None:
    ok, nan, forbidden = Status.OK, Status.NAN, Status.FORBIDDEN
    fine = pending(decode(2, 0, 1), outputs([4, 5, 6], [ok] * 3), [0, 0, 0])
    assert fine.result().step == 3
    assert (fine.result().tokens, fine.result().rows) == ([4, 5, 6], [])
    rows = pending(decode(2, 0, 1), outputs([4, -1, -1], [ok, nan, forbidden]), [0, 1, 0])
    assert rows.result().written_out() == [
        RowResult([4]),
        RowResult([], error=NAN_ERROR),
        RowResult([], error=FORBIDDEN_ERROR),
    ]


def test_a_spoiled_token_anywhere_in_a_row_is_its_error() -> None:
    rows = [
        Row(0, 0, [1, 2, 3], [[]], True),
        Row(1, 0, [1, 2], [[]], False),
        *decode(2),
        Row(3, 0, [1, 2], [[]], False),
    ]
    made = outputs([8, 9], [Status.OK] * 2)
    nan = RowResult([], error=NAN_ERROR)
    expected = [RowResult([8]), RowResult([]), RowResult([9]), RowResult([])]
    for spoiled in range(8):
        row = [0, 0, 0, 1, 1, 2, 3, 3][spoiled]
        flags = [int(i == spoiled) for i in range(8)]
        found = pending(rows, made, flags).result().written_out()
        assert found == [nan if i == row else want for i, want in enumerate(expected)]
    assert pending(rows, made, [0] * 8).result().written_out() == expected


def test_a_row_with_drafts_gives_what_stands_and_is_spoiled_by_no_refused_draft() -> None:
    rows = [Row(1, 4, [9, 5, 6], [[]], True, drafts=2), Row(3, 0, [1], [[]], False), *decode(2)]
    ok, nan = Status.OK, Status.NAN
    cases = [
        ([5, 6, 7], [ok, ok, ok], [], [5, 6, 7]),
        ([5, 6, 7], [ok, ok, ok], [2], None),  # an accepted draft counts
        ([5, 6, -1], [ok, ok, nan], [2], [5, 6]),
        ([5, 4, -1], [ok, ok, nan], [2], [5, 4]),
        ([5, -1, -1], [ok, nan, nan], [1, 2], [5]),
        ([4, -1, -1], [ok, nan, nan], [1, 2], [4]),
        ([5, 6, 7], [ok, ok, ok], [0], None),
        ([-1, 6, 7], [nan, ok, ok], [], None),
    ]
    for tokens, status, spoiled, expected in cases:
        flags = [int(i in spoiled) for i in range(5)]
        made = outputs([*tokens, 8], [*status, ok])
        found = pending(rows, made, flags).result().written_out()
        want = RowResult([], error=NAN_ERROR) if expected is None else RowResult(expected)
        assert found == [want, RowResult([]), RowResult([8])], (tokens, spoiled)
        if not spoiled:  # where all decode, logits tell
            assert pending([rows[0], rows[2]], made, flags).result().written_out() == [
                want,
                RowResult([8]),
            ]


def test_log_probabilities_come_with_the_rows_that_want_them() -> None:
    made = outputs([4, 5], [Status.OK] * 2)
    made.logprob[:2], made.rank[:2] = torch.tensor([-1.5, -2.5]), torch.tensor([1, 3])
    made.top_ids[1, :2], made.top_logprobs[1, :2] = torch.tensor([7, 8]), torch.tensor([-0.5, -1.0])
    step = pending(decode(0, 1), made, [0, 0], logprobs=True)
    step.wanted = [None, 2]
    first, second = step.result().rows
    assert first == RowResult([4])
    assert second == RowResult([5], [token_logprobs(5, -2.5, 3, [7, 8], [-0.5, -1.0])])


def test_log_probabilities_of_a_prompt_that_are_nan_are_an_error() -> None:
    for value, error in ((-1.0, None), (math.nan, NAN_ERROR)):
        step = pending(decode(0), outputs([4], [Status.OK]), [0])
        step.prompts[0] = [token_logprobs(9, value, 1, [], [])]
        [row] = step.result().rows
        assert row.error == error and row.tokens == ([] if error else [4])
        assert (row.prompt_logprobs is None) is (error is not None)


def test_a_held_step_is_done_and_has_a_result_only_once_it_is_open() -> None:
    step = pending(decode(0), outputs([4], [Status.OK]), [0])
    given: list[dict[int, bytes]] = []
    step.hold(lambda mine, masks: given.append(masks))
    assert not step.done()
    with pytest.raises(AssertionError, match="opened first"):
        step.result()
    step.open({0: b"mask"})
    assert (
        step.done() and given == [{0: b"mask"}] and step.result().written_out() == [RowResult([4])]
    )
    with pytest.raises(AssertionError, match="open already"):
        step.open({})
