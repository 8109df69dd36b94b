"""Products of few tokens against the reference, whichever kernel serves them."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.gemm import skinny as reference
from quire.kernels.triton.gemm import gemv, skinny, tall
from quire.kernels.triton.launch import INTERPRETED
from tests.kernels.triton.gemm_inputs import (
    DTYPES,
    assert_close,
    flat,
    magnitude,
    matrix,
    vector,
)

# Tokens, outputs, inputs: of every bucket, with odd and even sizes, one and several tiles of K.
SHAPES = [
    (0, 5, 16),
    (1, 1, 8),
    (1, 7, 33),
    (1, 10, 2056),
    (2, 5, 576),
    (3, 17, 1100),
    (4, 24, 96),
    (5, 17, 72),
    (9, 65, 264),
    (31, 40, 300),
    (64, 3, 520),
]
EPS = 1e-5


def check_linear(t: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = matrix(t, k, dtype, device, 1), flat(n, k, dtype, device, 2), None
    if k % 3 == 0:
        bias = vector(n, device, 3)
    out = matrix(t, n, dtype, device, 4).fill_(torch.nan)
    assert skinny.skinny_linear(x, weight, bias, out) is out
    assert_close(out, reference.skinny_linear(x, weight, bias), magnitude(x, weight, bias))


@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_linear_equals_reference(t: int, n: int, k: int, device: torch.device) -> None:
    check_linear(t, n, k, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 5, 576), (4, 3, 1100), (9, 33, 264)])
def test_linear_in_other_types_equals_reference(
    t: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_linear(t, n, k, dtype, device)


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 7, 8, 16, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 2056), (70, 3000)])
def test_many_shapes_equal_reference(
    t: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_linear(t, n, k, dtype, device)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("t", "n", "k"), [(0, 3, 16), (1, 5, 576), (3, 7, 33), (9, 40, 264)])
def test_gated_linear_equals_reference(
    t: int, n: int, k: int, kind: str, device: torch.device
) -> None:
    dtype = torch.float16
    x, weight = matrix(t, k, dtype, device, 1) / k**0.5, flat(2 * n, k, dtype, device, 2)
    bias = vector(2 * n, device, 3) if k % 3 == 0 else None
    found = skinny.gated_linear(x, weight, kind, bias)
    gate, up = magnitude(x, weight, bias).chunk(2, dim=1)
    wanted = reference.gated_linear(x, weight, kind, bias)
    assert_close(found, wanted, (gate + 1) * (up + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize(
    ("splits", "t", "n", "k"), [(2, 1, 37, 200), (4, 3, 5, 264), (2, 20, 40, 513), (4, 64, 33, 96)]
)
def test_split_sums_equal_reference(
    splits: int,
    t: int,
    n: int,
    k: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    height = n if activation == "" else 2 * n
    x, weight = matrix(t, k, dtype, device, 1) / k**0.5, flat(height, k, dtype, device, 2)
    bias = vector(height, device, 3)
    out = matrix(t, n, dtype, device, 4).fill_(torch.nan)
    tiles = {"ROWS": 64, "BLOCK_K": 64, "SPLITS": splits, "num_warps": 4, "num_stages": 2}
    tall.tall(x, weight, bias, out, activation, tiles)
    size = magnitude(x, weight, bias)
    if activation == "":
        assert_close(out, reference.skinny_linear(x, weight, bias), size)
    else:
        gate, up = size.chunk(2, dim=1)
        wanted = reference.gated_linear(x, weight, activation, bias)
        assert_close(out, wanted, (gate + 1) * (up + 1))


@pytest.mark.parametrize("product", [gemv.gemv, tall.tall])
@pytest.mark.parametrize("t", [1, 4, 5, 8])
def test_both_kernels_serve_up_to_8_tokens(t: int, product: object, device: torch.device) -> None:
    x, weight = matrix(t, 600, torch.bfloat16, device, 1), flat(19, 600, torch.bfloat16, device, 2)
    out = matrix(t, 19, torch.bfloat16, device, 4).fill_(torch.nan)
    product(x, weight, None, out, "")  # type: ignore[operator]
    assert_close(out, reference.skinny_linear(x, weight), magnitude(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("add", "kind"), [(False, ""), (True, ""), (True, "silu")])
@pytest.mark.parametrize(
    ("t", "n", "k"), [(0, 3, 16), (1, 35, 72), (2, 9, 576), (3, 20, 33), (8, 7, 130)]
)
def test_add_norm_linear_equals_reference(
    t: int, n: int, k: int, kind: str, add: bool, dtype: torch.dtype, device: torch.device
) -> None:
    height = 2 * n if kind else n
    x = matrix(t, k, dtype, device, 1) if add else None
    residual, scale = matrix(t, k, dtype, device, 2), vector(k, device, 3) / k**0.5
    weight, bias = flat(height, k, dtype, device, 4), vector(height, device, 5)
    before = residual.clone()
    norm, wanted_norm = (torch.full_like(residual, torch.nan) for _ in range(2))
    y, total = skinny.add_norm_linear(x, residual, scale, EPS, weight, bias, kind, norm)
    assert torch.equal(residual, before)
    if x is None:
        assert total is residual
    elif INTERPRETED and dtype == torch.bfloat16:  # which cuts where a GPU rounds
        torch.testing.assert_close(total, residual + x, rtol=2**-7, atol=0)
    else:
        assert torch.equal(total, residual + x)
    wanted, _ = reference.add_norm_linear(None, total, scale, EPS, weight, bias, kind, wanted_norm)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(norm, wanted_norm, rtol=2 * unit, atol=1e-6)
    rms = (total.float().square().mean(1, keepdim=True) + EPS).sqrt()
    size = magnitude(total.float() / rms * scale, weight, bias)
    # The norm is rounded before the product, once to nearest and once perhaps elsewhere.
    if kind:
        gate, up = size.chunk(2, dim=1)
        size = (gate + 1) * (up + 1)
        unit *= 2
    assert_close(y, wanted, size, unit)


def test_normed_tokens_must_fit_one_program(device: torch.device) -> None:
    assert skinny.add_norm_fits(8, 4096) and skinny.add_norm_fits(4, 8192)
    assert not skinny.add_norm_fits(9, 64) and not skinny.add_norm_fits(8, 5120)
    x, scale = torch.ones(9, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match="too many"):
        skinny.add_norm_linear(x, x, scale, EPS, torch.ones(4, 16, device=device))
    with pytest.raises(ValueError, match="normed"):
        skinny.add_norm_linear(
            None, x[:2], scale, EPS, torch.ones(4, 16, device=device), normed=x[:3]
        )


@pytest.mark.parametrize("t", [3, 12])
def test_only_the_result_is_written(t: int, device: torch.device) -> None:
    whole = torch.full((t + 5, 40), torch.nan, device=device)
    x, weight = torch.ones(t, 48, device=device), torch.ones(21, 48, device=device)
    skinny.skinny_linear(x, weight, out=whole[1 : t + 1, 3:24])
    written = torch.zeros_like(whole, dtype=torch.bool)
    written[1 : t + 1, 3:24] = True
    assert torch.equal(~whole.isnan(), written)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, weight = torch.ones(3, 16, device=device), torch.ones(6, 16, device=device)
    with pytest.raises(ValueError, match="at most 64"):
        skinny.skinny_linear(torch.ones(65, 16, device=device), weight)
    with pytest.raises(ValueError, match=r"x: expected \[T, 16\]"):
        skinny.skinny_linear(torch.ones(3, 8, device=device), weight)
    with pytest.raises(ValueError, match=r"the weight torch\.float16"):
        skinny.skinny_linear(x, weight.half())
    with pytest.raises(ValueError, match="weight: expected contiguous"):
        skinny.skinny_linear(x, torch.ones(6, 32, device=device)[:, :16])
    with pytest.raises(ValueError, match="bias"):
        skinny.skinny_linear(x, weight, torch.ones(5, device=device))
    with pytest.raises(ValueError, match="out"):
        skinny.skinny_linear(x, weight, out=torch.ones(3, 5, device=device))
    with pytest.raises(ValueError, match="no gate and up"):
        skinny.gated_linear(x, weight[:5], "silu")
    with pytest.raises(ValueError, match="relu"):
        skinny.gated_linear(x, weight, "relu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's lazily touched memory")
@pytest.mark.parametrize("t", [1, 3, 40])
def test_weights_beyond_two_to_the_31_elements(t: int) -> None:
    device, n, k = torch.device("cuda"), 2**19 + 40, 4096
    weight = torch.empty(n, k, dtype=torch.bfloat16, device=device)
    weight[-40:] = flat(40, k, torch.bfloat16, device, 1)
    x = matrix(t, k, torch.bfloat16, device, 2)
    found = skinny.skinny_linear(x, weight)[:, -40:]
    assert_close(found, reference.skinny_linear(x, weight[-40:]), magnitude(x, weight[-40:]))
