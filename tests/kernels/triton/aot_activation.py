"""Gated activations of Qwen3-8B and Gemma 3."""

from __future__ import annotations

from quire.kernels.triton.activation.gated_activation import BLOCK_I, gated_activation_kernel
from tests.kernels.triton.aot import Case


def gated(dtype: str, i: int, kind: str) -> Case:
    constants = {
        "X_STRIDE": 2 * i,
        "OUT_STRIDE": i,
        "WIDTH": i,
        "KIND": kind,
        "BLOCK_I": BLOCK_I,
        "LIMIT": 0.0,
    }
    types = {"x_ptr": dtype, "out_ptr": dtype}
    return Case(f"{kind} {dtype} I {i}", gated_activation_kernel, types, constants)


CASES = [gated("*bf16", 12288, "silu"), gated("*fp32", 6912, "gelu_tanh")]
