"""The router among groups against the reference: order, ties, NaN, rows on their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.kernels.reference.moe.route_groups import route_groups as reference
from quire.kernels.triton.moe.route_groups import route_groups
from tests.kernels.triton.moe_inputs import poisoned_memory, random

# (experts, chosen, groups, groups chosen): tiny, V3's, V2's, all in one group, Kimi K2's.
SIZES = [(8, 3, 4, 2), (256, 8, 8, 4), (160, 6, 8, 3), (12, 12, 1, 1), (384, 8, 1, 1)]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_route_equals_reference(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, corrected: bool, device: torch.device
) -> None:
    e, k, groups, top = sizes
    correction = random(e, e, scale=0.3).to(device) if corrected else None
    for t in (0, 1, 5):
        logits = random(t + e, t, e, scale=2.0).to(device, dtype)
        given: tuple[Any, ...] = (logits, correction, k, groups, top, corrected, corrected, 2.5)
        wanted_weights, wanted_ids = reference(*given)
        with poisoned_memory():
            weights, ids = route_groups(*given)
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_equal_experts_and_groups_are_taken_from_the_lowest(device: torch.device) -> None:
    logits = torch.zeros(1, 12, device=device)
    for correction in (None, torch.zeros(12, device=device)):
        weights, ids = route_groups(logits, correction, 4, 4, 2, correction is not None, True, 1.0)
        assert ids.tolist() == [[0, 1, 2, 3]]
        assert weights.tolist() == [[0.25] * 4]


def test_a_group_is_as_good_as_its_two_best_and_a_correction_is_no_weight(
    device: torch.device,
) -> None:
    """By hand: group 1 has the best expert, group 0 the best pair."""
    correction = torch.tensor([0.4, 0.4, 0.7, -0.5], device=device)
    weights, ids = route_groups(
        torch.zeros(1, 4, device=device), correction, 2, 2, 1, True, False, 3.0
    )
    assert ids.tolist() == [[0, 1]] and weights.tolist() == [[1.5, 1.5]]


def test_a_row_of_nan_has_valid_experts_and_harms_no_other(device: torch.device) -> None:
    logits = random(3, 3, 20).to(device)
    good = route_groups(logits, None, 4, 5, 2, False, True, 1.0)
    logits[1, 17] = torch.nan
    for correction in (None, torch.zeros(20, device=device)):
        weights, ids = route_groups(logits, correction, 4, 5, 2, correction is not None, True, 1.0)
        assert weights[1].isnan().all() and not weights[::2].isnan().any()
        assert len(set(ids[1].tolist())) == 4
        assert 0 <= int(ids[1].min()) <= int(ids[1].max()) < 20
        if correction is None:
            assert torch.equal(weights[::2], good[0][::2]) and torch.equal(ids[::2], good[1][::2])


@pytest.mark.parametrize(
    ("e", "k", "groups", "top"),
    [(513, 2, 1, 1), (8, 9, 1, 1), (32, 17, 1, 1), (8, 2, 3, 1), (8, 2, 2, 3), (8, 3, 4, 1)],
)
def test_what_does_not_fit_the_kernel_is_refused(
    e: int, k: int, groups: int, top: int, device: torch.device
) -> None:
    with pytest.raises(ValueError, match="experts"):
        route_groups(torch.zeros(1, e, device=device), None, k, groups, top, False, True, 1.0)
