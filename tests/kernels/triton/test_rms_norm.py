"""RMS norms against the reference; a row's bits do not depend on the rows around it."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.norm import rms_norm as reference
from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SHAPES = [(0, 64), (1, 16), (3, 72), (5, 33), (2, 576), (9, 1000), (1, 4096), (2, 5120)]


def rows(t: int, h: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """Rows of very different sizes, within a wider matrix of NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, h, generator=generator) * 4.0 ** torch.arange(-1, t - 1)[:, None].clamp(
        max=6
    )
    whole = torch.full((t, h + 24), torch.nan, dtype=dtype, device=device)
    whole[:, 8 : 8 + h] = x.to(dtype)
    return whole[:, 8 : 8 + h]


def weight(h: int, device: torch.device, seed: int = 9) -> torch.Tensor:
    return torch.randn(h, generator=torch.Generator().manual_seed(seed)).to(device)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = TOLERANCE[wanted.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "h"), SHAPES)
def test_norm_equals_reference(t: int, h: int, dtype: torch.dtype, device: torch.device) -> None:
    x, w = rows(t, h, dtype, device, 1), weight(h, device)
    out = rows(t, h, dtype, device, 2).fill_(torch.nan)
    assert rms_norm(x, w, EPS, out=out) is out
    close(out, reference.rms_norm(x, w, EPS))
    assert torch.equal(rms_norm(x, w, EPS), out)


def test_norm_can_be_written_over_its_input(device: torch.device) -> None:
    x, w = rows(5, 72, torch.float32, device, 1), weight(72, device)
    wanted = reference.rms_norm(x, w, EPS)
    close(rms_norm(x, w, EPS, out=x), wanted)


def test_only_rows_are_written(device: torch.device) -> None:
    whole = torch.full((6, 40), torch.nan, device=device)
    rms_norm(torch.ones(4, 33, device=device), weight(33, device), EPS, out=whole[1:5, 3:36])
    written = torch.zeros(6, 40, dtype=torch.bool, device=device)
    written[1:5, 3:36] = True
    assert torch.equal(~whole.isnan(), written)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(("t", "h"), SHAPES)
def test_added_norm_equals_reference(
    t: int, h: int, post_norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, residual = rows(t, h, dtype, device, 1), rows(t, h, dtype, device, 2)
    w, x_norm = weight(h, device), weight(h, device, 5) if post_norm else None
    wanted = residual.clone()
    reference.add_rms_norm(x, wanted, w, EPS, x_norm)
    added = x if x_norm is None else reference.rms_norm(x, x_norm, EPS)
    found = add_rms_norm(x, residual, w, EPS, x_norm)
    # Triton's interpreter cuts to bfloat16 where a GPU rounds.
    exact = x_norm is None and not (INTERPRETED and dtype == torch.bfloat16)
    bound = 0 if exact else TOLERANCE[dtype] * (wanted.abs() + added.abs()).float()
    assert ((residual.float() - wanted.float()).abs() <= bound).all()
    # The norm is of the residual as it was rounded.
    close(found, reference.rms_norm(residual, w, EPS))


def test_residual_may_be_wider_than_the_activations(device: torch.device) -> None:
    x, residual = rows(3, 72, torch.bfloat16, device, 1), rows(3, 72, torch.float32, device, 2)
    w, wanted_residual = weight(72, device), residual.clone()
    wanted = reference.add_rms_norm(x, wanted_residual, w, EPS)
    found = add_rms_norm(x, residual, w, EPS)
    assert torch.equal(residual, wanted_residual)
    assert found.dtype == torch.bfloat16
    close(found, wanted)


@pytest.mark.parametrize("h", [16, 576, 1152])
def test_a_rows_bits_do_not_depend_on_the_other_rows(h: int, device: torch.device) -> None:
    t = 7
    x, residual = rows(t, h, torch.bfloat16, device, 1), rows(t, h, torch.bfloat16, device, 2)
    w, x_norm = weight(h, device), weight(h, device, 5)
    together = rms_norm(x, w, EPS)
    residual_together = residual.clone()
    added_together = add_rms_norm(x, residual_together, w, EPS, x_norm)
    for i in range(t):
        assert torch.equal(rms_norm(x[i : i + 1], w, EPS)[0], together[i])
        alone = residual[i : i + 1].clone()
        assert torch.equal(add_rms_norm(x[i : i + 1], alone, w, EPS, x_norm)[0], added_together[i])
        assert torch.equal(alone[0], residual_together[i])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    x = rows(4, 48, torch.bfloat16, device, 1).contiguous()
    wanted = rms_norm(x, weight(48, device), EPS)
    x[1, 3], x[2, 7] = torch.nan, torch.inf
    found = rms_norm(x, weight(48, device), EPS)
    assert torch.equal(found[[0, 3]], wanted[[0, 3]])
    assert found[1].isnan().all()


def test_columns_that_lie_apart_are_refused(device: torch.device) -> None:
    x = torch.ones(4, 32, device=device)[:, ::2]
    with pytest.raises(ValueError, match="contiguous rows"):
        rms_norm(x, weight(16, device), EPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_beyond_two_billion_values() -> None:
    stride = 2**30 + 16
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    w = weight(64, x.device)
    close(rms_norm(x, w, EPS), reference.rms_norm(x, w, EPS))
