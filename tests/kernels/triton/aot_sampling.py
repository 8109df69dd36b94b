"""Kernels of quire/kernels/triton/sampling, at the vocabulary of Qwen."""

from __future__ import annotations

from typing import Any

import triton

from quire.kernels.sampling import CANDIDATES, PICKS, SUBTILE, TILE, num_tiles
from quire.kernels.triton.sampling.accept import accept_kernel
from quire.kernels.triton.sampling.adjust import adjust_tiles_kernel
from quire.kernels.triton.sampling.logprobs_of import (
    list_likely_kernel,
    measure_rows_kernel,
    measure_tiles_kernel,
    report_kernel,
)
from quire.kernels.triton.sampling.select import (
    cut_rows_kernel,
    finish_kernel,
    list_or_pick_kernel,
)
from quire.kernels.triton.sampling.tiles import pick_tiles_kernel
from tests.kernels.triton.aot import Case

RECORD = 21088
FLOATS = ["bias_values", "adjusted", "tile_max", "tile_sum", "subtile_max", "pick", "largest"]
FLOATS += ["logsumexp", "logprob", "top_logprobs"]


def case(name: str, kernel: Any, dtype: str, vocab_size: int, **more: Any) -> Case:
    """A case with those of all the constants that the kernel has."""
    tiles = num_tiles(vocab_size)
    subtiles = tiles * (TILE // SUBTILE)
    constants = {
        "RECORD": RECORD,
        "HISTORY": 8193,
        "V": vocab_size,
        "STRIDE": vocab_size,
        "TILE": TILE,
        "SUBTILE": SUBTILE,
        "TILES": tiles,
        "BLOCK_TILES": triton.next_power_of_2(tiles),
        "SUBTILES": subtiles,
        "BLOCK_SUBTILES": triton.next_power_of_2(subtiles),
        "CANDIDATES": CANDIDATES,
        "PICKS": PICKS,
        "BLOCK": 512,
        **more,
    }
    types = {name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {f"{name}_ptr": "*fp32" for name in FLOATS}
    types |= {"counts_ptr": "*i16", "tile_mass_ptr": "*i64", "logits_ptr": f"*{dtype}"}
    warps = constants.pop("num_warps", 4)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Case(f"{name} {dtype} {vocab_size}", kernel, types, constants, num_warps=warps)


CASES = [
    case("greedy", pick_tiles_kernel, "bf16", 151936, NOISE=False),
    case("plain", pick_tiles_kernel, "bf16", 151936, NOISE=True, num_warps=8),
    case("adjust", adjust_tiles_kernel, "bf16", 151936, num_warps=8),
    case("cut", cut_rows_kernel, "fp32", 151936, BLOCK=2048),
    case("list or pick", list_or_pick_kernel, "fp32", 151936, num_warps=8),
    case("finish plain", finish_kernel, "fp32", 151936, FULL=False, APPEND=True),
    case("finish full", finish_kernel, "fp32", 151936, FULL=True, APPEND=True, num_warps=8),
    case("finish drafts", finish_kernel, "fp32", 151936, FULL=True, APPEND=False, num_warps=8),
    case("accept", accept_kernel, "fp32", 151936, num_warps=1),
    case("measure tiles", measure_tiles_kernel, "bf16", 151936),
    case("measure rows", measure_rows_kernel, "fp32", 151936),
    case("list likely", list_likely_kernel, "bf16", 151936, num_warps=8),
    case("report", report_kernel, "bf16", 151936, num_warps=8),
]
