"""attention and rotary_cache against their torch references, and bit-invariance to batching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

native = pytest.importorskip("quire.kernels.native._native", reason="the extension is not built")
from quire.kernels.native import ops  # noqa: E402
from quire.kernels.reference import ops as reference  # noqa: E402
from quire.kernels.reference.attention.fp8_cache import (  # noqa: E402
    FP8_CACHE,
    codes_and_scales,
    decode_heads,
    encode_heads,
)

BLOCK = ops.BLOCK


def empty_caches(
    blocks: int, heads: int, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that are all NaN."""
    page, fp8 = ops.cache_page(heads, size, dtype == FP8_CACHE), dtype == FP8_CACHE
    poison = 255 if fp8 else torch.nan
    k, v = (torch.full((blocks, *shape), poison, dtype=dtype) for shape in page)
    return k, v


@dataclass
class Case:
    """Sequences of (queries, context): caches full of NaN but for what the sequences hold."""

    lengths: list[tuple[int, int]]
    query_heads: int = 6
    kv_heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads, size = self.kv_heads, self.head_size
        needed = [-(-context // BLOCK) for _, context in self.lengths]
        total = sum(needed) + 3
        self.k, self.v = empty_caches(total, heads, size, self.dtype)
        self.tables = torch.full((len(needed), max(needed) + 2), -1, dtype=torch.int32)
        free = torch.randperm(total).tolist()
        for b, (_, context) in enumerate(self.lengths):
            for i in range(needed[b]):
                block, used = free.pop(), min(BLOCK, context - i * BLOCK)
                keys, values = torch.randn(2, used, heads, size)
                if self.dtype == FP8_CACHE:
                    for cache, written in ((self.k, keys), (self.v, values)):
                        codes, scales = codes_and_scales(cache, tokens_last=cache is self.k)
                        codes = codes.transpose(2, 3) if cache is self.k else codes
                        coded, scale = encode_heads(written.transpose(0, 1))
                        codes[block, :, :used], scales[block, :, :used] = coded, scale
                else:
                    self.k[block, :, :, :used] = keys.permute(1, 2, 0).to(self.dtype)
                    self.v[block, :, :used] = values.transpose(0, 1).to(self.dtype)
                self.tables[b, i] = block
        self.starts = torch.tensor([0, *(n for n, _ in self.lengths)]).cumsum(0).int()
        self.contexts = torch.tensor([c for _, c in self.lengths], dtype=torch.int32)
        self.q = torch.randn(int(self.starts[-1]), self.query_heads * self.head_size)

    def run(self, kernels: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        arguments = (
            self.q,
            self.k,
            self.v,
            self.tables,
            self.starts,
            self.contexts,
            self.head_size**-0.5,
        )
        result: torch.Tensor = kernels.attention(*arguments, **self.options, out=out)
        return result

    def chunk(self, sequence: int, first: int, last: int) -> torch.Tensor:
        """Attention of queries first..last-1 of one sequence, as a step of its own."""
        queries, context = self.lengths[sequence]
        row = int(self.starts[sequence])
        return ops.attention(
            self.q[row + first : row + last].contiguous(), self.k, self.v,
            self.tables[sequence : sequence + 1],
            torch.tensor([0, last - first], dtype=torch.int32),
            torch.tensor([context - queries + last], dtype=torch.int32),
            self.head_size**-0.5, **self.options,
        )  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "window with sinks": {"window": 100, "sinks": torch.linspace(-1, 3, 6)},
    "softcap": {"softcap": 5.0},
    "wide window": {"window": 600},
}
SEQUENCES = [[(1, 1)], [(5, 5), (1, 40), (17, 33), (0, 9), (64, 64)], [(1, 1300)], [(130, 700)]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", SEQUENCES, ids=str)
def test_attention_matches_the_reference_with_nan_in_all_other_memory(
    isa: str, lengths: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.bfloat16, FP8_CACHE):
        case = Case(lengths, dtype=dtype, options=options)
        out = torch.full_like(case.q, float("nan"))
        assert case.run(ops, out) is out
        torch.testing.assert_close(out, case.run(reference), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_size"),
    [(9, 3, 64), (4, 4, 8), (8, 1, 72), (16, 1, 128), (4, 2, 256)],
)
def test_attention_matches_the_reference_for_head_shapes(
    isa: str, query_heads: int, kv_heads: int, head_size: int
) -> None:
    for dtype in (torch.float32, FP8_CACHE):
        case = Case([(19, 150), (1, 77)], query_heads, kv_heads, head_size, dtype)
        torch.testing.assert_close(case.run(ops), case.run(reference), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((some, torch.float32) for some in OPTIONS.values()), (OPTIONS["window"], FP8_CACHE)],
    ids=[*OPTIONS, "e4m3"],
)
def test_attention_bits_do_not_depend_on_chunks_batch_or_threads(
    isa: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    case = Case([(70, 70), (3, 1100), (40, 560)], dtype=dtype, options=options)
    ops.set_num_threads(1)
    whole = case.run(ops)
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        assert torch.equal(case.run(ops), whole)
        for sequence, (queries, _) in enumerate(case.lengths):
            row = int(case.starts[sequence])
            for step in (1, 5, 16, queries):
                for first in range(0, queries, step):
                    last = min(first + step, queries)
                    assert torch.equal(
                        case.chunk(sequence, first, last), whole[row + first : row + last]
                    )


def test_a_nan_key_reaches_only_the_queries_that_see_it(isa: str) -> None:
    case = Case([(60, 60)])
    clean = case.run(ops)
    for cache, at in ((case.k, (..., 5)), (case.v, (slice(None), 5))):
        kept = cache[case.tables[0, 2]].clone()
        cache[case.tables[0, 2]][at] = float("nan")
        out = case.run(ops)
        assert torch.equal(out[:37], clean[:37])
        assert out[37:].isnan().all()
        cache[case.tables[0, 2]] = kept


def test_window_ignores_stale_table_entries(isa: str) -> None:
    case = Case([(4, 200)], options={"window": 20})
    expected = case.run(ops)
    case.tables[0, :11] = -123  # oldest visible key: position 200 - 4 + 1 - 20 = 177, block 11
    assert torch.equal(case.run(ops), expected)


def test_large_scores_do_not_overflow(isa: str) -> None:
    case = Case([(20, 90)])
    case.q *= 1000
    # Scores reach |q| |k| / sqrt(D), about 8,000 here. Each of the few fp32 roundings on the way to
    # a score moves it by up to 2^-24 of that, and a weight, exp(score), by the same as a share.
    largest = 1000 * case.head_size * case.head_size**-0.5
    bound = 4 * largest * 2**-24
    torch.testing.assert_close(case.run(ops), case.run(reference), atol=bound, rtol=bound)


def test_attention_refuses_what_would_read_outside_the_cache() -> None:
    case = Case([(4, 40)])
    arguments = [case.q, case.k, case.v, case.tables, case.starts, case.contexts, 0.1]
    for position, value, message in [
        (3, torch.full_like(case.tables, 99), "not a block of the cache"),
        (3, torch.full_like(case.tables, -1), "not a block of the cache"),
        (3, case.tables[:, :2].contiguous(), "too narrow"),
        (4, torch.tensor([0, 5], dtype=torch.int32), "query_start"),
        (5, torch.tensor([3], dtype=torch.int32), "smaller than the chunk"),
        (0, case.q[:, :-1], "q: expected"),
        (2, case.v.double(), "v_cache: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.attention(*arguments[:position], value, *arguments[position + 1 :])
    with pytest.raises(ValueError, match="window"):
        ops.attention(*arguments, window=0)


def rotary_case(
    rows: int, head_size: int, rotary_size: int | None, norms: bool, dtype: torch.dtype
) -> list[Any]:
    blocks, kv_heads, query_heads = rows // BLOCK + 3, 2, 5
    norm = [torch.rand(head_size) + 0.5, torch.rand(head_size) + 0.5] if norms else [None, None]
    angles = torch.rand(50, (rotary_size or 0) // 2) * 6
    slots = torch.randperm(blocks * BLOCK)[:rows]
    slots[1::3] = -1
    return [
        torch.randn(rows, (query_heads + 2 * kv_heads) * head_size), torch.randint(0, 50, (rows,)),
        torch.cat([angles.cos(), angles.sin()], -1) if rotary_size else None, *norm, 1e-6,
        torch.full((blocks, kv_heads, head_size, BLOCK), 7.0, dtype=dtype),
        torch.full((blocks, kv_heads, BLOCK, head_size), 7.0, dtype=dtype), slots,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("head_size", "rotary_size"), [(64, 64), (72, 40), (8, 8), (256, 64), (64, None)]
)
def test_rotary_cache_matches_the_reference_and_writes_only_its_slots(
    isa: str, head_size: int, rotary_size: int | None, norms: bool, dtype: torch.dtype
) -> None:
    for rows in (0, 1, 3, 64):
        case = rotary_case(rows, head_size, rotary_size, norms, dtype)
        plain = [value.clone() if isinstance(value, torch.Tensor) else value for value in case]
        before = case[0].clone()
        q = ops.rotary_cache(*case)
        torch.testing.assert_close(q, reference.rotary_cache(*plain), atol=1e-6, rtol=1e-5)
        assert torch.equal(case[0], before)
        tolerance = (
            {"atol": 1e-6, "rtol": 1e-5}
            if dtype is torch.float32
            else {"atol": 1e-6, "rtol": 1 / 128}
        )
        torch.testing.assert_close(case[6], plain[6], **tolerance)
        assert torch.equal(case[7], plain[7])  # values are only rounded


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_size"), [(64, 64), (72, 40), (8, None)])
def test_rotary_cache_writes_codes_and_scales_like_the_reference(
    isa: str, head_size: int, rotary_size: int | None, fixed: bool
) -> None:
    case = rotary_case(64, head_size, rotary_size, True, torch.float32)
    case[0][5, -1] = torch.inf
    case[0][6, -head_size:] = 0.0
    case.append(torch.linspace(0.001, 0.01, 4).view(2, 2) if fixed else None)
    found, expected = (empty_caches(len(case[6]), 2, head_size, FP8_CACHE) for _ in range(2))
    q = ops.rotary_cache(*case[:6], *found, *case[8:])
    wanted = reference.rotary_cache(*case[:6], *expected, *case[8:])
    torch.testing.assert_close(q, wanted, atol=1e-6, rtol=1e-5)
    for mine, theirs, tokens_last in zip(found, expected, (True, False), strict=True):
        (codes, scales), (other, theirs) = (
            codes_and_scales(cache, tokens_last) for cache in (mine, theirs)
        )
        torch.testing.assert_close(scales, theirs, equal_nan=True)
        same = codes == other
        if tokens_last:  # keys are rotated, and a value near the middle of two codes gets either
            assert same[~scales.isnan()[:, :, None].expand_as(same)].float().mean() > 0.99
            codes, other = codes.transpose(2, 3), other.transpose(2, 3)
        else:
            assert same[~scales.isnan()[..., None].expand_as(same)].all()
        torch.testing.assert_close(
            decode_heads(codes, scales), decode_heads(other, theirs), rtol=0.13, atol=1e-5,
            equal_nan=True,
        )  # fmt: skip
    assert codes_and_scales(found[1])[1].isnan().sum() == found[1].shape[0] * 32 - 2 * int(
        (case[8] >= 0).sum()
    ) + int(case[8][5] >= 0)


def test_rotary_cache_of_a_row_does_not_depend_on_the_others(isa: str) -> None:
    case = rotary_case(600, 64, 64, True, torch.float32)
    whole = ops.rotary_cache(*case)
    k, v = case[6].clone(), case[7].clone()
    for row in range(0, 600, 7):
        alone = [case[0][row : row + 1], case[1][row : row + 1], *case[2:8], case[8][row : row + 1]]
        assert torch.equal(ops.rotary_cache(*alone), whole[row : row + 1])
    assert torch.equal(case[6], k) and torch.equal(case[7], v)


def test_rotary_cache_refuses_positions_and_slots_outside() -> None:
    for index, value, message in [(1, 50, "positions"), (1, -1, "positions"), (8, 10**6, "slots")]:
        case = rotary_case(4, 64, 64, False, torch.float32)
        case[index][2] = value
        with pytest.raises(ValueError, match=message):
            ops.rotary_cache(*case)
