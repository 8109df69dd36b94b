"""DeepSeek V4's router against the reference: order, ties, tables, extreme logits, NaN."""

from __future__ import annotations

import math

import pytest
import torch

from quire.kernels.reference.moe.route_tokens import route_tokens as reference
from quire.kernels.triton.moe.route_tokens import route_tokens
from tests.kernels.triton.moe_inputs import poisoned_memory, random, random_ids

pytestmark = pytest.mark.triton

# (experts, chosen): tiny, odd, Flash's, Pro's.
SIZES = [(8, 3), (5, 5), (1, 1), (256, 6), (384, 6)]


@pytest.mark.parametrize("how", ["table", "bias", "alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_route_equals_reference(
    sizes: tuple[int, int], dtype: torch.dtype, how: str, device: torch.device
) -> None:
    e, k = sizes
    table = random_ids(e, 20, e, k).long().to(device) if how == "table" else None
    bias = random(e, e, scale=0.3).to(device) if how == "bias" else None
    for t in (0, 1, 5):
        logits = random(t + e, t, e, scale=4.0).to(device, dtype)
        tokens = torch.arange(t, device=device) * 3
        given = (logits, tokens, table, bias, k, 1.5)
        with poisoned_memory():
            weights, ids = route_tokens(*given)
        wanted_weights, wanted_ids = reference(*given)
        assert ids.dtype == wanted_ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-7)


def test_equal_experts_are_taken_from_the_lowest_and_a_bias_is_no_weight(
    device: torch.device,
) -> None:
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    logits = torch.zeros(1, 6, device=device)
    weights, ids = route_tokens(logits, tokens, None, None, 4, 2.0)
    assert ids.tolist() == [[0, 1, 2, 3]] and weights.tolist() == [[0.5] * 4]
    bias = torch.tensor([0.0, -1.0, 0.5, 0.0, 0.5, 0.2], device=device)
    weights, ids = route_tokens(logits, tokens, None, bias, 4, 2.0)
    assert ids.tolist() == [[2, 4, 5, 0]] and weights.tolist() == [[0.5] * 4]


def test_scores_keep_their_digits_from_tiny_to_large(device: torch.device) -> None:
    """Relative weights of experts by hand: softplus(x) is exp(x) far below 0, x far above it."""
    logits = torch.tensor([[-60.0, -58.0], [-12.0, -14.0], [300.0, 75.0]], device=device)
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    weights, ids = route_tokens(logits, tokens, None, None, 2, 1.0)
    assert ids.tolist() == [[1, 0], [0, 1], [0, 1]]
    ratio = (weights[:, 0] / weights[:, 1]).tolist()
    exact = math.log1p(math.exp(-12)) / math.log1p(math.exp(-14))
    assert ratio == pytest.approx([math.e, math.sqrt(exact), 2.0], rel=1e-5)


def test_a_row_of_nan_has_valid_experts_and_harms_no_other(device: torch.device) -> None:
    logits = random(3, 3, 20).to(device)
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    good = route_tokens(logits, tokens, None, None, 4, 1.0)
    logits[1, 17] = torch.nan
    weights, ids = route_tokens(logits, tokens, None, None, 4, 1.0)
    assert weights[1].isnan().all() and len(set(ids[1].tolist())) == 4
    assert 0 <= int(ids[1].min()) <= int(ids[1].max()) < 20
    assert torch.equal(weights[::2], good[0][::2]) and torch.equal(ids[::2], good[1][::2])
    logits[1] = torch.nan
    assert route_tokens(logits, tokens, None, None, 4, 1.0)[1][1].tolist() == [0, 1, 2, 3]


def test_what_does_not_fit_the_kernel_is_refused(device: torch.device) -> None:
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    for e, k in ((513, 2), (8, 9), (32, 17)):
        with pytest.raises(ValueError, match="experts"):
            route_tokens(torch.zeros(1, e, device=device), tokens, None, None, k, 1.0)
    table = torch.zeros(3, 2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="table"):
        route_tokens(torch.zeros(1, 8, device=device), tokens, table, None, 3, 1.0)
