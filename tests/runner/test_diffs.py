"""What the host sends arrives: every field of a request, however the packets are cut."""

from __future__ import annotations

import math

import pytest
import torch

from quire.kernels.device_state import (
    MAX_WORD_TOKENS,
    MAX_WORDS,
    DeviceState,
    Flag,
    RowFlag,
    Scalar,
)
from quire.kernels.reference.step.apply_runs import apply_runs
from quire.params import SamplingParams
from quire.runner.diffs import Columns, Diffs, unfit, variant
from quire.runner.packets import PacketRing, Run
from quire.step import DEVICE_TOKEN, Batch, Decoding, Enter, Row, mask_of, written_out

V = 70


def state() -> DeviceState:
    return DeviceState.allocate(5, max_len=100, vocab_size=V, groups=2, max_blocks=9)


def enter(slot: int = 3, **fields: object) -> Enter:
    defaults: dict[str, object] = {
        "slot": slot, "params": SamplingParams(), "tokens": [5, 6, 7], "num_prompt": 2, "seed": 1,
        "choice": 0, "blocks": [[4], [2, 3]], "end_tokens": [], "bad_words": [],
    }  # fmt: skip
    return Enter(**{**defaults, **fields})  # type: ignore[arg-type]


def apply(state: DeviceState, runs: list[Run], ring: PacketRing | None = None) -> None:
    for packet, num_runs in (ring or PacketRing(state.device)).send(runs):
        apply_runs(state.arena, packet, num_runs)


PARAMS = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    top_k=11,
    min_p=0.25,
    presence_penalty=0.5,
    frequency_penalty=-1.5,
    repetition_penalty=1.25,
    min_tokens=4,
    logprobs=7,
    logit_bias={9: 1.5, 0: -100.0},
    allowed_token_ids=[0, 31, 32, 69],
    max_tokens=None,
)


