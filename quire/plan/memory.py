"""Memory arithmetic: KV groups and pools, activations, and the context that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import lcm, prod

from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup
from quire.layers.build import Build, CacheLayer
from quire.models.registry import ModelConfig

# Interpreter, torch and the other libraries, the tokenizer: measured on Linux x86-64 with the CPU
# build of torch (tests/plan/test_measured.py holds it to a real process).
RESERVE_BYTES = 400 * 2**20
# Prompt log-probabilities take logits of this many tokens at a time, to bound memory.
LOGIT_ROWS = 64
# Vectors of the vocabulary's size that sampling one token works with, as float32.
SAMPLING_VECTORS = 16
# Where the windows of a prompt are kept for prefix hits, besides its end: they are large beside the
# compressed entries of as many tokens.
CHECKPOINT_TOKENS = 4096
# Steps in flight, of which each may have blocks that its windows have passed.
STEPS_IN_FLIGHT = 2
Page = tuple[tuple[int, ...], ...]  # as in CacheLayer


def kv_groups(
    caches: Sequence[CacheLayer], itemsize: int, checkpoint_tokens: int = CHECKPOINT_TOKENS
) -> tuple[KVGroup, ...]:
    """Layers of equal window and page share a group; groups of as many layers of equal page share
    a pool and its memory. Where pages of other layers hold compressed entries of many tokens,
    windows are kept for prefix hits only at checkpoints: `checkpoint_tokens` apart, or a few more
    where hits end."""
    members: dict[tuple[int | None, Page, int], list[CacheLayer]] = {}
    for cache in caches:
        members.setdefault((cache.window, cache.page, cache.block_size), []).append(cache)
    hit_tokens = lcm(*(cache.block_size for cache in caches))
    checkpoint = -(-checkpoint_tokens // hit_tokens) * hit_tokens
    groups: list[KVGroup] = []
    pools: list[tuple[Page, int]] = []
    for (window, page, block_size), layers in members.items():
        if (page, len(layers)) not in pools:
            pools.append((page, len(layers)))
        group = KVGroup(
            index=len(groups),
            window=window,
            layers=tuple(cache.layer for cache in layers),
            page_bytes=itemsize * sum(cache.page_values for cache in layers),
            pool=pools.index((page, len(layers))),
            block_size=block_size,
            checkpoint=checkpoint if window is not None and hit_tokens > BLOCK_SIZE else None,
        )
        groups.append(group)
    return tuple(groups)


def entry_bytes(groups: Sequence[KVGroup]) -> float:
    """KV bytes by which each token of a request grows, once its windows are full."""
    return sum(group.page_bytes / group.block_size for group in groups if group.window is None)


def window_bytes(groups: Sequence[KVGroup]) -> int:
    """KV bytes of one request's full windows."""
    windows = [group for group in groups if group.window is not None]
    return sum(group.page_bytes * window_blocks(group) for group in windows)


def window_blocks(group: KVGroup) -> int:
    """Blocks of one request's full window, wherever it begins in its first block."""
    assert group.window is not None
    return group.blocks_of(group.window) + 1


def state_bytes(build: Build, sequences: int) -> int:
    """What layers keep of requests besides their caches."""
    return 4 * sequences * sum(prod(state.shape) for state in build.states)


def recomputed_tokens(build: Build) -> int:
    """Tokens before a prefix hit that are computed again, to make the layers' state whole."""
    return max((state.recomputed for state in build.states), default=0)


def window_peak(group: KVGroup, step_tokens: int) -> int:
    """Most blocks of one request in a window group, however long it gets."""
    return replace(group, pool=0).peak_blocks(2**40, step_tokens)


def bytes_for_tokens(
    groups: Sequence[KVGroup], tokens: int, step_tokens: int, sequences: int
) -> int:
    """KV bytes for `sequences` requests that hold `tokens` tokens together."""
    return allocated_bytes(groups, pool_blocks(groups, tokens, step_tokens, sequences))


