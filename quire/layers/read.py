"""Reading weights onto the device in the form that kernels want."""

from __future__ import annotations

import torch

from quire.formats.blocks import BlockTensor
from quire.formats.layout import FP8_BLOCK, ORDERED_FORMATS
from quire.formats.quantized import QuantTensor
from quire.layers.build import Build
from quire.quant.errors import bad_values
from quire.weights.source import WeightSource

# Values that are widened at a time: their float32 form is all that is needed beside the result.
WIDENED_AT_ONCE = 1 << 24


def to_dense(
    tensor: torch.Tensor | BlockTensor | QuantTensor, dtype: torch.dtype | None, name: str = ""
) -> torch.Tensor:
    """A dense tensor in `dtype`; None keeps a dense tensor's own. `name` and errors as in
    `widen`."""
    if isinstance(tensor, QuantTensor):
        return widen(tensor, dtype or torch.float32, name)
    if isinstance(tensor, BlockTensor):
        tensor = tensor.dequantize()
    return tensor.to(dtype) if dtype is not None else tensor


def widen(tensor: QuantTensor, dtype: torch.dtype, name: str = "") -> torch.Tensor:
    """The values of a quantised matrix in `dtype`, rounded to nearest. Raises ModelError, with the
    tensor's `name`, where some are NaN or infinite: scales that are numbers can still be too large
    for their codes, or for `dtype`."""
    rows, columns = tensor.shape
    values = torch.empty(rows, columns, dtype=dtype, device=tensor.device)
    step = max(1, WIDENED_AT_ONCE // max(1, columns) // FP8_BLOCK) * FP8_BLOCK
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values[part] = tensor.rows(part).dequantize()
        _finite(values[part], name)
    return values


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    if not values.isfinite().all():
        kind = str(values.dtype).removeprefix("torch.")
        why = f"some are NaN or infinite when they are widened to {kind}"
        raise bad_values(name.removesuffix(".weight"), why)
    return values


def read_matrix(
    build: Build,
    source: WeightSource,
    name: str,
    rows: slice | None = None,
    columns: slice | None = None,
    layer: str = "linear",
) -> torch.Tensor | BlockTensor | QuantTensor:
    """A weight or a part of it on the build's device, dense where its kernels want that.

    `layer`: whose kernels say which formats stay codes; "" for those that have none.
    """
    tensor = source.read(name, rows=rows, columns=columns).to(build.device)
    if isinstance(tensor, QuantTensor):
        if layer and not build.kernels.why_widened(tensor.layout, tensor.shape[1], layer):
            return tensor
        return widen(tensor, build.dtype or build.widened, name)
    if source.info(name).format in ORDERED_FORMATS:
        return _finite(to_dense(tensor, build.dtype or build.widened), name)
    if isinstance(tensor, BlockTensor) and not build.kernels.dense:
        return tensor
    return to_dense(tensor, build.dtype)


def read_vector(
    build: Build, source: WeightSource, name: str, rows: slice | None = None
) -> torch.Tensor:
    """A 1-D tensor in float32, on the build's device."""
    tensor = source.read(name, rows=rows).to(build.device)
    return to_dense(tensor, torch.float32, name).contiguous()
