"""Operands of dense products, each within memory of NaN, and the bound their results must keep."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def matrix(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    """Random rows that begin 16 bytes into wider rows of NaN."""
    generator = torch.Generator().manual_seed(seed)
    pad = 16 // dtype.itemsize
    whole = torch.full((rows + 2, columns + 3 * pad), torch.nan, dtype=dtype, device=device)
    part = whole[1 : rows + 1, pad : pad + columns]
    return part.copy_(torch.randn(rows, columns, generator=generator).to(dtype))


def flat(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int
) -> torch.Tensor:
    """A random contiguous matrix with NaN before and after it."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((rows * columns + 512,), torch.nan, dtype=dtype, device=device)
    part = whole[256 : 256 + rows * columns].view(rows, columns)
    return part.copy_(torch.randn(rows, columns, generator=generator).to(dtype))


def vector(n: int, device: torch.device, seed: int) -> torch.Tensor:
    return flat(1, n, torch.float32, device, seed)[0]


def magnitude(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """|x| |W|^T + |bias|: what rounding in a product is relative to."""
    y = x.float().abs() @ weight.float().abs().T
    return y if bias is None else y + bias.abs()


def assert_close(
    found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, inner: float = 0.0
) -> None:
    """One rounding of the result (a cut in Triton's interpreter), sums in float32 over terms of
    magnitude `size`, and errors of relative size `inner` in those terms."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    unit = torch.finfo(found.dtype).eps
    bound = unit * wanted.float().abs() + (2.0**-15 + inner) * size
    error = (found.float() - wanted.float()).abs()
    assert (error <= bound).all(), f"off by {error.max():.3g}, {(error / bound).max():.3g} bounds"
