"""Prompt lookup against a search through all tokens, and that its time does not grow with them."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.speculative import ngram
from quire.speculative.ngram import NgramDrafter


def searched(tokens: list[int], least: int, most: int, count: int) -> list[int]:
    """The longest n-gram that ends the tokens and comes before, at its latest place."""
    for size in range(most, least - 1, -1):
        if size >= len(tokens):
            continue
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                known = list(tokens)
                for i in range(count):
                    known.append(known[place + i])
                return known[len(tokens) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    grows=st.lists(st.integers(1, 9), max_size=20),
    least=st.integers(1, 3),
    more=st.integers(0, 3),
    count=st.integers(1, 8),
)
def test_it_finds_what_a_search_through_all_tokens_finds(
    tokens: list[int], grows: list[int], least: int, more: int, count: int
) -> None:
    drafter = NgramDrafter(least, least + more)
    end = 1
    for grown in [*grows, 60]:
        known = tokens[:end]
        assert drafter.propose(list(known), count) == searched(known, least, least + more, count)
        end = min(end + grown, len(tokens))


def test_the_longest_match_decides_and_of_equals_the_latest() -> None:
    assert NgramDrafter(1, 2).propose([1, 2, 7, 5, 2, 8, 1, 2], 1) == [7]
    assert NgramDrafter(1, 1).propose([1, 2, 7, 5, 2, 8, 1, 2], 1) == [8]
    assert NgramDrafter(2, 2).propose([1, 2, 7, 1, 2, 8, 1, 2], 3) == [8, 1, 2]
    assert NgramDrafter(3, 3).propose([1, 2, 7, 5], 2) == []


def test_what_repeats_itself_goes_on_behind_the_last_token() -> None:
    assert NgramDrafter(1, 1).propose([4, 4], 3) == [4, 4, 4]
    assert NgramDrafter(2, 2).propose([1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_tokens_of_equal_hash_are_told_apart() -> None:
    assert hash((-1,)) == hash((-2,))
    assert NgramDrafter(1, 1).propose([-1, 5, -2], 1) == []


def test_a_proposal_takes_time_by_the_ngram_and_not_by_the_context() -> None:
    numbers = random.Random(0)

    def seconds(length: int) -> float:
        tokens = [numbers.randrange(1000) for _ in range(length)]
        drafter = NgramDrafter(2, 5)
        while drafter._indexed < length - 1:
            drafter.propose(tokens, 4)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(50):
                tokens.append(numbers.randrange(1000))
                drafter.propose(tokens, 4)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(200_000) < 5 * seconds(2_000) + 1e-3


def test_a_long_prompt_is_indexed_over_several_calls() -> None:
    tokens = list(range(3 * ngram.MOST_INDEXED))
    tokens += tokens[10:12]
    drafter, calls = NgramDrafter(2, 2), 0
    while drafter._indexed < len(tokens) - 1:
        before = drafter._indexed
        assert drafter.propose(tokens, 2) == [12, 13], "the beginning is known at once"
        assert drafter._indexed - before <= ngram.MOST_INDEXED
        calls += 1
    assert calls == 4