@pytest.mark.parametrize("capacity", [2**16, 37, 8, 5])
def test_a_request_arrives_whole_through_packets_of_any_size(capacity: int) -> None:
    at, seed = state(), 2**64 - 5
    one = enter(
        params=PARAMS, seed=seed, choice=127, end_tokens=[1, 2], bad_words=[[8], [9, 10, 11]]
    )
    diffs = Diffs(at.layout)
    apply(at, diffs.enter(one), PacketRing(at.device, capacity, depth=2))
    assert at.history[3, :3].tolist() == [5, 6, 7]
    assert (int(at.length[3]), int(at.num_prompt[3])) == (3, 2)
    assert at.tables[3, 0, :2].tolist() == [4, 0]
    assert at.tables[3, 1, :3].tolist() == [2, 3, 0]
    ints = at.scalars[3].tolist()
    assert (ints[Scalar.SEED_LOW], ints[Scalar.SEED_HIGH], ints[Scalar.CHOICE]) == (-5, -1, 127)
    assert (ints[Scalar.MIN_TOKENS], ints[Scalar.TOP_K], ints[Scalar.NUM_LOGPROBS]) == (4, 11, 7)
    counts = (Scalar.NUM_ENDS, Scalar.NUM_BIAS, Scalar.NUM_WORDS, Scalar.LONGEST_WORD)
    assert [ints[c] for c in counts] == [2, 2, 2, 3]
    floats = at.scalars[3].contiguous().view(torch.float32)
    assert floats[Scalar.TEMPERATURE] == torch.tensor(0.7)
    assert floats[Scalar.LOG_MIN_P] == torch.tensor(math.log(0.25))
    assert floats[[Scalar.PRESENCE, Scalar.FREQUENCY, Scalar.REPETITION]].tolist() == [
        0.5,
        -1.5,
        1.25,
    ]
    assert at.scalars[3].contiguous().view(torch.float64)[Scalar.TOP_P // 2] == 0.9
    assert at.ends[3, :2].tolist() == [1, 2]
    assert at.bias_ids[3, :2].tolist() == [9, 0]
    assert at.bias_values[3, :2].tolist() == [1.5, -100.0]
    assert at.word_starts[3, :3].tolist() == [0, 1, 4]
    assert at.word_tokens[3, :4].tolist() == [8, 9, 10, 11]
    bits = [bool(int(at.allowed[3, t // 32]) >> t % 32 & 1) for t in range(V)]
    assert [t for t in range(V) if bits[t]] == [0, 31, 32, 69]
    assert not at.scalars[[0, 1, 2, 4]].any() and not at.history[[0, 1, 2, 4]].any()


@pytest.mark.parametrize(
    ("params", "fields", "flags"),
    [
        ({}, {}, Flag(0)),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, {}, Flag.GREEDY),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.5}, {}, Flag.TOP_K | Flag.TOP_P | Flag.MIN_P),
        ({"top_k": V, "logprobs": 0}, {}, Flag.LOGPROBS),
        ({"repetition_penalty": 1.1}, {}, Flag.PENALTIES),
        ({"logit_bias": {}, "min_tokens": 2}, {}, Flag(0)),
        ({"min_tokens": 1}, {"end_tokens": [2]}, Flag(0)),  # there is one output token already
        ({"min_tokens": 2}, {"end_tokens": [2]}, Flag.ENDS),
        ({"allowed_token_ids": [1]}, {"bad_words": [[3]]}, Flag.ALLOWED | Flag.BAD_WORDS),
    ],
)
def test_flags_say_what_a_request_needs(
    params: dict[str, object], fields: dict[str, object], flags: Flag
) -> None:
    diffs = Diffs(state().layout)
    diffs.enter(enter(params=SamplingParams(**params), **fields))  # type: ignore[arg-type]
    assert diffs.flags[3] == flags


def test_the_variant_is_the_least_that_serves_all() -> None:
    assert variant([]) == "greedy"
    assert variant([Flag.GREEDY, Flag.GREEDY | Flag.LOGPROBS]) == "greedy"
    assert variant([Flag.GREEDY, Flag(0)]) == "plain"
    assert variant([Flag.GREEDY, Flag(0), Flag.GREEDY | Flag.BIAS]) == "full"


def test_new_blocks_extend_the_tables_and_a_new_request_starts_them_again() -> None:
    at = state()
    diffs = Diffs(at.layout)
    apply(at, diffs.enter(enter(2, blocks=[[5], [6, 7]])))
    apply(at, diffs.blocks([Row(2, 3, [1], [[8, 9], []], True), Row(1, 0, [1], [[1], [1]], True)]))
    apply(at, diffs.blocks([Row(2, 4, [1], [[], [4]], True), Row(1, 1, [1], [[], []], True)]))
    assert at.tables[2].tolist() == [[5, 8, 9] + [0] * 6, [6, 7, 4] + [0] * 6]
    assert at.tables[1].tolist() == [[1] + [0] * 8, [1] + [0] * 8]
    apply(at, diffs.enter(enter(2, blocks=[[3], []])))
    apply(at, diffs.blocks([Row(2, 3, [1], [[2], [1]], True)]))
    assert at.tables[2, :, :2].tolist() == [[3, 2], [1, 7]]


def test_a_mask_arrives_within_what_the_request_allows_itself() -> None:
    at = state()
    diffs = Diffs(at.layout)
    mask = mask_of([1, 31, 32, 40], V)
    assert len(mask) == 12
    apply(at, diffs.enter(enter(2, params=SamplingParams(allowed_token_ids=[0, 31, 32, 69]))))
    apply(at, diffs.enter(enter(1)))
    assert diffs.flags[1:3] == [0, Flag.ALLOWED]
    for slot, tokens in ((2, [31, 32]), (1, [1, 31, 32, 40])):
        apply(at, diffs.mask(slot, mask))
        bits = [int(at.allowed[slot, t // 32]) >> t % 32 & 1 for t in range(V)]
        assert [t for t in range(V) if bits[t]] == tokens
        assert int(at.flags[slot]) == diffs.flags[slot] == Flag.ALLOWED
    apply(at, diffs.mask(2, mask_of([69], V)))
    assert int(at.allowed[2, 2]) == 1 << 5 and not at.allowed[2, :2].any()
    apply(at, diffs.enter(enter(2)))  # the next request in the slot allows itself everything
    assert diffs.flags[2] == int(at.flags[2]) == 0
    apply(at, diffs.mask(2, mask))
    assert at.allowed[2].tolist() == at.allowed[1].tolist()


def test_rows_that_may_not_sample_are_taken_out() -> None:
    rows = [Row(slot, 4, [5], [[]], True, False, gated=slot != 0) for slot in (4, 0, 2)]
    columns = Columns.of(rows)
    assert columns.gated == [0, 2]
    left = columns.without({2})
    assert (left.sampling, left.sampling_slots, left.places) == ([0, 1], [4, 0], [0, 1])
    assert left.slots == [4, 0, 2] and left.num_tokens == 3 and not left.decode


def test_rows_arrive_with_padding_after_them() -> None:
    at = state()
    rows = [Row(2, 7, [1, 2], [[], []], True), Row(0, 3, [1], [[], []], False)]
    apply(at, [Diffs(at.layout).rows(Columns.of(rows), 4)])
    assert at.rows[:4].tolist() == [
        [2, 7, 2, RowFlag.SAMPLE],
        [0, 3, 1, 0],
        [-1, 0, 0, 0],
        [-1, 0, 0, 0],
    ]
    assert not at.rows[4:].any()


def test_rows_that_sample_arrive_with_the_places_of_their_last_tokens() -> None:
    at = state()
    rows = [
        Row(2, 7, [1, 2], [[], []], True),
        Row(0, 3, [1, 4, 5], [[], []], False),
        Row(1, 9, [3], [[], []], True),
    ]
    columns = Columns.of(rows)
    assert (columns.num_tokens, columns.decode) == (6, False)
    apply(at, [Diffs(at.layout).sampling_rows(columns, 3, first=4)])
    assert at.rows[3:8].tolist() == [
        [0, 0, 0, 0],
        [2, 1, 0, RowFlag.SAMPLE],
        [1, 5, 0, RowFlag.SAMPLE],
        [-1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


def test_rows_with_drafts_sample_behind_each_and_their_drafts_arrive_in_the_history() -> None:
    at = state()
    rows = [
        Row(2, 7, [1, 8, 9], [[], []], True, drafts=2),
        Row(0, 3, [4, 5], [[], []], False),
        Row(1, 9, [3], [[], []], True, propose=3),
    ]
    columns, diffs = Columns.of(rows, drafting=True), Diffs(at.layout)
    assert not columns.decode and columns.num_rows == 3
    runs = [diffs.rows(columns, 3), *diffs.drafts(columns), diffs.sampling_rows(columns, 5, 4)]
    apply(at, runs)
    assert at.history[2, 8:10].tolist() == [8, 9]
    two = RowFlag.SAMPLE + 2 * RowFlag.DRAFTS
    wants = RowFlag.SAMPLE + 3 * RowFlag.PROPOSE
    assert at.rows[:3].tolist() == [[2, 7, 3, two], [0, 3, 2, 0], [1, 9, 1, wants]]
    assert at.rows[4:9].tolist() == [
        [2, 0, 0, two],
        [2, 1, 0, two + RowFlag.BEHIND],
        [2, 2, 0, two + 2 * RowFlag.BEHIND],
        [1, 5, 0, RowFlag.SAMPLE],
        [-1, 0, 0, 0],
    ]


def test_where_all_rows_decode_each_draft_is_a_row_of_its_own() -> None:
    at = state()
    rows = [Row(2, 7, [1, 8, 9], [[], []], True, drafts=2), Row(1, 9, [3], [[], []], True)]
    columns, diffs = Columns.of(rows), Diffs(at.layout)
    assert columns.decode and (columns.num_tokens, columns.num_rows) == (4, 4)
    apply(at, [diffs.rows(columns, 5), diffs.whole_rows(columns, 3, first=6)])
    sample, draft = int(RowFlag.SAMPLE), int(RowFlag.DRAFTS)
    assert at.rows[:5].tolist() == [
        [2, 7, 1, sample],
        [2, 8, 1, sample + draft],
        [2, 9, 1, sample + 2 * draft],
        [1, 9, 1, sample],
        [-1, 0, 0, 0],
    ]
    assert at.rows[6:9].tolist() == [
        [2, 7, 3, sample + 2 * draft],
        [1, 9, 1, sample],
        [-1, 0, 0, 0],
    ]


@pytest.mark.parametrize("last", [Row(1, 4, [5], [[]], False), Row(1, 4, [5, 6], [[]], True)])
def test_a_step_is_decode_only_where_every_row_samples_from_its_only_token(last: Row) -> None:
    rows = [Row(slot, 4, [5], [[]], True) for slot in (4, 0, 2)]
    found = Columns.of(rows)
    assert found.decode
    assert (found.sampling, found.sampling_slots, found.places) == ([0, 1, 2], [4, 0, 2], [0, 1, 2])
    mixed = Columns.of([*rows, last])
    assert not mixed.decode
    assert mixed.sampling_slots[:3] == [4, 0, 2] and mixed.places[:3] == [0, 1, 2]
    assert mixed.num_tokens == 3 + len(last.tokens)


def test_what_does_not_fit_a_slot_is_refused_in_words() -> None:
    diffs = Diffs(state().layout)
    assert unfit([], [[1]] * MAX_WORDS) is None
    for fields in (
        {"bad_words": [[1]] * (MAX_WORDS + 1)},
        {"bad_words": [[1] * MAX_WORD_TOKENS, [1]]},
        {"end_tokens": list(range(321))},
        {"tokens": list(range(101))},
    ):
        with pytest.raises(ValueError, match="at most"):
            diffs.enter(enter(**fields))


def test_plain_columns_are_those_of_the_rows_written_out() -> None:
    batch = Batch(1, [], [], [], Decoding([4, 0, 2], [7, 31, 16], {2: [[9]]}))
    rows = written_out(batch).rows
    assert rows == [
        Row(4, 7, [DEVICE_TOKEN], [], True),
        Row(0, 31, [DEVICE_TOKEN], [], True),
        Row(2, 16, [DEVICE_TOKEN], [[9]], True),
    ]
    assert batch.decoding is not None and batch.num_rows == batch.num_tokens == 3
    assert Columns.plain(batch.decoding) == Columns.of(rows)
