"""Attention over latents against the reference, and bit for bit against itself in deterministic
mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from quire.kernels.reference.attention.latent_attention import latent_attention as reference
from quire.kernels.triton.attention.latent_attention import latent_attention
from quire.kernels.triton.attention.scratch import Scratch
from quire.kernels.triton.attention.tiles import Target, head_tiles
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.paged_inputs import TOLERANCE, PagedRequests


@dataclass(frozen=True)
class Shape:
    heads: int
    rank: int
    rest: int
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None

    @property
    def width(self) -> int:
        return self.rank + self.rest


SMALL = Shape(2, 16, 16)
SHAPES = [
    SMALL,
    Shape(5, 24, 8, dtype=torch.float32, cache=torch.bfloat16),
    *(
        pytest.param(shape, marks=FULL)
        for shape in (
            Shape(128, 32, 16),
            Shape(40, 512, 64),
            Shape(16, 128, 32, dtype=torch.float16),
            Shape(7, 16, 16, dtype=torch.float32),
        )
    ),
]


class Requests(PagedRequests):
    """Latents of requests in one cache."""

    def __init__(self, shape: Shape, contexts: Sequence[int], device: torch.device):
        self.shape, kept = shape, shape.cache or shape.dtype
        super().__init__(
            contexts, shape.heads * shape.width, shape.dtype, 1, shape.width, kept, device
        )

    def scratch(self, deterministic: bool, total_tokens: int | None = None) -> Scratch:
        shape = self.shape
        found = Scratch.allocate(
            len(self.contexts) + 1, shape.heads, 1, shape.width, shape.rank,
            total_tokens=sum(self.contexts) if total_tokens is None else total_tokens,
            dtype=shape.dtype, deterministic=deterministic, device=self.device,
        )  # fmt: skip
        found.values.fill_(torch.nan)
        found.sums.fill_(torch.nan)
        found.marks.fill_(-(2**30))
        return found

    def step(
        self,
        counts: Sequence[int],
        contexts: Sequence[int] | None = None,
        *,
        decode: bool = False,
        deterministic: bool = False,
        padding: int = 0,
        scratch: Scratch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(kernel's, reference's) results of the last counts[i] queries of request i when it has
        contexts[i] tokens; then `padding` rows of NaN."""
        shape = self.shape
        contexts = self.contexts[: len(counts)] if contexts is None else contexts
        q, *others = self.inputs(counts, contexts, range(len(counts)), padding)
        arguments = (q, self.cache, *others, shape.width**-0.5, shape.rank)
        out = self.nowhere(len(q), shape.heads * shape.rank)
        same = latent_attention(
            *arguments, decode=decode, deterministic=deterministic, out=out,
            scratch=self.scratch(deterministic) if scratch is None else scratch,
        )  # fmt: skip
        assert same is out
        expected = reference(*arguments, decode=decode)
        return out[: sum(counts)], expected[: sum(counts)]

    def check(self, *args: object, **options: object) -> None:
        found, expected = self.step(*args, **options)  # type: ignore[arg-type]
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_and_mixed_steps_equal_the_reference(
    shape: Shape, deterministic: bool, device: torch.device
) -> None:
    """One query each; whole prompts, chunks, single queries, no queries, rows of padding."""
    requests = Requests(shape, [1, 100, 17, 16, 65], device)
    requests.check([1] * 5, decode=True, deterministic=deterministic)
    requests.check([1, 9, 1, 2, 0], deterministic=deterministic, padding=3)
    requests.check([1, 0, 17], deterministic=deterministic, padding=1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_work_is_split_over_programs_and_merged(deterministic: bool, device: torch.device) -> None:
    requests = Requests(Shape(20, 16, 8), [530, 5, 40], device)
    scratch = requests.scratch(deterministic)
    requests.check([1, 1, 1], decode=True, deterministic=deterministic, scratch=scratch)
    assert not scratch.values.isnan().all(), "nothing was split"


def test_decode_without_scratch_to_split_gives_the_same_bits(device: torch.device) -> None:
    requests = Requests(SMALL, [300, 140], device)
    whole, _ = requests.step([1, 1], decode=True, deterministic=True)
    little = requests.scratch(True, total_tokens=150)
    alone, _ = requests.step([1, 1], decode=True, deterministic=True, scratch=little)
    assert torch.equal(whole, alone)
    none = replace(little, values=little.values[:0], sums=little.sums[:0])
    for deterministic in (False, True):
        requests.check([1, 1], decode=True, deterministic=deterministic, scratch=none)


def test_more_requests_than_merge_head_by_head(device: torch.device) -> None:
    requests = Requests(Shape(6, 16, 8), [60 + b for b in range(10)], device)
    for deterministic in (False, True):
        requests.check([1] * 10, decode=True, deterministic=deterministic)


@pytest.mark.parametrize("shape", [SMALL, pytest.param(Shape(40, 64, 16), marks=FULL)], ids=str)
def test_deterministic_bits_do_not_depend_on_how_tokens_are_computed(
    shape: Shape, device: torch.device
) -> None:
    """A request's queries in one step, in chunks, one by one, alone and among others."""
    length = 70
    requests = Requests(shape, [length, 37, 90, 9], device)

    def bits(counts: Sequence[int], contexts: Sequence[int], **options: object) -> torch.Tensor:
        """The first request's results."""
        found, _ = requests.step(counts, contexts, deterministic=True, **options)  # type: ignore[arg-type]
        return found[: counts[0]].clone()

    whole = bits([length], [length])
    chunks = [bits([n], [end]) for n, end in ((1, 1), (30, 31), (33, 64), (2, 66), (4, 70))]
    assert torch.equal(torch.cat(chunks), whole)
    assert torch.equal(bits([length, 1, 20, 9], [length, 37, 90, 9], padding=2), whole)
    for position in (0, 1, 63, 64, length - 1):
        row = whole[position : position + 1]
        assert torch.equal(bits([1], [position + 1], decode=True), row)
    last = whole[-1:]
    assert torch.equal(bits([1, 1, 1, 1], [length, 37, 90, 9], decode=True), last)
    assert torch.equal(bits([1, 5, 20, 1], [length, 37, 90, 9]), last)


def test_padded_requests_are_skipped(device: torch.device) -> None:
    """Context 0 in decoding: the row's query is NaN, and so is its block 0."""
    requests = Requests(SMALL, [40, 5, 20], device)
    contexts = torch.tensor([0, 5, 0], dtype=torch.int32, device=device)
    q = torch.stack([requests.queries[b][4] for b in range(3)])
    q[::2] = torch.nan
    arguments = (
        q, requests.cache, torch.where(contexts[:, None] > 0, requests.tables, 0),
        torch.arange(4, dtype=torch.int32, device=device), contexts, 0.25, 16,
    )  # fmt: skip
    expected = reference(*arguments, decode=True)
    for deterministic in (False, True):
        out = torch.zeros_like(expected)
        latent_attention(
            *arguments, decode=True, deterministic=deterministic, out=out,
            scratch=requests.scratch(deterministic),
        )  # fmt: skip
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


def test_heads_are_cut_into_equal_tiles() -> None:
    hopper, other = Target(232448, wgmma=True), Target(166912)
    for heads, of_hopper, of_other in (
        (128, 2, 8),
        (16, 1, 1),
        (64, 1, 4),
        (40, 1, 4),
        (67, 67, 67),
    ):
        assert head_tiles(heads, hopper, False) == of_hopper
        assert head_tiles(heads, hopper, True) == head_tiles(heads, other, True) == of_other


@pytest.mark.parametrize("deterministic", [False, True])
def test_scratch_is_as_large_as_it_says(deterministic: bool, device: torch.device) -> None:
    sizes = {"total_tokens": 5000, "dtype": torch.bfloat16, "deterministic": deterministic}
    scratch = Scratch.allocate(7, 32, 1, 72, 64, **sizes, device=device)  # type: ignore[arg-type]
    taken = sum(t.nbytes for t in (scratch.values, scratch.sums, scratch.arrived, scratch.marks))
    assert taken == Scratch.nbytes(7, 32, 1, 72, 64, **sizes, device=device)  # type: ignore[arg-type]


def test_nothing_to_do_is_no_launch(device: torch.device) -> None:
    requests = Requests(SMALL, [20], device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    found = latent_attention(
        requests.queries[0][:0], requests.cache, requests.tables[:0],
        torch.zeros(1, dtype=torch.int32, device=device), none, 1.0, 16, decode=True,
        deterministic=False, scratch=requests.scratch(False),
    )  # fmt: skip
    assert found.shape == (0, 32)


def test_what_does_not_fit_is_an_error(device: torch.device) -> None:
    requests = Requests(SMALL, [20, 30], device)
    scratch = requests.scratch(False)
    given = {
        "q": torch.zeros(2, 64, dtype=torch.bfloat16, device=device), "cache": requests.cache,
        "block_tables": requests.tables,
        "query_start": torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        "context_len": torch.tensor([20, 30], dtype=torch.int32, device=device),
        "scale": 1.0, "rank": 16, "decode": True, "deterministic": False, "scratch": scratch,
    }  # fmt: skip
    q = given["q"]
    assert isinstance(q, torch.Tensor)
    latent_attention(**given)  # type: ignore[arg-type]
    for change, message in (
        ({"q": q[:, :60]}, "q"),
        ({"q": q.half()}, "cache"),
        ({"cache": requests.cache[:, :, :8]}, "cache"),
        ({"rank": 32}, "cache"),
        ({"block_tables": requests.tables[:1]}, "block_tables"),
        ({"q": q[:1]}, "decode"),
        ({"scale": 0.0}, "scale"),
        ({"scratch": replace(scratch, marks=scratch.marks[:2])}, "scratch"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_attention(**{**given, **change})  # type: ignore[arg-type]
