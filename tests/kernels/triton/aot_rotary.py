"""Rotary and cache writes of Qwen3-8B, SmolLM2-135M and a head with all there can be."""

from __future__ import annotations

from quire.kernels.reference.attention.fp8_cache import packed_width
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.rotary.latent_cache import block_sizes as latent_sizes
from quire.kernels.triton.rotary.latent_cache import latent_cache_kernel
from quire.kernels.triton.rotary.rotary_cache import block_sizes, rotary_cache_kernel
from tests.kernels.triton.aot import Case


def rotary(
    dtype: str,
    q_heads: int,
    kv_heads: int,
    d: int,
    rotary_dim: int,
    norms: bool,
    fp8: bool = False,
    fixed: bool = False,
) -> Case:
    heads, half = q_heads + 2 * kv_heads, rotary_dim // 2
    cache, width = ("*u8", packed_width(d)) if fp8 else (dtype, d)
    sizes = block_sizes(heads, half, d - rotary_dim)
    warps = sizes.pop("num_warps")
    types = {"qkv_ptr": dtype, "positions_ptr": "*i64", "cos_sin_ptr": "*fp32"}
    types |= {"q_norm_ptr": "*fp32", "k_norm_ptr": "*fp32", "k_cache_ptr": cache}
    types |= {"v_cache_ptr": cache, "fixed_ptr": "*fp32"}
    types |= {"slots_ptr": "*i64", "out_ptr": dtype, "eps": "fp32"}
    constants = {
        "QKV_STRIDE": heads * d, "OUT_STRIDE": q_heads * d, "K_STRIDE": kv_heads * BLOCK * width,
        "V_STRIDE": kv_heads * BLOCK * width, "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "D": d,
        "HALF": half, "ROTATE": True, "NORM_Q": norms, "NORM_K": norms, "BLOCK": BLOCK,
        "FP8": fp8, "FIXED": fixed, **sizes,
    }  # fmt: skip
    name = f"rotary {dtype} {q_heads}+{kv_heads} heads of {d}, {rotary_dim} rotate, norms {norms}"
    name += " e4m3" * fp8
    return Case(name, rotary_cache_kernel, types, constants, num_warps=warps)


def latents(heads: int, rank: int, rotary: int, nope: int, interleaved: bool) -> Case:
    sizes, width = latent_sizes(heads, rank, rotary), rank + rotary
    types = dict.fromkeys(("q_ptr", "latents_ptr", "cache_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64") | {"eps": "fp32"}
    types |= dict.fromkeys(("cos_sin_ptr", "norm_ptr"), "*fp32")
    constants = {
        "Q_STRIDE": heads * (nope + rotary), "LATENT_STRIDE": 1536 + width,
        "OUT_STRIDE": heads * width, "CACHE_STRIDE": BLOCK * width,
        "TILES": -(-heads // sizes["TILE"]), "HEADS": heads, "NOPE": nope, "RANK": rank,
        "HALF": rotary // 2, "INTERLEAVED": interleaved, "BLOCK": BLOCK, **sizes,
    }  # fmt: skip
    name = f"latents of {rank}+{rotary}, {heads} heads, interleaved {interleaved}"
    return Case(name, latent_cache_kernel, types, constants)


CASES = [
    latents(128, 512, 64, 128, True),
    latents(16, 512, 64, 128, False),
    rotary("*bf16", 32, 8, 128, 128, True),
    rotary("*bf16", 32, 8, 128, 128, True, fp8=True),
    rotary("*bf16", 5, 1, 80, 24, True, fp8=True, fixed=True),
    rotary("*bf16", 9, 3, 64, 64, False),
    rotary("*fp32", 5, 1, 80, 24, True),
]
