"""Pages of a pool gathered into rows of contiguous memory, or scattered from there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.paged_tensors import PagedTensors
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs


@triton.jit
def move_pages_kernel(
    table_ptr,
    blocks_ptr,
    rows_ptr,
    slots_ptr,
    PAGE_WORDS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    block = tl.load(blocks_ptr + tl.program_id(0)).to(tl.int64)
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    entry_ptr = table_ptr + 3 * tl.program_id(1)
    address, words = tl.load(entry_ptr), tl.load(entry_ptr + 1)
    cache_ptr = address.to(tl.pointer_type(tl.int64)) + block * words
    row_ptr = rows_ptr + slot * PAGE_WORDS + tl.load(entry_ptr + 2)
    for first in range(0, words.to(tl.int32), BLOCK):
        index = first + tl.arange(0, BLOCK)
        if STORE:
            value = tl.load(cache_ptr + index, mask=index < words)
            tl.store(row_ptr + index, value, mask=index < words)
        else:
            value = tl.load(row_ptr + index, mask=index < words)
            tl.store(cache_ptr + index, value, mask=index < words)


def move_pages(
    pages: PagedTensors,
    blocks: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    store: bool,
) -> None:
    """Copy pages between the blocks of a pool and rows int64 [n, page words], contiguous.

    `blocks` and `slots` int32 [k]: page i is that of blocks[i] and rows[slots[i]]. `store`: from
    the blocks to the rows, else back. No block and no row is written twice.
    """
    launch(
        move_pages_kernel,
        (len(blocks), len(pages.tensors)),
        rows.device,
        pages.table,
        blocks,
        rows,
        slots,
        PAGE_WORDS=pages.page_words,
        STORE=store,
        BLOCK=1024,
        num_warps=4,
    )
