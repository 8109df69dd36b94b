"""Norm, rotary and cache write of latents against the reference, with caches poisoned."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.rotary.latent_cache import latent_cache as reference
from quire.kernels.triton.rotary.latent_cache import latent_cache

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
BLOCKS, POSITIONS = 4, 40


class Inputs:
    """Latents that are columns of a wider matrix of NaN, slots that include negative ones."""

    def __init__(
        self, t: int, heads: int, nope: int, rank: int, rotary: int, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(t + rank)
        self.heads, self.width, self.rank = heads, rank + rotary, rank
        q = torch.randn(t, heads * (nope + rotary), generator=generator)
        self.q = q.to(device, dtype)
        wide = torch.full((t, 8 + self.width), torch.nan)
        wide[:, 8:] = torch.randn(t, self.width, generator=generator)
        self.latents = wide.to(device, dtype)[:, 8:]
        self.positions = torch.randint(POSITIONS, (t,), generator=generator).to(device)
        angles = torch.arange(POSITIONS)[:, None] * 10.0 ** -torch.linspace(0, 4, rotary // 2)
        self.tables = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
        self.norm = torch.randn(rank, generator=generator).to(device)
        slots = torch.randperm(16 * BLOCKS, generator=generator)[:t]
        slots[1::5] = -1
        self.slots, self.dtype = slots.to(device), dtype

    def run(self, kernel: object, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(rotated queries among NaN, the cache)."""
        device = self.q.device
        cache = torch.full((BLOCKS, 1, 16, self.width), torch.nan, dtype=self.dtype, device=device)
        out = torch.full((len(self.q), self.heads * self.width + 8), torch.nan, dtype=self.dtype)
        out = out.to(device)[:, : self.heads * self.width]
        same = kernel(  # type: ignore[operator]
            self.q, self.latents, self.positions, self.tables, self.norm, 1e-6, cache, self.slots,
            self.heads, interleaved, out,
        )  # fmt: skip
        assert same is out
        return out, cache


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("t", "heads", "nope", "rank", "rotary"),
    [(0, 2, 8, 16, 8), (1, 1, 0, 16, 2), (7, 5, 12, 24, 12), (6, 40, 8, 512, 64)],
)
def test_latents_and_queries_equal_the_reference(
    t: int, heads: int, nope: int, rank: int, rotary: int, dtype: torch.dtype, interleaved: bool,
    device: torch.device,
) -> None:  # fmt: skip
    inputs = Inputs(t, heads, nope, rank, rotary, dtype, device)
    tolerance = TOLERANCE[dtype]
    found, expected = inputs.run(latent_cache, interleaved), inputs.run(reference, interleaved)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert int((~found[1].isnan()).sum()) == int((inputs.slots >= 0).sum()) * inputs.width


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    inputs = Inputs(3, 2, 8, 16, 8, torch.float32, device)
    inputs.heads = 3
    with pytest.raises(ValueError, match="do not fit together"):
        inputs.run(latent_cache, True)
    inputs.heads, inputs.norm = 2, inputs.norm[:8]
    with pytest.raises(ValueError, match="cache"):
        inputs.run(latent_cache, True)
