"""Dense products of Qwen3-8B's sizes: every kernel, with the tiles each target gets."""

from __future__ import annotations

from quire.kernels.triton.gemm.gemm import AHEAD, gemm_kernel
from quire.kernels.triton.gemm.gemm_tiles import LARGE, SMALL, GemmTiles, block_k, gemm_tiles
from quire.kernels.triton.gemm.gemv import (
    gemv_kernel,
    gemv_tiles,
    norm_gemv_kernel,
    norm_gemv_tiles,
)
from quire.kernels.triton.gemm.head_linear import head_linear_kernel, tile_sizes
from quire.kernels.triton.gemm.tall import add_parts_kernel, tall_kernel, tall_tiles
from tests.kernels.triton.aot import SHARED, Case

K = 4096
SIZES = ("tokens", "count", "n", "k", "share", "x_stride", "residual_stride", "out_stride")
ALIGNED = SIZES[2:]
OTHERS = tuple(target for target in SHARED if target != "sm_90")


def types(dtype: str, bias: bool) -> dict[str, str]:
    pointers = ("x", "weight", "out", "weight_data", "residual", "residual_out", "normed_out")
    found = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(SIZES, "i32")
    found |= {"parts": "*fp32", "norm_weight": "*fp32", "eps": "fp32"}
    return found | ({"bias": "*fp32"} if bias else {})


def gemv(
    tokens: int, activation: str, dtype: str = "bf16", targets: tuple[str, ...] = tuple(SHARED)
) -> Case:
    sizes = gemv_tiles(tokens, 4096, K, activation != "")
    warps = sizes.pop("num_warps")
    constants = {"T": tokens, "ACTIVATION": activation, "bias": None, **sizes}
    name = f"gemv {dtype} T {tokens} {activation}"
    return Case(
        name, gemv_kernel, types(dtype, False), constants, warps, aligned=ALIGNED, targets=targets
    )


def norm_gemv(
    tokens: int, activation: str, add: bool, targets: tuple[str, ...] = tuple(SHARED)
) -> Case:
    sizes = norm_gemv_tiles(tokens, K, activation != "")
    warps = sizes.pop("num_warps")
    constants = {"T": tokens, "BLOCK_K": K, "ACTIVATION": activation, "bias": None, **sizes}
    if not add:
        constants |= {"x": None, "residual_out": None}
    if activation or not add:
        constants["normed_out"] = None
    name = f"norm_gemv T {tokens} {activation}{' of a sum' if add else ''}"
    kinds = types("bf16", False)
    return Case(name, norm_gemv_kernel, kinds, constants, warps, aligned=ALIGNED, targets=targets)


def tall(tokens: int, height: int, activation: str, target: str, dtype: str = "bf16") -> Case:
    itemsize = 4 if dtype == "fp32" else 2
    sizes = tall_tiles(tokens, height, K, itemsize, 132, SHARED[target])
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constants = {"T": tokens, "EVEN_K": True, "AHEAD": stages - 1, "ACTIVATION": activation}
    if sizes.pop("SPLITS") == 1:
        constants["parts"] = None
    return Case(
        f"tall {dtype} T {tokens} rows {height} {activation}",
        tall_kernel,
        types(dtype, True),
        constants | sizes,
        warps,
        stages,
        ALIGNED,
        (target,),
    )


def gemm(
    tiles: GemmTiles, activation: str, target: str, dtype: str = "bf16", out: str = ""
) -> Case:
    """`out`: its dtype, where it is another."""
    tma = target == "sm_90" and dtype != "fp32"
    depth = block_k(4 if dtype == "fp32" else 2)
    types_of = types(dtype, True)
    if tma:
        width = tiles.width if activation == "" else tiles.width // 2
        pair = "" if activation == "" else "2, "
        stored = width // 2 if tiles.halves else width
        types_of["x"] = f"tensordesc<{dtype}[{tiles.height}, {depth}]>"
        types_of["weight"] = f"tensordesc<{dtype}[{pair}{width}, {depth}]>"
        types_of["out"] = f"tensordesc<{dtype}[{tiles.height}, {stored}]>"
    if out:
        types_of["out"] = f"*{out}"
    constants = {"BLOCK_M": tiles.height, "BLOCK_N": tiles.width, "BLOCK_K": depth, "GROUP_M": 8}
    constants |= {"AHEAD": AHEAD if tiles.height == 64 else 0, "HALVES": tiles.halves, "TMA": tma}
    constants |= {"ACTIVATION": activation, "STORE_TMA": tma and not out}
    return Case(
        f"gemm {dtype} {out} {tiles.height} x {tiles.width} {activation}",
        gemm_kernel,
        types_of,
        constants,
        tiles.num_warps,
        tiles.num_stages,
        ALIGNED,
        (target,),
    )


def gemm_elsewhere(tokens: int, activation: str, target: str) -> Case:
    tiles = gemm_tiles(tokens, 24576, 2, 132, hopper=False, shared=SHARED[target])
    return gemm(tiles, activation, target)


def add_parts(activation: str) -> Case:
    constants = {"BLOCK": 256, "ACTIVATION": activation}
    name = f"add_parts {activation}"
    return Case(name, add_parts_kernel, types("bf16", True), constants, 2, aligned=ALIGNED)


HOPPER_TILES = {tiles for tiles, _ in LARGE} | {tiles for _, tiles in SMALL}


def heads(tokens: int, n: int, k: int) -> Case:
    """DeepSeek-V3's 128 heads, of queries to the latent's space and of latents to values."""
    sizes = tile_sizes(tokens, 2)
    warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
    constants = {"N": n, "K": k, "X_STRIDE": 128 * 192, "X_HEAD": 192} | sizes
    constants |= {"OUT_STRIDE": 128 * 576, "OUT_HEAD": 576}
    types = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16") | {"tokens": "i32"}
    return Case(
        f"head_linear {tokens} {n} {k}", head_linear_kernel, types, constants, warps, stages,
        one_instruction=True,
    )  # fmt: skip


CASES = [
    heads(1, 512, 128),
    heads(1000, 128, 512),
    gemv(1, ""),
    gemv(4, ""),
    gemv(1, "silu", targets=("sm_90",)),
    gemv(2, "gelu_tanh", targets=("sm_90", "gfx942")),
    gemv(1, "", "fp32", targets=("sm_90",)),
    norm_gemv(4, "", True),
    norm_gemv(1, "silu", True, targets=("sm_90", "gfx942")),
    norm_gemv(1, "", False, targets=("sm_90",)),
    *(tall(tokens, 24576, "", "sm_90") for tokens in (8, 16, 32)),
    *(tall(16, 24576, "silu", target) for target in ("sm_90", "gfx942")),
    *(tall(64, 4096, "", target) for target in SHARED),
    tall(8, 4096, "", "gfx942"),
    tall(16, 4096, "", "sm_80", "fp32"),
    add_parts("silu"),
    *(gemm(tiles, "", "sm_90") for tiles in sorted(HOPPER_TILES, key=repr)),
    *(
        gemm(tiles, "", "sm_90", out="fp32")
        for tiles in sorted(HOPPER_TILES - {LARGE[0][0]}, key=repr)
    ),
    gemm(LARGE[0][0], "silu", "sm_90"),
    *(gemm_elsewhere(tokens, "", target) for tokens in (1, 512) for target in OTHERS),
    *(gemm_elsewhere(512, "silu", target) for target in ("sm_100", "gfx942")),
    gemm(gemm_tiles(512, 24576, 4, 132, False, SHARED["sm_80"]), "", "sm_80", "fp32"),
]
