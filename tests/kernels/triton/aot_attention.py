"""The attention kernels' tile shapes on every GPU, for compilation ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels.reference.attention.fp8_cache import FP8_CACHE, packed_width
from quire.kernels.triton.attention.decode import decode_kernel
from quire.kernels.triton.attention.decode_ordered import decode_ordered_kernel
from quire.kernels.triton.attention.decode_short import (
    SHORT_CONTEXT,
    TILES,
    decode_short_kernel,
)
from quire.kernels.triton.attention.latent_attention import MERGED_AT_ONCE, merged_heads
from quire.kernels.triton.attention.latent_decode import latent_decode_kernel, latent_merge_kernel
from quire.kernels.triton.attention.tiles import (
    Target,
    Tiles,
    columns,
    decode_tiles,
    head_tiles,
    latent_tiles,
    power_of_2,
    varlen_tiles,
)
from quire.kernels.triton.attention.varlen import varlen_kernel
from tests.kernels.triton.aot import SHARED, Case, instructions

NAMES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", FP8_CACHE: "*u8",
}  # fmt: skip
AHEAD = {
    name: Target(shared, wgmma=name == "sm_90", amd=name == "gfx942")
    for name, shared in SHARED.items()
}


def _types(dtype: torch.dtype, cache: torch.dtype, kernel: Any) -> dict[str, str]:
    types = dict.fromkeys(kernel.arg_names, "i32") | {"factor": "fp32", "inner_scale": "fp32"}
    for name in ("q_ptr", "out_ptr"):
        types[name] = NAMES[dtype]
    for name in ("k_ptr", "v_ptr"):
        types[name] = NAMES[cache]
    for name in ("tables_ptr", "query_start_ptr", "context_len_ptr", "arrived_ptr"):
        types[name] = "*i32"
    for name in ("sinks_ptr", "values_ptr", "sums_ptr"):
        types[name] = "*fp32"
    return types


def case(
    kind: str,
    target: str,
    heads: int,
    kv_heads: int,
    d: int,
    *,
    deterministic: bool = False,
    small: bool = False,
    decode: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    window: int = 0,
    softcap: bool = False,
    sinks: bool = False,
    one_row: bool = False,
    only_full: bool = False,
) -> Case:
    """The "decode" or the "varlen" kernel as paged_attention would launch it on `target`."""
    group = heads // kv_heads
    cache = cache or dtype
    sizes = (group, d, dtype.itemsize, AHEAD[target], deterministic)
    tiles: Tiles = (
        decode_tiles(*sizes, cache.itemsize) if kind == "decode" else varlen_tiles(*sizes, small)
    )
    width = packed_width(d) if cache == FP8_CACHE else d
    decodes = decode_ordered_kernel if deterministic else decode_kernel
    kernel = decodes if kind == "decode" else varlen_kernel
    constants = {
        "Q_STRIDE": heads * d,
        "OUT_STRIDE": heads * d,
        "K_STRIDE": kv_heads * 16 * width,
        "V_STRIDE": kv_heads * 16 * width,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "D": d,
        "BLOCK": 16,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "HAS_SINKS": sinks,
        "FP8": cache == FP8_CACHE,
        **instructions(target),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "TILE": tiles.keys,
        "TILE_ROWS": tiles.rows,
        "D_COLUMNS": columns(d),
        "SEARCH": 32 if kind == "decode" and decode else 256,
    }
    if kind == "decode":
        constants |= {"ONE_QUERY": decode, "ONE_ROW": one_row, "GROUP_ROWS": power_of_2(group)}
    if kernel is decode_kernel:
        constants |= {"PIECE": tiles.piece}
    if kernel is varlen_kernel:
        constants |= {"DETERMINISTIC": deterministic, "REST": 0, "REST_COLUMNS": 1}
    name = f"{kind} {heads}/{kv_heads} D={d} {dtype}".replace("torch.", "")
    name += " deterministic" * deterministic + " small" * small + " one row" * one_row
    name += " e4m3" * (cache == FP8_CACHE)
    name += " mixed" * (not decode and kind == "decode") + " extras" * (softcap or sinks)
    return Case(
        name,
        kernel,
        _types(dtype, cache, kernel),
        constants,
        tiles.warps,
        tiles.stages,
        targets=(target,),
        options={"maxnreg": tiles.registers} if tiles.registers else {},
        only_full=only_full,
    )


def short(
    target: str,
    heads: int,
    kv_heads: int,
    d: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 0,
    extras: bool = False,
    new: bool = False,
    only_full: bool = False,
) -> Case:
    """The kernel of few short requests as decode_short would launch it, with `new` tokens of which
    heads are normed and rotate."""
    tile = TILES[extras]
    types = _types(dtype, dtype, decode_short_kernel) | {"eps": "fp32"}
    types |= dict.fromkeys(("positions_ptr", "slots_ptr"), "*i64" if new else "*i32")
    types |= dict.fromkeys(("cos_sin_ptr", "q_norm_ptr", "k_norm_ptr"), "*fp32" if new else "*i32")
    constants = {
        "Q_STRIDE": (heads + 2 * kv_heads * new) * d,
        "OUT_STRIDE": heads * d,
        "K_STRIDE": kv_heads * 16 * d,
        "V_STRIDE": kv_heads * 16 * d,
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "D": d,
        "BLOCK": 16,
        "WINDOW": window,
        "SOFTCAP": extras,
        "HAS_SINKS": extras,
        "NEW": new,
        "HALF": d // 2 * new,
        "NORM_Q": new,
        "NORM_K": new,
        "SHORT": SHORT_CONTEXT,
        "TILE": tile.keys,
        "CHUNK": tile.chunk,
    }
    return Case(
        f"short {heads}/{kv_heads} D={d} {dtype}".replace("torch.", "")
        + " extras" * extras
        + " new" * new,
        decode_short_kernel,
        types,
        constants,
        tile.warps,
        1,
        targets=(target,),
        only_full=only_full,
    )


RANK, REST = 512, 64  # of DeepSeek's latents


def latents(
    kind: str,
    target: str,
    heads: int = 128,
    *,
    deterministic: bool = False,
    decode: bool = True,
    only_full: bool = False,
) -> Case:
    """The "decode", "merge" or "varlen" kernel as latent_attention would launch it on `target`."""
    dtype = torch.bfloat16
    count = head_tiles(heads, AHEAD[target], deterministic)
    group, width = heads // count, RANK + REST
    tiles = latent_tiles(group, dtype.itemsize, AHEAD[target], deterministic)
    kernels = {
        "decode": latent_decode_kernel, "merge": latent_merge_kernel, "varlen": varlen_kernel,
    }  # fmt: skip
    kernel = kernels[kind]
    values: dict[str, Any] = {
        "Q_STRIDE": heads * width, "OUT_STRIDE": heads * RANK, "CACHE_STRIDE": 16 * width,
        "K_STRIDE": 16 * width, "V_STRIDE": 16 * width, "HEAD_TILES": count, "KV_HEADS": count,
        "GROUP": group, "D": RANK, "REST": REST, "BLOCK": 16, "WINDOW": 0, "SOFTCAP": False,
        "HAS_SINKS": False, "FP8": False, "PACKED": False, "CAST": False,
        "ORDERED": deterministic, "DETERMINISTIC": deterministic,
        "ONE_QUERY": decode, "ONE_ROW": False, "TILE": tiles.keys, "TILE_ROWS": tiles.rows,
        "D_COLUMNS": RANK, "REST_COLUMNS": REST, "SEARCH": 32 if decode else 256,
        "PRECISION": "tf32", "HEADS": merged_heads(1 if decode else 256, group),
        "ROUND": MERGED_AT_ONCE,
    }  # fmt: skip
    types = _types(dtype, dtype, kernel) | {"cache_ptr": NAMES[dtype], "marks_ptr": "*i32"}
    warps, stages = (4, 3) if kind == "merge" else (tiles.warps, tiles.stages)
    return Case(
        f"latents {kind} {heads}" + " deterministic" * deterministic + " mixed" * (not decode),
        kernel,
        types,
        {name: values[name] for name in kernel.arg_names if name in values},
        warps,
        stages,
        targets=(target,),
        only_full=only_full,
        one_instruction=kind != "merge" and not deterministic,
    )


def _latents_for_target(target: str) -> list[Case]:
    rest: dict[str, Any] = {"only_full": target != "sm_90"}
    return [
        latents("decode", target),
        latents("varlen", target, only_full=True),
        latents("merge", target, **rest),
        latents("decode", target, 16, deterministic=True, decode=False, **rest),
        latents("varlen", target, 16, deterministic=True, decode=False, **rest),
        latents("merge", target, 16, deterministic=True, decode=False, only_full=True),
    ]


def _for_target(target: str) -> list[Case]:
    rest: dict[str, Any] = {"only_full": target != "sm_90"}
    extras: dict[str, Any] = {"window": 1024, "softcap": True, "sinks": True} | rest
    return [
        case("decode", target, 32, 8, 128),
        case("varlen", target, 32, 8, 128),
        case("decode", target, 32, 8, 128, one_row=True, **rest),
        short(target, 32, 8, 128, **rest),
        short(target, 8, 4, 256, window=1024, extras=True, **rest),
        short(target, 32, 4, 128, new=True),
        short(target, 8, 4, 256, window=1024, extras=True, new=True, **rest),
        case("decode", target, 32, 8, 128, deterministic=True, decode=False, **rest),
        case("varlen", target, 32, 8, 128, deterministic=True, small=True, **rest),
        case("decode", target, 8, 4, 256, **extras),
        case("varlen", target, 8, 4, 256, **extras),
        case("decode", target, 32, 8, 128, cache=FP8_CACHE),
        case("varlen", target, 32, 8, 128, cache=FP8_CACHE),
        case("decode", target, 32, 8, 128, deterministic=True, cache=FP8_CACHE, **rest),
        case("varlen", target, 8, 4, 256, cache=FP8_CACHE, **extras),
    ]


CASES = [new for target in AHEAD for new in _for_target(target) + _latents_for_target(target)] + [
    case("decode", "sm_90", 9, 3, 64, dtype=torch.float16, only_full=True),
    case("varlen", "sm_90", 9, 3, 64, dtype=torch.float16, only_full=True),
    short("sm_90", 9, 3, 80, dtype=torch.float16, only_full=True),
    short("sm_90", 9, 3, 64, dtype=torch.float16, new=True, only_full=True),
    case("varlen", "sm_90", 32, 8, 128, small=True, only_full=True),
    case("varlen", "sm_90", 8, 4, 256, deterministic=True, only_full=True),
    case("varlen", "sm_90", 32, 8, 128, deterministic=True, only_full=True),
    case("decode", "sm_90", 8, 4, 256, deterministic=True, only_full=True),
    case("decode", "sm_90", 4, 2, 16, dtype=torch.float32, cache=torch.bfloat16, only_full=True),
    case("varlen", "sm_90", 64, 8, 64, deterministic=True, cache=FP8_CACHE, only_full=True),
    case("varlen", "sm_90", 32, 8, 128, small=True, cache=FP8_CACHE, only_full=True),
    case("decode", "sm_90", 9, 3, 64, dtype=torch.float16, cache=FP8_CACHE, only_full=True),
    case("varlen", "sm_90", 4, 2, 16, dtype=torch.float32, deterministic=True, only_full=True),
]