def tokens_that_fit(groups: Sequence[KVGroup], size: int, step_tokens: int, sequences: int) -> int:
    """The most tokens whose KV fits in `size` bytes, a multiple of BLOCK_SIZE; 0 if none."""
    most = max(group.block_size for group in groups) // BLOCK_SIZE
    low, high = 0, most * (size // max(1, min(g.page_bytes for g in groups)) + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_for_tokens(groups, middle * BLOCK_SIZE, step_tokens, sequences) <= size:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK_SIZE


def pool_blocks(
    groups: Sequence[KVGroup], tokens: int, step_tokens: int, sequences: int
) -> tuple[int, ...]:
    """Blocks of each pool (with its null block) for `tokens` tokens of `sequences` requests."""
    blocks = [1] * (max(g.pool for g in groups) + 1)
    for group in groups:
        # Each request's last block may be partly filled.
        whole = group.blocks_of(tokens) + sequences
        peak = whole
        if group.checkpoint is not None:
            peak = _checkpointed_blocks(group, tokens, step_tokens, sequences)
        elif group.window is not None:
            peak = sequences * window_peak(group, step_tokens)
        blocks[group.pool] += min(whole, peak)
    return tuple(blocks)


def _checkpointed_blocks(group: KVGroup, tokens: int, step_tokens: int, sequences: int) -> int:
    """Blocks of a window group: live windows, what steps in flight add to them, and checkpoints of
    as many tokens as the other groups hold."""
    assert group.checkpoint is not None
    live = sequences * window_blocks(group) + STEPS_IN_FLIGHT * group.blocks_of(step_tokens)
    kept = (tokens // group.checkpoint + sequences) * window_blocks(group)
    return max(live, window_peak(group, step_tokens)) + kept


def allocated_bytes(groups: Sequence[KVGroup], blocks: Sequence[int]) -> int:
    """What the runner will allocate: a page for every block of every pool."""
    pages = {g.pool: g.page_bytes for g in groups}
    return sum(page * blocks[pool] for pool, page in pages.items())


def activation_bytes(config: ModelConfig, width: int, step_tokens: int, sequences: int) -> int:
    """Largest working memory of a step, in float32: of every token the residual, a layer's input
    and output and its `width` (Build.width); then logits and what sampling needs."""
    rows = max(min(sequences, step_tokens), min(LOGIT_ROWS, step_tokens))
    layers = (3 * config.hidden + width) * step_tokens
    logits = config.hidden * step_tokens + config.vocab_size * (rows + SAMPLING_VECTORS)
    return 4 * max(layers, logits)


def gpu_activation_bytes(
    config: ModelConfig, width: int, step_tokens: int, sequences: int, itemsize: int
) -> int:
    """Largest working memory of a step on a GPU: as on the CPU, in the model's number format; the
    logits of all rows, once as computed and twice in float32 for sampling. An eighth more is for
    what the allocator cannot use."""
    layers = (3 * config.hidden + width) * step_tokens * itemsize
    logits = config.hidden * step_tokens * itemsize
    logits += config.vocab_size * sequences * (itemsize + 8)
    return max(layers, logits) * 9 // 8


def recorded_bytes(config: ModelConfig, width: int, rows: int) -> int:
    """Memory that recorded decode steps of 1 to `rows` rows keep: logits and working memory."""
    per_row = 4 * (config.vocab_size + 4 * config.hidden + width)
    return per_row * rows * (rows + 1) // 2


def reference_bytes(build: Build, formats: Callable[[str], str]) -> int:
    """The largest weight's copy in float32: the reference kernels widen one at a time."""
    return max(
        sum(
            4 * prod(tensor.shape)
            for tensor in weight.tensors()
            if len(tensor.shape) == 2 and formats(tensor.name) in ("f16", "bf16")
        )
        for weight in build.weights
    )
