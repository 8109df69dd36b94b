"""Linear layers of groups of columns with quantised weights against each group's own product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.kernels.reference.quantized.grouped_linear import quantized_grouped_linear as reference
from quire.kernels.reference.quantized.weights import FORMATS, dequantize
from quire.kernels.triton.quantized import grouped_linear as module
from quire.kernels.triton.quantized.grouped_linear import quantized_grouped_linear
from quire.kernels.triton.quantized.linear import quantized_linear
from quire.kernels.triton.quantized.pack import PackedQuantized, pack
from quire.kernels.triton.quantized.skinny import MAX_TOKENS
from tests.kernels.triton.gemm_inputs import assert_close, magnitude, matrix
from tests.kernels.triton.moe_inputs import poisoned_memory
from tests.kernels.triton.quantized_inputs import quantized_experts

pytestmark = pytest.mark.triton

BF16 = torch.bfloat16


def stacked(weight: object, groups: int) -> PackedQuantized:
    each = [pack(weight[g]) for g in range(groups)]  # type: ignore[index]
    stack = each[0].stack(groups)
    for g, one in enumerate(each):
        stack.put(g, one)
    return stack


# (format, deterministic, tokens, groups, rows, columns)
CASES = [(format, False, 3, 2, 33, 96) for format in FORMATS]
CASES += [("fp8_block", mode, *size) for mode in (False, True)
          for size in ((0, 2, 8, 32), (1, 3, 128, 256), (65, 2, 17, 64))]  # fmt: skip
CASES += [("mxfp4", True, 1, 2, 17, 64), ("nvfp4", False, 65, 2, 17, 64)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_group_is_multiplied_with_its_own_weight(
    case: tuple[str, bool, int, int, int, int], device: torch.device
) -> None:
    format, deterministic, t, groups, n, k = case
    weight = quantized_experts(format, groups, n, k, device, 4)
    x, packed = matrix(t, groups * k, BF16, device, 1), stacked(weight, groups)
    with poisoned_memory():
        found = quantized_grouped_linear(x, packed, deterministic=deterministic)
    parts = [x[:, g * k : (g + 1) * k] for g in range(groups)]
    size = [magnitude(part, dequantize(weight[g])) for g, part in enumerate(parts)]
    # Many tokens are multiplied with values that are rounded to bfloat16.
    inner = 0.0 if deterministic or t <= MAX_TOKENS else 2.0**-8
    assert_close(found, reference(x, weight), torch.cat(size, dim=1), inner)
    for g, part in enumerate(parts):
        if deterministic:
            alone = quantized_linear(part, packed.one(g), deterministic=True)
            assert torch.equal(found[:, g * n : (g + 1) * n], alone)


def test_tokens_are_quantised_where_the_scheme_says_so(device: torch.device) -> None:
    weight = quantized_experts("fp8_block", 2, 128, 128, device, 4)
    packed = replace(stacked(weight, 2), activation="token")
    x = matrix(MAX_TOKENS + 1, 256, BF16, device, 1)
    found = quantized_grouped_linear(x, packed, deterministic=False)
    size = [magnitude(x[:, 128 * g : 128 * (g + 1)], dequantize(weight[g])) for g in (0, 1)]
    assert_close(found, reference(x, weight), torch.cat(size, dim=1), 2.0**-4)


def test_few_tokens_take_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **more: object) -> torch.Tensor:
        raise AssertionError("a product for one group")

    monkeypatch.setattr(module, "quantized_linear", refused)
    packed = stacked(quantized_experts("fp8_block", 2, 128, 128, device, 4), 2)
    for t in (1, MAX_TOKENS):
        x = matrix(t, 256, BF16, device, 1)
        assert quantized_grouped_linear(x, packed, deterministic=False).shape == (t, 256)


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    packed = stacked(quantized_experts("fp8", 2, 16, 32, device, 4), 2)
    for t in (1, 65):
        for x in (matrix(t, 32, BF16, device, 1), matrix(t, 64, torch.float16, device, 1)):
            with pytest.raises(ValueError, match="x: "):
                quantized_grouped_linear(x, packed, deterministic=False)
