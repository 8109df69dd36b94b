"""benchmarks/op_errors.py: its float64 values are the formats', and the CPU's kernels are as exact
as their number formats allow."""

import pytest
import torch

from benchmarks import fp8_errors, op_errors
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


def test_float64_codes_are_those_of_torch() -> None:
    """Of values in float32, with scales that are powers of two."""
    values = torch.randn(40, 256, generator=torch.Generator().manual_seed(2))
    values *= torch.logspace(-6, 0, 256)
    values[:, ::128] = 448 * 2.0**-5
    for group in (0, 128):
        found = fp8_errors._quantized(values.double(), group)
        wanted = (values * 2**5).to(torch.float8_e4m3fn).float() / 2**5
        assert torch.equal(found.float(), wanted)


def test_attention_over_fp8_and_norms_are_as_exact_as_their_sums() -> None:
    """float32 sums; and codes whose 4 bits leave 2^-5 in the worst case, 0.026 in the mean."""
    found = fp8_errors.measure(torch.device("cpu"))
    for op, cells in found.items():
        for name, each in cells.items():
            low, high = (0.02, 0.03) if "codes and scales" in op else (0, 1e-6)
            assert low < each.rms < high, (op, name)
    assert "reference" in found["norm, e4m3 per token: beyond e4m3"]


def test_a_gpus_attention_over_fp8_and_norms_round_to_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Results: 2^-9 at most. In the interpreter, where there is no GPU, they are cut off instead,
    which is up to 2^-8, and puts many a norm on the other side of a border of two codes."""
    small = {"HEADS": 2, "KV_HEADS": 1, "HEAD_SIZE": 32, "HIDDEN": 256, "NORM_TOKENS": 9}
    small |= {"DECODE": ((20, 1), (33, 1)), "PROMPT": ((9, 9), (40, 3))}
    for name, value in small.items():
        monkeypatch.setattr(fp8_errors, name, value)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = fp8_errors.measure(device, triton=True)
    for op, cells in found.items():
        assert set(cells) == {"triton", "triton deterministic"}
        for each in cells.values():
            if "e4m3" in op:
                low = 0.02 if "codes and scales" in op else 0.0
                assert low < each.rms < (0.03 if low or device.type == "cpu" else 5e-3), op
            else:
                assert 5e-4 < each.rms < (8e-3 if device.type == "cpu" else 4e-3), op
