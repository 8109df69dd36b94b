"""The choice of compressed entries and attention to them, for compilation ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys, Plain
from quire.kernels.triton.attention.latent_attention import merged_heads
from quire.kernels.triton.attention.tiles import columns, head_tiles, power_of_2
from quire.kernels.triton.compressed.attend import merge_states_kernel, sparse_attention_kernel
from quire.kernels.triton.compressed.choose import choose_kernel
from quire.kernels.triton.compressed.index_scores import index_scores_kernel
from quire.kernels.triton.compressed.select_entries import SIZES
from quire.kernels.triton.compressed.sparse_attention import merged_at_once, sparse_tiles
from tests.kernels.triton.aot import Case
from tests.kernels.triton.aot_attention import AHEAD, NAMES

# NVIDIA's from Ada on, as in stored.converts_e4m3.
NATIVE = ("sm_90", "sm_100", "sm_120")
FLASH = PackedKeys(512, 64)


def _types(kernel: Any, dtype: torch.dtype, stored: Entries) -> dict[str, str]:
    types = dict.fromkeys(kernel.arg_names, "i32") | {"factor": "fp32"}
    plain = isinstance(stored, Plain)
    for name in ("q_ptr", "out_ptr", "queries_ptr", "weights_ptr"):
        types[name] = NAMES[dtype]
    for name in ("window_ptr", "entries_ptr", "keys_ptr"):
        types[name] = NAMES[dtype] if plain else "*u8"
    for name in ("window_turned_ptr", "entries_turned_ptr"):
        types[name] = "*bf16"
    for name in ("positions_ptr", "rows_ptr"):
        types[name] = "*i64"
    for name in ("scales_ptr", "scores_ptr", "sinks_ptr", "cos_sin_ptr", "values_ptr", "sums_ptr"):
        types[name] = "*fp32"
    for name in kernel.arg_names:
        tables = name.endswith("tables_ptr") or name.startswith("list_")
        if tables or name in ("query_start_ptr", "chosen_ptr"):
            types[name] = "*i32"
    return types


def scores(
    target: str,
    keys: Entries,
    heads: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    only_full: bool = False,
) -> Case:
    constants: dict[str, Any] = {
        "QUERY_STRIDE": heads * keys.size, "WEIGHT_STRIDE": heads, "HEADS": heads, "D": keys.size,
        "WIDTH": keys.width, "PER_BLOCK": 64, "RATIO": 4, "COUNT": 512,
        "NATIVE": target in NATIVE, "KEYS": 32 if dtype == torch.float32 else 128,
        "HEAD_COLUMNS": columns(heads), "D_COLUMNS": columns(keys.size),
    }  # fmt: skip
    if isinstance(keys, Plain):
        constants["scales_ptr"] = None
    return Case(
        f"scores {heads} {keys} {dtype}", index_scores_kernel,
        _types(index_scores_kernel, dtype, keys), constants, 4, 2, targets=(target,),
        only_full=only_full, one_instruction=dtype != torch.float32 and heads > 16,
    )  # fmt: skip


def choose(count: int, longest: int, target: str, only_full: bool = False) -> Case:
    tile = max(SIZES.tile, power_of_2(count))
    width = min(count, longest)
    constants = {
        "RATIO": 4, "COUNT": count, "WIDTH": width, "COLUMNS": power_of_2(width), "TILE": tile,
        "LISTED": SIZES.listed if longest > tile else 0,
    }  # fmt: skip
    return Case(
        f"choose {count} of {longest}", choose_kernel,
        _types(choose_kernel, torch.float32, Plain(16)), constants, 16, 3, targets=(target,),
        only_full=only_full,
    )  # fmt: skip


def attend(
    target: str,
    stored: Entries,
    heads: int = 64,
    *,
    merge: bool = False,
    deterministic: bool = False,
    split: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    ratio: int = 4,
    chosen: int = 512,
    rotary: int = 64,
    only_full: bool = False,
) -> Case:
    count = head_tiles(heads, AHEAD[target], deterministic)
    group, d = heads // count, stored.size
    packed = isinstance(stored, PackedKeys)
    tiles = sparse_tiles(group, dtype.itemsize, AHEAD[target], deterministic, packed)
    merged = merged_heads(1 if split else 64, group)
    kernel = merge_states_kernel if merge else sparse_attention_kernel
    values: dict[str, Any] = {
        "Q_STRIDE": heads * d, "OUT_STRIDE": heads * d, "HEAD_TILES": count, "GROUP": group, "D": d,
        "FIXED": stored.fixed if isinstance(stored, PackedKeys) else 0, "WIDTH": stored.width,
        "SIZE": 128, "WINDOW_BLOCK": 16, "ENTRY_BLOCK": 256 // ratio if ratio else 16,
        "RATIO": ratio, "CHOSEN": chosen, "CHOSEN_STRIDE": chosen,
        "CHOSEN_COLUMNS": power_of_2(max(1, chosen)), "ROTARY": rotary, "SPLIT": split,
        "NATIVE": target in NATIVE, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "TILE": tiles.keys, "TILE_ROWS": tiles.rows, "D_COLUMNS": columns(d),
        "HEADS": merged, "ROUND": merged_at_once(merged, 20),
    }  # fmt: skip
    if not packed:
        values |= {"window_turned_ptr": None, "entries_turned_ptr": None}
    if not chosen:
        values["chosen_ptr"] = None
    if not rotary:
        values["cos_sin_ptr"] = None
    warps, stages = (4, 3) if merge else (tiles.warps, tiles.stages)
    name = "merge" if merge else "attend"
    return Case(
        f"{name} {heads} {stored} {dtype} ratio {ratio} chosen {chosen} rotary {rotary}"
        + " split" * split + " deterministic" * deterministic,
        kernel, _types(kernel, dtype, stored),
        {name: values[name] for name in kernel.arg_names if name in values}, warps, stages,
        targets=(target,), only_full=only_full,
        one_instruction=not merge and not deterministic and dtype != torch.float32,
    )  # fmt: skip


def _for_target(target: str) -> list[Case]:
    rest: dict[str, Any] = {"only_full": target != "sm_90"}
    return [
        scores(target, PackedIndex(128)),
        scores(target, Plain(128), only_full=True),
        choose(512, 262144, target),
        choose(1024, 8192, target, only_full=True),
        attend(target, FLASH),
        attend(target, FLASH, split=True, rotary=0, **rest),
        attend(target, FLASH, deterministic=True, **rest),
        attend(target, Plain(512), only_full=True),
        attend(target, Plain(512), deterministic=True, chosen=0, ratio=128, only_full=True),
        attend(target, FLASH, 128, chosen=1024, only_full=True),
        attend(target, FLASH, merge=True),
        attend(target, FLASH, merge=True, split=True, rotary=0, only_full=True),
    ]


CASES = [case for target in AHEAD for case in _for_target(target)] + [
    scores("sm_90", PackedIndex(16), 2, torch.float32, only_full=True),
    scores("sm_90", Plain(24), 4, torch.float32, only_full=True),
    attend("sm_90", FLASH, chosen=0, ratio=0, only_full=True),
    attend("sm_90", FLASH, 8, chosen=0, ratio=128, split=True, only_full=True),
    attend("sm_90", PackedKeys(32, 16), 4, dtype=torch.float32, rotary=16, only_full=True),
    attend("sm_90", Plain(32), 4, dtype=torch.float32, split=True, rotary=0, only_full=True),
]
