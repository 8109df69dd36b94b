"""Products with quantised weights: every kernel in every format, Qwen3's sizes."""

from __future__ import annotations

import itertools
from typing import Any

from quire.kernels.triton.norm.rms_norm import block_sizes
from quire.kernels.triton.quantized.experts import expert_tile
from quire.kernels.triton.quantized.experts_small import (
    SmallTile,
    T,
    down_small_kernel,
    gate_up_small_kernel,
    small_tiles,
)
from quire.kernels.triton.quantized.gemm import (
    GROUP_TOKENS,
    quantized_gemm_kernel,
    quantized_tile,
)
from quire.kernels.triton.quantized.gemv import (
    down_tiles,
    e4m3_down_kernel,
    e4m3_gemv_kernel,
    gemv_tiles,
)
from quire.kernels.triton.quantized.grouped_gemm import GROUP_BLOCKS, quantized_grouped_kernel
from quire.kernels.triton.quantized.linear import EXACT
from quire.kernels.triton.quantized.norm_gemv import (
    e4m3_norm_gemv_kernel,
    norm_gemv_tiles,
    registers,
)
from quire.kernels.triton.quantized.quantize import (
    _sizes,
    activation_quantize_kernel,
    norm_quantize_kernel,
    quantize_kernel,
)
from quire.kernels.triton.quantized.scaled_experts import scaled_tiles
from quire.kernels.triton.quantized.scaled_gemm import GROUP_M, ScaledTile, scaled_gemm_kernel
from quire.kernels.triton.quantized.scaled_grouped_gemm import scaled_grouped_kernel
from quire.kernels.triton.quantized.skinny import skinny_kernel, skinny_tiles
from quire.kernels.triton.quantized.widen import ROWS as WIDENED_ROWS
from quire.kernels.triton.quantized.widen import widen_kernel
from quire.kernels.triton.quantized.words import WORDS, pack_words_kernel
from tests.kernels.triton.aot import SHARED, Case, instructions

# With an instruction for e4m3, as operands.instructions has it.
CASTING = ("sm_90", "sm_100", "sm_120")
SIZES = ("tokens", "max_blocks", "n", "k", "blocks", "x_stride", "code_stride", "scale_stride")
SIZES += ("scale_size", "out_stride", "groups")
ALIGNED = SIZES[2:]
SCALES = {"nvfp4": "*i64", "mxfp4": "*i32", "fp8_block": "*fp32", "int4": "*bf16", "int8": "*fp16"}


