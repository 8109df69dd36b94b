"""What the experts' kernels ask of their operands."""

from __future__ import annotations

import torch

KINDS = ("silu", "gelu_tanh")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")


def check_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
) -> None:
    """Raises ValueError for shapes, dtypes or layouts that do not go together."""
    check_kind(kind)
    experts, hidden, intermediate = down.shape
    wanted = {
        "x": (x, (ids.shape[0], hidden), down.dtype),
        "weights": (weights, tuple(ids.shape), torch.float32),
        "ids": (ids, tuple(ids.shape), ids.dtype),
        "gate_up": (gate_up, (experts, 2 * intermediate, hidden), down.dtype),
        "down": (down, tuple(down.shape), down.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
