"""Memory arithmetic by hand."""

import pytest
from models.test_deepseek_v3 import PUBLISHED

from quire.kernels.reference import ops
from quire.kernels.reference.ops import cache_page
from quire.kv.groups import KVGroup
from quire.layers.build import Build, CacheLayer
from quire.models.registry import build_model
from quire.plan import memory


def caches(*layers: tuple[int | None, int, int]) -> list[CacheLayer]:
    return [
        CacheLayer(i, cache_page(heads, size), window, heads, heads, size, size)
        for i, (window, heads, size) in enumerate(layers)
    ]


def test_a_page_is_a_block_of_keys_and_values_in_all_layers_of_the_group() -> None:
    [group] = memory.kv_groups(caches((None, 3, 64), (None, 3, 64)), itemsize=2)
    assert group.page_bytes == 2 * (2 * 3 * 64 * 16) * 2
    assert group.layers == (0, 1)


def test_windows_make_groups_and_as_many_equal_layers_share_a_pool() -> None:
    even = memory.kv_groups(caches((8, 2, 16), (None, 2, 16)), 4)
    assert [(g.window, g.layers, g.pool) for g in even] == [(8, (0,), 0), (None, (1,), 0)]
    uneven = memory.kv_groups(caches((8, 2, 16), (8, 2, 16), (None, 2, 16)), 4)
    assert [(g.window, g.layers, g.pool) for g in uneven] == [(8, (0, 1), 0), (None, (2,), 1)]
    # Pages of equal size but another shape cannot lie in the same tensors.
    shapes = memory.kv_groups(caches((8, 2, 16), (None, 1, 32)), 4)
    assert [g.pool for g in shapes] == [0, 1]


def test_deepseek_v3_keeps_one_latent_per_token_and_layer() -> None:
    build = Build(ops)
    build_model(PUBLISHED, build)
    [group] = memory.kv_groups(build.caches, itemsize=2)
    assert group.page_bytes == 16 * 61 * 1152  # (512 + 64) * 2 bytes
    assert memory.bytes_for_tokens([group], 163840, 8192, 1) == (10240 + 2) * group.page_bytes


def test_a_layer_of_one_tensor_counts_it_alone() -> None:
    latent = CacheLayer(
        0, ((1, 16, 576),), None, heads=128, kv_heads=1, key_size=576, value_size=512
    )
    [group] = memory.kv_groups([latent], itemsize=2)
    assert group.page_bytes == 16 * 1152


FULL = KVGroup(0, None, (0,), page_bytes=1000, pool=0)
WINDOW = KVGroup(1, 40, (1,), page_bytes=1000, pool=0)
APART = KVGroup(1, 40, (1,), page_bytes=700, pool=1)


def test_blocks_and_bytes_of_one_pool_and_of_two() -> None:
    # 100 tokens are 7 blocks, and each of 3 requests may leave one partly filled: 10.
    assert memory.pool_blocks([FULL], 100, 8, 3) == (1 + 10,)
    # A window of 40 with steps of 8: 3 blocks and one that begins within; 3 requests.
    assert memory.window_peak(WINDOW, 8) == 4
    assert memory.pool_blocks([FULL, WINDOW], 10_000, 8, 3) == (1 + 628 + 12,)
    assert memory.pool_blocks([FULL, APART], 10_000, 8, 3) == (1 + 628, 1 + 12)
    assert memory.bytes_for_tokens([FULL, WINDOW], 10_000, 8, 3) == 641 * 1000
    assert memory.bytes_for_tokens([FULL, APART], 10_000, 8, 3) == 629 * 1000 + 13 * 700
    # A short text does not need the whole window.
    assert memory.pool_blocks([FULL, APART], 16, 8, 1) == (1 + 2, 1 + 2)


@pytest.mark.parametrize("groups", [[FULL], [FULL, WINDOW], [FULL, APART], [WINDOW]])
@pytest.mark.parametrize("size", [0, 5_000, 50_000, 123_456, 10**6])
def test_what_fits_fits_and_a_block_more_does_not(groups: list[KVGroup], size: int) -> None:
    groups = [KVGroup(i, g.window, g.layers, g.page_bytes, g.pool) for i, g in enumerate(groups)]
    tokens = memory.tokens_that_fit(groups, size, 8, 3)
    assert tokens % 16 == 0
    if tokens:
        assert memory.bytes_for_tokens(groups, tokens, 8, 3) <= size
    if any(g.window is None for g in groups):
        assert memory.bytes_for_tokens(groups, tokens + 16, 8, 3) > size


def test_working_memory_counts_layers_or_logits_whichever_is_more() -> None:
    class Config:
        vocab_size, hidden, max_len = 1000, 64, 128

    wide = memory.activation_bytes(Config(), 300, step_tokens=512, sequences=8)
    assert wide == 4 * (3 * 64 + 300) * 512
    # One token per step: one row of logits, and the vectors that sampling takes.
    assert memory.activation_bytes(Config(), 0, 1, 8) == 4 * (64 + 1000 * (1 + 16))
    # Prompt log-probabilities take 64 rows at a time, even for one request.
    assert memory.activation_bytes(Config(), 0, 512, 1) == 4 * max(
        3 * 64 * 512, 64 * 512 + 1000 * (64 + 16)
    )
