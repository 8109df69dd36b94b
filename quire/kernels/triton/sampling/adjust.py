"""Everything that changes logits before the temperature: allowed tokens, bad words, end tokens
below min_tokens, bias, penalties."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.device_state import MAX_BIAS, MAX_ENDS, MAX_WORDS
from quire.kernels.triton.launch import let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.slots import (
    FLAGS,
    FREQUENCY,
    HAS_ALLOWED,
    HAS_BAD_WORDS,
    HAS_BIAS,
    HAS_ENDS,
    HAS_PENALTIES,
    INFINITY,
    LARGEST,
    LENGTH,
    LONGEST_WORD,
    MIN_TOKENS,
    NUM_BIAS,
    NUM_ENDS,
    NUM_PROMPT,
    NUM_WORDS,
    PRESENCE,
    REPETITION,
    load_float,
    row_behind,
    sampling_slot,
)
from quire.kernels.triton.sampling.tiles import checked

_BIAS_BLOCK = tl.constexpr(triton.next_power_of_2(MAX_BIAS))
_ENDS_BLOCK = tl.constexpr(triton.next_power_of_2(MAX_ENDS))
_WORDS_BLOCK = tl.constexpr(triton.next_power_of_2(MAX_WORDS))
_SPARSE = tl.constexpr(HAS_BIAS.value | HAS_BAD_WORDS.value | HAS_ENDS.value)


@triton.jit
def _adjusted(x, bias, token, inside, allowed_ptr, counts_ptr, scalars_ptr, drafts_ptr, behind):
    """Logits x of tokens, allowed or not, biased, penalised and finite above. The first `behind` of
    the drafts count as output."""
    flags = tl.load(scalars_ptr + FLAGS)
    if flags & HAS_ALLOWED != 0:
        bits = tl.load(allowed_ptr + token // 32, mask=inside, other=0)
        x = tl.where((bits >> token % 32) & 1 != 0, x, -INFINITY)
    x += bias
    if flags & HAS_PENALTIES != 0:
        repetition = load_float(scalars_ptr + REPETITION)
        presence = load_float(scalars_ptr + PRESENCE)
        frequency = load_float(scalars_ptr + FREQUENCY)
        counts = tl.load(counts_ptr + token, mask=inside, other=0).to(tl.int32)
        for i in range(behind):
            once_more = (token == tl.load(drafts_ptr + i)) & ((counts & 0x7FFF) != 0x7FFF)
            counts += once_more.to(tl.int32)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where(counts != 0, repeated, x)
        output = counts & 0x7FFF
        penalty = tl.fma(output.to(tl.float32), frequency, presence)
        x = tl.where(output > 0, x - penalty, x)
    # A tiny repetition penalty can overflow; infinities would leave nothing to choose by.
    return tl.minimum(x, LARGEST)


@triton.jit
def _forbid_words(
    x_ptr, first, last, word_starts_ptr, word_tokens_ptr, history_ptr, scalars_ptr, length
):
    """-inf for the last tokens of words whose other tokens end the output."""
    num_output = length - tl.load(scalars_ptr + NUM_PROMPT)
    word = tl.arange(0, _WORDS_BLOCK)
    inside = word < tl.load(scalars_ptr + NUM_WORDS)
    start = tl.load(word_starts_ptr + word, mask=inside, other=0)
    prefix = tl.load(word_starts_ptr + word + 1, mask=inside, other=0) - start - 1
    inside &= (prefix >= 0) & (prefix <= num_output)
    token = tl.load(word_tokens_ptr + start + prefix, mask=inside, other=-1)
    inside &= (token >= first) & (token < last)
    i = 0
    end = tl.load(scalars_ptr + LONGEST_WORD) - 1
    while i < end:
        compared = inside & (i < prefix)
        wanted = tl.load(word_tokens_ptr + start + i, mask=compared, other=0)
        found = tl.load(history_ptr + length - prefix + i, mask=compared, other=0)
        inside &= wanted == found
        i += 1
        if tl.max(inside.to(tl.int32)) == 0:
            end = i
    tl.store(x_ptr + token, -INFINITY, mask=inside)


@triton.jit
def adjust_tiles_kernel(
    logits_ptr,
    rows_ptr,
    scalars_ptr,
    history_ptr,
    ends_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    word_starts_ptr,
    word_tokens_ptr,
    allowed_ptr,
    counts_ptr,
    adjusted_ptr,
    tile_max_ptr,
    subtile_max_ptr,
    RECORD: tl.constexpr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    if slot >= 0:
        scalars_ptr += slot * RECORD
        allowed_ptr += slot * RECORD
        counts_ptr += slot * V
        logits_ptr += row * STRIDE
        adjusted_ptr += row * V
        SUBTILES: tl.constexpr = TILE // SUBTILE
        first = tile * TILE
        subtile = tl.arange(0, SUBTILES)
        token = first + subtile[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
        inside = token < V
        x = tl.load(logits_ptr + token, mask=inside, other=-INFINITY)
        x, largest = checked(x.to(tl.float32))
        tl.store(tile_max_ptr + row * tl.num_programs(0) + tile, largest)
        history_ptr += slot * RECORD
        behind = row_behind(rows_ptr, row)
        length = tl.load(scalars_ptr + LENGTH)
        drafts_ptr = history_ptr + length
        x = _adjusted(
            x, 0.0, token, inside, allowed_ptr, counts_ptr, scalars_ptr, drafts_ptr, behind
        )
        tl.store(adjusted_ptr + token, x, mask=inside)
        flags = tl.load(scalars_ptr + FLAGS)
        if flags & _SPARSE != 0:
            # A few tokens change once more, through memory: each step sees the one before.
            last = tl.minimum(first + TILE, V)
            if flags & HAS_BIAS != 0:
                tl.debug_barrier()
                i = tl.arange(0, _BIAS_BLOCK)
                has = i < tl.load(scalars_ptr + NUM_BIAS)
                id = tl.load(bias_ids_ptr + slot * RECORD + i, mask=has, other=-1)
                has &= (id >= first) & (id < last)
                bias = tl.load(bias_values_ptr + slot * RECORD + i, mask=has, other=0.0)
                raw = tl.load(logits_ptr + id, mask=has, other=0.0).to(tl.float32)
                raw = tl.where(raw == raw, raw, -INFINITY)
                biased = _adjusted(
                    raw, bias, id, has, allowed_ptr, counts_ptr, scalars_ptr, drafts_ptr, behind
                )
                tl.store(adjusted_ptr + id, biased, mask=has)
            tl.debug_barrier()
            if flags & HAS_BAD_WORDS != 0:
                _forbid_words(
                    adjusted_ptr,
                    first,
                    last,
                    word_starts_ptr + slot * RECORD,
                    word_tokens_ptr + slot * RECORD,
                    history_ptr,
                    scalars_ptr,
                    length + behind,
                )
            if flags & HAS_ENDS != 0:
                num_output = length + behind - tl.load(scalars_ptr + NUM_PROMPT)
                if num_output < tl.load(scalars_ptr + MIN_TOKENS):
                    i = tl.arange(0, _ENDS_BLOCK)
                    has = i < tl.load(scalars_ptr + NUM_ENDS)
                    id = tl.load(ends_ptr + slot * RECORD + i, mask=has, other=-1)
                    has &= (id >= first) & (id < last)
                    tl.store(adjusted_ptr + id, -INFINITY, mask=has)
            tl.debug_barrier()
            x = tl.load(adjusted_ptr + token, mask=inside, other=-INFINITY)
        at = (row * tl.num_programs(0) + tile) * SUBTILES + subtile
        tl.store(subtile_max_ptr + at, tl.max(x, axis=1))
