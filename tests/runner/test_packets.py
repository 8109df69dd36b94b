"""Packets: those of most steps are alike, and can be taken as they lie in the ring."""

from __future__ import annotations

from array import array

import pytest
import torch

from quire.kernels.reference.step.apply_runs import apply_runs
from quire.runner.packets import SMALL, PacketRing, Run

CPU = torch.device("cpu")
LEAST = 5


def runs_of(lengths: list[int]) -> list[Run]:
    return [(10_000 * i, array("i", range(i, i + n))) for i, n in enumerate(lengths)]


def by_hand(lengths: list[int]) -> torch.Tensor:
    arena = torch.full((100_000,), -7, dtype=torch.int32)
    for offset, values in runs_of(lengths):
        arena[offset : offset + len(values)] = torch.tensor(values, dtype=torch.int32)
    return arena


@pytest.mark.parametrize(
    ("lengths", "taken"),
    [
        ([3], True),
        ([1, 7, 2000, 16], True),
        ([1] * LEAST, True),
        ([1] * (LEAST + 1), False),
        ([4000, SMALL - 4 * LEAST - 4000], True),
        ([4000, SMALL - 4 * LEAST - 3999], False),
    ],
)
def test_a_small_packet_is_taken_and_a_large_one_sent(lengths: list[int], taken: bool) -> None:
    ring = PacketRing(CPU, depth=2, least=LEAST)
    for takes in (True, False, True):
        arena, places = torch.full((100_000,), -7, dtype=torch.int32), list[int]()

        def take(place: int) -> bool:
            places.append(place)  # noqa: B023
            if takes:  # noqa: B023
                apply_runs(arena, *ring.small(place))  # noqa: B023
            return takes  # noqa: B023

        sent = list(ring.send(runs_of(lengths), take))
        assert len(places) == taken and bool(sent) == (not (taken and takes))
        for packet, num_runs in sent:
            assert num_runs == max(LEAST, len(lengths))
            apply_runs(arena, packet, num_runs)
        assert torch.equal(arena, by_hand(lengths))


def test_packets_without_runs_change_nothing_whatever_was_in_them() -> None:
    ring = PacketRing(CPU, depth=3, least=LEAST)
    for _ in range(4):
        assert len(list(ring.send(runs_of([5, 6])))) == 1
    arena, places = torch.full((100_000,), -7, dtype=torch.int32), list[int]()
    for place in ring.empty():
        places.append(place)
        apply_runs(arena, *ring.small(place))
    assert sorted(places) == [0, 1, 2] and torch.equal(arena, torch.full_like(arena, -7))


@pytest.mark.parametrize("capacity", [32, 33, 100])
def test_packets_of_any_size_bring_everything(capacity: int) -> None:
    lengths = [1, 40, 3, 0, 130, 7, 7, 7, 7]
    arena = torch.full((100_000,), -7, dtype=torch.int32)
    for packet, num_runs in PacketRing(CPU, capacity, depth=2, least=LEAST).send(runs_of(lengths)):
        assert len(packet) == capacity and num_runs >= LEAST
        apply_runs(arena, packet, num_runs)
    assert torch.equal(arena, by_hand(lengths))
