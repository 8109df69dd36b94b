"""Norms of Qwen3-8B, SmolLM2-135M and the widest rows."""

from __future__ import annotations

from quire.kernels.triton.norm.rms_norm import add_rms_norm_kernel, block_sizes, rms_norm_kernel
from tests.kernels.triton.aot import Case


def norm(dtype: str, h: int) -> Case:
    sizes = block_sizes(h)
    warps = sizes.pop("num_warps")
    types = {"x_ptr": dtype, "weight_ptr": "*fp32", "out_ptr": dtype, "rows": "i32", "eps": "fp32"}
    constants = {"X_STRIDE": h, "OUT_STRIDE": h, "H": h, **sizes}
    return Case(f"rms_norm {dtype} H {h}", rms_norm_kernel, types, constants, num_warps=warps)


def added(dtype: str, h: int, norm_x: bool) -> Case:
    sizes = block_sizes(h)
    warps = sizes.pop("num_warps")
    types = {"x_ptr": dtype, "residual_ptr": dtype, "weight_ptr": "*fp32", "x_norm_ptr": "*fp32"}
    types |= {"out_ptr": dtype, "rows": "i32", "eps": "fp32"}
    constants = {"X_STRIDE": h, "RESIDUAL_STRIDE": h, "H": h, "NORM_X": norm_x, **sizes}
    name = f"add_rms_norm {dtype} H {h}{' of a normed x' if norm_x else ''}"
    return Case(name, add_rms_norm_kernel, types, constants, num_warps=warps)


CASES = [
    norm("*bf16", 4096),
    norm("*fp32", 33),
    added("*bf16", 576, False),
    added("*bf16", 4096, False),
    added("*fp32", 16384, True),
]
