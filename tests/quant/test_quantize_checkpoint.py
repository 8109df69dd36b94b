"""benchmarks/quantize_checkpoint.py: what it writes is read as what the encoders made."""

from pathlib import Path

import pytest
import torch

from benchmarks.quantize_checkpoint import convert
from quant.checkpoints import DENSE, LLAMA, write
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import quantize_fp8_block, quantize_integer, quantize_mxfp4
from quire.models.checkpoint import open_checkpoint
from quire.weights.hub import resolve

ENCODERS = {
    "fp8_block": quantize_fp8_block,
    "mxfp4": quantize_mxfp4,
    "int4-g32": lambda values: quantize_integer(values, 4, 32),
    "int8-g16": lambda values: quantize_integer(values, 8, 16),
    "float32": lambda values: values,
}


@pytest.mark.parametrize("format", ENCODERS)
def test_a_written_checkpoint_is_read_as_the_encoders_made_it(tmp_path: Path, format: str) -> None:
    _, plain = write(tmp_path, LLAMA, None, None)
    convert(str(plain), format, tmp_path / "out")
    with (
        open_checkpoint(resolve(str(plain))) as before,
        open_checkpoint(resolve(str(tmp_path / "out"))) as after,
    ):
        assert after.names() == before.names()
        for name in before.names():
            values, found = before.read(name), after.read(name)
            assert isinstance(values, torch.Tensor)
            if values.dim() == 2 and name.split(".")[-2] not in DENSE:
                wanted = ENCODERS[format](values)
                assert isinstance(found, QuantTensor) == (format != "float32")
            else:
                wanted = values
            dense = [t.dequantize() if isinstance(t, QuantTensor) else t for t in (found, wanted)]
            assert torch.equal(*dense), name


def test_groups_that_do_not_divide_a_width_are_an_error(tmp_path: Path) -> None:
    _, plain = write(tmp_path, LLAMA, None, None)
    for format in ("int4-g128", "int3-g32", "fp4"):
        with pytest.raises(ValueError, match=r"groups of 128 do not divide|is not float32"):
            convert(str(plain), format, tmp_path / "out")
