"""Kernels of quire/kernels/triton/step."""

from __future__ import annotations

from quire.kernels.triton.step.apply_runs import apply_runs_kernel
from quire.kernels.triton.step.count_tokens import count_tokens_kernel
from quire.kernels.triton.step.draft_rows import draft_rows_kernel
from quire.kernels.triton.step.keep_drafts import keep_drafts_kernel
from quire.kernels.triton.step.keep_hidden import keep_hidden_kernel
from quire.kernels.triton.step.move_pages import move_pages_kernel
from quire.kernels.triton.step.prepare_step import prepare_step_kernel
from quire.kernels.triton.step.take_hidden import take_hidden_kernel
from tests.kernels.triton.aot import Case

INTS = ["rows", "scalars", "tables", "history", "query_start", "context_len", "out_tables", "slots"]
INTS += ["arena", "packet", "blocks", "out", "status", "kept"]
TYPES = {f"{name}_ptr": "*i32" for name in INTS} | {
    "counts_ptr": "*i16",
    "tokens_ptr": "*i64",
    "positions_ptr": "*i64",
    "out_slots_ptr": "*i64",
    "state_slots_ptr": "*i64",
    "row_of_ptr": "*i64",
    "sizes_ptr": "*i32",
    **dict.fromkeys(("num_rows", "num_tokens", "behind"), "i32"),
    **dict.fromkeys(("group_tables", "group_slots"), "i64"),
}
RECORD = 21088

CASES = [
    *(
        Case(
            f"draft_rows lags={lags}",
            draft_rows_kernel,
            TYPES,
            {"RECORD": RECORD, "LAGS": lags},
            num_warps=1,
        )
        for lags in (False, True)
    ),
    *(
        Case(
            f"take_hidden {dtype} H={hidden}",
            take_hidden_kernel,
            TYPES | {"kept_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
            {"H": hidden, "BLOCK_B": 256, "BLOCK_H": 1024},
        )
        for dtype, hidden in (("bf16", 7168), ("fp32", 576))
    ),
    Case(
        "keep_drafts",
        keep_drafts_kernel,
        TYPES | {"tokens_ptr": "*i32"},
        {"RECORD": RECORD, "HISTORY": 8193},
        num_warps=1,
    ),
    Case("apply_runs", apply_runs_kernel, TYPES, {"BLOCK": 1024}),
    Case(
        "count_tokens",
        count_tokens_kernel,
        TYPES,
        {"RECORD": RECORD, "V": 151936, "BLOCK_V": 2048, "TILE": 1024},
    ),
    *(
        Case(
            f"keep_hidden {dtype} H={hidden}",
            keep_hidden_kernel,
            {"hidden_ptr": f"*{dtype}", "kept_ptr": f"*{dtype}", "spoiled_ptr": "*i32"},
            {"STRIDE": hidden, "H": hidden, "BLOCK_H": 1024},
        )
        for dtype, hidden in (("bf16", 4096), ("fp32", 576))
    ),
    *(
        Case(
            f"move_pages store={store}",
            move_pages_kernel,
            {"table_ptr": "*i64", "rows_ptr": "*i64", "blocks_ptr": "*i32", "slots_ptr": "*i32"},
            {"PAGE_WORDS": 294912, "STORE": store, "BLOCK": 1024},
        )
        for store in (True, False)
    ),
    *(
        Case(
            f"prepare_step rows<={rows} groups={groups} ahead={ahead}",
            prepare_step_kernel,
            TYPES,
            {
                "RECORD": RECORD,
                "MAX_BLOCKS": 514,
                "GROUPS": groups,
                "SIZES": groups > 1,
                "BLOCK_B": rows,
                "TILE": 512,
                "AHEAD": ahead,
            },
        )
        for rows, groups, ahead in ((32, 1, 0), (256, 2, 0), (256, 1, 1))
    ),
]
