"""latent_cache and latent_attention against their torch references, and bit-invariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

native = pytest.importorskip("quire.kernels.native._native", reason="the extension is not built")
from quire.kernels.native import ops  # noqa: E402
from quire.kernels.reference import ops as reference  # noqa: E402

BLOCK = ops.BLOCK


@dataclass
class Case:
    """Sequences of (queries, context): a cache full of NaN but for what the sequences hold."""

    lengths: list[tuple[int, int]]
    heads: int = 5
    rank: int = 72
    rotary: int = 24
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        width = self.rank + self.rotary
        needed = [-(-context // BLOCK) for _, context in self.lengths]
        total = sum(needed) + 3
        self.cache = torch.full((total, 1, BLOCK, width), torch.nan, dtype=self.dtype)
        self.tables = torch.full((len(needed), max(needed) + 2), -1, dtype=torch.int32)
        free = torch.randperm(total).tolist()
        for b, (_, context) in enumerate(self.lengths):
            for i in range(needed[b]):
                block, used = free.pop(), min(BLOCK, context - i * BLOCK)
                self.cache[block, 0, :used] = torch.randn(used, width).to(self.dtype)
                self.tables[b, i] = block
        self.starts = torch.tensor([0, *(n for n, _ in self.lengths)]).cumsum(0).int()
        self.contexts = torch.tensor([c for _, c in self.lengths], dtype=torch.int32)
        self.q = torch.randn(int(self.starts[-1]), self.heads * width)

    def run(self, kernels: Any, **given: Any) -> torch.Tensor:
        found: torch.Tensor = kernels.latent_attention(
            self.q, self.cache, self.tables, self.starts, self.contexts, 0.1, self.rank, **given
        )
        return found

    def chunk(self, sequence: int, first: int, last: int) -> torch.Tensor:
        """Queries first..last-1 of one sequence, as a step of its own."""
        queries, context = self.lengths[sequence]
        row = int(self.starts[sequence])
        return ops.latent_attention(
            self.q[row + first : row + last].contiguous(), self.cache,
            self.tables[sequence : sequence + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([context - queries + last], dtype=torch.int32), 0.1, self.rank,
        )  # fmt: skip


SEQUENCES = [[(1, 1)], [(5, 5), (1, 40), (17, 33), (0, 9), (64, 64)], [(1, 700)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", SEQUENCES, ids=str)
def test_attention_matches_the_reference_with_nan_in_all_other_memory(
    isa: str, lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    case = Case(lengths, dtype=dtype)
    out = torch.full((len(case.q), case.heads * case.rank), torch.nan)
    assert case.run(ops, out=out) is out
    torch.testing.assert_close(out, case.run(reference), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "rank", "rotary"), [(1, 1, 2), (17, 512, 64), (4, 40, 6)])
def test_attention_matches_the_reference_for_other_shapes(
    isa: str, heads: int, rank: int, rotary: int
) -> None:
    case = Case([(3, 50), (1, 17)], heads, rank, rotary)
    torch.testing.assert_close(case.run(ops), case.run(reference), atol=2e-5, rtol=1e-4)


def test_attention_bits_do_not_depend_on_chunks_batch_or_threads(isa: str) -> None:
    case = Case([(70, 70), (3, 600), (1, 33)], heads=18)
    expected = case.run(ops)
    threads = ops.num_threads()
    ops.set_num_threads(2)
    assert torch.equal(case.run(ops), expected)
    ops.set_num_threads(threads)
    for sequence, (queries, _) in enumerate(case.lengths):
        row = int(case.starts[sequence])
        for first in range(0, queries, 23):
            last = min(first + 23, queries)
            assert torch.equal(
                case.chunk(sequence, first, last), expected[row + first : row + last]
            )
        alone = case.chunk(sequence, queries - 1, queries)
        assert torch.equal(alone, expected[row + queries - 1 : row + queries])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_normed_rotated_and_written(
    isa: str, dtype: torch.dtype, interleaved: bool
) -> None:
    heads, nope, rank, rotary, tokens = 3, 10, 20, 12, 9
    q = torch.randn(tokens, heads * (nope + rotary))
    latents = torch.randn(tokens, 7 + rank + rotary)[:, 7:]
    angles = torch.rand(40, rotary // 2)
    tables = torch.cat([angles.cos(), angles.sin()], dim=1)
    slots = torch.tensor([33, -1, 0, 17, 63, 62, -1, 5, 16])
    norm = torch.rand(rank) + 0.5
    found = []
    for kernels in (ops, reference):
        cache = torch.full((4, 1, BLOCK, rank + rotary), torch.nan, dtype=dtype)
        out = torch.full((tokens, heads * (rank + rotary)), torch.nan)
        kernels.latent_cache(
            q, latents, torch.arange(30, 30 + tokens), tables, norm, 1e-6, cache, slots,
            heads, interleaved, out,
        )  # fmt: skip
        found.append((out, cache.float()))
    (out, cache), (expected, expected_cache) = found
    assert int((~out.isnan()).sum()) == tokens * heads * rotary
    assert int((~cache.isnan()).sum()) == 7 * (rank + rotary)
    torch.testing.assert_close(out, expected, equal_nan=True)
    near = 1e-5 if dtype == torch.float32 else 1e-2  # one unit of bfloat16
    torch.testing.assert_close(cache, expected_cache, equal_nan=True, atol=near, rtol=near)


def test_what_does_not_fit_is_refused(isa: str) -> None:
    case = Case([(2, 20)])
    with pytest.raises(ValueError, match="cache"):
        ops.latent_attention(
            case.q, case.cache, case.tables, case.starts, case.contexts, 0.1, rank=96
        )
    with pytest.raises(ValueError, match="context_len"):
        ops.latent_attention(
            case.q, case.cache, case.tables, case.starts, case.contexts * 0 + 1, 0.1, case.rank
        )
    case.tables[0, 1] = 99
    with pytest.raises(ValueError, match="not a block"):
        case.run(ops)
