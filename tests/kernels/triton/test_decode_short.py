"""Decode of few short requests against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.kernels.reference.attention.paged_attention import paged_attention as reference
from quire.kernels.triton.attention import decode_short as module
from quire.kernels.triton.attention import paged_attention as public
from quire.kernels.triton.attention.decode import decode_kernel
from quire.kernels.triton.attention.decode_short import (
    SHORT_CONTEXT,
    TILES,
    ShortTile,
    decode_short,
    decode_short_kernel,
    serves_short,
)
from quire.kernels.triton.attention.paged_attention import Scratch, paged_attention
from quire.kernels.triton.launch import launch, num_sms
from tests.kernels.triton.marks import FULL
from tests.kernels.triton.paged_inputs import TOLERANCE, PagedRequests, Shape

PLAIN = Shape(3, 1, 16)
EXTRAS = Shape(1, 1, 80, window=70, softcap=3.0, sinks=True)
SHAPES = [
    PLAIN,
    EXTRAS,
    *(
        pytest.param(shape, marks=FULL)
        for shape in (
            Shape(3, 3, 64, sinks=True, dtype=torch.float16),
            Shape(8, 2, 128),
            Shape(8, 1, 64, window=1),
            Shape(4, 2, 80, softcap=2.0),
            Shape(3, 1, 128, window=511, dtype=torch.float16),
            Shape(2, 2, 256, window=100, sinks=True),
        )
    ),
]
# Around borders of blocks, tiles, pairs of them, and of what is short.
CONTEXTS = [1, 16, 17, 63, 64, 65, 127, 128, 129, 290, 385, 511, 512]


class Requests(PagedRequests):
    def __init__(self, shape: Shape, contexts: Sequence[int], device: torch.device):
        self.shape = shape
        sizes = shape.heads * shape.d, shape.dtype, 2 * shape.kv_heads, shape.d, shape.dtype
        super().__init__(contexts, *sizes, device)
        self.sinks = None
        if shape.sinks:
            self.sinks = torch.randn(shape.heads, generator=self.generator).to(device)
        self.caches = self.cache.unflatten(1, (2, -1)).unbind(1)

    def step(self) -> tuple[torch.Tensor, ...]:
        """(q, block tables, query_start, context_len) of each request's last position."""
        rows = range(len(self.contexts))
        return self.inputs([1] * len(rows), self.contexts, rows, padding=0)

    def expected(self, step: tuple[torch.Tensor, ...]) -> torch.Tensor:
        q, *others = step
        shape = self.shape
        return reference(
            q, *self.caches, *others, shape.d**-0.5, shape.window, shape.softcap, self.sinks,
            decode=True, deterministic=False,
        )  # fmt: skip

    def short(self, step: tuple[torch.Tensor, ...], tile: ShortTile) -> torch.Tensor:
        q, tables, _, context_len = step
        shape, scale = self.shape, self.shape.d**-0.5
        factor = (shape.softcap or scale) * math.log2(math.e)
        inner_scale = scale / shape.softcap if shape.softcap else 1.0
        out = self.nowhere(*q.shape)
        decode_short(
            q, *self.caches, tables, context_len, factor, inner_scale, shape.window,
            shape.softcap is not None, self.sinks, out, tile,
        )  # fmt: skip
        return out


def scratch_of(shape: Shape, device: torch.device) -> Scratch:
    """For the tests' requests, all of them."""
    return Scratch.allocate(
        8, shape.heads, shape.kv_heads, shape.d, total_tokens=0, dtype=shape.dtype,
        deterministic=False, device=device,
    )  # fmt: skip


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_short_requests_equal_the_reference(shape: Shape, device: torch.device) -> None:
    requests = Requests(shape, CONTEXTS, device)
    step = requests.step()
    check(requests.short(step, TILES[0]), requests.expected(step))


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize("tile", [TILES[1], ShortTile(32, 32, 4), ShortTile(64, 128, 8)])
@pytest.mark.parametrize("shape", [EXTRAS, Shape(2, 1, 128)], ids=str)
def test_tiles_of_other_sizes_equal_the_reference(
    shape: Shape, tile: ShortTile, device: torch.device
) -> None:
    requests = Requests(shape, [1, 129, 290, 512], device)
    step = requests.step()
    check(requests.short(step, tile), requests.expected(step))


def test_a_window_makes_contexts_of_any_length_short(device: torch.device) -> None:
    requests = Requests(replace(PLAIN, window=512), [20, 513, 1100], device)
    step = requests.step()
    check(requests.short(step, TILES[0]), requests.expected(step))


@pytest.mark.parametrize(("columns", "window"), [(32, None), (34, None), (34, 300)])
def test_it_serves_where_tables_or_windows_say_that_all_are_short(
    columns: int, window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(replace(PLAIN, window=window), [290, 512], device)
    q, tables, *others = step = requests.step()
    launched = []

    def watched(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel)
        launch(kernel, *args, **options)

    monkeypatch.setattr(module, "launch", watched)
    monkeypatch.setattr(public, "launch", watched)
    found = paged_attention(
        q, *requests.caches, tables[:, :columns], *others, PLAIN.d**-0.5, window, None, None,
        decode=True, deterministic=False, scratch=scratch_of(PLAIN, device),
    )  # fmt: skip
    short = columns == 32 or window is not None
    assert launched == [decode_short_kernel if short else decode_kernel]
    check(found, requests.expected(step))


@pytest.mark.parametrize("window", [None, 32])
def test_padding_gets_something_finite(window: int | None, device: torch.device) -> None:
    requests = Requests(replace(PLAIN, window=window), [40, 5], device)
    q, tables, start, context_len = requests.step()
    context_len = torch.tensor([0, 5], dtype=torch.int32, device=device)
    found = requests.short((q, torch.zeros_like(tables), start, context_len), TILES[0])
    assert found[0].isfinite().all()


def test_it_serves_16_bits_and_as_many_programs_as_there_are_multiprocessors(
    device: torch.device,
) -> None:
    requests = Requests(Shape(2, 1, 80), [20], device)
    q, cache = requests.step()[0], requests.caches[0]
    most, longest = num_sms(device) // 4, SHORT_CONTEXT  # two heads, two chunks of columns
    assert serves_short(q, cache, most, longest)
    assert not serves_short(q, cache, most + 1, longest)
    assert not serves_short(q, cache, most, longest + 1)
    assert not serves_short(q.float(), cache, 1, longest)
    odd = requests.nowhere(1, 161)[:, 1:]  # halves of words
    assert not serves_short(odd, cache, 1, longest)
    assert not serves_short(q, cache.view(torch.uint8), 1, longest)
