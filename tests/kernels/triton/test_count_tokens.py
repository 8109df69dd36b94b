"""Counts of prompt and output tokens against the reference and against counting by hand."""

from __future__ import annotations

import pytest
import torch
from device_requests import copy_of, request, state_of

from quire.kernels.reference.step.count_tokens import count_tokens as reference
from quire.kernels.triton.step.count_tokens import count_tokens
from quire.params import SamplingParams

PENALTY = SamplingParams(presence_penalty=0.5)


@pytest.mark.parametrize(("vocab_size", "max_len"), [(1, 5), (33, 40), (2049, 2300)])
def test_counts_equal_reference(vocab_size: int, max_len: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab_size)

    def tokens(count: int) -> list[int]:
        # Low ids often, high ones now and then.
        exponent = torch.rand(count, generator=generator) ** 3
        return (exponent * vocab_size).long().clamp(max=vocab_size - 1).tolist()

    lengths = [(0, 0), (3, 0), (0, 4), (2, 3), (max_len // 2, max_len - max_len // 2)]
    enters = [
        request(slot, tokens(prompt + output), prompt, PENALTY)
        for slot, (prompt, output) in enumerate(lengths)
    ]
    enters.append(request(5, tokens(4), 2))  # no penalty: its counts stay as they are
    found = state_of(enters, device, vocab_size=vocab_size, max_len=max_len)
    found.counts.fill_(-12345)
    wanted = copy_of(found)
    slots = torch.tensor([4, 0, -1, 5, 2, 3], dtype=torch.int32, device=device)
    count_tokens(found, slots)
    reference(wanted, slots)
    assert torch.equal(found.counts, wanted.counts)
    assert (found.counts[[1, 5, 6, 7]] == -12345).all()
    assert torch.equal(found.arena, wanted.arena)


def test_sign_bit_and_count(device: torch.device) -> None:
    state = state_of([request(1, [4, 4, 7, 7, 7, 9], 3, PENALTY)], device)
    state.counts.fill_(-12345)
    count_tokens(state, torch.tensor([1], dtype=torch.int32, device=device))
    counts = state.counts[1].tolist()
    assert {t: c for t, c in enumerate(counts) if c} == {4: -(2**15), 7: 2 - 2**15, 9: 1}


def test_a_count_stops_at_fifteen_bits(device: torch.device) -> None:
    length = 2**15 + 8
    state = state_of(
        [request(0, [0] + [1] * (length - 1), 1, PENALTY)], device, slots=1, max_len=length,
        vocab_size=2,
    )  # fmt: skip
    state.counts.fill_(-12345)
    count_tokens(state, torch.tensor([0], dtype=torch.int32, device=device))
    assert state.counts.tolist() == [[-(2**15), 2**15 - 1]]


def test_no_slots(device: torch.device) -> None:
    count_tokens(state_of([], device), torch.empty(0, dtype=torch.int32, device=device))
