"""A step's inputs out of the state on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import BLOCK, DeviceState, RowFlag, Scalar, StepBuffers
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

_BLOCK = tl.constexpr(BLOCK)
_LENGTH = tl.constexpr(int(Scalar.LENGTH))
_CACHED = tl.constexpr(int(Scalar.CACHED))
_DRAFTS = tl.constexpr(int(RowFlag.DRAFTS))
_BEHIND = tl.constexpr(int(RowFlag.BEHIND))
# Tables of rows that one warp reads at once: for fewer a kernel of its own would save no time.
LEAST_ROWS = 32


@triton.jit
def _block_size(sizes_ptr, group, SIZES: tl.constexpr):
    """Tokens in a block of a group; all are _BLOCK without SIZES."""
    size = tl.full([], _BLOCK, dtype=tl.int32)
    if SIZES:
        size = tl.load(sizes_ptr + group)
    return size


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "group_tables", "group_slots"])
def prepare_step_kernel(
    rows_ptr,
    scalars_ptr,
    tables_ptr,
    history_ptr,
    query_start_ptr,
    context_len_ptr,
    tokens_ptr,
    positions_ptr,
    out_tables_ptr,
    out_slots_ptr,
    state_slots_ptr,
    row_of_ptr,
    sizes_ptr,
    num_rows,
    num_tokens,
    group_tables,
    group_slots,
    RECORD: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TILE: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    # A long row's tokens and blocks are shared by several programs.
    begin = tl.program_id(1) * TILE
    step = tl.num_programs(1) * TILE
    # Each program adds up the counts before its row itself.
    before = tl.arange(0, BLOCK_B)
    taken = tl.load(rows_ptr + 4 * before, mask=before < num_rows, other=-1) >= 0
    counts = tl.load(rows_ptr + 4 * before + 2, mask=taken & (before < row), other=0)
    query_start = tl.sum(counts, axis=0)
    if begin == 0:
        tl.store(query_start_ptr + row, query_start)
    if row == num_rows:
        for i in range(query_start + begin, num_tokens, step):
            token = i + tl.arange(0, TILE)
            inside = token < num_tokens
            tl.store(tokens_ptr + token, tl.zeros([TILE], dtype=tl.int64), mask=inside)
            tl.store(positions_ptr + token, tl.zeros([TILE], dtype=tl.int64), mask=inside)
            tl.store(row_of_ptr + token, tl.full([TILE], -1, dtype=tl.int64), mask=inside)
            for group in range(GROUPS):
                to_ptr = out_slots_ptr + group * group_slots
                tl.store(to_ptr + token, tl.full([TILE], -1, dtype=tl.int64), mask=inside)
    else:
        slot = tl.load(rows_ptr + 4 * row).to(tl.int64)
        if begin == 0:
            tl.store(state_slots_ptr + row, slot)
        if slot < 0:
            if begin == 0:
                tl.store(context_len_ptr + row, 0)
        else:
            start = tl.load(rows_ptr + 4 * row + 1)
            count = tl.load(rows_ptr + 4 * row + 2)
            # Drafts lie behind what is known.
            length = tl.load(scalars_ptr + slot * RECORD + _LENGTH)
            length += tl.load(rows_ptr + 4 * row + 3) % _BEHIND // _DRAFTS
            cached = tl.load(scalars_ptr + slot * RECORD + _CACHED)
            tables_ptr += slot * RECORD
            if begin == 0:
                tl.store(context_len_ptr + row, start + count)
            for i in range(begin, count, step):
                index = i + tl.arange(0, TILE)
                position = start + index
                to = query_start + index
                inside = (index < count) & (to < num_tokens)
                # A row that failed has appended nothing: what lies there is not its token.
                place = position + AHEAD
                known = inside & (place < length)
                token = tl.load(history_ptr + slot * RECORD + place, mask=known, other=0)
                tl.store(tokens_ptr + to, token.to(tl.int64), mask=inside)
                tl.store(positions_ptr + to, position.to(tl.int64), mask=inside)
                mine = tl.zeros([TILE], dtype=tl.int64) + row
                tl.store(row_of_ptr + to, mine, mask=inside)
                for group in range(GROUPS):
                    size = _block_size(sizes_ptr, group, SIZES)
                    from_ptr = tables_ptr + group * MAX_BLOCKS
                    block = tl.load(from_ptr + position // size, mask=inside, other=0)
                    write = block.to(tl.int64) * size + position % size
                    write = tl.where(position < cached, -1, write)
                    tl.store(out_slots_ptr + group * group_slots + to, write, mask=inside)
            for group in range(GROUPS):
                num_blocks = tl.cdiv(start + count, _block_size(sizes_ptr, group, SIZES))
                from_ptr = tables_ptr + group * MAX_BLOCKS
                to_ptr = out_tables_ptr + group * group_tables + row.to(tl.int64) * MAX_BLOCKS
                for i in range(begin, num_blocks, step):
                    index = i + tl.arange(0, TILE)
                    block = tl.load(from_ptr + index, mask=index < num_blocks)
                    tl.store(to_ptr + index, block, mask=index < num_blocks)


def prepare_step(state: DeviceState, rows: torch.Tensor, out: StepBuffers, ahead: int = 0) -> None:
    """Fill `out` (B rows, T tokens) for a step over `rows` int32 [B, 4]: slot or -1, start, count,
    flags.

    A row computes the tokens at positions start to start + count of its slot's history, the last of
    which may be drafts (RowFlag); those the device does not know, which happens after a row that
    failed, are 0. A row without a slot has no tokens. Tokens past the last row's have token 0,
    position 0, row -1 and slot -1; slot -1, too, has what is cached already (Scalar.CACHED). Block
    tables are written as far as the context goes. The rows' counts must add up to at most T.
    `ahead`: in place of each token the one so many positions behind it.
    """
    layout = state.layout
    num_rows, num_tokens = rows.shape[0], out.tokens.shape[0]
    tile = 512
    # A long request's blocks are many even where a step has few tokens.
    programs = max(1, triton.cdiv(num_tokens, tile), triton.cdiv(layout.max_blocks, 8 * tile))
    launch(
        prepare_step_kernel,
        (num_rows + 1, programs),
        state.device,
        rows,
        state.scalars,
        state.tables,
        state.history,
        out.query_start,
        out.context_len,
        out.tokens,
        out.positions,
        out.block_tables,
        out.slots,
        out.state_slots,
        out.rows,
        state.block_sizes,
        num_rows,
        num_tokens,
        out.block_tables.stride(0),
        out.slots.stride(0),
        RECORD=layout.record,
        MAX_BLOCKS=layout.max_blocks,
        GROUPS=layout.groups,
        SIZES=state.block_sizes is not None,
        BLOCK_B=triton.next_power_of_2(max(num_rows, LEAST_ROWS)),
        TILE=tile,
        AHEAD=ahead,
        num_warps=4,
    )
