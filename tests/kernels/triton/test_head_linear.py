"""Each head's product: against the reference, and a row's bits in every batch."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.gemm.head_linear import head_linear as reference
from quire.kernels.triton.gemm.head_linear import head_linear
from tests.kernels.triton.gemm_inputs import DTYPES, assert_close, flat, matrix


def operands(
    t: int, heads: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and out are columns of each head's wider rows, with NaN around them."""
    x = matrix(t, heads * (k + 8), dtype, device, 1).view(t, heads, k + 8)[:, :, :k]
    weight = flat(heads * n, k, dtype, device, 2).view(heads, n, k)
    out = matrix(t, heads * (n + 16), dtype, device, 3).fill_(torch.nan)
    return x, weight, out.view(t, heads, n + 16)[:, :, 8 : 8 + n]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "heads", "n", "k"), [(0, 2, 8, 16), (1, 1, 5, 33), (3, 4, 65, 72), (66, 2, 20, 130)]
)
def test_product_equals_reference(
    t: int, heads: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, out = operands(t, heads, n, k, dtype, device)
    wanted, size = torch.empty_like(out), torch.empty(t, heads, n, device=device)
    reference(x, weight, wanted)
    reference(x.abs(), weight.abs(), size)
    assert head_linear(x, weight, out) is out
    assert_close(out, wanted, size)
    assert torch.equal(head_linear(x, weight), out)


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    x, weight, out = operands(2, 3, 8, 16, torch.float16, device)
    for changed in (
        (x[:, :2], weight, out),
        (x, weight, out[..., :4]),
        (x.float(), weight, out),
        (x, weight.transpose(1, 2).contiguous().transpose(1, 2), out),
    ):
        with pytest.raises(ValueError, match="x"):
            head_linear(*changed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bits of a GPU's instructions")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(512, 128), (128, 512)])
def test_a_rows_bits_do_not_depend_on_its_batch(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, out = operands(300, 16, n, k, dtype, torch.device("cuda"))
    head_linear(x, weight, out)
    for t in (1, 17, 64, 65, 128, 257):
        some = torch.empty_like(out[:t])
        head_linear(x[300 - t :], weight, some)
        assert torch.equal(some, out[300 - t :])
