"""Top-k, top-p and min-p, and the end of every variant: the row's token, appended to its slot."""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels.sampling import Status
from quire.kernels.triton.launch import let_next_start, wait_for_inputs
from quire.kernels.triton.sampling.likely import (
    BY_COUNT,
    BY_MASS,
    BY_TOKEN,
    cut_at,
    list_candidates,
    load_candidates,
    mass,
    raw_of_key,
    scaled_key,
    search,
)
from quire.kernels.triton.sampling.noise import noise_of
from quire.kernels.triton.sampling.slots import (
    FLAGS,
    HAS_LOGPROBS,
    HAS_MIN_P,
    HAS_PENALTIES,
    HAS_SELECTION,
    HAS_TOP_K,
    HAS_TOP_P,
    INFINITY,
    LENGTH,
    LOG_MIN_P,
    NO_TOKEN,
    NUM_LOGPROBS,
    TEMPERATURE,
    TOP_K,
    count_once,
    load_float,
    load_key,
    load_top_p,
    row_behind,
    sampling_slot,
    scaled,
)
from quire.kernels.triton.sampling.tiles import checked, pick_of_row, pick_of_tile

_OK = tl.constexpr(int(Status.OK))
_NAN = tl.constexpr(int(Status.NAN))
_FORBIDDEN = tl.constexpr(int(Status.FORBIDDEN))
_SKIPPED = tl.constexpr(int(Status.SKIPPED))
_LAST_KEY = tl.constexpr(0x7F7FFFFF)  # of the largest float that is finite


@triton.jit
def _min_p_key(scalars_ptr):
    """The last key that min-p leaves."""
    return tl.abs(load_float(scalars_ptr + LOG_MIN_P)).to(tl.int32, bitcast=True)


