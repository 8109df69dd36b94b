"""Runs of any length land where they belong, and nothing else is written."""

from __future__ import annotations

from array import array

import pytest
import torch

from quire.kernels.reference.step.apply_runs import apply_runs as reference
from quire.kernels.triton.step.apply_runs import apply_runs
from quire.runner.packets import PIECE, PacketRing, Run

LENGTHS = [[], [1], [3, 1, 1024, 1025], [PIECE + 1, 7], [2 * PIECE]]


def runs_of(lengths: list[int], gap: int = 3) -> list[Run]:
    runs, offset = [], gap
    for length in lengths:
        values = array("i", [(7919 * (offset + i)) % 2**32 - 2**31 for i in range(length)])
        runs.append((offset, values))
        offset += length + gap
    return runs


@pytest.mark.parametrize("capacity", [2**16, 4096])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_runs_equal_reference(lengths: list[int], capacity: int, device: torch.device) -> None:
    found = torch.full((sum(lengths) + 64,), -7, dtype=torch.int32, device=device)
    wanted = found.clone()
    for packet, num_runs in PacketRing(device, capacity, depth=2).send(runs_of(lengths)):
        apply_runs(found, packet, num_runs)
        reference(wanted, packet, num_runs)
    assert torch.equal(found, wanted)
    by_hand = torch.full_like(found, -7)
    for offset, values in runs_of(lengths):
        by_hand[offset : offset + len(values)] = torch.tensor(values, dtype=torch.int32)
    assert torch.equal(found, by_hand)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="12 GiB of lazily touched memory")
def test_an_arena_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    arena = torch.empty(2**31 + 2**28, dtype=torch.int32, device=device)
    for offset in (2**31 - 1, 2**31 + 5, 2**31 + 2**28 - 3):
        for packet, num_runs in PacketRing(device).send([(offset, array("i", [1, -2, 3]))]):
            apply_runs(arena, packet, num_runs)
        if offset + 3 <= len(arena):
            assert arena[offset : offset + 3].tolist() == [1, -2, 3]
