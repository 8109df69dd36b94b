"""benchmarks/op_errors.py: its float64 values are the formats', and the CPU's kernels are as exact
as their number formats allow."""

import pytest
import torch

from benchmarks import op_errors
from benchmarks.op_errors import ENCODERS, encoded, exact, kernel_errors, measure
from quire.formats.blocks import BlockTensor
from quire.formats.quantized import QuantTensor
from quire.kernels.capabilities import GGUF_FORMATS


@pytest.mark.parametrize("format", [*ENCODERS, *GGUF_FORMATS])
def test_float64_values_are_the_formats(format: str) -> None:
    """Against the decoders, which round the product of code and scale to float32."""
    values = torch.randn(160, 256, generator=torch.Generator().manual_seed(1))
    tensor = encoded(format, values)
    assert isinstance(tensor, QuantTensor | BlockTensor)
    assert torch.allclose(exact(tensor).float(), tensor.dequantize(), rtol=2e-7, atol=0)
    assert exact(tensor).dtype == torch.float64


@pytest.mark.parametrize("format", ["fp8", "fp8_block", "nvfp4", "int4"])
def test_gpu_products_with_codes_round_their_results_to_bfloat16(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And little else: 2^-9 of a result at most, of which the root mean square is about half.
    In Triton's interpreter where there is no GPU."""
    for name, size in {"N": 32, "K": 256, "TOKENS": (1, 9)}.items():
        monkeypatch.setattr(op_errors, name, size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = kernel_errors(format, device)
    assert len(found) == (3 if format.startswith("fp8") else 2)
    for op, each in found.items():
        assert 5e-4 < each.rms < 4e-3, op


def test_products_are_as_exact_as_their_number_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums of some hundred terms; weights with bfloat16's 8 bits, a third of whose step
    2^-8 is 1.3e-3; activations of 16 bits, whose step is 2^-15 of the largest in 32."""
    for name, size in {"N": 64, "K": 256, "INTERMEDIATE": 256, "EXPERTS": 4}.items():
        monkeypatch.setattr(op_errors, name, size)
    monkeypatch.setattr(op_errors, "TOKENS", (1, 9))
    found = measure(torch.device("cpu"), ["fp8", "fp8_block", "mxfp4", "int4", "q4_1"])
    for format, cells in found.items():
        for op, each in cells.items():
            bound = 2e-6
            if "bfloat16" in op and format in ("fp8", "fp8_block", "int4"):
                bound = 5e-3
                assert each.rms > 5e-4  # a power of two for a scale loses nothing, others do
            if "native" in op and format == "q4_1":
                bound = 1e-4
            assert each.rms < bound, (format, op)
            assert each.rms <= each.worst
