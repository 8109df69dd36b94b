"""The line of work that decode's programs share, and what they hand to each other.

The work of all requests is one line of units, in order of request, KV head and piece of keys. A
fixed number of programs take equal runs of it, so that the GPU is full with one long request as
with 256 of mixed lengths, and lengths are read on the device alone. A request's KV head that lies
within one run is written directly. Otherwise each program leaves a state in scratch, and the one
that arrives last merges them in order, in the same launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.tile import normalised


@triton.jit
def pieces_of(
    row, mask, context_len_ptr, query_start_ptr,
    ONE_QUERY: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """(pieces of keys that requests `row` see, the first of them, tokens of their context). None:
    not for this kernel."""
    length = tl.load(context_len_ptr + row, mask=mask, other=0)
    if not ONE_QUERY:
        first = tl.load(query_start_ptr + row, mask=mask, other=0)
        queries = tl.load(query_start_ptr + row + 1, mask=mask, other=0) - first
        length = tl.where(queries == 1, length, 0)
    # Without a window, nothing: of the shape of length all the same.
    skipped = tl.maximum(length - WINDOW, 0) // PIECE if WINDOW else length * 0
    return tl.cdiv(length, PIECE) - skipped, skipped, length


@triton.jit
def run_of(
    program, programs, rows, context_len_ptr, query_start_ptr,
    KV_HEADS: tl.constexpr, ONE_QUERY: tl.constexpr, ONE_ROW: tl.constexpr, WINDOW: tl.constexpr,
    PIECE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """A program's part of the line: (units of every run, the first unit of this one, its end, the
    request that it starts in, that one's first unit)."""
    total, longest = 0, 0
    if ONE_ROW:  # nothing to search, and one request waits for every step of this
        longest, _, _ = pieces_of(
            0, rows > 0, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
        )
        total = longest * KV_HEADS
    else:
        for first_row in range(0, rows, SEARCH):
            index = first_row + tl.arange(0, SEARCH)
            pieces, _, _ = pieces_of(
                index, index < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
            )
            total += tl.sum(pieces, 0) * KV_HEADS
            longest = tl.maximum(longest, tl.max(pieces, 0))
    run = tl.cdiv(total, programs)
    # Passing a state on takes as long as reading some 200 tokens. So where all requests are short
    # and have heads for a third of the programs, a run is at least a whole head.
    whole = (longest * PIECE <= 512) & (3 * rows * KV_HEADS >= programs)
    run = tl.where(whole, tl.maximum(run, longest), run)
    unit = program * run
    end = tl.minimum(unit + run, total)

    row, row_unit, passed = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), 0
    if (unit < end) and not ONE_ROW:
        for first_row in range(0, rows, SEARCH):
            index = first_row + tl.arange(0, SEARCH)
            pieces, _, _ = pieces_of(
                index, index < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
            )
            units = pieces * KV_HEADS
            before = passed + tl.cumsum(units, 0) <= unit
            row += tl.sum(before.to(tl.int32), 0)
            row_unit += tl.sum(tl.where(before, units, 0), 0)
            passed += tl.sum(units, 0)
    return run, unit, end, row, row_unit


@triton.jit
def head_of(
    unit, row, row_unit, rows, context_len_ptr, query_start_ptr,
    KV_HEADS: tl.constexpr, ONE_QUERY: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Where a unit lies, looked for from `row` on, whose first unit is `row_unit`: (its request,
    that one's first unit, its KV head, that one's first unit, pieces of the head, the first of
    them, tokens of the request's context)."""
    pieces, skipped, length = pieces_of(
        row, row < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
    )
    while unit - row_unit >= pieces * KV_HEADS:
        row_unit += pieces * KV_HEADS
        row += 1
        pieces, skipped, length = pieces_of(
            row, row < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
        )
    head = (unit - row_unit) // pieces
    return row, row_unit, head, row_unit + head * pieces, pieces, skipped, length


@triton.jit
def leave(values_ptr, sums_ptr, slot, m, weight, acc, kept, GROUP: tl.constexpr, D: tl.constexpr):
    """Write the state of the rows `kept` to scratch."""
    row = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    values_ptr += slot.to(tl.int64) * (GROUP * D)
    sums_ptr += slot.to(tl.int64) * (2 * GROUP)
    tl.store(values_ptr + row[:, None] * D + d[None, :], acc, mask=kept[:, None] & (d < D)[None, :])
    tl.store(sums_ptr + row, m, mask=kept)
    tl.store(sums_ptr + GROUP + row, weight, mask=kept)


@triton.jit
def last_to_arrive(counter_ptr, sharing):
    """Whether this program is the last of `sharing` to leave its state; the counter starts anew."""
    # Release: the barrier puts all threads' stores before the one thread's atomic, which publishes
    # them to the GPU. Acquire: the same backwards, for the last to arrive.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == sharing - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def write(
    out_ptr, sinks_ptr, head, m, weight, acc, kept, factor,
    GROUP: tl.constexpr, D: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The result of the rows `kept` of a KV head; out_ptr is at its first query head."""
    row = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    sinks = m
    if HAS_SINKS:
        sinks = tl.load(sinks_ptr + head * GROUP + row, mask=row < GROUP, other=0.0)
    result = normalised(m, weight, acc, sinks, factor, HAS_SINKS).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + d[None, :], result, mask=kept[:, None] & (d < D)[None, :])
