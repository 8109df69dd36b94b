"""The vectors of one layer in a cache, in the form that they are stored in."""

from __future__ import annotations

import torch

from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys, Plain
from quire.kv import BLOCK_SIZE
from quire.layers.build import Build, CacheLayer, Reads
from quire.models.deepseek_v4.config import Config, Layer


class Stored:
    """One tensor of a layer's cache: `entries` say how vectors lie in it, `per_block` of them in a
    block."""

    def __init__(self, cache: CacheLayer, tensor: int, entries: Entries, per_block: int):
        self.cache, self.tensor, self.entries, self.per_block = cache, tensor, entries, per_block

    @property
    def memory(self) -> torch.Tensor:
        """[slots, width]."""
        return self.cache.tensors[self.tensor].view(-1, self.entries.width)


def window(config: Config, build: Build) -> Stored:
    """The cache of a layer's window; with what is computed again after a prefix hit."""
    keys = _keys(config, build)
    page = ((BLOCK_SIZE, keys.width),)
    reads = (_reads(config, keys, config.window),)
    cache = _add(config, build, page, config.window + config.overlap, BLOCK_SIZE, reads)
    return Stored(cache, 0, keys, BLOCK_SIZE)


def compressed(config: Config, build: Build, layer: Layer) -> list[Stored]:
    """The cache of a layer's compressed entries: keys, and index keys where it chooses."""
    kinds = [_keys(config, build)]
    reads = [_reads(config, kinds[0], config.index_topk if layer.sparse else None, layer.ratio)]
    if layer.sparse:
        packed = build.kv_dtype == "fp8"
        kinds.append(PackedIndex(config.index_size) if packed else Plain(config.index_size))
        operations = 2 * config.index_heads * config.index_size
        reads.append(Reads(kinds[1].width, operations, None, layer.ratio))
    count = config.block_tokens // layer.ratio
    page = tuple((count, kind.width) for kind in kinds)
    cache = _add(config, build, page, None, config.block_tokens, tuple(reads))
    return [Stored(cache, i, kind, count) for i, kind in enumerate(kinds)]


def _reads(config: Config, keys: Entries, most: int | None, ratio: int = 1) -> Reads:
    return Reads(keys.width, 4 * config.heads * config.head_size, most, ratio)


def _keys(config: Config, build: Build) -> Entries:
    build.packs_fp8 = True
    if build.kv_dtype == "fp8":
        return PackedKeys(config.head_size, config.rotary_size)
    return Plain(config.head_size)


def _add(
    config: Config,
    build: Build,
    page: tuple[tuple[int, ...], ...],
    window: int | None,
    block_size: int,
    reads: tuple[Reads, ...],
) -> CacheLayer:
    size = config.head_size
    return build.add_cache(
        page, window, heads=config.heads, kv_heads=1, key_size=size, value_size=size,
        block_size=block_size, by_kernels=False, reads=reads,
    )  # fmt: skip
