"""Streams of DeepSeek V4 Flash and Pro, for few tokens and for many, and of its head."""

from __future__ import annotations

import triton

from quire.kernels.triton.streams.mix_streams import MIX_TOKENS, block_sizes, mix_streams_kernel
from quire.kernels.triton.streams.write_streams import (
    CHANNELS,
    part_width,
    sizes,
    write_streams_kernel,
)
from tests.kernels.triton.aot import Case

N = 4
FLASH, PRO = 4096, 7168
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def written(d: int, tokens: int, dtype: str, write: bool = True, rows: int = 24) -> Case:
    size = sizes(tokens, 4 if dtype == "*fp32" else 2)
    warps = size.pop("num_warps")
    types = {"streams": dtype, "tokens": "i32"}
    constants: dict[str, object] = {
        "N": N, "D": d, "M": rows, "TOKEN_STRIDE": N * d, "STREAM_STRIDE": d, "Y_STRIDE": d,
        "BLOCK_M": part_width(rows), "CHANNELS": CHANNELS, "LEVELS": 6,
        "EXACT": dtype != "*bf16", **size,
    }  # fmt: skip
    for name, kind in (("y", dtype), ("writes", "*fp32"), ("passes", "*fp32"), ("out", dtype)):
        (types if write else constants)[name] = kind if write else None  # type: ignore[assignment]
    for name in ("matrix", "parts"):
        (types if rows else constants)[name] = "*fp32" if rows else None  # type: ignore[assignment]
    name = f"write_streams {dtype} D {d} T {tokens}{' written' if write else ''} rows {rows}"
    one = MMA if rows and dtype == "*bf16" else False
    return Case(name, write_streams_kernel, types, constants, num_warps=warps, one_instruction=one)


def mixed(d: int, dtype: str, head: bool = False) -> Case:
    splits = triton.cdiv(d, CHANNELS)
    size = block_sizes(N, d, splits)
    warps = size.pop("num_warps")
    rows = N if head else N * (N + 2)
    names = ("parts", "base", "scale", "norm", "writes", "passes")
    types = dict.fromkeys(names, "*fp32") | {"streams": dtype, "out": dtype, "tokens": "i32"}
    types |= dict.fromkeys(("eps", "stream_eps", "norm_eps"), "fp32")
    constants: dict[str, object] = {
        "N": N, "D": d, "M": rows, "WIDTH": part_width(rows), "SPLITS": splits, "STEPS": 20,
        "TOKEN_STRIDE": N * d, "STREAM_STRIDE": d, "MIX_TOKENS": MIX_TOKENS, **size,
    }  # fmt: skip
    if head:
        constants |= dict.fromkeys(("norm", "writes", "passes"))
    name = f"mix_streams {dtype} D {d}{' of the head' if head else ''}"
    return Case(name, mix_streams_kernel, types, constants, num_warps=warps)


CASES = [
    written(FLASH, 1, "*bf16"),
    written(FLASH, 4096, "*bf16"),
    written(PRO, 1, "*bf16", write=False),
    written(FLASH, 4096, "*bf16", rows=0),
    written(FLASH, 1, "*bf16", write=False, rows=4),
    written(FLASH, 1, "*fp32"),
    mixed(FLASH, "*bf16"),
    mixed(PRO, "*bf16"),
    mixed(FLASH, "*bf16", head=True),
]
