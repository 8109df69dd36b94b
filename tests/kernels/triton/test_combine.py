"""The weighted sum of experts against the reference, and against its order by hand."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.combine import combine as reference
from quire.kernels.triton.moe.combine import combine
from tests.kernels.triton.moe_inputs import poisoned_memory, random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("t", "k", "h"), [(0, 2, 8), (1, 1, 1), (3, 8, 40), (2, 5, 1100)])
def test_combine_equals_reference(
    t: int, k: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    y, weights = random(1, t * k, h).to(device, dtype), random(2, t, k).to(device)
    with poisoned_memory():
        found = combine(y, weights, torch.float32)
    torch.testing.assert_close(found, reference(y, weights, torch.float32), rtol=1e-5, atol=1e-5)


def test_slots_are_added_in_their_order(device: torch.device) -> None:
    y = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    assert combine(y, torch.ones(1, 4, device=device), torch.float32).item() == 1.0
