"""Queries, keys and entries of DeepSeek V4 Flash, and of models as small as the tests'."""

from __future__ import annotations

import triton

from quire.kernels.reference.compressed.entries import GROUP, PackedIndex, PackedKeys, Plain
from quire.kernels.triton.compressed.compress import keep_kernel, pool_kernel, tile_sizes
from quire.kernels.triton.compressed.insert_keys import insert_keys_kernel, warps
from quire.kernels.triton.compressed.rotate_and_insert import rotate_and_insert_kernel
from quire.kernels.triton.compressed.rotate_pairs import block_sizes, rotate_pairs_kernel
from quire.kernels.triton.compressed.store_entry import KINDS
from tests.kernels.triton.aot import Case

Kind = Plain | PackedKeys | PackedIndex
POINTERS = {"cos_sin_ptr": "*fp32", "norm_ptr": "*fp32", "places_ptr": "*fp32"}
POINTERS |= {"positions_ptr": "*i64", "slots_ptr": "*i64", "request_ptr": "*i64"}
POINTERS |= {"query_start_ptr": "*i32", "context_len_ptr": "*i32", "state_slots_ptr": "*i64"}
POINTERS |= {"state_ptr": "*fp32", "eps": "fp32", "tokens": "i32", "each": "i32"}
SPARE = 32


def entries(kind: Kind, rotary: int) -> dict[str, int]:
    return {
        "KIND": KINDS.index(type(kind)), "D": kind.size, "ROTARY": rotary, "WIDTH": kind.width,
        "BLOCK": max(GROUP, triton.next_power_of_2(kind.size)),
    }  # fmt: skip


def memory(kind: Kind, dtype: str) -> str:
    return dtype if isinstance(kind, Plain) else "*u8"


def rotating(dtype: str, heads: int, size: int, rotary: int, norm: bool, inverse: bool) -> Case:
    sizes = block_sizes(heads, size if norm else rotary)
    num_warps = sizes.pop("num_warps")
    constants = {
        "STRIDE": heads * size, "H": heads, "D": size, "HALF": rotary // 2, "INVERSE": inverse,
        "NORM": norm, **sizes,
    }  # fmt: skip
    name = f"rotate {dtype} {heads} heads of {size}, norm {norm}, inverse {inverse}"
    return Case(name, rotate_pairs_kernel, POINTERS | {"x_ptr": dtype}, constants, num_warps)


def inserting(dtype: str, kind: Kind, rotary: int) -> Case:
    types = POINTERS | {"keys_ptr": dtype, "cache_ptr": memory(kind, dtype)}
    constants = {"STRIDE": 1024 + kind.size} | entries(kind, rotary)
    num_warps = warps(constants["BLOCK"])
    return Case(f"insert {dtype} as {kind}", insert_keys_kernel, types, constants, num_warps)


def rotating_and_inserting(dtype: str, heads: int, kind: Kind, rotary: int) -> Case:
    types = POINTERS | {"q_ptr": dtype, "keys_ptr": dtype, "cache_ptr": memory(kind, dtype)}
    constants = entries(kind, rotary)
    sizes = block_sizes(heads, constants["BLOCK"])
    num_warps = sizes.pop("num_warps")
    constants |= {"Q_STRIDE": heads * kind.size, "STRIDE": 1024 + kind.size, "H": heads, **sizes}
    name = f"rotate {dtype} {heads} heads and insert as {kind}"
    return Case(name, rotate_and_insert_kernel, types, constants, num_warps)


def pooling(
    kind: Kind, rotary: int, ratio: int, overlap: bool, keep: bool, rows: str = "*fp32"
) -> Case:
    span, width = (2 * ratio, 2 * kind.size) if overlap else (ratio, kind.size)
    length, constants = span + SPARE, entries(kind, rotary)
    sizes = tile_sizes(span, constants["BLOCK"])
    num_warps = sizes.pop("num_warps")
    constants |= {
        "STRIDE": 2 * width, "STATE_STRIDE": length * 2 * width, "RATIO": ratio,
        "OVERLAP": overlap, "LENGTH": length, "KEEP": keep, **sizes,
    }  # fmt: skip
    types = POINTERS | {"rows_ptr": rows, "cache_ptr": memory(kind, "*bf16")}
    name = f"pool {rows} by {ratio}, overlap {overlap}, keep {keep}, as {kind}"
    return Case(name, pool_kernel, types, constants, num_warps)


def keeping(width: int, ratio: int, length: int, rows: str = "*fp32") -> Case:
    block = triton.next_power_of_2(width)
    constants = {
        "STRIDE": 2 * width, "STATE_STRIDE": length * 2 * width, "RATIO": ratio,
        "LENGTH": length, "W": width, "BLOCK_W": block,
    }  # fmt: skip
    name, types = f"keep {rows} of {width} by {ratio}", POINTERS | {"rows_ptr": rows}
    return Case(name, keep_kernel, types, constants, min(8, max(1, block // 256)))


CASES = [
    rotating("*bf16", 64, 512, 64, True, False),
    rotating("*bf16", 64, 512, 64, False, True),
    rotating("*bf16", 64, 128, 64, False, False),
    rotating("*fp32", 3, 24, 8, True, False),
    inserting("*bf16", PackedKeys(512, 64), 64),
    inserting("*bf16", Plain(512), 64),
    inserting("*fp32", PackedKeys(32, 16), 16),
    rotating_and_inserting("*bf16", 64, PackedKeys(512, 64), 64),
    rotating_and_inserting("*fp32", 3, Plain(32), 16),
    pooling(PackedKeys(512, 64), 64, 128, False, True),
    pooling(PackedKeys(512, 64), 64, 128, False, False),
    pooling(PackedKeys(512, 64), 64, 4, True, True),
    pooling(PackedIndex(128), 64, 4, True, True),
    pooling(Plain(512), 64, 4, True, False, "*bf16"),
    pooling(PackedIndex(24), 8, 5, True, False),
    keeping(1024, 4, 40),
    keeping(512, 128, 160),
    keeping(48, 5, 23, "*bf16"),
]
