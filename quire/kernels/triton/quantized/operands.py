"""What products with quantised weights ask of their operands and of the GPU."""

from __future__ import annotations

from functools import cache

import torch

from quire.kernels.triton.gemm.epilogue import ACTIVATIONS
from quire.kernels.triton.launch import INTERPRETED
from quire.kernels.triton.quantized.pack import PackedQuantized


@cache
def instructions(device: torch.device) -> dict[str, bool]:
    """The kernels' constexprs PACKED, multiplication of two bfloat16 at once, and CAST, conversion
    from e4m3: what the GPU has."""
    nvidia = device.type == "cuda" and not INTERPRETED and torch.version.hip is None
    fp8 = nvidia and torch.cuda.get_device_capability(device) >= (8, 9)
    return {"PACKED": nvidia, "CAST": fp8}


def ahead(weight: PackedQuantized, blocks: int) -> int:
    """Elements of a row of codes that `blocks` blocks of 128 columns are, or the next power of two
    below: what to fetch before a kernel's inputs are there."""
    elements = weight.codes.shape[-1] // weight.blocks * blocks
    return 1 << (elements.bit_length() - 1) if elements else 0


def scale_strides(scales: torch.Tensor | None) -> tuple[int, int]:
    """Elements from one group's scales to the next, and from one weight's of a stack to the
    next."""
    if scales is None:
        return 0, 0
    return scales.shape[-1], scales.shape[-2] * scales.shape[-1]


def format_of(weight: PackedQuantized) -> dict[str, str | int]:
    """The kernels' constexprs FORMAT and GROUP."""
    return {"FORMAT": weight.format, "GROUP": weight.group if weight.format[:3] == "int" else 128}


def check_linear(
    x_TK: torch.Tensor,
    weight: PackedQuantized,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """`out`, or a new tensor, for x W^T [T, N] ([T, N / 2] with an activation). Raises ValueError
    for shapes, dtypes or layouts that do not go together."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(ACTIVATIONS[1:])}")
    n, k = weight.n, weight.k
    if weight.experts is not None:
        raise ValueError("weight: one is expected, not a stack of experts")
    if x_TK.dim() != 2 or x_TK.shape[1] != k:
        raise ValueError(f"x: expected [T, {k}], not {list(x_TK.shape)}")
    if x_TK.dtype != torch.bfloat16:
        raise ValueError(f"x: expected bfloat16, not {x_TK.dtype}")
    if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32):
        raise ValueError(f"bias: expected float32 [{n}], not {bias.dtype} {list(bias.shape)}")
    if kind != "" and n % 2:
        raise ValueError(f"weight: {n} rows are no gate and up")
    shape = (x_TK.shape[0], n if kind == "" else n // 2)
    if out is None:
        return torch.empty(shape, dtype=x_TK.dtype, device=x_TK.device)
    if tuple(out.shape) != shape:
        raise ValueError(f"out: expected {list(shape)}, not {list(out.shape)}")
    return out


def check_experts(
    x: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: PackedQuantized,
    down: PackedQuantized,
    kind: str,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> None:
    """Raises ValueError for shapes, dtypes or layouts that do not go together. No `x`: tokens that
    are quantised, which their product checks."""
    if kind == "" or kind not in ACTIVATIONS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(ACTIVATIONS[1:])}")
    experts, hidden, intermediate = down.experts, down.n, down.k
    found = (gate_up.experts, gate_up.n, gate_up.k)
    if experts is None or found != (experts, 2 * intermediate, hidden):
        raise ValueError(
            f"gate_up: expected [{experts}, {2 * intermediate}, {hidden}], not {list(found)}"
        )
    wanted = {
        "weights": (weights, tuple(ids.shape), torch.float32),
        "ids": (ids, tuple(ids.shape), torch.int32),
    }
    if x is not None:
        wanted["x"] = (x, (ids.shape[0], hidden), torch.bfloat16)
    if gate_up_bias is not None:
        wanted["gate_up_bias"] = (gate_up_bias, (experts, 2 * intermediate), torch.float32)
    if down_bias is not None:
        wanted["down_bias"] = (down_bias, (experts, hidden), torch.float32)
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous {dtype} {list(shape)}, "
                f"not {tensor.dtype} {list(tensor.shape)}"
            )
