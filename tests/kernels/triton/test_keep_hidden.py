"""Hidden states are copied bit for bit, and those that are not finite are named."""

from __future__ import annotations

import math

import pytest
import torch

from quire.kernels.reference.step.keep_hidden import keep_hidden as reference
from quire.kernels.triton.step.keep_hidden import keep_hidden

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "h"), [(0, 8), (1, 1), (5, 33), (4, 1024), (3, 2500)])
def test_copy_and_flags_equal_reference(
    t: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(t)
    whole = torch.full((t, h + 3), torch.nan, dtype=dtype, device=device)
    hidden = whole[:, :h]  # what lies between its rows is no part of it
    hidden.copy_(torch.randn(t, h, generator=generator))
    spoilt = {0: math.nan, 2: math.inf, 3: -math.inf} if t > 1 else {}
    for token, value in spoilt.items():
        if token < t:
            hidden[token, -1 if token else 0] = value
    found, wanted = (
        (
            torch.full((t + 2, h), 7.0, dtype=dtype, device=device),
            torch.full((t + 2,), -9, dtype=torch.int32, device=device),
        )
        for _ in range(2)
    )
    keep_hidden(hidden, *found)
    reference(hidden, *wanted)
    assert torch.equal(found[0].nan_to_num(), wanted[0].nan_to_num())
    assert found[1].tolist() == wanted[1].tolist()
    assert found[1].tolist() == [int(token in spoilt) for token in range(t)] + [-9, -9]
    assert (found[0][t:] == 7.0).all()
    kept = found[0][:t]
    assert all(kept[i].isfinite().all() != (i in spoilt) for i in range(t))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_not_spoiled(dtype: torch.dtype, device: torch.device) -> None:
    hidden = torch.full((1, 9), torch.finfo(dtype).max, dtype=dtype, device=device)
    spoiled = torch.full((1,), -9, dtype=torch.int32, device=device)
    keep_hidden(hidden, torch.empty_like(hidden), spoiled)
    assert spoiled.tolist() == [0]
