"""Decode of short requests whose last token is not in the cache yet, against the two kernels that
write it first and then attend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.attention.paged_attention import paged_attention as reference
from quire.kernels.triton.attention import decode_short as short_module
from quire.kernels.triton.attention import paged_attention as paged_module
from quire.kernels.triton.attention.decode import decode_kernel
from quire.kernels.triton.attention.decode_ordered import decode_ordered_kernel
from quire.kernels.triton.attention.decode_short import (
    TILES,
    decode_short,
    decode_short_kernel,
    serves_new,
    serves_short,
)
from quire.kernels.triton.launch import launch
from quire.kernels.triton.ops import TritonKernels
from quire.kernels.triton.rotary import rotary_cache as rotary_module
from quire.kernels.triton.rotary.rotary_cache import rotary_cache, rotary_cache_kernel
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.paged_inputs import TOLERANCE, PagedRequests, Shape
from tests.kernels.triton.test_decode_short import scratch_of

# Around borders of blocks and tiles, and of what is short.
CONTEXTS = [1, 2, 127, 128, 129, 511, 512]
EPS, POSITIONS = 1e-6, 1200


@dataclass(frozen=True)
class Case:
    """`rotary`: values of a head that rotate. `norms`: which of "q" and "k" are normed."""

    shape: Shape
    rotary: int
    norms: str = "qk"
    contexts: list[int] = field(default_factory=lambda: CONTEXTS)


CASES = [
    Case(Shape(8, 1, 64), 64, "qk", [129, 512]),
    Case(Shape(1, 1, 64, window=100, softcap=3.0, sinks=True), 64, ""),
    Case(Shape(2, 2, 80, sinks=True), 0, "k", [1, 300]),
    Case(Shape(2, 1, 80, dtype=torch.float16), 64, "q", [2, 129]),
    Case(Shape(2, 1, 128, window=1), 128, "qk", [1, 40]),
    Case(Shape(1, 1, 64, window=512), 64, "qk", [513, 1100]),
    *(
        pytest.param(case, marks=FULL)
        for case in (
            Case(Shape(8, 1, 64), 64),
            Case(Shape(8, 1, 128), 128),
            Case(Shape(2, 2, 128, sinks=True), 128, ""),
            Case(Shape(8, 1, 128, window=127, softcap=2.0), 64),
            Case(Shape(2, 2, 64, window=511, dtype=torch.float16), 64),
            Case(Shape(4, 2, 256), 256),
        )
    ),
]


class Requests(PagedRequests):
    """Requests whose last token has no place yet: there the cache is NaN, as where nobody reads.
    The first row is padding, with a slot that is -1 and a context of 0 tokens."""

    def __init__(self, case: Case, device: torch.device):
        shape, self.case, d = case.shape, case, case.shape.d
        sizes = shape.heads * d, shape.dtype, 2 * shape.kv_heads, d, shape.dtype
        super().__init__(case.contexts, *sizes, device)
        _, tables, _, lengths = self.inputs(
            [1] * len(case.contexts), case.contexts, range(len(case.contexts)), padding=0
        )
        last = lengths - 1
        blocks = tables.gather(1, (last // 16)[:, None].long())[:, 0]
        self.cache[blocks.long(), :, last.long() % 16] = torch.nan
        self.caches = self.cache.unflatten(1, (2, -1)).unbind(1)
        padding = torch.zeros(1, dtype=torch.int64, device=device)
        slots = blocks.long() * 16 + last % 16
        self.tables = torch.cat([torch.zeros_like(tables[:1]), tables])
        self.lengths = torch.cat([padding.int(), lengths])
        self.start = torch.arange(len(self.lengths) + 1, device=device, dtype=torch.int32)
        norms = torch.randn(2, d, generator=self.generator).to(device)
        self.sinks = None
        if shape.sinks:
            self.sinks = torch.randn(shape.heads, generator=self.generator).to(device)
        width = (shape.heads + 2 * shape.kv_heads) * d
        # Eighths: a norm's sum of squares is exact, so its order changes no bits.
        values = (torch.randn(len(slots) + 1, width, generator=self.generator) * 8).round() / 8
        qkv = self.nowhere(*values.shape)
        qkv.copy_(values)
        self.new = NewTokens(
            qkv,
            torch.cat([padding, last.long()]),
            self._table(device),
            norms[0] if "q" in case.norms else None,
            norms[1] if "k" in case.norms else None,
            EPS,
            torch.cat([padding - 1, slots]),
        )

    def _table(self, device: torch.device) -> torch.Tensor | None:
        if not self.case.rotary:
            return None
        inverse = 10.0 ** -torch.linspace(0, 4, self.case.rotary // 2)
        angles = torch.arange(POSITIONS)[:, None] * inverse
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of attention from the block tables on."""
        shape = self.case.shape
        where = self.tables, self.start, self.lengths
        return *where, shape.d**-0.5, shape.window, shape.softcap, self.sinks

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(attention, cache) of the two kernels, the second as its reference."""
        cache = self.cache.clone()
        caches = cache.unflatten(1, (2, -1)).unbind(1)
        q = self.new.written(rotary_cache, *caches)
        return reference(q, *caches, *self.options, decode=True, deterministic=False), cache


def check(
    found: torch.Tensor, requests: Requests, wanted: torch.Tensor, cache: torch.Tensor
) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found[1:], wanted[1:], atol=tolerance, rtol=tolerance)
    assert torch.equal(requests.cache.view(torch.int16), cache.view(torch.int16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_what_is_written_equal_the_two_kernels(
    case: Case, device: torch.device
) -> None:
    requests, shape = Requests(case, device), case.shape
    wanted, cache = requests.expected()
    tables, _, lengths, scale, *_ = requests.options
    factor = (shape.softcap or scale) * math.log2(math.e)
    q = requests.new.qkv[:, : shape.heads * shape.d]
    out = requests.nowhere(*q.shape)
    decode_short(
        q, *requests.caches, tables, lengths, factor, scale / (shape.softcap or scale),
        shape.window, shape.softcap is not None, requests.sinks, out, TILES[0], requests.new,
    )  # fmt: skip
    check(out, requests, wanted, cache)
    assert out[0].isfinite().all()


def test_padding_of_nan_gets_something_finite(device: torch.device) -> None:
    requests = Requests(Case(Shape(1, 1, 64), 64, "qk", [5]), device)
    wanted, cache = requests.expected()
    requests.new.qkv[0] = torch.nan
    kernels = TritonKernels(torch.bfloat16, device, False)
    kernels.scratch = scratch_of(requests.case.shape, device)
    found = kernels.rotary_attention(requests.new, *requests.caches, *requests.options)
    check(found, requests, wanted, cache)
    assert found[0].isfinite().all()


@pytest.mark.parametrize(
    ("case", "deterministic", "launched"),
    [
        (Case(Shape(1, 1, 64), 64, "qk", [40]), False, [decode_short_kernel]),
        (Case(Shape(1, 1, 80), 80, "qk", [40]), False, [rotary_cache_kernel, decode_short_kernel]),
        (Case(Shape(1, 1, 64), 64, "qk", [600]), False, [rotary_cache_kernel, decode_kernel]),
        (Case(Shape(1, 1, 64), 64, "qk", [40]), True, [rotary_cache_kernel, decode_ordered_kernel]),
    ],
)
def test_one_kernel_serves_short_steps_of_heads_whose_halves_are_whole_chunks(
    case: Case,
    deterministic: bool,
    launched: list[Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = Requests(case, device)
    wanted, cache = requests.expected()
    kernels = TritonKernels(torch.bfloat16, device, deterministic)
    kernels.scratch = scratch_of(case.shape, device)
    found = []

    def watched(kernel: Any, *args: Any, **options: Any) -> None:
        found.append(kernel)
        launch(kernel, *args, **options)

    for module in (short_module, paged_module, rotary_module):
        monkeypatch.setattr(module, "launch", watched)
    out = kernels.rotary_attention(requests.new, *requests.caches, *requests.options)
    assert found == launched
    check(out, requests, wanted, cache)


def test_two_kernels_serve_where_a_chunk_has_both_halves(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many requests that programs have whole heads."""
    monkeypatch.setattr(short_module, "TILES", TILES[1:])
    requests = Requests(Case(Shape(1, 1, 64), 64, "qk", [40]), device)
    wanted, cache = requests.expected()
    q = requests.new.qkv[:, :64]
    assert serves_short(q, requests.caches[0], 2, 512)
    assert not serves_new(q, requests.caches[0], 2, 512, requests.new)
    kernels = TritonKernels(torch.bfloat16, device, False)
    kernels.scratch = scratch_of(requests.case.shape, device)
    out = kernels.rotary_attention(requests.new, *requests.caches, *requests.options)
    check(out, requests, wanted, cache)


