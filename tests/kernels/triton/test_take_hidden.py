"""Hidden states find their tokens again, of which some were refused."""

from __future__ import annotations

import random

import pytest
import torch
from device_requests import rows_of

from quire.kernels.reference.step.take_hidden import take_hidden as reference
from quire.kernels.triton.step.take_hidden import take_hidden


def test_what_was_refused_is_left_out(device: torch.device) -> None:
    kept = torch.arange(12, device=device).float()[:, None].expand(-1, 5).contiguous()
    # Five tokens of which three stand, a row without a slot, one token, four tokens.
    rows = rows_of([(0, 7, 5, 0), (-1, 3, 9, 0), (2, 0, 1, 0), (3, 4, 4, 0)], device)
    starts = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32, device=device)
    out = torch.full((10, 5), 99.0, device=device)
    take_hidden(kept, rows, starts, out)
    assert out[:, 0].tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 0, 0]
    assert (out == out[:, :1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_any_rows_equal_the_reference(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    numbers = random.Random(seed)
    count = numbers.choice([0, 1, 6])
    whole = [numbers.randint(1, 6) for _ in range(count)]
    stand = [numbers.randint(0, tokens) for tokens in whole]
    slots = [numbers.choice([i, i, -1]) for i in range(count)]
    stand = [n if slot >= 0 else 0 for n, slot in zip(stand, slots, strict=True)]
    rows = rows_of([(s, 0, n, 0) for s, n in zip(slots, whole, strict=True)], device)
    ends = torch.tensor([0, *stand], device=device).cumsum(0).to(torch.int32)
    kept = torch.randn(sum(whole) + 1, 1100, device=device).to(dtype)
    found, wanted = (torch.full((sum(stand) + 3, 1100), 7.0, device=device) for _ in range(2))
    found, wanted = found.to(dtype), wanted.to(dtype)
    take_hidden(kept, rows, ends, found)
    reference(kept, rows, ends, wanted)
    assert torch.equal(found, wanted)
