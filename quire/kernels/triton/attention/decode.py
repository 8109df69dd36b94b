"""Decode: one query per request, keys and values split over programs (Flash-Decoding, Dao 2023).

The work of all requests is one line of units, in order of request, KV head and piece of keys.
A fixed number of programs take equal runs of it, so that the GPU is full with one long request as
with 256 of mixed lengths, and lengths are read on the device alone. A request's KV head that lies
within one run is written directly. Otherwise each program leaves a state in scratch, and the one
that arrives last merges them in order, in this launch.

Deterministic: a state is left for every piece, never for several merged, and merging follows
tile.py, so runs may be cut anywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.triton.attention.tile import extend, finite, merge, normalised, piece_state
from quire.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def _pieces(
    row, mask, context_len_ptr, query_start_ptr,
    ONE_QUERY: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Pieces of keys that requests `row` see, and the first of them. None: not for this kernel."""
    length = tl.load(context_len_ptr + row, mask=mask, other=0)
    if not ONE_QUERY:
        first = tl.load(query_start_ptr + row, mask=mask, other=0)
        queries = tl.load(query_start_ptr + row + 1, mask=mask, other=0) - first
        length = tl.where(queries == 1, length, 0)
    # Without a window, nothing: of the shape of length all the same.
    skipped = tl.maximum(length - WINDOW, 0) // PIECE if WINDOW else length * 0
    return tl.cdiv(length, PIECE) - skipped, skipped


