"""Compressed entries are the same however a sequence is cut, and those of the formula."""

from __future__ import annotations

import random

import pytest
import torch

from quire.kernels.reference.compressed.compress import compress

SIZE, LENGTH = 6, 70


def rows(width: int) -> torch.Tensor:
    return torch.randn(LENGTH, 2, width, generator=torch.Generator().manual_seed(0)) * 2


def by_the_formula(given: torch.Tensor, ratio: int, overlap: bool) -> torch.Tensor:
    """Entry by entry and channel by channel."""
    entries = []
    for w in range(LENGTH // ratio):
        own = given[ratio * w : ratio * (w + 1), :, SIZE if overlap else 0 :]
        pooled = own
        if overlap and w > 0:
            pooled = torch.cat([given[ratio * (w - 1) : ratio * w, :, :SIZE], own])
        weights = (pooled[:, 1] - pooled[:, 1].amax(0)).exp()
        entries.append((pooled[:, 0] * weights).sum(0) / weights.sum(0))
    return torch.stack(entries)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (16, False), (5, False), (7, True)])
@pytest.mark.parametrize("chunks", [[70], [1] * 70, [3, 1, 40, 0, 26], [16, 16, 38]])
def test_entries_are_those_of_the_formula_however_the_sequence_is_cut(
    ratio: int, overlap: bool, chunks: list[int]
) -> None:
    given = rows(2 * SIZE if overlap else SIZE)
    state = torch.full((3, 2 * ratio + 5, *given.shape[1:]), torch.nan)
    found, ends, start = [], [], 0
    for count in chunks:
        entries, tokens = compress(
            given[start : start + count],
            state,
            torch.tensor([1]),
            torch.tensor([0, count]),
            torch.tensor([start + count]),
            ratio,
            overlap,
        )
        found.append(entries)
        ends += (tokens + start).tolist()
        start += count
    assert ends == [ratio * (w + 1) - 1 for w in range(LENGTH // ratio)]
    torch.testing.assert_close(torch.cat(found), by_the_formula(given, ratio, overlap))
    assert state[[0, 2]].isnan().all()


def test_requests_of_a_step_have_states_of_their_own_and_bits_that_no_other_changes() -> None:
    rng = random.Random(3)
    given = rows(2 * SIZE)
    whole, _ = compress(
        given, torch.empty(1, 24, 2, 2 * SIZE), torch.tensor([0]), torch.tensor([0, LENGTH]),
        torch.tensor([LENGTH]), 4, True,
    )  # fmt: skip
    state = torch.full((4, 24, 2, 2 * SIZE), torch.nan)
    done, found = [0, 0, 0], [[], [], []]
    while min(done) < LENGTH:
        counts = [min(rng.choice([0, 1, 2, 9, 30]), LENGTH - d) for d in done]
        step = torch.cat([given[d : d + n] for d, n in zip(done, counts, strict=True)])
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        done = [d + n for d, n in zip(done, counts, strict=True)]
        slots = torch.tensor([2, 0, 3])
        entries, tokens = compress(step, state, slots, starts, torch.tensor(done), 4, True)
        for entry, token in zip(entries, tokens.tolist(), strict=True):
            row = next(b for b in range(3) if starts[b] <= token < starts[b + 1])
            found[row].append(entry)
    for mine in found:
        assert torch.equal(torch.stack(mine), whole)


def test_refused_drafts_leave_no_trace() -> None:
    given, other = rows(SIZE), rows(SIZE).flip(0)
    state = torch.full((1, 16 + 4, 2, SIZE), torch.nan)

    def step(part: torch.Tensor, start: int) -> torch.Tensor:
        ends = torch.tensor([start + len(part)])
        bounds = torch.tensor([0, len(part)])
        return compress(part, state, torch.tensor([0]), bounds, ends, 16, False)[0]

    found = []
    for start in range(0, 64, 2):
        # One token is right and four are not: those are computed again, by other values.
        step(torch.cat([given[start : start + 1], other[:4]]), start)
        found.append(step(given[start + 1 : start + 2], start + 1))
    wanted = by_the_formula(given, 16, False)[:4]
    torch.testing.assert_close(torch.cat(found), wanted)