def weight(format: str, target: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a weight's arguments, and the constexprs that the format and the GPU decide."""
    four = format in ("nvfp4", "mxfp4", "int4")
    types = dict.fromkeys(SIZES, "i32") | dict.fromkeys(("x", "h", "out"), "*bf16")
    types |= dict.fromkeys(("row_scales", "weights"), "*fp32")
    types |= {"zeros": "*u8", "codes": "*i32" if four else "*u8", "scales": SCALES.get(format, "")}
    types |= dict.fromkeys(("ids", "pairs", "experts", "starts", "ends", "count"), "*i32")
    constants: dict[str, Any] = {"FORMAT": format, "GROUP": 128, "EVEN": True, "bias": None}
    constants |= instructions(target)
    if format == "fp8":
        constants["scales"] = None
    if format in ("fp8_block", "int4", "int8"):
        constants["row_scales"] = None
    if format not in ("int4", "int8"):
        constants["zeros"] = None
    return types, constants


def skinny(tokens: int, n: int, format: str, target: str, kind: str = "") -> Case:
    types, constants = weight(format, target)
    sizes = skinny_tiles(tokens, n, format, 128, 132, SHARED[target])
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constants |= {"T": tokens, "AHEAD": 1024, "ACTIVATION": kind, "LIMIT": 0.0}
    constants |= sizes
    name = f"skinny {format} T {tokens} rows {n} {kind}"
    return Case(name, skinny_kernel, types, constants, warps, stages, ALIGNED, (target,))


def gemm(tokens: int, format: str, target: str, kind: str = "", limit: float = 0.0) -> Case:
    types, constants = weight(format, target)
    tile = quantized_tile(tokens, 6144, format, 128, SHARED[target])
    constants |= {"T": tile.tokens, "ROWS": tile.rows, "BLOCKS": tile.blocks, "AHEAD": 64}
    constants |= {"GROUP_TOKENS": GROUP_TOKENS, "ACTIVATION": kind, "LIMIT": limit}
    return Case(
        f"quantized_gemm {format} {tile} {kind}",
        quantized_gemm_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        ALIGNED,
        (target,),
        one_instruction=True,
    )


def _small(tile: SmallTile) -> dict[str, Any]:
    return {"T": T, "ROWS": tile.rows, "PARTS": tile.parts, "BLOCKS": tile.blocks}


def gate_up_small(format: str, target: str, rows: int) -> Case:
    types, constants = weight(format, target)
    tile, _ = small_tiles(format, format, 8, rows, 132)
    constants |= {"SLOTS": 8, "KIND": "swiglu_oai", "LIMIT": 7.0, **_small(tile)}
    return Case(
        f"gate_up_small {format} {tile.rows}", gate_up_small_kernel, types, constants, tile.warps,
        tile.stages, ALIGNED, (target,),
    )  # fmt: skip


def down_small(format: str, target: str) -> Case:
    types, constants = weight(format, target)
    _, tile = small_tiles(format, format, 6, 0, 132)
    constants |= {"SLOTS": 6, **_small(tile)}
    return Case(
        f"down_small {format}", down_small_kernel, types, constants, tile.warps, tile.stages,
        ALIGNED, (target,),
    )  # fmt: skip


def _words(format: str, target: str) -> tuple[dict[str, str], dict[str, Any]]:
    types, constants = weight(format, target)
    types |= dict.fromkeys(("x", "h"), "*i64") | {"codes": "*i32"}
    types |= dict.fromkeys(("words", "units"), "i32")
    return types, constants


def _gemv(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Case:
    tiles = {**constants}
    warps = tiles.pop("num_warps")
    given = {n: tiles[n] for n in kernel.arg_names if n in tiles}
    return Case(name, kernel, types, given, warps, 3, (*ALIGNED, "words", "units"), CASTING)


def gemv(format: str, tokens: int, kind: str = "", experts: bool = False) -> Case:
    types, constants = _words(format, "sm_90")
    constants |= {"T": tokens, "SLOTS": 8 if experts else 1, "ACTIVATION": kind, "LIMIT": 0.0}
    constants |= gemv_tiles(4096, experts) | ({} if experts else {"ids": None})
    name = f"gemv {format} T {tokens} {kind}" + " experts" * experts
    return _gemv(name, e4m3_gemv_kernel, types, constants)


def norm_gemv(format: str, tokens: int, k: int, kind: str = "", add: bool = True) -> Case:
    types, constants = weight(format, "sm_90")
    types |= dict.fromkeys(("residual", "residual_out"), "*bf16") | {"codes": "*i32"}
    types |= {"words": "i32", "residual_stride": "i32", "norm_weight": "*fp32", "eps": "fp32"}
    constants |= {"T": tokens, "COLUMNS": k // 4, "ACTIVATION": kind, "LIMIT": 0.0}
    constants |= {} if add else {"x": None, "residual_out": None}
    sizes, programs = norm_gemv_tiles(tokens, k)
    warps = sizes.pop("num_warps")
    given = {n: v for n, v in (constants | sizes).items() if n in e4m3_norm_gemv_kernel.arg_names}
    return Case(
        f"norm_gemv {format} T {tokens} K {k} {kind}{' of a sum' if add else ''}",
        e4m3_norm_gemv_kernel,
        types,
        given,
        warps,
        3,
        (*ALIGNED, "words", "residual_stride"),
        CASTING,
        {"maxnreg": registers(programs, warps)},
    )


def down_gemv(format: str, slots: int) -> Case:
    types, constants = _words(format, "sm_90")
    constants |= {"SLOTS": slots, **down_tiles(slots)}
    return _gemv(f"down_gemv {format} {slots}", e4m3_down_kernel, types, constants)


def packing(floats: bool) -> Case:
    types = {"codes": "*u8", "zero": "*u8", "words": "*i32"}
    types |= dict.fromkeys(("count", "width", "stored", "groups"), "i32")
    constants: dict[str, Any] = {"WORDS": WORDS, "FLOATS": floats}
    if not floats:
        constants["zero"] = None
    name = f"pack_words floats {floats}"
    return Case(name, pack_words_kernel, types, constants, 4, 3, ("count", "width", "stored"))


def grouped(tokens: int, format: str, target: str, kind: str = "") -> Case:
    types, constants = weight(format, target)
    tile = expert_tile(tokens, format, SHARED[target])
    constants |= {"T": tile.tokens, "ROWS": tile.rows, "BLOCKS": tile.blocks, "SLOTS": 8}
    constants |= {"GROUP_BLOCKS": GROUP_BLOCKS, "FROM_TOKENS": kind != "", "KIND": kind}
    constants |= {"LIMIT": 0.0}
    return Case(
        f"quantized_grouped {format} {tile} {kind}",
        quantized_grouped_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        ALIGNED,
        (target,),
    )


def widening(format: str, target: str) -> Case:
    types, constants = weight(format, target)
    constants = {n: v for n, v in constants.items() if n in widen_kernel.arg_names}
    constants["ROWS"] = WIDENED_ROWS
    name = f"widen {format}"
    return Case(name, widen_kernel, types, constants, 4, 3, ALIGNED, (target,))


FP8 = ("sm_90", "sm_100", "sm_120")


def scaled(tile: ScaledTile, blockwise: bool, exact: bool, *targets: str) -> Case:
    tma = targets == ("sm_90",)
    types = dict.fromkeys(("tokens", "n", "k", "weight_stride", "scale_stride"), "i32")
    types |= {"x": "*fp8e4nv", "weight": "*fp8e4nv", "out": "*bf16", "out_stride": "i32"}
    types |= dict.fromkeys(("x_scales", "weight_scales"), "*fp32")
    if tma:
        types["x"] = f"tensordesc<fp8e4nv[{tile.rows}, 128]>"
        types["weight"] = f"tensordesc<fp8e4nv[{tile.columns}, 128]>"
    constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "GROUP_M": GROUP_M, "bias": None}
    constants |= {"BLOCKWISE": blockwise, "EXACT": exact, "TMA": tma}
    return Case(
        f"scaled_gemm {tile} {'blockwise' if blockwise else ''} {'exact' if exact else ''}",
        scaled_gemm_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        ("n", "k", "weight_stride", "out_stride"),
        targets,
        {"maxnreg": min(255, 65536 // (tile.programs_per_sm * tile.warps * 32))},
    )


def scaled_grouped(
    pairs: int,
    format: str,
    targets: tuple[str, ...] = ("sm_90",),
    kind: str = "",
    only_full: bool = False,
) -> Case:
    """Of experts of Qwen3-30B-A3B's sizes; `kind`: gate and up, else down."""
    tile = scaled_tiles(pairs, 128, format)[kind == ""]
    width = tile.rows // (1 if kind == "" else 2)
    sizes = ("max_blocks", "x_rows", "n", "k", "blocks", "row_blocks")
    types = dict.fromkeys(sizes, "i32") | {"x": "*fp8e4nv", "out": "*bf16"}
    types |= dict.fromkeys(("x_scales", "weight_scales"), "*fp32")
    types |= dict.fromkeys(("pairs", "experts", "starts", "ends", "count"), "*i32")
    types["weight"] = f"tensordesc<fp8e4nv[{width}, 128]>"
    if kind == "":
        types["x"] = f"tensordesc<fp8e4nv[{tile.tokens}, 128]>"
    constants = {"SLOTS": 8, "FROM_TOKENS": kind != "", "X_MAP": kind == "", "T": tile.tokens}
    constants |= {"ROWS": tile.rows, "WEIGHT_TALL": tile.weight_tall, "bias": None}
    constants |= {"GROUP_BLOCKS": GROUP_BLOCKS, "BLOCKWISE": format == "fp8_block"}
    constants |= {"EXACT": EXACT, "EVEN": True, "KIND": kind, "LIMIT": 0.0}
    return Case(
        f"scaled_grouped {format} {tile} {kind}",
        scaled_grouped_kernel,
        types,
        constants,
        tile.warps,
        tile.stages,
        ("n", "k"),
        targets,
        {"maxnreg": min(255, 65536 // (tile.programs_per_sm * tile.warps * 32))},
        only_full,
        one_instruction=True,
    )


def quantizing(
    kernel: Any, columns: int, group: int, fixed: bool = False, **constants: Any
) -> Case:
    types = dict.fromkeys(("x", "residual", "normed"), "*bf16") | {"codes": "*fp8e4nv"}
    types |= {"scales": "*fp32", "weight": "*fp32", "rows": "i32", "eps": "fp32", "fixed": "*fp32"}
    constants = {"fixed": None} | constants if not fixed else constants
    sizes = block_sizes(columns) if kernel is norm_quantize_kernel else _sizes(columns)
    warps = sizes.pop("num_warps")
    constants |= {"X_STRIDE": columns, "GROUP": group, "POWER_OF_TWO": group > 0, **sizes}
    constants |= {"H" if kernel is norm_quantize_kernel else "COLUMNS": columns}
    name = f"{kernel.__name__} {columns} group {group}"
    return Case(name, kernel, types, constants, warps, targets=FP8)


def everywhere(target: str) -> list[Case]:
    return [
        skinny(8, 6144, "nvfp4", target),
        skinny(8, 6144, "fp8", target),
        gemm(2048, "nvfp4", target),
        gemm(2048, "fp8_block", target),
        gate_up_small("mxfp4", target, 24576),  # DeepSeek V4 Flash
        down_small("int4", target),
        grouped(8, "nvfp4", target, "silu"),
        widening("nvfp4", target),
    ]


CASES = [
    *(case for target in SHARED for case in everywhere(target)),
    scaled(ScaledTile(64, 64, 4, 2), True, True, "sm_120", "sm_100"),
    scaled(ScaledTile(64, 64, 4, 2), False, True, "sm_120", "sm_100"),
    scaled(ScaledTile(128, 256, 8, 4), False, True, "sm_90"),
    scaled(ScaledTile(128, 256, 8, 4), False, False, "sm_90"),
    scaled(ScaledTile(128, 128, 8, 3, 2), False, True, "sm_90"),
    scaled(ScaledTile(128, 128, 8, 3, 2), True, True, "sm_90"),
    scaled(ScaledTile(64, 128, 4, 4, 2), True, True, "sm_90"),
    scaled_grouped(128 * 16, "fp8", FP8, "silu"),
    scaled_grouped(128 * 512, "fp8", kind="silu"),
    scaled_grouped(128 * 512, "fp8"),
    scaled_grouped(128 * 16, "fp8_block", kind="silu"),
    *(
        scaled_grouped(128 * each, format, kind=kind, only_full=True)
        for each in (8, 16, 64, 512)
        for format, kind in itertools.product(("fp8", "fp8_block"), ("silu", ""))
    ),
    quantizing(quantize_kernel, 4096, 0),
    quantizing(quantize_kernel, 4096, 0, True),
    quantizing(quantize_kernel, 12288, 128),
    quantizing(activation_quantize_kernel, 12288, 0, KIND="silu", LIMIT=0.0),
    quantizing(norm_quantize_kernel, 4096, 0, RESIDUAL_STRIDE=4096, normed=None),
    quantizing(norm_quantize_kernel, 2048, 128, RESIDUAL_STRIDE=2048, x=None),
    skinny(8, 24576, "mxfp4", "sm_90", "silu"),
    skinny(32, 6144, "int4", "sm_90"),
    skinny(64, 6144, "int8", "sm_90"),
    skinny(16, 6144, "fp8_block", "sm_90"),
    gemv("fp8", 1),
    gemv("fp8_block", 2, "silu"),
    gemv("fp8_block", 1, "silu", experts=True),
    down_gemv("fp8", 8),
    norm_gemv("fp8", 1, 4096),
    norm_gemv("fp8_block", 1, 4096, "silu"),
    norm_gemv("fp8", 2, 2048, "silu", add=False),
    norm_gemv("fp8", 1, 8192),
    gemm(8, "nvfp4", "sm_90", "silu", 10.0),
    gemm(8, "mxfp4", "sm_90"),
    gemm(32, "nvfp4", "sm_90"),
    gemm(64, "mxfp4", "sm_90"),
    gemm(2048, "fp8", "sm_90", "silu"),
    gemm(2048, "int4", "sm_90"),
    gemm(2048, "int8", "sm_90"),
    packing(True),
    packing(False),
    *(widening(format, "sm_90") for format in ("mxfp4", "int4", "int8")),
    gate_up_small("nvfp4", "sm_90", 12288),  # Qwen3-30B-A3B
    down_small("nvfp4", "sm_90"),
    down_small("fp8_block", "sm_90"),
    grouped(128, "nvfp4", "sm_90", "silu"),
    grouped(128, "fp8", "sm_90"),
    grouped(16, "mxfp4", "sm_90", "silu"),
    grouped(32, "nvfp4", "sm_90", "silu"),
    grouped(64, "int4", "sm_90"),
]
