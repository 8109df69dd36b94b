"""Rotary and cache writes of Qwen3-8B, SmolLM2-135M and a head with all there can be."""

from __future__ import annotations

from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.rotary.rotary_cache import block_sizes, rotary_cache_kernel
from tests.kernels.triton.aot import Case


def rotary(dtype: str, q_heads: int, kv_heads: int, d: int, rotary_dim: int, norms: bool) -> Case:
    heads, half = q_heads + 2 * kv_heads, rotary_dim // 2
    sizes = block_sizes(heads, half, d - rotary_dim)
    warps = sizes.pop("num_warps")
    types = {"qkv_ptr": dtype, "positions_ptr": "*i64", "cos_sin_ptr": "*fp32"}
    types |= {"q_norm_ptr": "*fp32", "k_norm_ptr": "*fp32", "k_cache_ptr": dtype}
    types |= {"v_cache_ptr": dtype, "slots_ptr": "*i64", "out_ptr": dtype, "eps": "fp32"}
    constants = {
        "QKV_STRIDE": heads * d, "OUT_STRIDE": q_heads * d, "K_STRIDE": kv_heads * BLOCK * d,
        "V_STRIDE": kv_heads * BLOCK * d, "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "D": d,
        "HALF": half, "ROTATE": True, "NORM_Q": norms, "NORM_K": norms, "BLOCK": BLOCK, **sizes,
    }  # fmt: skip
    name = f"rotary {dtype} {q_heads}+{kv_heads} heads of {d}, {rotary_dim} rotate, norms {norms}"
    return Case(name, rotary_cache_kernel, types, constants, num_warps=warps)


CASES = [
    rotary("*bf16", 32, 8, 128, 128, True),
    rotary("*bf16", 9, 3, 64, 64, False),
    rotary("*fp32", 5, 1, 80, 24, True),
]