@triton.jit
def _run(
    program, programs, rows, context_len_ptr, query_start_ptr,
    KV_HEADS: tl.constexpr, ONE_QUERY: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """A program's part of the line: (units of every run, the first unit of this one, its end, the
    request that it starts in, that one's first unit)."""
    total, longest = 0, 0
    for first_row in range(0, rows, SEARCH):
        index = first_row + tl.arange(0, SEARCH)
        pieces, _ = _pieces(
            index, index < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
        )
        total += tl.sum(pieces, 0) * KV_HEADS
        longest = tl.maximum(longest, tl.max(pieces, 0))
    run = tl.cdiv(total, programs)
    # Where all requests are short, a run is at least a whole one: reading 4 pieces takes about as
    # long as passing half of them on.
    run = tl.where(longest <= 4, tl.maximum(run, longest), run)
    unit = program * run
    end = tl.minimum(unit + run, total)

    row, row_unit, passed = 0, 0, 0
    if unit < end:
        for first_row in range(0, rows, SEARCH):
            index = first_row + tl.arange(0, SEARCH)
            pieces, _ = _pieces(
                index, index < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
            )
            units = pieces * KV_HEADS
            before = passed + tl.cumsum(units, 0) <= unit
            row += tl.sum(before.to(tl.int32), 0)
            row_unit += tl.sum(tl.where(before, units, 0), 0)
            passed += tl.sum(units, 0)
    return run, unit, end, row, row_unit


@triton.jit
def _leave(values_ptr, sums_ptr, slot, m, weight, acc, kept, GROUP: tl.constexpr, D: tl.constexpr):
    """Write the state of the rows `kept` to scratch."""
    row = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    values_ptr += slot.to(tl.int64) * (GROUP * D)
    sums_ptr += slot.to(tl.int64) * (2 * GROUP)
    tl.store(values_ptr + row[:, None] * D + d[None, :], acc, mask=kept[:, None] & (d < D)[None, :])
    tl.store(sums_ptr + row, m, mask=kept)
    tl.store(sums_ptr + GROUP + row, weight, mask=kept)


@triton.jit
def _slot(program, head_unit, run):
    """Where a program leaves its state of a head. A run can share two: the one it starts in, at
    2 * program, and the one it ends in."""
    return 2 * program + (head_unit > program * run).to(tl.int32)


@triton.jit
def _merged(
    values_ptr, sums_ptr, states, head_unit, first_program, run, factor,
    GROUP: tl.constexpr, D: tl.constexpr, GROUP_ROWS: tl.constexpr, D_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The states that `states` programs left for one KV head as one, many at a time: this is what
    one long request waits for. They are read past L1, which other programs' stores do not reach."""
    # 32 values a thread in flight: with more, registers would not last for 3 programs.
    ROUND: tl.constexpr = max(1, min(16, 4096 // (GROUP_ROWS * D_COLUMNS)))
    row = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, D_COLUMNS)
    m = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, D_COLUMNS], tl.float32)
    for first in range(0, states, ROUND):
        state = first + tl.arange(0, ROUND)
        slot = _slot(first_program + state, head_unit, run).to(tl.int64)
        kept = (state < states)[:, None] & (row < GROUP)[None, :]
        values = values_ptr + ((slot * (GROUP * D))[:, None] + row[None, :] * D)[:, :, None]
        sums = sums_ptr + (slot * (2 * GROUP))[:, None] + row[None, :]
        acc_i = tl.load(
            values + d[None, None, :],
            mask=kept[:, :, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        m_i = tl.load(sums, mask=kept, other=float("-inf"), cache_modifier=".cg")
        weight_i = tl.load(sums + GROUP, mask=kept, other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(m_i, 0))
        reference = finite(top)
        shrink = tl.exp2((m - reference) * factor)
        share = tl.exp2((m_i - reference[None, :]) * factor)
        weight = weight * shrink + tl.sum(weight_i * share, 0)
        acc = acc * shrink[:, None] + tl.sum(acc_i * share[:, :, None], 0)
        m = top
    return m, weight, acc


@triton.jit
def _merged_in_order(
    values_ptr, sums_ptr, states, head_unit, factor,
    GROUP: tl.constexpr, D: tl.constexpr, GROUP_ROWS: tl.constexpr, D_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The states of a KV head's pieces as one, by the formula that merges them in registers."""
    row = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, D_COLUMNS)
    m = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_ROWS], tl.float32)
    acc = tl.zeros([GROUP_ROWS, D_COLUMNS], tl.float32)
    for first in range(0, states, 4):
        for i in tl.static_range(4):  # unrolled, so that loads overlap
            slot = (head_unit + first + i).to(tl.int64)
            kept = row < tl.where(first + i < states, GROUP, 0)
            values = values_ptr + slot * (GROUP * D) + row[:, None] * D + d[None, :]
            sums = sums_ptr + slot * (2 * GROUP) + row
            inside = kept[:, None] & (d < D)[None, :]
            acc_i = tl.load(values, mask=inside, other=0.0, cache_modifier=".cg")
            m_i = tl.load(sums, mask=kept, other=float("-inf"), cache_modifier=".cg")
            weight_i = tl.load(sums + GROUP, mask=kept, other=0.0, cache_modifier=".cg")
            m, weight, acc = merge(m, weight, acc, m_i, weight_i, acc_i, factor)
    return m, weight, acc


@triton.jit
def _write(
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


@triton.jit(do_not_specialize=["rows", "table_stride", "capacity"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    query_start_ptr,
    context_len_ptr,
    sinks_ptr,
    out_ptr,
    values_ptr,
    sums_ptr,
    arrived_ptr,
    rows,
    table_stride,
    capacity,
    factor,
    inner_scale,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    D_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    run, unit, end, row, row_unit = _run(
        program, tl.num_programs(0), rows, context_len_ptr, query_start_ptr,
        KV_HEADS, ONE_QUERY, WINDOW, PIECE, SEARCH,
    )  # fmt: skip
    d = tl.arange(0, D_COLUMNS)
    member = tl.arange(0, TILE_ROWS)
    in_group, in_head = member < GROUP, d < D
    q_inside = in_group[:, None] & in_head[None, :]
    key = tl.arange(0, TILE)
    inner = (key % BLOCK * D)[:, None] + d[None, :]
    while unit < end:
        pieces, skipped = _pieces(
            row, row < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
        )
        while unit - row_unit >= pieces * KV_HEADS:
            row_unit += pieces * KV_HEADS
            row += 1
            pieces, skipped = _pieces(
                row, row < rows, context_len_ptr, query_start_ptr, ONE_QUERY, WINDOW, PIECE
            )
        length = tl.load(context_len_ptr + row)
        head = (unit - row_unit) // pieces
        head_unit = row_unit + head * pieces
        begin, stop = unit - head_unit, tl.minimum(end - head_unit, pieces)
        next_unit = head_unit + stop
        # Scratch too small for this head: whoever has its first piece does all of it.
        alone = (head_unit + pieces > capacity) & DETERMINISTIC
        stop = tl.where(alone, tl.where(begin == 0, pieces, begin), stop)
        shared = ((begin > 0) | (stop < pieces)) & (alone == 0)

        token = row if ONE_QUERY else tl.load(query_start_ptr + row)
        q_row = q_ptr + token.to(tl.int64) * Q_STRIDE + head * (GROUP * D)
        q = tl.load(q_row + member[:, None] * D + d[None, :], mask=q_inside, other=0.0)
        table_ptr = tables_ptr + row.to(tl.int64) * table_stride
        k_head = k_ptr + head * (BLOCK * D)
        v_head = v_ptr + head * (BLOCK * D)
        oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
        first_key = (skipped + begin) * PIECE
        last_key = tl.minimum((skipped + stop) * PIECE, length)

        m = tl.full([TILE_ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, D_COLUMNS], tl.float32)
        if WINDOW:
            first_key = tl.maximum(first_key, oldest // TILE * TILE)
        seen = (first_key + key >= oldest) & (first_key + key < last_key)
        # Block numbers are read one tile ahead: keys must not wait for them.
        block = tl.load(table_ptr + (first_key + key) // BLOCK, mask=seen, other=0)
        for at in range(first_key, last_key, TILE):
            seen = (at + key >= oldest) & (at + key < last_key)
            inside = seen[:, None] & in_head[None, :]
            places = block.to(tl.int64)
            k = tl.load(k_head + ((places * K_STRIDE)[:, None] + inner), mask=inside, other=0.0)
            v = tl.load(v_head + ((places * V_STRIDE)[:, None] + inner), mask=inside, other=0.0)
            after = at + TILE + key
            block = tl.load(table_ptr + after // BLOCK, mask=after < last_key, other=0)
            if DETERMINISTIC:
                m_piece, weight_piece, acc_piece = piece_state(
                    q, k, v, seen[None, :], factor, inner_scale, True, SOFTCAP, PRECISION
                )
                kept = member < tl.where(shared, GROUP, 0)
                slot = head_unit + at // PIECE - skipped
                _leave(values_ptr, sums_ptr, slot, m_piece, weight_piece, acc_piece, kept, GROUP, D)
                m, weight, acc = merge(m, weight, acc, m_piece, weight_piece, acc_piece, factor)
            else:
                m, weight, acc = extend(
                    q, k, v, seen[None, :], m, weight, acc, factor, inner_scale,
                    True, SOFTCAP, PRECISION,
                )  # fmt: skip

        out_head = out_ptr + token.to(tl.int64) * OUT_STRIDE + head * (GROUP * D)
        if shared:
            if not DETERMINISTIC:
                slot = _slot(program, head_unit, run)
                _leave(values_ptr, sums_ptr, slot, m, weight, acc, in_group, GROUP, D)
            first_program = head_unit // run
            sharing = (head_unit + pieces - 1) // run - first_program + 1
            counter = arrived_ptr + row * KV_HEADS + head
            # Release: the barrier puts all threads' stores before the one thread's atomic, which
            # publishes them to the GPU. Acquire: the same backwards, for the last to arrive.
            tl.debug_barrier()
            before_me = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if before_me == sharing - 1:
                tl.store(counter, 0)
                if DETERMINISTIC:
                    m_all, weight_all, acc_all = _merged_in_order(
                        values_ptr, sums_ptr, pieces, head_unit, factor,
                        GROUP, D, GROUP_ROWS, D_COLUMNS,
                    )  # fmt: skip
                else:
                    m_all, weight_all, acc_all = _merged(
                        values_ptr, sums_ptr, sharing, head_unit, first_program, run, factor,
                        GROUP, D, GROUP_ROWS, D_COLUMNS,
                    )  # fmt: skip
                every = tl.arange(0, GROUP_ROWS) < GROUP
                _write(
                    out_head, sinks_ptr, head, m_all, weight_all, acc_all, every, factor,
                    GROUP, D, HAS_SINKS,
                )  # fmt: skip
        else:
            written = member < tl.where(stop > begin, GROUP, 0)
            _write(out_head, sinks_ptr, head, m, weight, acc, written, factor, GROUP, D, HAS_SINKS)
        unit = next_unit
