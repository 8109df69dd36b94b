"""Paged attention against the reference, and bit for bit against itself in deterministic mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from quire.kernels.reference.attention.fp8_cache import FP8_CACHE
from quire.kernels.reference.attention.paged_attention import paged_attention as reference
from quire.kernels.triton.attention.paged_attention import Scratch, paged_attention
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.paged_inputs import TOLERANCE, PagedRequests, Shape

PLAIN, ONE_HEAD = Shape(4, 2, 16), Shape(2, 1, 16)
EXTRAS = Shape(3, 1, 24, window=70, softcap=3.0, sinks=True)
CODES = replace(EXTRAS, cache=FP8_CACHE)
SHAPES = [
    PLAIN,
    EXTRAS,
    CODES,
    Shape(2, 1, 16, dtype=torch.float32, cache=torch.bfloat16),
    *(
        pytest.param(shape, marks=FULL)
        for shape in (
            Shape(4, 2, 16, dtype=torch.float32),
            Shape(34, 2, 16, window=1),
            Shape(3, 3, 64, sinks=True, dtype=torch.float16),
            Shape(2, 1, 80, softcap=2.0),
            Shape(4, 1, 128, window=130),
            Shape(2, 1, 256),
            Shape(8, 2, 128, cache=FP8_CACHE),
            Shape(2, 1, 16, dtype=torch.float32, cache=FP8_CACHE),
            Shape(3, 3, 64, sinks=True, dtype=torch.float16, cache=FP8_CACHE),
        )
    ),
]


class Requests(PagedRequests):
    """Keys and values of requests in one cache."""

    def __init__(self, shape: Shape, contexts: Sequence[int], device: torch.device, seed: int = 0):
        self.shape, kept = shape, shape.cache or shape.dtype
        sizes = shape.heads * shape.d, shape.dtype, 2 * shape.kv_heads, shape.d, kept
        super().__init__(contexts, *sizes, device, seed)
        self.sinks = torch.randn(shape.heads, generator=self.generator).to(device)
        self.k_cache, self.v_cache = self.cache.unflatten(1, (2, -1)).unbind(1)

    def scratch(self, deterministic: bool, total_tokens: int | None = None) -> Scratch:
        shape = self.shape
        found = Scratch.allocate(
            len(self.contexts) + 1, shape.heads, shape.kv_heads, shape.d,
            total_tokens=sum(self.contexts) if total_tokens is None else total_tokens,
            dtype=shape.dtype, deterministic=deterministic, device=self.device,
        )  # fmt: skip
        found.values.fill_(torch.nan)
        found.sums.fill_(torch.nan)
        return found

    def step(
        self,
        counts: Sequence[int],
        contexts: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
        decode: bool = False,
        deterministic: bool = False,
        padding: int = 0,
        scratch: Scratch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(kernel's, reference's) results of the last counts[i] queries of request rows[i] (the
        i-th where not given) when it has contexts[i] tokens; then `padding` rows of NaN."""
        shape = self.shape
        rows = range(len(counts)) if rows is None else rows
        contexts = [self.contexts[b] for b in rows] if contexts is None else contexts
        q, *others = self.inputs(counts, contexts, rows, padding)
        arguments = (
            q, self.k_cache, self.v_cache, *others, shape.d**-0.5, shape.window, shape.softcap,
            self.sinks if shape.sinks else None,
        )  # fmt: skip
        scratch = self.scratch(deterministic) if scratch is None else scratch
        out = self.nowhere(*q.shape)
        same = paged_attention(
            *arguments, decode=decode, deterministic=deterministic, scratch=scratch, out=out
        )
        assert same is out
        assert not scratch.arrived.any()
        expected = reference(*arguments, decode=decode, deterministic=deterministic)
        return out[: sum(counts)], expected[: sum(counts)]

    def check(self, *args: object, **options: object) -> None:
        found, expected = self.step(*args, **options)  # type: ignore[arg-type]
        tolerance = TOLERANCE[self.shape.dtype]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_the_reference(
    shape: Shape, deterministic: bool, device: torch.device
) -> None:
    requests = Requests(shape, [1, 200, 17, 16, 129], device)
    requests.check([1] * 5, decode=True, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_steps_equal_the_reference(
    shape: Shape, deterministic: bool, device: torch.device
) -> None:
    """Whole prompts, chunks, drafts of 2, single queries; no queries; rows of padding."""
    requests = Requests(shape, [19, 200, 150, 70, 1], device)
    requests.check([19, 9, 1, 2, 1], deterministic=deterministic, padding=3)
    requests.check([0, 3, 0, 1, 0], deterministic=deterministic, padding=1)


def test_codes_and_scales_mean_what_their_bytes_say(device: torch.device) -> None:
    """Against float64 from the bytes of blocks, without the reference's own reading of them."""
    size, context = 16, 90
    requests = Requests(Shape(2, 1, size, cache=FP8_CACHE), [context], device)
    found, _ = requests.step([context], padding=1)
    tokens = torch.arange(context)
    decoded = []
    for cache in (requests.k_cache, requests.v_cache):
        rows = cache[requests.tables[0, : -(-context // 16)]].cpu().contiguous().view(-1, 16 * 20)
        codes = rows[:, : 16 * size].contiguous().view(torch.float8_e4m3fn).double()
        scales = rows[:, 16 * size :].contiguous().view(torch.float32).double()
        values = codes.view(-1, 16, size) * scales[:, :, None]
        decoded.append(values.reshape(-1, size)[tokens])
    keys, values = decoded
    queries = requests.queries[0].cpu().double().view(context, 2, size)
    scores = torch.einsum("thd,kd->htk", queries, keys) * size**-0.5
    scores = scores.masked_fill(tokens[None, :] > tokens[:, None], -torch.inf)
    expected = torch.einsum("htk,kd->thd", scores.softmax(-1), values).flatten(1)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_work_is_split_over_programs_and_merged(deterministic: bool, device: torch.device) -> None:
    requests = Requests(ONE_HEAD, [1400, 5, 300], device)
    scratch = requests.scratch(deterministic)
    for _ in range(2):  # the second finds counters and scratch as the first left them
        requests.check([1, 1, 1], decode=True, deterministic=deterministic, scratch=scratch)
    assert not scratch.values.isnan().all(), "nothing was split"


def test_decode_without_scratch_to_split_gives_the_same_bits(device: torch.device) -> None:
    requests = Requests(ONE_HEAD, [600, 140], device)
    whole, _ = requests.step([1, 1], decode=True, deterministic=True)
    little = requests.scratch(True, total_tokens=300)
    alone, _ = requests.step([1, 1], decode=True, deterministic=True, scratch=little)
    assert torch.equal(whole, alone)
    for deterministic in (False, True):
        none = replace(little, values=little.values[:0], sums=little.sums[:0])
        requests.check([1, 1], decode=True, deterministic=deterministic, scratch=none)


@pytest.mark.parametrize("deterministic", [False, True])
def test_padded_requests_are_skipped(deterministic: bool, device: torch.device) -> None:
    requests = Requests(PLAIN, [40, 5, 20], device)
    for b in (0, 2):
        requests.queries[b] = torch.cat([requests.queries[b][:1] * torch.nan, requests.queries[b]])
    # Context 0 in decoding: the row's query is NaN, and so is its block 0.
    contexts = torch.tensor([0, 5, 0], dtype=torch.int32, device=device)
    start = torch.arange(4, dtype=torch.int32, device=device)
    q = torch.cat([requests.queries[0][:1], requests.queries[1][4:], requests.queries[2][:1]])
    arguments = (
        q, requests.k_cache, requests.v_cache,
        torch.where(contexts[:, None] > 0, requests.tables, 0), start, contexts, 0.25,
        None, None, None,
    )  # fmt: skip
    expected = reference(*arguments, decode=True, deterministic=deterministic)
    for decode in (True, False):
        out = torch.zeros_like(q)
        paged_attention(
            *arguments, decode=decode, deterministic=deterministic, out=out,
            scratch=requests.scratch(deterministic),
        )  # fmt: skip
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "shape",
    [
        ONE_HEAD,
        EXTRAS,
        replace(ONE_HEAD, cache=FP8_CACHE),
        *(
            pytest.param(shape, marks=FULL)
            for shape in (
                CODES,
                Shape(4, 1, 128, window=200, sinks=True),
                Shape(2, 2, 80, dtype=torch.float16),
                Shape(2, 1, 256),
                Shape(4, 2, 16, dtype=torch.float32),
            )
        ),
    ],
    ids=str,
)
def test_deterministic_bits_do_not_depend_on_how_tokens_are_computed(
    shape: Shape, device: torch.device
) -> None:
    """A request's queries in one step, in chunks, one by one, alone and among others."""
    length = 200
    requests = Requests(shape, [length, 77, 300, 9], device)

    def bits(counts: Sequence[int], contexts: Sequence[int], **options: object) -> torch.Tensor:
        """The first request's results."""
        found, _ = requests.step(counts, contexts, deterministic=True, **options)  # type: ignore[arg-type]
        return found[: counts[0]].clone()

    whole = bits([length], [length])
    chunks = [bits([n], [end]) for n, end in ((1, 1), (30, 31), (99, 130), (2, 132), (68, 200))]
    assert torch.equal(torch.cat(chunks), whole)
    mixed = bits([length, 1, 50, 9], [length, 77, 300, 9], padding=2)
    assert torch.equal(mixed, whole)
    for position in (0, 1, 127, 128, length - 1):
        row = whole[position : position + 1]
        assert torch.equal(bits([1], [position + 1], decode=True), row)
    last = whole[-1:]
    assert torch.equal(bits([1, 1, 1, 1], [length, 77, 300, 9], decode=True), last)
    assert torch.equal(bits([1, 5, 50, 1], [length, 77, 300, 9]), last)


def test_more_requests_than_are_searched_at_once(device: torch.device) -> None:
    counts = [0] * 260
    for b, count in ((0, 1), (7, 2), (254, 1), (255, 3), (256, 1), (257, 2), (259, 1)):
        counts[b] = count
    contexts = [min(1, n) * (20 + b % 50) for b, n in enumerate(counts)]
    requests = Requests(ONE_HEAD, contexts, device)
    requests.check(counts)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("context", [1, 64, 300])
def test_one_request_alone_equals_the_reference(
    context: int, deterministic: bool, device: torch.device
) -> None:
    for shape in (PLAIN, EXTRAS):
        requests = Requests(shape, [context], device)
        requests.check([1], decode=True, deterministic=deterministic)


def test_nothing_to_do_is_no_launch(device: torch.device) -> None:
    requests = Requests(PLAIN, [20], device)
    width = PLAIN.heads * PLAIN.d
    nothing = torch.empty(0, width, dtype=PLAIN.dtype, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    found = paged_attention(
        nothing, requests.k_cache, requests.v_cache, requests.tables[:0],
        torch.zeros(1, dtype=torch.int32, device=device), none, 1.0, None, None, None,
        decode=True, deterministic=False, scratch=requests.scratch(False),
    )  # fmt: skip
    assert found.shape == (0, width)


@pytest.mark.parametrize("deterministic", [False, True])
def test_scratch_is_as_large_as_it_says(deterministic: bool, device: torch.device) -> None:
    sizes = {"total_tokens": 5000, "dtype": torch.bfloat16, "deterministic": deterministic}
    scratch = Scratch.allocate(7, 8, 2, 64, **sizes, device=device)  # type: ignore[arg-type]
    taken = sum(t.nbytes for t in (scratch.values, scratch.sums, scratch.arrived, scratch.marks))
    assert taken == Scratch.nbytes(7, 8, 2, 64, **sizes, device=device)  # type: ignore[arg-type]


def test_what_does_not_fit_is_an_error(device: torch.device) -> None:
    requests = Requests(PLAIN, [20, 30], device)
    scratch = requests.scratch(False)
    start = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    contexts = torch.tensor([20, 30], dtype=torch.int32, device=device)
    q = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)

    def call(**changed: object) -> None:
        given = {
            "q": q, "k_cache": requests.k_cache, "v_cache": requests.v_cache,
            "block_tables": requests.tables, "query_start": start, "context_len": contexts,
            "scale": 1.0, "window": None, "softcap": None, "sinks": None, "decode": True,
            "deterministic": False, "scratch": scratch,
        }  # fmt: skip
        paged_attention(**{**given, **changed})  # type: ignore[arg-type]

    call()
    for change, message in (
        ({"q": q[:, :60]}, "q"),
        ({"q": q.float(), "v_cache": requests.v_cache.half()}, "caches"),
        ({"q": q.half()}, "caches"),
        ({"k_cache": requests.k_cache[..., :8]}, "caches"),
        ({"k_cache": requests.k_cache.view(FP8_CACHE)}, "caches"),
        ({"k_cache": requests.k_cache.transpose(1, 2).contiguous().transpose(1, 2)}, "caches"),
        ({"block_tables": requests.tables[:1]}, "block_tables"),
        ({"q": q[:1]}, "decode"),
        ({"scale": 0.0}, "scale"),
        ({"window": 0}, "window"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"scratch": replace(scratch, arrived=scratch.arrived[:3])}, "scratch"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's memory")
def test_caches_of_more_than_2_to_the_31_values(device: torch.device) -> None:
    shape = Shape(4, 1, 128)
    requests = Requests(shape, [200, 40], device)
    small = requests.step([1, 20], padding=1)[0]
    blocks = 2**31 // (16 * 128) + 100
    moved = blocks - requests.k_cache.shape[0]
    for name in ("k_cache", "v_cache"):
        old = getattr(requests, name)
        large = torch.empty(blocks, 1, 16, 128, dtype=old.dtype, device=device)
        large[moved:] = old
        setattr(requests, name, large)
    requests.tables = torch.where(requests.tables < 2**30, requests.tables + moved, 0)
    assert torch.equal(requests.step([1, 20], padding=1)[0], small)
