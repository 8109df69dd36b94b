"""Which drafts stand, by hand."""

from __future__ import annotations

import pytest

from quire.speculative.verify import verify
from quire.step import FORBIDDEN_ERROR, NAN_ERROR, RowResult, TokenLogprobs


def target(tokens: list[int], fails_at: int = -1, asked: list[int] | None = None):
    """Chooses these tokens one after the other."""

    def sample(i: int) -> RowResult:
        if asked is not None:
            asked.append(i)
        if i == fails_at:
            return RowResult([], error=NAN_ERROR)
        return RowResult([tokens[i]], [TokenLogprobs([tokens[i]], [-float(i)], [1])])

    return sample


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([], [5]),
        ([5], [5, 6]),
        ([4], [5]),
        ([5, 6, 7], [5, 6, 7, 8]),
        ([5, 9, 7], [5, 6]),
        ([9, 6, 7], [5]),
    ],
)
def test_one_token_more_than_drafts_that_equal_the_targets_choices(
    drafts: list[int], expected: list[int]
) -> None:
    asked: list[int] = []
    got = verify(drafts, target([5, 6, 7, 8], asked=asked))
    assert got.tokens == expected
    assert got.logprobs is not None
    assert [p.tokens[0] for p in got.logprobs] == expected
    assert asked == list(range(len(expected))), "nothing is sampled behind a refused draft"


def test_an_error_fails_the_row_only_where_no_draft_is_before_it() -> None:
    assert verify([5, 6], target([5, 6, 7], fails_at=0)).error == NAN_ERROR
    got = verify([5, 6], target([5, 6, 7], fails_at=1))
    assert (got.tokens, got.error) == ([5], None)
    assert verify([1], lambda i: RowResult([], error=FORBIDDEN_ERROR)).error == FORBIDDEN_ERROR
