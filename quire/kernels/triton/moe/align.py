"""Sorting (token, slot) pairs by expert, as the grouped GEMM needs them.

A counting sort without atomics. Pairs are cut into chunks, and each (expert, chunk) has a program
that finds where its expert's pairs of earlier chunks end and adds its own in order. Every such
program needs all experts' counts: with one chunk it counts the pairs itself, so decode batches
take one launch; with more, a first launch counts each chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.reference.moe.align import Aligned, max_blocks
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

__all__ = ["Aligned", "align", "max_blocks"]

# Pairs of one program: 512 tokens with 8 experts each are one chunk, 8,192 tokens are 16.
CHUNK = 4096
# Pairs at a time: 8 for each of 128 threads.
STEP = 1024
# Entries of the block list written at a time.
BLOCKS_STEP = 128


@triton.jit
def _counts_of_chunk(
    ids_ptr, first, pairs, E, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK_E: tl.constexpr
):
    """How many of the chunk's pairs each expert has, int32 [BLOCK_E]."""
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for step in range(first, tl.minimum(first + CHUNK, pairs), STEP):
        pair = step + tl.arange(0, STEP)
        expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
        counts += tl.histogram(expert, BLOCK_E, mask=(expert >= 0) & (expert < E))
    return counts


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    ids_ptr,
    counts_ptr,
    pairs,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts [chunks, BLOCK_E]: each expert's pairs in each chunk."""
    let_next_start(PDL)
    chunk = tl.program_id(0)
    wait_for_inputs(PDL)
    counts = _counts_of_chunk(ids_ptr, chunk * CHUNK, pairs, E, CHUNK, STEP, BLOCK_E)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["pairs", "chunks"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    starts_ptr,
    ends_ptr,
    blocks_ptr,
    pairs,
    chunks,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS_STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (e, c) writes where expert e's pairs of chunk c go; those of chunk 0 write the
    expert's blocks too. COUNTED: count_kernel has run."""
    let_next_start(PDL)
    expert = tl.program_id(0)
    chunk = tl.program_id(1)
    wait_for_inputs(PDL)
    all_experts = tl.arange(0, BLOCK_E)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    if COUNTED:
        counts = tl.zeros((BLOCK_E,), tl.int32)
        for c in range(chunks):
            here = tl.load(counts_ptr + c * BLOCK_E + all_experts)
            counts += here
            earlier += tl.where(c < chunk, here, 0)
    else:
        counts = _counts_of_chunk(ids_ptr, 0, pairs, E, CHUNK, STEP, BLOCK_E)
    start = tl.sum(tl.where(all_experts < expert, counts, 0))
    own = tl.sum(tl.where(all_experts == expert, counts, 0))

    if chunk == 0:
        block_counts = (counts + BLOCK - 1) // BLOCK
        first_block = tl.sum(tl.where(all_experts < expert, block_counts, 0))
        own_blocks = (own + BLOCK - 1) // BLOCK
        for step in range(0, own_blocks, BLOCKS_STEP):
            block = step + tl.arange(0, BLOCKS_STEP)
            inside = block < own_blocks
            end = tl.minimum((block + 1) * BLOCK, own)
            tl.store(experts_ptr + first_block + block, expert, mask=inside)
            tl.store(starts_ptr + first_block + block, start + block * BLOCK, mask=inside)
            tl.store(ends_ptr + first_block + block, start + end, mask=inside)
        if expert == E - 1:
            tl.store(blocks_ptr, first_block + own_blocks)

    position = start + tl.sum(tl.where(all_experts == expert, earlier, 0))
    first = chunk * CHUNK
    for step in range(first, tl.minimum(first + CHUNK, pairs), STEP):
        pair = step + tl.arange(0, STEP)
        mine = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(pairs_ptr + position + rank - 1, pair, mask=mine)
        position += tl.sum(mine.to(tl.int32))


def align(ids: torch.Tensor, experts: int, block: int) -> Aligned:
    """The pairs of `ids` (int32 [T, K], each in 0 to `experts` - 1) sorted by expert and cut into
    blocks of at most `block` pairs, see Aligned.

    Sizes follow from shapes alone; nothing depends on the order in which programs run. T * K must
    stay below 2**31.
    """
    t, k = ids.shape
    pairs, device = t * k, ids.device
    most, chunks = max_blocks(pairs, experts, block), triton.cdiv(pairs, CHUNK)
    # Without pairs no program runs, and the number of blocks must be 0 all the same.
    blocks = (torch.empty if pairs else torch.zeros)(1, dtype=torch.int32, device=device)
    sorted_pairs = torch.empty(pairs, dtype=torch.int32, device=device)
    which, starts, ends = (torch.empty(most, dtype=torch.int32, device=device) for _ in range(3))
    block_e = max(2, triton.next_power_of_2(experts))
    flat = ids.contiguous()
    sizes = {"E": experts, "CHUNK": CHUNK, "STEP": STEP, "BLOCK_E": block_e}
    counts = flat
    if chunks > 1:
        counts = torch.empty((chunks, block_e), dtype=torch.int32, device=device)
        launch(count_kernel, (chunks,), device, flat, counts, pairs, **sizes, num_warps=4)
    launch(
        place_kernel,
        (experts, chunks),
        device,
        flat,
        counts,
        sorted_pairs,
        which,
        starts,
        ends,
        blocks,
        pairs,
        chunks,
        BLOCK=block,
        COUNTED=chunks > 1,
        BLOCKS_STEP=BLOCKS_STEP,
        **sizes,
        num_warps=4,
    )
    return Aligned(sorted_pairs, which, starts, ends, blocks, block, k)
