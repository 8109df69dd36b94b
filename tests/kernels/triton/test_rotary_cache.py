"""Rotary, head norms and cache writes against the reference, with caches poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quire.formats.float8 import E4M3_MAX
from quire.kernels.reference.attention.fp8_cache import (
    FP8_CACHE,
    codes_and_scales,
    decode_heads,
    encode_heads,
    packed_width,
)
from quire.kernels.reference.rotary import rotary_cache as reference
from quire.kernels.triton.rotary.rotary_cache import rotary_cache

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
EPS, BLOCKS, POSITIONS = 1e-6, 4, 40


@dataclass(frozen=True)
class Shape:
    """`rotary` 0: no table. `norms`: which of "q" and "k" are normed."""

    q_heads: int
    kv_heads: int
    d: int
    rotary: int
    norms: str = ""


SHAPES = [
    Shape(4, 2, 64, 64),
    Shape(9, 3, 64, 64, "qk"),
    Shape(2, 1, 128, 128, "qk"),
    Shape(17, 1, 16, 16, "q"),
    Shape(3, 3, 80, 80, "k"),
    Shape(3, 1, 96, 24, "qk"),
    Shape(5, 2, 24, 6),
    Shape(4, 4, 256, 256, "qk"),
    Shape(2, 1, 40, 0, "qk"),
    Shape(2, 2, 64, 0),
]


class Inputs:
    """qkv in a wider matrix of NaN, slots that include negative ones, caches of NaN."""

    def __init__(
        self, shape: Shape, t: int, dtype: torch.dtype, cache: torch.dtype, device: torch.device
    ):
        generator = torch.Generator().manual_seed(t + shape.d)
        width = (shape.q_heads + 2 * shape.kv_heads) * shape.d
        whole = torch.full((t, width + 24), torch.nan, dtype=dtype, device=device)
        self.qkv = whole[:, 8 : 8 + width]
        self.qkv.copy_(torch.randn(t, width, generator=generator))
        self.positions = torch.randint(POSITIONS, (t,), generator=generator).to(device)
        self.cos_sin = None
        if shape.rotary:
            inverse = 10.0 ** -torch.linspace(0, 4, shape.rotary // 2)
            angles = torch.arange(POSITIONS)[:, None] * inverse
            self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
        norms = torch.randn(2, shape.d, generator=generator).to(device)
        self.q_norm = norms[0] if "q" in shape.norms else None
        self.k_norm = norms[1] if "k" in shape.norms else None
        # One of five tokens is padding.
        self.slots = torch.randperm(16 * BLOCKS, generator=generator)[:t]
        self.slots[1::5] = -1
        self.slots = self.slots.to(device)
        # Blocks of keys and values alternate, as in a pool that holds both.
        both = torch.full((BLOCKS, 2, shape.kv_heads, 16, shape.d), torch.nan, dtype=cache)
        self.k_cache, self.v_cache = both.to(device).unbind(1)
        self.out = torch.full((t, shape.q_heads * shape.d + 8), torch.nan, dtype=dtype).to(device)

    def tokens(self, first: int, last: int) -> tuple[Any, ...]:
        """Arguments of tokens first to last - 1, but for `out`."""
        part = slice(first, last)
        return (
            self.qkv[part], self.positions[part], self.cos_sin, self.q_norm, self.k_norm, EPS,
            self.k_cache, self.v_cache, self.slots[part],
        )  # fmt: skip


def check(inputs: Inputs) -> None:
    found_k, found_v = inputs.k_cache, inputs.v_cache
    q = inputs.out[:, : inputs.out.shape[1] - 8]
    t = len(inputs.slots)
    assert rotary_cache(*inputs.tokens(0, t), out=q) is q
    inputs.k_cache = torch.full_like(found_k, torch.nan)
    inputs.v_cache = torch.full_like(found_v, torch.nan)
    wanted = reference.rotary_cache(*inputs.tokens(0, t))
    for found, expected in ((q, wanted), (found_k, inputs.k_cache), (found_v, inputs.v_cache)):
        tolerance = TOLERANCE[expected.dtype]
        # NaN equals only NaN: nothing else is written.
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not q.isnan().any()
    assert int((~found_k.isnan()).any(dim=(1, 3)).sum()) == int((inputs.slots >= 0).sum())
    assert inputs.out[:, -8:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("t", [0, 1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape: Shape, t: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Inputs(shape, t, dtype, dtype, device))


@pytest.mark.parametrize("cache", TOLERANCE)
def test_keys_and_values_take_the_caches_dtype(cache: torch.dtype, device: torch.device) -> None:
    check(Inputs(SHAPES[1], 3, torch.bfloat16, cache, device))


def test_values_are_copied_bit_for_bit(device: torch.device) -> None:
    inputs = Inputs(SHAPES[1], 5, torch.bfloat16, torch.bfloat16, device)
    inputs.qkv[:, -3] = torch.inf
    rotary_cache(*inputs.tokens(0, 5))
    written = inputs.slots >= 0
    slots = inputs.slots[written]
    found = inputs.v_cache[slots // 16, :, slots % 16]
    assert torch.equal(found.flatten(1), inputs.qkv[written, -3 * 64 :])


def test_padding_alone_writes_only_queries(device: torch.device) -> None:
    inputs = Inputs(SHAPES[0], 4, torch.bfloat16, torch.bfloat16, device)
    inputs.slots.fill_(-1)
    check(inputs)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5]], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_others(shape: Shape, device: torch.device) -> None:
    inputs = Inputs(shape, 6, torch.bfloat16, torch.float32, device)
    together = rotary_cache(*inputs.tokens(0, 6))
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    inputs.k_cache.fill_(torch.nan)
    inputs.v_cache.fill_(torch.nan)
    for i in range(6):
        alone = rotary_cache(*inputs.tokens(i, i + 1))
        assert torch.equal(alone[0], together[i])
    torch.testing.assert_close(inputs.k_cache, k_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(inputs.v_cache, v_cache, rtol=0, atol=0, equal_nan=True)


def test_other_layouts_are_refused(device: torch.device) -> None:
    inputs = Inputs(SHAPES[0], 2, torch.bfloat16, torch.bfloat16, device)
    good = list(inputs.tokens(0, 2))
    turned = inputs.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    for index, value, message in (
        (6, turned, "not contiguous"),
        (0, inputs.qkv[:, :256], "do not fit together"),
        (2, torch.ones(POSITIONS, 3, device=device), "cannot rotate"),
        (0, inputs.qkv.repeat_interleave(2, dim=1)[:, ::2], "contiguous rows"),
        (9, torch.ones(2, 2, device=device), "e4m3 cache"),
    ):
        arguments = [*good[:index], value, *good[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            rotary_cache(*arguments)


def _coded(inputs: Inputs, shape: Shape) -> None:
    """Caches of codes and scales, whose bytes are all ones: every scale is NaN."""
    size = BLOCKS, shape.kv_heads, 16, packed_width(shape.d)
    both = torch.full((2, *size), 255, dtype=FP8_CACHE, device=inputs.qkv.device)
    inputs.k_cache, inputs.v_cache = both.transpose(0, 1).contiguous().unbind(1)


def _decoded(cache: torch.Tensor) -> torch.Tensor:
    return decode_heads(*codes_and_scales(cache))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5], SHAPES[6], SHAPES[8]], ids=str)
def test_codes_and_scales_equal_the_references(
    shape: Shape, fixed: bool, device: torch.device
) -> None:
    inputs = Inputs(shape, 7, torch.bfloat16, torch.bfloat16, device)
    inputs.qkv[3, -shape.d :] = 0.0  # the last value head
    scales = torch.linspace(0.001, 0.01, 2 * shape.kv_heads, device=device).view(2, -1)
    given = scales if fixed else None
    _coded(inputs, shape)
    found = inputs.k_cache, inputs.v_cache
    q = rotary_cache(*inputs.tokens(0, 7), given)
    _coded(inputs, shape)
    expected_q = reference.rotary_cache(*inputs.tokens(0, 7), given)
    torch.testing.assert_close(q, expected_q, rtol=1e-2, atol=1e-2)
    written = inputs.slots[inputs.slots >= 0]
    for mine, wanted in zip(found, (inputs.k_cache, inputs.v_cache), strict=True):
        # NaN equals only NaN: nothing else is written. A value near the middle of two codes may get
        # either, which are an eighth apart.
        torch.testing.assert_close(
            _decoded(mine), _decoded(wanted), rtol=0.13, atol=1e-5, equal_nan=True
        )
        assert int((~codes_and_scales(mine)[1].isnan()).any(1).sum()) == len(written)
        if not fixed:
            codes, scale = codes_and_scales(mine)
            largest = codes.view(torch.float8_e4m3fn).float().abs().amax(-1)[~scale.isnan()]
            assert ((largest == E4M3_MAX) | (largest == 0)).all()


def test_every_value_gets_the_nearest_code(device: torch.device) -> None:
    """All codes, halfway between neighbours and a hair to both sides, and beyond the range."""
    shape, heads = Shape(2, 2, 256, 0), 2
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    some = torch.cat([codes, middle, middle.nextafter(codes[1:]), middle.nextafter(codes[:-1])])
    some = torch.cat([some, -some, torch.tensor([449.0, -1e30])])
    rows = torch.nn.functional.pad(some, (0, -len(some) % 512)).view(-1, heads, 256)
    t = len(rows)
    inputs = Inputs(shape, t, torch.float32, torch.float32, device)
    inputs.slots = torch.arange(t, device=device)
    inputs.qkv[:, -512:] = rows.flatten(1).to(device)
    _coded(inputs, shape)
    rotary_cache(*inputs.tokens(0, t), torch.ones(2, heads, device=device))
    found = codes_and_scales(inputs.v_cache)[0][0, :, :t].transpose(0, 1)
    expected, _ = encode_heads(rows, torch.ones(heads))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_head_that_is_not_finite_is_nan_when_it_is_read(
    bad: float, fixed: bool, device: torch.device
) -> None:
    shape = SHAPES[0]
    inputs = Inputs(shape, 1, torch.bfloat16, torch.bfloat16, device)
    inputs.slots[0] = 5
    inputs.qkv[0, -1] = bad
    _coded(inputs, shape)
    rotary_cache(*inputs.tokens(0, 1), torch.ones(2, 2, device=device) if fixed else None)
    read = _decoded(inputs.v_cache)[0, :, 5]
    assert read[1].isnan().all() and read[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_slots_beyond_two_billion_values() -> None:
    device = torch.device("cuda")
    shape = Shape(2, 1, 128, 128, "qk")
    inputs = Inputs(shape, 3, torch.bfloat16, torch.bfloat16, device)
    blocks = 2**20 + 3
    inputs.k_cache, inputs.v_cache = (
        torch.empty(blocks, 1, 16, 128, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    inputs.slots = torch.tensor([16 * blocks - 1, 5, 2**24 + 1], device=device)
    rotary_cache(*inputs.tokens(0, 3))
    found = inputs.k_cache[inputs.slots // 16, :, inputs.slots % 16].clone()
    reference.rotary_cache(*inputs.tokens(0, 3))
    wanted = inputs.k_cache[inputs.slots // 16, :, inputs.slots % 16]
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
