"""Decode of few requests with short contexts: no program waits for another.

What one short request waits for in decode.py is not its keys and values, which take under 1 us, but
the states that programs hand on, which takes 3. Here a program has one query head and CHUNK columns
of its values. It scores all keys, as the other programs of its head do, and needs none of them. So
the keys of a KV head are read for each of its query heads and chunks, from L2 but for the first
time: for long contexts that would take more than it saves. So this kernel is for block tables, or
windows, that have room for no more than SHORT_CONTEXT tokens: steps whose contexts are all short
get such tables, and a graph of their own (Shapes.short_context).

Products are float32's own: an MMA would want more queries for a key than there are, and keys by way
of shared memory. A thread has some columns of some keys of every tile, and for each of these places
in a tile a softmax of its own; threads meet once, when all tiles are done. Two tiles are in flight,
and block numbers are read two tiles ahead of them, the first before the length is known. Programs
of a KV head begin with different tiles, so that all of its keys are on their way to L2 at once.

Keys and values are words of two columns from memory to arithmetic: as numbers of 16 bits they would
be taken apart, each in a register of its own, as soon as they are there, which a program would wait
for before it asks for the next tile.

Where it can (serves_new), the kernel also does what rotary_cache does: head norms, rotation and the
write to the cache, which would be a launch of its own for little work. Every program makes its
query head and the new key of its KV head ready while its first tiles are on their way, and its
first state is that of the new key and value. So nobody reads what is written, as long as rows are
of different requests: in the cache, keys end before the new one. Of a KV head, the programs of its
first query head write their columns.

On an H100, one layer in a chain of them, contexts of 290 tokens: 4.7 us for one request and 5.4 for
two, where states that are handed on take 7.4 and 8.5 (benchmarks/gpu/short_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.new_tokens import NewTokens
from quire.kernels.triton.attention.tile import capped, finite, normalised
from quire.kernels.triton.attention.words import (
    dot_words,
    load_floats,
    load_head,
    narrow,
    normed,
    spread,
    turned,
    wide,
    words_at,
)
from quire.kernels.triton.launch import launch, let_next_start, num_sms, wait_for_inputs
from quire.kernels.triton.rows import row_stride

# Tokens that a query sees at most; a power of two.
SHORT_CONTEXT = 512


@dataclass(frozen=True)
class ShortTile:
    """`keys` of a tile: a power of two, half of SHORT_CONTEXT at most, and fewer than threads, as
    then each thread reads the block numbers that it needs, where it would get them through shared
    memory otherwise. `chunk`: columns, a power of two."""

    keys: int
    chunk: int
    warps: int


# The first for which there is a multiprocessor for each program.
TILES = (ShortTile(128, 32, 8), ShortTile(128, 64, 8))


@triton.jit
def _blocks(table_ptr, number, tile, blocks, BLOCK: tl.constexpr):
    """Block numbers [TILE] of the keys of a tile, in the first of which they are the `number`-th of
    the table; past the table, 0."""
    number += tile * (number.shape[0] // BLOCK)
    return tl.load(table_ptr + number, mask=number < blocks, other=0)


@triton.jit
def _columns(first, D: tl.constexpr, CHUNK: tl.constexpr):
    """Whether the words [1, CHUNK / 2] of the columns from `first` on are the head's."""
    return (tl.arange(0, CHUNK // 2) < (D - first) // 2)[None, :]


@triton.jit
def _tile(
    k_ptrs, v_ptrs, block, seen, v_columns,
    K_WORDS: tl.constexpr, V_WORDS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(all chunks of keys, the program's chunk of values) of the keys `seen`, in words."""
    places = block.to(tl.int64)[:, None]
    k_ptrs += places * K_WORDS
    k = ()
    for first in tl.static_range(0, D, CHUNK):
        inside = seen[:, None] & _columns(first, D, CHUNK)
        chunk = tl.load(k_ptrs + first // 2, mask=inside, other=0)
        k = k + (chunk,)  # type: ignore[assignment]  # noqa: RUF005
    return k, tl.load(v_ptrs + places * V_WORDS, mask=seen[:, None] & v_columns, other=0)


@triton.jit
def _extend(
    q, k, v, seen, m, weight, low_acc, high_acc, factor, inner_scale,
    SOFTCAP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The states of the places in a tile with one key more each: m and weight [TILE], and acc
    [TILE, CHUNK / 2] of both columns of words."""
    products = tl.zeros(low_acc.shape, tl.float32)
    for i in tl.static_range(len(k)):
        low, high = wide(k[i], DTYPE)
        products += low * q[2 * i][None, :]
        products += high * q[2 * i + 1][None, :]
    s = tl.sum(products, 1)
    s = tl.where(seen, capped(s, inner_scale) if SOFTCAP else s, float("-inf"))
    top = tl.maximum(m, s)
    reference = finite(top) * factor
    p = tl.exp2(tl.fma(s, factor, -reference))
    shrink = tl.exp2(tl.fma(m, factor, -reference))
    low, high = wide(v, DTYPE)
    low_acc = low_acc * shrink[:, None] + low * p[:, None]
    high_acc = high_acc * shrink[:, None] + high * p[:, None]
    return top, weight * shrink + p, low_acc, high_acc


@triton.jit
def _write(
    k_ptr, v_ptr, k, v, slot, kv_head, begin, column, count,
    K_WORDS: tl.constexpr, V_WORDS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `count` words from column `begin` on of a key and its value to their slot of the
    cache; `v` has no others."""
    inner = (kv_head * BLOCK + slot % BLOCK) * (D // 2) + begin // 2 + column
    k_ptrs = words_at(k_ptr) + slot // BLOCK * K_WORDS + inner
    for i in tl.static_range(len(k)):
        tl.store(k_ptrs, k[i], mask=column < tl.where(begin == i * CHUNK, count, 0))
    tl.store(words_at(v_ptr) + slot // BLOCK * V_WORDS + inner, v, mask=column < count)


@triton.jit(do_not_specialize=["table_stride", "blocks"])
def decode_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    context_len_ptr,
    sinks_ptr,
    out_ptr,
    positions_ptr,
    slots_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    table_stride,
    blocks,
    factor,
    inner_scale,
    eps,
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
    NEW: tl.constexpr,
    HALF: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    K_WORDS: tl.constexpr = K_STRIDE // 2
    V_WORDS: tl.constexpr = V_STRIDE // 2
    SLICES: tl.constexpr = (D + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    head, row = program // SLICES % (KV_HEADS * GROUP), program // (SLICES * KV_HEADS * GROUP)
    begin = program % SLICES * CHUNK
    key, column = tl.arange(0, TILE), tl.arange(0, CHUNK // 2)
    q_weights = load_floats(q_norm_ptr, column, D, CHUNK) if NORM_Q else ()
    k_weights = load_floats(k_norm_ptr, column, D, CHUNK) if NORM_K else ()
    wait_for_inputs(PDL)
    length = tl.load(context_len_ptr + row)
    first_head = words_at(q_ptr) + row.to(tl.int64) * (Q_STRIDE // 2)
    if NEW:
        slot = tl.load(slots_ptr + row)
        position = tl.load(positions_ptr + row)
    else:
        q = load_head(first_head + head * (D // 2), column, D, CHUNK, DTYPE)
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    # Keys in the cache; a new one is another program's to write.
    left = length - oldest - 1 if NEW else length - oldest
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    number = (oldest + key) // BLOCK
    # Even, so the tiles of a pair are 2 i and 2 i + 1.
    turn = 2 * (program % (GROUP * SLICES)) % (SHORT // TILE)
    block_a = _blocks(table_ptr, number, turn, blocks, BLOCK)
    block_b = _blocks(table_ptr, number, turn + 1, blocks, BLOCK)
    following = turn ^ 2
    next_a = _blocks(table_ptr, number, following, blocks, BLOCK)
    next_b = _blocks(table_ptr, number, following + 1, blocks, BLOCK)

    # A block's heads begin BLOCK * D // 2 words apart, its tokens D // 2.
    inner = (head // GROUP * BLOCK + (oldest + key) % BLOCK)[:, None] * (D // 2) + column[None, :]
    k_ptrs, v_ptrs = words_at(k_ptr) + inner, words_at(v_ptr) + begin // 2 + inner
    in_slice = _columns(begin, D, CHUNK)
    seen_a, seen_b = turn * TILE + key < left, (turn + 1) * TILE + key < left
    k_a, v_a = _tile(k_ptrs, v_ptrs, block_a, seen_a, in_slice, K_WORDS, V_WORDS, D, CHUNK)
    k_b, v_b = _tile(k_ptrs, v_ptrs, block_b, seen_b, in_slice, K_WORDS, V_WORDS, D, CHUNK)
    m = tl.full([TILE], float("-inf"), tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    low_acc = tl.zeros([TILE, CHUNK // 2], tl.float32)
    high_acc = tl.zeros([TILE, CHUNK // 2], tl.float32)
    if NEW:
        # Or the compiler asks for tiles after this arithmetic, which is done by the time that they
        # are there.
        tl.debug_barrier()
        k_head = first_head + (KV_HEADS * GROUP + head // GROUP) * (D // 2)
        v_head = k_head + (KV_HEADS * D + begin) // 2
        new_q = load_head(first_head + head * (D // 2), column, D, CHUNK, DTYPE)
        new_k = load_head(k_head, column, D, CHUNK, DTYPE)
        new_v = tl.load(v_head + column, mask=column < (D - begin) // 2, other=0)
        table = ()
        if HALF:
            table = load_floats(cos_sin_ptr + position * (2 * HALF), column, 2 * HALF, CHUNK)
        q_words = narrow(turned(normed(new_q, q_weights, eps, D), table), DTYPE)
        k_words = narrow(turned(normed(new_k, k_weights, eps, D), table), DTYPE)
        # Padding has no slot.
        count = tl.where((slot >= 0) & (head % GROUP == 0), (D - begin) // 2, 0)
        _write(
            k_ptr, v_ptr, k_words, new_v, slot, head // GROUP, begin, column, count,
            K_WORDS, V_WORDS, D, CHUNK, BLOCK,
        )  # fmt: skip
        # The first place of a tile has seen the new key, if there is one.
        first_place = key < tl.minimum(length, 1)
        s = dot_words(q_words, k_words, DTYPE)
        m = tl.where(first_place, capped(s, inner_scale) if SOFTCAP else s, m)
        weight = tl.where(first_place, 1.0, weight)
        low, high = wide(new_v[None, :], DTYPE)
        low_acc = tl.where(first_place[:, None], low, low_acc)
        high_acc = tl.where(first_place[:, None], high, high_acc)
        q = spread(q_words, column, DTYPE)
    for i in range(0, SHORT // TILE, 2):
        pair, following, after = i ^ turn, (i + 2) ^ turn, (i + 4) ^ turn
        if pair * TILE < left:
            m, weight, low_acc, high_acc = _extend(
                q, k_a, v_a, seen_a, m, weight, low_acc, high_acc, factor, inner_scale,
                SOFTCAP, DTYPE,
            )  # fmt: skip
        seen_a = following * TILE + key < left
        k_a, v_a = _tile(k_ptrs, v_ptrs, next_a, seen_a, in_slice, K_WORDS, V_WORDS, D, CHUNK)
        next_a = _blocks(table_ptr, number, after, blocks, BLOCK)
        # Or the compiler asks for the tile after the other one's arithmetic, when that is there.
        tl.debug_barrier()
        if (pair + 1) * TILE < left:
            m, weight, low_acc, high_acc = _extend(
                q, k_b, v_b, seen_b, m, weight, low_acc, high_acc, factor, inner_scale,
                SOFTCAP, DTYPE,
            )  # fmt: skip
        seen_b = (following + 1) * TILE + key < left
        k_b, v_b = _tile(k_ptrs, v_ptrs, next_b, seen_b, in_slice, K_WORDS, V_WORDS, D, CHUNK)
        next_b = _blocks(table_ptr, number, after + 1, blocks, BLOCK)

    top = tl.max(m, 0, keep_dims=True)
    share = tl.exp2((m - finite(top)) * factor)
    weight = tl.sum(weight * share, 0, keep_dims=True)
    acc = tl.interleave(low_acc, high_acc) * share[:, None]
    sinks = tl.load(sinks_ptr + head) if HAS_SINKS else 0.0
    result = normalised(top, weight, tl.sum(acc, 0, keep_dims=True), sinks, factor, HAS_SINKS)
    column = begin + tl.arange(0, CHUNK)[None, :]
    out = out_ptr + row.to(tl.int64) * OUT_STRIDE + head * D + column
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=column < D)


def _programs(rows: int, heads: int, head_size: int, tile: ShortTile) -> int:
    return rows * heads * -(-head_size // tile.chunk)


def _tile_for(rows: int, heads: int, head_size: int, device: torch.device) -> ShortTile:
    sms = num_sms(device)
    fits = (t for t in TILES if _programs(rows, heads, head_size, t) <= sms)
    return next(fits, TILES[-1])


def short_rows(heads: int, dtype: torch.dtype, k_cache: torch.Tensor) -> int:
    """For how many requests with queries in `dtype` decode_short is: of caches in the same 16 bits,
    and so few that each program has a multiprocessor."""
    head_size = k_cache.shape[3]
    if dtype.itemsize != 2 or k_cache.dtype != dtype or head_size % 2:
        return 0
    return num_sms(k_cache.device) // _programs(1, heads, head_size, TILES[-1])


def serves_short(q: torch.Tensor, k_cache: torch.Tensor, rows: int, longest: int) -> bool:
    """Whether decode_short is for these queries of `rows` requests, which see `longest` tokens at
    most; they are read two by two."""
    whole_words = row_stride(q, "q") % 2 == q.storage_offset() % 2 == 0
    few = rows <= short_rows(q.shape[1] // k_cache.shape[3], q.dtype, k_cache)
    return longest <= SHORT_CONTEXT and whole_words and few


def serves_new(
    q: torch.Tensor, k_cache: torch.Tensor, rows: int, longest: int, new: NewTokens
) -> bool:
    """serves_short for tokens whose keys and values are not in the cache yet, q being the first
    columns of their qkv: columns that rotate together must be whole chunks apart."""
    if not serves_short(q, k_cache, rows, longest):
        return False
    head_size = k_cache.shape[3]
    tile = _tile_for(rows, q.shape[1] // head_size, head_size, q.device)
    half = 0 if new.cos_sin is None else new.cos_sin.shape[1] // 2
    tables = (t for t in (new.cos_sin, new.q_norm, new.k_norm) if t is not None)
    whole_pairs = all(t.is_contiguous() and t.storage_offset() % 2 == 0 for t in tables)
    return half % tile.chunk == 0 and whole_pairs


def decode_short(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_len: torch.Tensor,
    factor: float,
    inner_scale: float,
    window: int | None,
    softcap: bool,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    tile: ShortTile | None = None,
    new: NewTokens | None = None,
) -> None:
    """paged_attention's `decode` where serves_short says so. Logits in log2 units are dot * factor,
    or tanh(dot * inner_scale) * factor with `softcap`. Rows of block_tables are read beyond the
    context. `tile`: another than the first that has multiprocessors enough. `new`, where serves_new
    says so: each request's last token, of whose qkv `q` are the first columns; its key and value
    are not read from the cache but written there, as rotary_cache does.
    """
    rows, columns = block_tables.shape
    _, kv_heads, block, head_size = k_cache.shape
    heads = q.shape[1] // head_size
    tile = tile or _tile_for(rows, heads, head_size, q.device)
    cos_sin, q_norm, k_norm = (new.cos_sin, new.q_norm, new.k_norm) if new else (None,) * 3
    # The pointer of what is absent is never read.
    sinks_or, cos_sin_or, q_norm_or, k_norm_or = (
        context_len if x is None else x for x in (sinks, cos_sin, q_norm, k_norm)
    )
    positions, slots = (new.positions, new.slots) if new else (context_len, context_len)
    launch(
        decode_short_kernel, (_programs(rows, heads, head_size, tile),), q.device,
        q, k_cache, v_cache, block_tables, context_len, sinks_or, out, positions, slots,
        cos_sin_or, q_norm_or, k_norm_or, block_tables.stride(0), columns, factor, inner_scale,
        new.eps if new else 0.0,
        Q_STRIDE=row_stride(q, "q"), OUT_STRIDE=row_stride(out, "out"),
        K_STRIDE=k_cache.stride(0), V_STRIDE=v_cache.stride(0), KV_HEADS=kv_heads,
        GROUP=heads // kv_heads, D=head_size, BLOCK=block, WINDOW=window or 0, SOFTCAP=softcap,
        HAS_SINKS=sinks is not None, NEW=new is not None,
        HALF=0 if cos_sin is None else cos_sin.shape[1] // 2, NORM_Q=q_norm is not None,
        NORM_K=k_norm is not None, SHORT=SHORT_CONTEXT, TILE=tile.keys, CHUNK=tile.chunk,
        num_warps=tile.warps, num_stages=1,
    )  # fmt: skip
