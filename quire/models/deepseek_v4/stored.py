"""The vectors of one layer in a cache, in the form that they are stored in."""

from __future__ import annotations

import torch

from quire.kernels.reference.compressed.entries import Entries, PackedIndex, PackedKeys, Plain
from quire.kv import BLOCK_SIZE
from quire.layers.build import Build, CacheLayer
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
    cache = _add(config, build, page, config.window + config.overlap, BLOCK_SIZE)
    return Stored(cache, 0, keys, BLOCK_SIZE)


def compressed(config: Config, build: Build, layer: Layer) -> list[Stored]:
    """The cache of a layer's compressed entries: keys, and index keys where it chooses."""
    kinds = [_keys(config, build)]
    if layer.sparse:
        packed = build.kv_dtype == "fp8"
        kinds.append(PackedIndex(config.index_size) if packed else Plain(config.index_size))
    count = config.block_tokens // layer.ratio
    page = tuple((count, kind.width) for kind in kinds)
    cache = _add(config, build, page, None, config.block_tokens)
    return [Stored(cache, i, kind, count) for i, kind in enumerate(kinds)]


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
) -> CacheLayer:
    size = config.head_size
    return build.add_cache(
        page, window, heads=config.heads, kv_heads=1, key_size=size, value_size=size,
        block_size=block_size, by_kernels=False,
    )  # fmt: skip
