"""A group of one does nothing; shares are equal and in rank order."""

import pytest
import torch

from quire.comm.group import Group
from quire.errors import PlanError


def test_one_rank_needs_no_set_up_and_changes_nothing() -> None:
    group, x = Group(), torch.randn(3, 4)
    assert group.all_reduce(x) is x
    assert group.all_gather_columns(x) is x
    assert group.shard(7, "things") == slice(0, 7)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_cover_everything_once(size: int) -> None:
    items = list(range(8))
    shares = [items[Group(rank, size).shard(8, "items")] for rank in range(size)]
    assert [i for share in shares for i in share] == items
    assert len({len(share) for share in shares}) == 1


def test_what_cannot_be_shared_equally_is_an_error_that_names_it() -> None:
    with pytest.raises(PlanError, match=r"KV heads.*3.*2 ranks"):
        Group(0, 2).shard(3, "KV heads")
