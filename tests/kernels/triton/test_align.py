"""Sorting by expert against the reference, with one chunk of pairs and with several."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.align import align as reference
from quire.kernels.triton.moe import align as module
from quire.kernels.triton.moe.align import align, max_blocks
from tests.kernels.triton.moe_inputs import poisoned_memory, random_ids


def check(ids: torch.Tensor, experts: int, block: int, device: torch.device) -> None:
    wanted = reference(ids, experts, block)
    with poisoned_memory():
        found = align(ids.to(device), experts, block)
    count = int(wanted.blocks)
    assert found.blocks.tolist() == [count]
    assert (found.block, found.experts_per_token) == (block, ids.shape[1])
    assert torch.equal(found.pairs.cpu(), wanted.pairs)
    for name in ("experts", "starts", "ends"):
        assert torch.equal(getattr(found, name)[:count].cpu(), getattr(wanted, name)[:count]), name
    assert found.experts.shape == (max_blocks(ids.numel(), experts, block),)


@pytest.mark.parametrize(
    ("t", "e", "k", "block"),
    [
        (0, 4, 2, 16),
        (1, 4, 1, 16),
        (1, 8, 3, 16),
        (37, 5, 2, 16),
        (33, 16, 16, 64),
        (40, 20, 8, 32),
    ],
)
def test_align_equals_reference(t: int, e: int, k: int, block: int, device: torch.device) -> None:
    check(random_ids(t + e, t, e, k), e, block, device)


@pytest.mark.parametrize("t", [63, 64, 65, 150])
def test_several_chunks_equal_one(
    t: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(module, "STEP", 128)
    check(random_ids(t, t, 9, 4), 9, 16, device)


@pytest.mark.parametrize("expert", [0, 2, 6])
def test_all_tokens_of_one_expert(expert: int, device: torch.device) -> None:
    check(torch.full((2100, 1), expert, dtype=torch.int32), 7, 16, device)


def test_more_pairs_than_one_chunk(device: torch.device) -> None:
    check(random_ids(1, 1300, 6, 4), 6, 128, device)


def test_the_bound_on_blocks_is_reached_and_never_passed() -> None:
    for pairs in range(30):
        for experts in (1, 2, 5):
            for block in (1, 3, 4):
                # The worst case: as many short last blocks as there can be.
                most = 0
                for used in range(1, min(pairs, experts) + 1):
                    counts = [1] * (used - 1) + [pairs - used + 1]
                    most = max(most, sum(-(-n // block) for n in counts))
                assert max_blocks(pairs, experts, block) == most
