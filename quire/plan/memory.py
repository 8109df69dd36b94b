"""Memory arithmetic: KV groups and pools, activations, and the context that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup
from quire.layers.build import CacheLayer
from quire.models.registry import ModelConfig

# Interpreter, torch and the other libraries, the tokenizer: measured on Linux x86-64 with the CPU
# build of torch (tests/plan/test_measured.py holds it to a real process).
RESERVE_BYTES = 400 * 2**20


def kv_groups(caches: Sequence[CacheLayer], itemsize: int) -> tuple[KVGroup, ...]:
    """Layers of equal window and head shape share a group; groups of equal pages share a pool."""
    members: dict[tuple[int | None, int, int], list[int]] = {}
    for cache in caches:
        key = (cache.window, cache.kv_heads, cache.head_size)
        members.setdefault(key, []).append(cache.layer)
    groups, pools = [], []
    for (window, heads, size), layers in members.items():
        page = 2 * heads * size * BLOCK_SIZE * itemsize * len(layers)
        if page not in pools:
            pools.append(page)
        groups.append(KVGroup(len(groups), window, tuple(layers), page, pools.index(page)))
    return tuple(groups)


def window_peak(group: KVGroup, step_tokens: int) -> int:
    """Most blocks of one request in a window group, however long it gets."""
    return replace(group, pool=0).peak_blocks(2**40, step_tokens)


def bytes_for_tokens(
    groups: Sequence[KVGroup], tokens: int, step_tokens: int, sequences: int
) -> int:
    """KV bytes for `sequences` requests that hold `tokens` tokens together."""
    return sum(
        g.page_bytes * n for g, n in zip(groups, _pages(groups, tokens, step_tokens, sequences))
    )


def _pages(
    groups: Sequence[KVGroup], tokens: int, step_tokens: int, sequences: int
) -> list[int]:
    whole = -(-tokens // BLOCK_SIZE) + sequences
    return [
        whole if g.window is None else min(whole, sequences * window_peak(g, step_tokens))
        for g in groups
    ]


def tokens_that_fit(
    groups: Sequence[KVGroup], size: int, step_tokens: int, sequences: int
) -> int:
    """The most tokens whose KV fits in `size` bytes, a multiple of BLOCK_SIZE; 0 if none."""
    low, high = 0, size // max(1, min(g.page_bytes for g in groups)) + 1
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
    for group, pages in zip(groups, _pages(groups, tokens, step_tokens, sequences), strict=True):
        blocks[group.pool] += pages
    return tuple(blocks)


def allocated_bytes(groups: Sequence[KVGroup], blocks: Sequence[int]) -> int:
    """What the runner will allocate: each group's layers have every block of its pool."""
    return sum(g.page_bytes * blocks[g.pool] for g in groups)


def activation_bytes(config: ModelConfig, widest: int, step_tokens: int, sequences: int) -> int:
    """Largest working memory of a step: residual, normed input, the widest product with its
    result, and float32 logits with their copy for sampling."""
    per_token = 4 * (3 * config.hidden + 2 * widest)
    logits = 2 * 4 * config.vocab_size * min(sequences, step_tokens)
    return per_token * step_tokens + logits
