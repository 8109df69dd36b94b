"""The choice of compressed entries against the reference: exact, of equal scores the earliest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from quire.kernels.compressed import Paged, StepTokens
from quire.kernels.reference.compressed.entries import Entries, PackedIndex, Plain
from quire.kernels.triton.compressed.select_entries import Sizes, scratch_of, select_entries
from tests.kernels.triton.compressed_inputs import REFERENCE
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.sparse_inputs import last_tokens, on_cpu, paged, paged_on_cpu

pytestmark = pytest.mark.triton

RATIO, PER_BLOCK = 4, 8
SMALL = Sizes(tokens=4, programs=1, tile=16, listed=32)


def quarters(*shape: int, seed: int) -> torch.Tensor:
    """Multiples of 1/4, of which sums of products are exact in every order and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, shape, generator=generator) / 4


class Step:
    """Tokens with queries and weights, and keys of their requests, whose products are exact."""

    def __init__(
        self,
        counts: Sequence[int],
        contexts: Sequence[int],
        device: torch.device,
        heads: int = 3,
        entries: Entries | None = None,
        dtype: torch.dtype = torch.bfloat16,
        padding: int = 0,
    ):
        entries = Plain(16) if entries is None else entries
        kept = torch.uint8 if isinstance(entries, PackedIndex) else dtype
        keys = [quarters(c // RATIO, entries.size, seed=i) for i, c in enumerate(contexts)]
        self.tokens = last_tokens(counts, contexts, padding, device)
        self.keys = paged([c // RATIO for c in contexts], entries, PER_BLOCK, kept, device, 1, keys)
        total = sum(counts) + padding
        self.queries = torch.full((total, heads, entries.size), torch.nan)
        self.weights = torch.full((total, heads), torch.nan)
        real = sum(counts)
        self.queries[:real] = quarters(real, heads, entries.size, seed=98)
        self.weights[:real] = quarters(real, heads, seed=99)
        self.queries, self.weights = (x.to(device, dtype) for x in (self.queries, self.weights))

    def found(self, count: int, sizes: Sizes = SMALL, room: int = 3) -> torch.Tensor:
        """With scratch for `room` tokens at a time."""
        longest = self.keys.block_tables.shape[1] * PER_BLOCK
        scratch = torch.full((room * scratch_of(longest, count, sizes) + 3,), torch.nan)
        return select_entries(
            self.queries, self.weights, self.tokens, self.keys, RATIO, count,
            scratch=scratch.to(self.queries.device), sizes=sizes,
        ).cpu()  # fmt: skip

    def expected(self, count: int) -> torch.Tensor:
        real = int(self.tokens.query_start[-1])
        tokens = on_cpu(self.tokens)
        tokens = StepTokens(
            tokens.positions[:real], tokens.rows[:real], tokens.query_start, tokens.context_len,
            tokens.state_slots,
        )  # fmt: skip
        return REFERENCE.select_entries(
            self.queries[:real].cpu().float(), self.weights[:real].cpu().float(), tokens,
            paged_on_cpu(self.keys), RATIO, count,
        )  # fmt: skip

    def check(self, count: int, sizes: Sizes = SMALL, room: int = 3) -> None:
        found, expected = self.found(count, sizes, room), self.expected(count)
        real, wide = expected.shape
        assert found.dtype == torch.int32
        assert found[:real, :wide].tolist() == expected.tolist()
        assert (found[:real, wide:] == -1).all()
        assert (found[real:] == -1).all()


@pytest.mark.parametrize("count", [1, 16])
def test_decode_and_mixed_steps_choose_as_the_reference(count: int, device: torch.device) -> None:
    """Contexts without entries, within one tile of the choice, and over several."""
    Step([1] * 5, [1, 3, 4, 63, 290], device).check(count)
    Step([1, 3, 0, 7], [1, 40, 17, 130], device, padding=3).check(count)


@pytest.mark.parametrize(
    ("entries", "dtype", "heads"),
    [
        (PackedIndex(16), torch.bfloat16, 20),
        (Plain(12), torch.float32, 2),
        (PackedIndex(8), torch.float32, 1),
        pytest.param(PackedIndex(128), torch.bfloat16, 64, marks=FULL),
        pytest.param(Plain(128), torch.float16, 64, marks=FULL),
    ],
    ids=str,
)
def test_all_forms_of_keys_choose_as_the_reference(
    entries: Entries, dtype: torch.dtype, heads: int, device: torch.device
) -> None:
    Step([1, 4], [33, 90], device, heads, entries, dtype, padding=1).check(8)


def test_the_sizes_it_runs_with_choose_as_the_reference(device: torch.device) -> None:
    Step([1, 2], [90, 150], device).check(8, Sizes(), room=1)


def test_a_list_that_is_too_short_changes_nothing(device: torch.device) -> None:
    step = Step([1, 1], [190, 290], device)
    step.check(12, Sizes(tokens=2, programs=1, tile=16, listed=4))
    step.check(12, Sizes(tokens=2, programs=1, tile=16, listed=256))


def test_of_equal_scores_the_earliest_count(device: torch.device) -> None:
    for context in (50, 190):  # within a tile, and too many for the list
        step = Step([1], [context], device)
        step.queries.zero_()
        assert step.found(7).tolist() == [list(range(7))]


def test_scores_that_are_nan_or_infinite_choose_what_exists(device: torch.device) -> None:
    step = Step([1, 1, 1, 1], [50, 150, 150, 150], device)
    alone = step.found(7)[3]
    step.weights[0], step.weights[1] = torch.nan, torch.nan
    step.weights[2] = torch.inf
    step.keys.memory[step.keys.block_tables[1, 2] * PER_BLOCK] = torch.nan
    found = step.found(7)
    assert torch.equal(found[3], alone)
    for row, entries in zip(found[:3].tolist(), (12, 37, 37), strict=True):
        assert len(set(row)) == 7 and row == sorted(row) and row[0] >= 0 and row[-1] < entries


def test_a_token_chooses_alike_alone_in_chunks_and_among_others(device: torch.device) -> None:
    """Scores with rounding, so that other bits would choose otherwise now and then."""
    whole = Step([22], [120], device)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(whole.queries.shape, generator=generator)
    whole.queries.copy_(noise)
    expected = whole.found(6, room=50)
    for first, end in ((0, 1), (1, 15), (15, 21), (21, 22)):
        part = Step([end - first, 2], [98 + end, 60], device)
        part.queries[: end - first] = whole.queries[first:end]
        part.weights[: end - first] = whole.weights[first:end]
        part.keys = _with_first(whole.keys, part.keys)
        found = part.found(6, room=2)[: end - first]
        assert found.tolist() == expected[first:end].tolist()


def _with_first(one: Paged, two: Paged) -> Paged:
    """A cache whose first request is that of `one`, and the second that of `two`."""
    offset = len(two.memory) // PER_BLOCK
    tables = two.block_tables.clone()
    wide = min(tables.shape[1], one.block_tables.shape[1])
    tables[0] = 2**30
    tables[0, :wide] = torch.where(
        one.block_tables[0, :wide] < 2**30, one.block_tables[0, :wide] + offset, 2**30
    )
    return Paged(torch.cat([two.memory, one.memory]), one.entries, tables, PER_BLOCK)


def test_nothing_to_do_is_no_launch(device: torch.device) -> None:
    step = Step([], [], device)
    assert step.found(5).shape[0] == 0
    step = Step([1], [3], device)  # no entry yet
    assert (step.found(5) == -1).all()


def test_what_does_not_fit_is_an_error(device: torch.device) -> None:
    step = Step([1, 1], [40, 90], device)
    given = {
        "queries_THD": step.queries, "weights_TH": step.weights, "tokens": step.tokens,
        "keys": step.keys, "ratio": RATIO, "count": 5,
        "scratch": torch.empty(1000, device=device),
    }  # fmt: skip
    select_entries(**given)  # type: ignore[arg-type]
    for change, message in (
        ({"queries_THD": step.queries.transpose(1, 2)}, "queries"),
        ({"queries_THD": step.queries[:, :, :8].contiguous()}, "keys"),
        ({"queries_THD": step.queries.half()}, "keys"),
        ({"weights_TH": step.weights[:1]}, "weights"),
        ({"scratch": torch.empty(8, device=device)}, "scratch"),
    ):
        with pytest.raises(ValueError, match=message):
            select_entries(**{**given, **change})  # type: ignore[arg-type]
