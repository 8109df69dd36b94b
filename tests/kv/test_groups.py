"""Group arithmetic against counting blocks position by position."""

import pytest

from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup

WINDOWS = [None, 1, 2, 15, 16, 17, 31, 32, 33, 100]


def group(window: int | None) -> KVGroup:
    return KVGroup(index=0, window=window, layers=(0,), page_bytes=1)


@pytest.mark.parametrize("window", WINDOWS)
def test_first_needed_is_the_block_of_the_first_position_read(window: int | None) -> None:
    for position in range(200):
        read = [k for k in range(position + 1) if window is None or position - k < window]
        assert group(window).first_needed(position) == read[0] // BLOCK_SIZE


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("step_tokens", [1, 2, 15, 16, 17, 64])
def test_peak_blocks_bounds_every_step_and_wastes_at_most_one_block(
    window: int | None, step_tokens: int
) -> None:
    kv = group(window)
    for tokens in (1, 16, 17, 40, 64, 150):
        most = 0
        for start in range(tokens):
            end = min(tokens, start + step_tokens)
            most = max(most, -(-end // BLOCK_SIZE) - kv.first_needed(start))
        assert most <= kv.peak_blocks(tokens, step_tokens) <= most + 1


def test_peak_by_hand() -> None:
    assert group(None).peak_blocks(33, 1) == 3
    # Window 32 at position 47 reads 16..47; computing two tokens from there touches block 3 too.
    assert group(32).peak_blocks(1000, 2) == 4
    assert group(32).peak_blocks(20, 2) == 2


def test_blocks_may_have_more_tokens() -> None:
    pages = KVGroup(index=0, window=None, layers=(0,), page_bytes=1, block_size=128)
    assert [pages.blocks_of(n) for n in (0, 1, 128, 129)] == [0, 1, 1, 2]
    assert pages.peak_blocks(300, 1000) == 3
    assert pages.first_needed(10**6) == 0


def test_a_window_is_kept_before_checkpoints_and_the_end_of_the_prompt() -> None:
    group = KVGroup(index=0, window=20, layers=(0,), page_bytes=1, checkpoint=64)
    # A query at 64 reads positions 45 to 63 of others, one at 112 from 93, one at 128 from 109.
    assert [i for i in range(10) if group.keeps(i, 112)] == [2, 3, 5, 6, 7]
    assert [i for i in range(10) if group.keeps(i, 0)] == [2, 3, 6, 7]
