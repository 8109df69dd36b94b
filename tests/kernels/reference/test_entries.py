"""Packed vectors: bytes by hand, values within the step of their group, powers of two as scales."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.compressed.entries import PackedIndex, PackedKeys, Plain


def values(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    spread = 10.0 ** torch.linspace(-6, 4, count)[:, None]
    return torch.randn(count, size, generator=generator) * spread


def test_vectors_of_flash_take_584_and_132_bytes() -> None:
    assert PackedKeys(512, 64).width == 584  # 448 + 2 * 64 + 7, and a byte to make it whole
    assert PackedIndex(128).width == 132
    # 21 layers of entries of 4 tokens with index keys, 20 of entries of 128 tokens.
    assert 21 * (584 + 132) / 4 + 20 * 584 / 128 == 3850.25


@pytest.mark.parametrize(("size", "rotary"), [(512, 64), (32, 16), (100, 2)])
def test_keys_keep_what_rotates_and_three_bits_of_the_rest(size: int, rotary: int) -> None:
    given, kind = values(40, size), PackedKeys(size, rotary)
    stored = kind.pack(given, torch.uint8)
    assert stored.shape == (40, kind.width) and stored.dtype == torch.uint8
    found = kind.unpack(stored)
    assert torch.equal(found[:, -rotary:], given[:, -rotary:].bfloat16().float())
    for first in range(0, size - rotary, 64):
        part = slice(first, min(first + 64, size - rotary))
        largest = given[:, part].abs().amax(1).clamp(min=1e-4)
        step = 2.0 ** torch.ceil(torch.log2(largest / 448))
        error = (found[:, part] - given[:, part]).abs()
        # Half of the last of three bits behind the leading one, or of the smallest step there is.
        assert (error <= torch.maximum(given[:, part].abs() / 16, step[:, None] * 2.0**-10)).all()
        codes = found[:, part] / step[:, None]
        assert torch.equal(codes.to(torch.float8_e4m3fn).float(), codes)


def test_index_keys_have_one_scale() -> None:
    given, kind = values(40, 24), PackedIndex(24)
    stored = kind.pack(given, torch.uint8)
    assert stored.shape == (40, 28)
    scales = stored[:, 24:].contiguous().view(torch.float32)[:, 0]
    wanted = 2.0 ** torch.ceil(torch.log2(given.abs().amax(1).clamp(min=1e-4) / 448))
    assert torch.equal(scales, wanted)
    error = (kind.unpack(stored) - given).abs()
    assert (error <= torch.maximum(given.abs() / 16, wanted[:, None] * 2.0**-10)).all()


@pytest.mark.parametrize("kind", [PackedKeys(32, 16), PackedIndex(32), Plain(32)])
def test_packing_again_changes_nothing_and_shapes_do_not_matter(kind: PackedKeys) -> None:
    given = values(40, 32)
    dtype = torch.float32 if isinstance(kind, Plain) else torch.uint8
    once = kind.unpack(kind.pack(given, dtype))
    assert torch.equal(kind.unpack(kind.pack(once, dtype)), once)
    stored = kind.pack(given, dtype).view(4, 10, kind.width)
    assert torch.equal(kind.unpack(stored).view(40, 32), once)
    assert kind.unpack(kind.pack(given[:0], dtype)).shape == (0, 32)


def test_a_nan_stays_one() -> None:
    given = values(3, 32)
    given[1, 2] = torch.nan
    for kind in (PackedKeys(32, 16), PackedIndex(32)):
        found = kind.unpack(kind.pack(given, torch.uint8))
        assert found[1].isnan().any() and found[[0, 2]].isfinite().all()
