"""Rotation of neighbouring pairs in place: the reference's values, and nothing beside them."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.triton.compressed.rotate_pairs import rotate_pairs
from tests.kernels.triton.compressed_inputs import POSITIONS, REFERENCE, random, rotary_table

pytestmark = pytest.mark.triton

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


def spaced(t: int, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Heads of tokens that lie apart, NaN between them."""
    wide = torch.full((t, heads * size + 6), torch.nan)
    wide[:, : heads * size] = random(t + heads, t, heads * size)
    return wide.to(device, dtype)[:, : heads * size].view(t, heads, size)


@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("t", "heads", "size", "rotary"),
    [(0, 2, 8, 4), (1, 1, 2, 2), (3, 5, 24, 8), (2, 9, 512, 64), (5, 33, 128, 64), (4, 3, 16, 16)],
)
def test_heads_equal_the_reference(
    t: int, heads: int, size: int, rotary: int, dtype: torch.dtype, inverse: bool,
    eps: float | None, device: torch.device,
) -> None:  # fmt: skip
    x = spaced(t, heads, size, dtype, device)
    whole, given = x._base, x.float().cpu()
    assert whole is not None
    positions = torch.randint(POSITIONS, (t,), generator=torch.Generator().manual_seed(1))
    table = rotary_table(rotary)
    wanted = REFERENCE.rotate_pairs(given.clone(), table, positions, inverse, eps)
    same = rotate_pairs(x, table.to(device), positions.to(device), inverse, eps)
    assert same is x and whole[:, heads * size :].isnan().all()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(x.float().cpu(), wanted, atol=tolerance, rtol=tolerance)
    if eps is None:
        assert torch.equal(x[..., : size - rotary].float().cpu(), given[..., : size - rotary])


def test_the_norm_divides_by_what_was_given_and_not_by_what_was_rounded(
    device: torch.device,
) -> None:
    """By hand: the mean of squares of (3, 4, 0, 0) is 25 / 4; a quarter turn takes (a, b) to
    (-b, a)."""
    x = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]], device=device)
    table = torch.tensor([[9.0, 9.0], [0.0, 1.0]], device=device)
    position = torch.tensor([1], device=device)
    found = rotate_pairs(x, table, position, eps=0.0)
    wanted = torch.tensor([[[1.2, 1.6, 0.0, 0.0], [0.0, 0.0, -1.6, 1.2]]])
    torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_turning_back_and_heads_alone(eps: float | None, device: torch.device) -> None:
    given = random(1, 6, 7, 48).to(device, torch.bfloat16)
    positions, table = torch.arange(6, device=device) * 11, rotary_table(16).to(device)
    whole = rotate_pairs(given.clone(), table, positions, eps=eps)
    for token in range(6):
        alone = rotate_pairs(given[token : token + 1].clone(), table, positions[token:], eps=eps)
        assert torch.equal(alone[0], whole[token])
    x = given.float()
    turned = rotate_pairs(x.clone(), table, positions)
    torch.testing.assert_close(rotate_pairs(turned, table, positions, inverse=True), x)


def test_a_nan_stays_in_its_head(device: torch.device) -> None:
    x = random(1, 1, 3, 8).to(device)
    x[0, 1, 7] = torch.nan
    found = rotate_pairs(x, rotary_table(4).to(device), torch.tensor([3], device=device))
    assert found.isnan().nonzero().tolist() == [[0, 1, 6], [0, 1, 7]]


def test_other_layouts_are_refused(device: torch.device) -> None:
    x, positions = torch.ones(2, 3, 8, device=device), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="pairs"):
        rotate_pairs(x, torch.ones(4, 3, device=device), positions.to(device))
    with pytest.raises(ValueError, match="pairs"):
        rotate_pairs(x, torch.ones(4, 10, device=device), positions.to(device))
    with pytest.raises(ValueError, match="contiguous"):
        rotate_pairs(x.transpose(0, 1), torch.ones(4, 2, device=device), positions.to(device))