@triton.jit
def cut_rows_kernel(
    rows_ptr,
    scalars_ptr,
    subtile_max_ptr,
    largest_ptr,
    count_ptr,
    cut_ptr,
    RECORD: tl.constexpr,
    V: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    if slot >= 0:
        scalars_ptr += slot * RECORD
        index = tl.arange(0, BLOCK)
        at = subtile_max_ptr + row * SUBTILES + index
        x = tl.load(at, mask=index < SUBTILES, other=-INFINITY)
        largest = tl.max(x)
        tl.store(largest_ptr + row, largest)
        tl.store(count_ptr + row, 0)
        flags = tl.load(scalars_ptr + FLAGS)
        temperature = load_float(scalars_ptr + TEMPERATURE)
        # Forbidden tokens, at infinity, are no candidates.
        cut = tl.minimum(_min_p_key(scalars_ptr), _LAST_KEY)
        if flags & HAS_TOP_K != 0:
            # As many tokens as there are maxima are at least as likely as these.
            top_k = tl.load(scalars_ptr + TOP_K)
            bound = cut_at(x, index < SUBTILES, top_k)
            if top_k <= SUBTILES:
                cut = tl.minimum(cut, scaled_key(raw_of_key(bound), largest, temperature))
        if flags & HAS_TOP_P != 0:
            # Tokens below the cut weigh, all together, less than what top-p leaves out. Half a
            # unit is for rounding.
            known = tl.exp(scaled(x, largest, temperature))
            total = tl.where(flags & HAS_TOP_K != 0, 1.0, tl.sum(known))
            rest = (1.0 - load_top_p(scalars_ptr)).to(tl.float32)
            bound = 0.5 - tl.log(rest * total / V)
            cut = tl.minimum(cut, bound.to(tl.int32, bitcast=True))
        tl.store(cut_ptr + row, cut)


@triton.jit
def list_or_pick_kernel(
    rows_ptr,
    scalars_ptr,
    logits_ptr,
    largest_ptr,
    cut_ptr,
    count_ptr,
    list_key_ptr,
    list_id_ptr,
    tile_mass_ptr,
    pick_ptr,
    pick_id_ptr,
    RECORD: tl.constexpr,
    V: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    if slot >= 0:
        scalars_ptr += slot * RECORD
        logits_ptr += row * V
        at = row * tl.num_programs(0) + tile
        first = tile * TILE
        flags = tl.load(scalars_ptr + FLAGS)
        largest = tl.load(largest_ptr + row)
        temperature = load_float(scalars_ptr + TEMPERATURE)
        last = _min_p_key(scalars_ptr)
        if flags & HAS_SELECTION != 0:
            each = first + tl.arange(0, TILE)
            logit = tl.load(logits_ptr + each, mask=each < V, other=-INFINITY)
            key = scaled_key(logit, largest, temperature)
            list_candidates(
                key,
                each,
                (each < V) & (key <= tl.load(cut_ptr + row)),
                count_ptr + row,
                list_key_ptr + row * CANDIDATES,
                list_id_ptr + row * CANDIDATES,
                CANDIDATES,
            )
            if flags & HAS_TOP_P != 0:
                tl.store(tile_mass_ptr + at, tl.sum(tl.where(key <= last, mass(key), 0)))
        else:
            token = first + tl.arange(0, TILE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
            x = tl.load(logits_ptr + token, mask=token < V, other=-INFINITY)
            if flags & HAS_MIN_P != 0:
                x = tl.where(scaled_key(x, largest, temperature) <= last, x, -INFINITY)
            behind = row_behind(rows_ptr, row)
            pick, pick_id = pick_of_tile(x, first, scalars_ptr, behind, True, TILE)
            tl.store(pick_ptr + at, pick)
            tl.store(pick_id_ptr + at, pick_id)


@triton.jit
def _select(
    scalars_ptr,
    behind,
    logits_ptr,
    largest,
    cut,
    count,
    list_key_ptr,
    list_id_ptr,
    total_mass,
    V: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token chosen among what top-k, top-p and min-p leave."""
    flags = tl.load(scalars_ptr + FLAGS)
    temperature = load_float(scalars_ptr + TEMPERATURE)
    total = tl.where(count <= CANDIDATES, count, V)
    nothing = tl.full([], -1, dtype=tl.int32)
    # Tokens stay whose key is below `last`, or equal and the token at most `last_token`.
    last = cut
    last_token = tl.full([], V, dtype=tl.int32)
    if flags & HAS_TOP_K != 0:
        top_k = tl.load(scalars_ptr + TOP_K).to(tl.int64)
        last, _ = search(
            nothing, last, top_k, nothing, count, list_key_ptr, list_id_ptr, logits_ptr,
            largest, temperature, BY_COUNT, V, CANDIDATES, False, BLOCK,
        )  # fmt: skip
    if flags & HAS_TOP_P != 0:
        if flags & HAS_TOP_K != 0:
            sums = tl.zeros([BLOCK], dtype=tl.int64)
            for start in range(0, total, BLOCK):
                key, _, inside = load_candidates(
                    start, count, list_key_ptr, list_id_ptr, logits_ptr, largest, temperature,
                    V, CANDIDATES, False, BLOCK,
                )  # fmt: skip
                sums += tl.where(inside & (key <= last), mass(key), 0)
            total_mass = tl.sum(sums)
        # A token stays while the mass before it is below top_p: below this, as masses are whole
        # numbers, and the likeliest always.
        share = total_mass.to(tl.float64) * load_top_p(scalars_ptr)
        target = share.to(tl.int64)
        target = tl.maximum(target + (target.to(tl.float64) < share).to(tl.int64), 1)
        last, before = search(
            nothing, last, target, nothing, count, list_key_ptr, list_id_ptr, logits_ptr,
            largest, temperature, BY_MASS, V, CANDIDATES, False, BLOCK,
        )  # fmt: skip
        each = tl.maximum(mass(last), 1)
        ties = (target - before + each - 1) // each
        last_token, _ = search(
            nothing, last_token, ties, last, count, list_key_ptr, list_id_ptr, logits_ptr,
            largest, temperature, BY_TOKEN, V, CANDIDATES, False, BLOCK,
        )  # fmt: skip
    position, choice, low, high = load_key(scalars_ptr, behind)
    best = tl.full([BLOCK], -INFINITY, dtype=tl.float32)
    best_token = tl.full([BLOCK], NO_TOKEN, dtype=tl.int32)
    for start in range(0, total, BLOCK):
        key, token, inside = load_candidates(
            start, count, list_key_ptr, list_id_ptr, logits_ptr, largest, temperature,
            V, CANDIDATES, False, BLOCK,
        )  # fmt: skip
        stays = inside & ((key < last) | ((key == last) & (token <= last_token)))
        noise = noise_of(token, position, choice, low, high)
        score = noise - key.to(tl.float32, bitcast=True)
        better = stays & ((score > best) | ((score == best) & (token < best_token)))
        best = tl.where(better, score, best)
        best_token = tl.where(better, token, best_token)
    return tl.min(tl.where(best == tl.max(best), best_token, NO_TOKEN))


@triton.jit
def finish_kernel(
    rows_ptr,
    scalars_ptr,
    history_ptr,
    counts_ptr,
    logits_ptr,
    tile_max_ptr,
    pick_ptr,
    pick_id_ptr,
    tile_mass_ptr,
    largest_ptr,
    cut_ptr,
    count_ptr,
    list_key_ptr,
    list_id_ptr,
    tokens_ptr,
    status_ptr,
    wanted_ptr,
    RECORD: tl.constexpr,
    HISTORY: tl.constexpr,
    V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    APPEND: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = sampling_slot(rows_ptr, row)
    status = tl.full([], _SKIPPED, dtype=tl.int32)
    token = tl.full([], -1, dtype=tl.int32)
    wanted = tl.full([], -1, dtype=tl.int32)
    if slot >= 0:
        scalars_ptr += slot * RECORD
        flags = tl.load(scalars_ptr + FLAGS)
        tile = tl.arange(0, BLOCK_TILES)
        at = row * TILES + tile
        _, largest = checked(tl.load(tile_max_ptr + at, mask=tile < TILES, other=-INFINITY))
        finite = (largest == largest) & (tl.abs(largest) < INFINITY)
        status = tl.where(finite, _OK, _NAN)
        if FULL:
            largest = tl.load(largest_ptr + row)
            status = tl.where(finite & (largest == -INFINITY), _FORBIDDEN, status)
        if status == _OK:
            selects = (flags & HAS_SELECTION != 0) & FULL
            if selects:
                if FULL:
                    tile_mass = tl.load(tile_mass_ptr + at, mask=tile < TILES, other=0)
                    token = _select(
                        scalars_ptr,
                        row_behind(rows_ptr, row),
                        logits_ptr + row * V,
                        largest,
                        tl.load(cut_ptr + row),
                        tl.load(count_ptr + row),
                        list_key_ptr + row * CANDIDATES,
                        list_id_ptr + row * CANDIDATES,
                        tl.sum(tile_mass),
                        V,
                        CANDIDATES,
                        BLOCK,
                    )
            else:
                pick = tl.load(pick_ptr + at, mask=tile < TILES, other=-INFINITY)
                pick_id = tl.load(pick_id_ptr + at, mask=tile < TILES, other=NO_TOKEN)
                behind = row_behind(rows_ptr, row)
                token = pick_of_row(pick, pick_id, largest, scalars_ptr, behind)
            if APPEND:
                length = tl.load(scalars_ptr + LENGTH)
                tl.store(history_ptr + slot * RECORD + length, token, mask=length < HISTORY)
                tl.store(scalars_ptr + LENGTH, length + 1)
                if flags & HAS_PENALTIES != 0:
                    count_once(counts_ptr + slot * V + token)
            if flags & HAS_LOGPROBS != 0:
                wanted = tl.load(scalars_ptr + NUM_LOGPROBS)
    tl.store(tokens_ptr + row, token)
    tl.store(status_ptr + row, status)
    tl.store(wanted_ptr + row, wanted)
