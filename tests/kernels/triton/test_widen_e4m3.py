"""e4m3 widened by shifts equals torch's, for every code that is a number."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from quire.kernels.triton.compressed.stored import widen_e4m3

pytestmark = pytest.mark.triton


@triton.jit
def _widen_kernel(codes_ptr, out_ptr, NATIVE: tl.constexpr):
    each = tl.arange(0, 256)
    tl.store(out_ptr + each, widen_e4m3(tl.load(codes_ptr + each), NATIVE))


def test_every_code_is_widened_exactly(device: torch.device) -> None:
    codes = torch.arange(256).to(device, torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    out = torch.full((256,), torch.nan, device=device)
    _widen_kernel[(1,)](codes, out, NATIVE=False)
    number = ~expected.isnan()
    assert int(number.sum()) == 254
    assert torch.equal(out[number], expected[number])