def test_what_does_not_fit_together_is_refused(device: torch.device) -> None:
    requests = Requests(Case(Shape(1, 1, 64), 64, "qk", [40]), device)
    kernels = TritonKernels(torch.bfloat16, device, False)
    kernels.scratch = scratch_of(requests.case.shape, device)
    new = replace(requests.new, cos_sin=torch.ones(POSITIONS, 3, device=device))
    with pytest.raises(ValueError, match="cannot rotate"):
        kernels.rotary_attention(new, *requests.caches, *requests.options)


@pytest.mark.parametrize("contexts", [[40, 41], [41, 40]])
def test_a_draft_sees_the_token_before_it(contexts: list[int], device: torch.device) -> None:
    """Rows of one request, of which one's key is the other's to see, are served by two kernels."""
    requests = Requests(Case(Shape(1, 1, 64), 64, "qk", contexts), device)
    requests.tables[1:] = requests.tables[1 + contexts.index(41)]
    places = requests.lengths[1:].long() - 1
    blocks = requests.tables[1:].long().gather(1, places[:, None] // 16)[:, 0]
    requests.new.slots[1:] = blocks * 16 + places % 16
    requests.cache[blocks, :, places % 16] = torch.nan
    wanted, cache = requests.expected()
    assert wanted[1:].isfinite().all()
    kernels = TritonKernels(torch.bfloat16, device, False)
    kernels.scratch, kernels.own_requests = scratch_of(requests.case.shape, device), False
    out = kernels.rotary_attention(requests.new, *requests.caches, *requests.options)
    check(out, requests, wanted, cache)
