"""Mixture of experts: Qwen3-30B-A3B's sizes, every tile that each target uses."""

from __future__ import annotations

import torch
import triton

from quire.kernels.triton.moe.align import BLOCKS_STEP, CHUNK, STEP, count_kernel, place_kernel
from quire.kernels.triton.moe.combine import combine_kernel
from quire.kernels.triton.moe.experts_small import (
    down_small_kernel,
    gate_up_small_kernel,
)
from quire.kernels.triton.moe.grouped_gemm import GROUP, grouped_gemm_kernel
from quire.kernels.triton.moe.route import ROWS, route_kernel
from quire.kernels.triton.moe.route_groups import route_groups_kernel
from quire.kernels.triton.moe.route_tokens import route_tokens_kernel
from quire.kernels.triton.moe.tiles import Tile, tiles
from tests.kernels.triton.aot import SHARED, Case

E, SLOTS, H, I = 128, 8, 2048, 768  # noqa: E741
TMA = ("sm_90", "sm_100", "sm_120")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALIGN = {"E": E, "CHUNK": CHUNK, "STEP": STEP, "BLOCK_E": 128}


def grouped(tile: Tile, gated: bool, dtype: str, tma: bool, targets: tuple[str, ...]) -> Case:
    n, k = (I, H) if gated else (H, I)
    x_map = tma and not gated
    return Case(
        f"grouped_gemm {'gate_up' if gated else 'down'} {dtype} {tile}",
        grouped_gemm_kernel,
        {
            "x": f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>" if x_map else f"*{dtype}",
            "weight": f"tensordesc<{dtype}[{tile.columns}, {tile.depth}]>" if tma else f"*{dtype}",
            "out_ptr": f"*{dtype}" if gated else "*fp32",
            **dict.fromkeys(
                ("pairs_ptr", "experts_ptr", "starts_ptr", "ends_ptr", "blocks_ptr"), "*i32"
            ),
            "max_blocks": "i32",
        },
        {
            "N": n, "K": k, "SLOTS": SLOTS, "KIND": "silu" if gated else None, "LIMIT": 0.0,
            "FROM_TOKENS": gated, "X_MAP": x_map, "WEIGHT_MAP": tma, "ROWS": tile.rows,
            "COLUMNS": tile.columns, "DEPTH": tile.depth, "WEIGHT_TALL": tile.weight_tall,
            "GROUP": GROUP,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        targets=targets,
    )  # fmt: skip


def grouped_cases() -> list[Case]:
    """Every tile, bf16 mostly; targets that take the same tile together."""
    found: dict[tuple[Tile, bool, str, bool], list[str]] = {}
    chosen = [("bf16", E * n, False) for n in (8, 16, 64, 128)]
    chosen += [("bf16", 8, True), ("fp32", 8, False)]
    for target, shared in SHARED.items():
        for dtype, pairs, deterministic in chosen:
            pair = tiles(pairs, E, DTYPES[dtype], deterministic=deterministic, shared=shared)
            for tile, gated in zip(pair, (True, False), strict=True):
                found.setdefault((tile, gated, dtype, target in TMA), []).append(target)
    return [grouped(*key, tuple(targets)) for key, targets in found.items()]


def routed(table: bool, e: int) -> Case:
    """DeepSeek V4's router, by a table or with a bias."""
    types = {"logits_ptr": "*fp32", "tokens_ptr": "*i64", "weights_ptr": "*fp32"}
    types |= {"ids_ptr": "*i32", "scale": "fp32"}
    constants = {"E": e, "SLOTS": 6, "BLOCK_E": triton.next_power_of_2(e), "BLOCK_SLOTS": 8}
    if table:
        types["table_ptr"], constants["bias_ptr"] = "*i64", None
    else:
        types["bias_ptr"], constants["table_ptr"] = "*fp32", None
    name = f"route_tokens {e} {'table' if table else 'bias'}"
    return Case(name, route_tokens_kernel, types, constants, num_warps=1)


CASES = [
    routed(False, 256),
    routed(True, 256),
    routed(False, 384),
    Case(
        "route groups",
        route_groups_kernel,
        {
            "logits_ptr": "*bf16", "correction_ptr": "*fp32", "weights_ptr": "*fp32",
            "ids_ptr": "*i32", "scale": "fp32",
        },
        {
            "E": 160, "SLOTS": 6, "GROUPS": 8, "TOP_GROUPS": 3, "SIGMOID": True, "NORMALIZE": True,
            "BLOCK_GROUPS": 8, "BLOCK_SIZE": 32, "BLOCK_SLOTS": 8,
        },
        num_warps=1,
    ),
    Case(
        "route",
        route_kernel,
        {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i32", "tokens": "i32"},
        {
            "E": E, "SLOTS": SLOTS, "NORMALIZE": True, "ROWS": ROWS, "BLOCK_E": 128,
            "BLOCK_SLOTS": 8,
        },
    ),
    Case(
        "align count",
        count_kernel,
        {"ids_ptr": "*i32", "counts_ptr": "*i32", "pairs": "i32"},
        ALIGN,
    ),
    *(
        Case(
            f"align place{' counted' if counted else ''}",
            place_kernel,
            {
                **dict.fromkeys(place_kernel.arg_names[:7], "*i32"),
                "pairs": "i32",
                "chunks": "i32",
            },
            {**ALIGN, "BLOCK": 64, "COUNTED": counted, "BLOCKS_STEP": BLOCKS_STEP},
        )
        for counted in (False, True)
    ),
    *grouped_cases(),
    Case(
        "combine",
        combine_kernel,
        {"y_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*bf16"},
        {"H": H, "SLOTS": SLOTS, "BLOCK_H": 1024},
    ),
    Case(
        "gate_up_small",
        gate_up_small_kernel,
        {"x_ptr": "*bf16", "ids_ptr": "*i32", "weight_ptr": "*bf16", "h_ptr": "*bf16"},
        {"H": H, "I": I, "SLOTS": SLOTS, "KIND": "silu", "LIMIT": 10.0, "ROWS": 4, "DEPTH": 1024},
    ),
    Case(
        "down_small",
        down_small_kernel,
        {
            "h_ptr": "*bf16", "ids_ptr": "*i32", "weights_ptr": "*fp32", "weight_ptr": "*bf16",
            "out_ptr": "*bf16",
        },
        {"H": H, "I": I, "SLOTS": SLOTS, "ROWS": 4, "DEPTH": 1024},
    ),
]  # fmt: skip
