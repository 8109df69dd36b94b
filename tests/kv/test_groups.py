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
