"""The router against the reference: order, ties, NaN, rows on their own."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.route import route as reference
from quire.kernels.triton.moe.route import route
from tests.kernels.triton.moe_inputs import poisoned_memory, random


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("t", "e", "k"),
    [(0, 8, 2), (1, 8, 2), (5, 1, 1), (3, 5, 5), (9, 128, 8), (2, 257, 6), (2, 512, 16)],
)
def test_route_equals_reference(
    t: int, e: int, k: int, dtype: torch.dtype, normalize: bool, device: torch.device
) -> None:
    logits = random(t + e, t, e, scale=2.0).to(device, dtype)
    wanted_weights, wanted_ids = reference(logits, k, normalize)
    with poisoned_memory():
        weights, ids = route(logits, k, normalize)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_equal_experts_are_taken_from_the_lowest(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1, 1, 0, 1, 0], [2, 2, 2, 2, 2, 2]], device=device)
    weights, ids = route(logits, 4, True)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert weights[1].tolist() == [0.25] * 4


def test_experts_that_cannot_be_chosen_come_last_and_only_once(device: torch.device) -> None:
    logits = torch.tensor([[-torch.inf, 3, -torch.inf, 5, -200]], device=device)
    weights, ids = route(logits, 5, False)
    assert ids.tolist() == [[3, 1, 0, 2, 4]]
    assert weights[0, 2:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_nan_has_valid_experts_and_harms_no_other(
    bad: float, device: torch.device
) -> None:
    logits = random(3, 6, 20).to(device)
    good_weights, good_ids = route(logits, 4, True)
    logits[2, 17] = bad
    logits[4] = -bad
    weights, ids = route(logits, 4, True)
    for row in (2, 4):
        assert weights[row].isnan().all()
        assert len(set(ids[row].tolist())) == 4
        assert 0 <= int(ids[row].min()) <= int(ids[row].max()) < 20
    others = [0, 1, 3, 5]
    assert torch.equal(weights[others], good_weights[others])
    assert torch.equal(ids[others], good_ids[others])


def test_a_row_has_the_same_bits_alone_and_among_others(device: torch.device) -> None:
    logits = random(5, 11, 100).to(device, torch.bfloat16)
    weights, ids = route(logits, 7, True)
    for row in (0, 6, 10):
        alone_weights, alone_ids = route(logits[row : row + 1], 7, True)
        assert torch.equal(alone_weights[0], weights[row])
        assert torch.equal(alone_ids[0], ids[row])


@pytest.mark.parametrize(("e", "k"), [(513, 2), (8, 9), (32, 17), (8, 0)])
def test_what_does_not_fit_the_kernel_is_refused(e: int, k: int, device: torch.device) -> None:
    with pytest.raises(ValueError, match="experts"):
        route(torch.zeros(1, e, device=device), k, True)
