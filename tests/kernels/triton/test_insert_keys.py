"""Keys in the cache: the reference's values, and exactly its codes and scales for equal values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.kernels.compressed import Paged
from quire.kernels.reference.compressed.entries import Entries, PackedKeys, Plain
from quire.kernels.triton.compressed.insert_keys import insert_keys
from quire.kernels.triton.compressed.store_entry import entry_constants
from tests.kernels.triton.compressed_inputs import (
    POSITIONS,
    REFERENCE,
    poisoned_cache,
    random,
    rotary_table,
    step_tokens,
    untouched_before,
)

pytestmark = pytest.mark.triton

BF16, F32 = torch.bfloat16, torch.float32
SLOTS = 40


class Inputs:
    """Keys that are columns of a wider matrix of NaN, slots that include negative ones."""

    def __init__(self, t: int, size: int, rotary: int, dtype: torch.dtype, device: torch.device):
        wide = torch.full((t, 7 + size), torch.nan)
        wide[:, 7:] = random(t + size, t, size) * 10.0 ** random(3, t, 1)
        self.keys = wide.to(device, dtype)[:, 7:]
        self.norm, self.table = random(2, size), rotary_table(rotary)
        generator = torch.Generator().manual_seed(t)
        self.tokens = step_tokens([0], [t], [0], 0, device)
        positions = torch.randint(POSITIONS, (t,), generator=generator)
        self.tokens.positions.copy_(positions)
        self.slots = torch.randperm(SLOTS, generator=generator)[:t]
        self.slots[1::5] = -1

    def into(self, entries: Entries, dtype: torch.dtype) -> Paged:
        device = self.keys.device
        cache = poisoned_cache(SLOTS, entries, dtype, device)
        insert_keys(
            self.keys, self.norm.to(device), 1e-6, self.table.to(device), self.tokens,
            self.slots.to(device), cache,
        )  # fmt: skip
        assert untouched_before(cache)
        return cache

    def reference(self, entries: Entries) -> Paged:
        """Of keys in float32, on the CPU."""
        cache = poisoned_cache(SLOTS, entries, F32, torch.device("cpu"))
        tokens = step_tokens([0], [len(self.keys)], [0], 0, torch.device("cpu"))
        tokens.positions.copy_(self.tokens.positions)
        REFERENCE.insert_keys(
            self.keys.float().cpu(), self.norm, 1e-6, self.table, tokens, self.slots, cache
        )
        return cache


SHAPES = [(0, 8, 4), (1, 2, 2), (7, 24, 8), (5, 512, 64), (9, 100, 2)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 1e-2), (F32, 2e-6)])
@pytest.mark.parametrize(("t", "size", "rotary"), SHAPES)
def test_values_equal_the_reference(
    t: int, size: int, rotary: int, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    inputs = Inputs(t, size, rotary, dtype, device)
    found = inputs.into(Plain(size), dtype).memory.float().cpu()
    wanted = inputs.reference(Plain(size)).memory
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert int((~found.isnan()).sum()) == int((inputs.slots >= 0).sum()) * size


@pytest.mark.parametrize(("t", "size", "rotary"), SHAPES)
def test_packed_keys_have_the_references_codes_and_scales(
    t: int, size: int, rotary: int, device: torch.device
) -> None:
    inputs, entries = Inputs(t, size, rotary, BF16, device), PackedKeys(size, rotary)
    found = inputs.into(entries, BF16).memory.cpu()
    values = inputs.into(Plain(size), F32).memory.cpu()
    kept = inputs.slots[inputs.slots >= 0]
    wanted = torch.full_like(found, 0xFF)
    wanted[kept] = entries.pack(values[kept], torch.uint8)
    same_but_cut(found, wanted, entries)


def same_but_cut(found: torch.Tensor, wanted: torch.Tensor, entries: PackedKeys) -> None:
    """Equal bytes; bfloat16s may be neighbours, as Triton's interpreter does not round them."""
    turned = slice(entries.fixed, entries.fixed + 2 * entries.rotary)
    pairs = [x[:, turned].contiguous().view(BF16).float() for x in (found, wanted)]
    torch.testing.assert_close(*pairs, rtol=2.0**-7, atol=0, equal_nan=True)
    for x in (found, wanted):
        x[:, turned] = 0
    assert torch.equal(found, wanted)


def stored(values: torch.Tensor, rotary: int, device: torch.device) -> torch.Tensor:
    """One vector packed by the kernel: the norm of ones without eps is its weight exactly, and at
    position 0 nothing turns."""
    entries = PackedKeys(len(values), rotary)
    cache = poisoned_cache(1, entries, BF16, device)
    ones, slot = torch.ones(1, len(values), device=device), torch.tensor([0], device=device)
    tokens = step_tokens([0], [1], [0], 0, device)
    table = torch.tensor([1.0] * (rotary // 2) + [0.0] * (rotary // 2), device=device)
    insert_keys(ones, values.to(device), 0.0, table[None], tokens, slot, cache)
    return cache.memory.cpu()


def test_values_at_every_border_are_packed_as_the_reference_packs_them(
    device: torch.device,
) -> None:
    # All e4m3 and halfway between neighbours, and float32s next to those, for scales from 2^-22,
    # the least, up; then values at and next to what a scale takes to 448.
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[:-1] + codes[1:]) / 2
    exact = torch.cat([codes, ties, -codes, -ties])
    near = [torch.nextafter(exact, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    values = torch.cat([exact, *near])
    values = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    groups = torch.cat([values, torch.full((len(values), 1), 448.0)], dim=1)
    for exponent in (-22, -3, 0, 100):
        scaled = groups * 2.0**exponent
        for limit in (448.0, 449.0, 447.9, 256.0):
            scaled[:, 63] = limit * 2.0**exponent
            check_groups(scaled, device)


def check_groups(groups: torch.Tensor, device: torch.device) -> None:
    """All groups as one vector."""
    rotary = torch.tensor([1.0, -0.5])
    values = torch.cat([groups.flatten(), rotary])
    entries = PackedKeys(len(values), 2)
    assert torch.equal(stored(values, 2, device), entries.pack(values[None], torch.uint8))


def test_zeros_and_what_is_not_finite(device: torch.device) -> None:
    groups = torch.zeros(7, 64)
    groups[1, 3], groups[2, 5], groups[3, 7] = 1e-5, torch.inf, -torch.inf
    groups[4, 9], groups[5] = torch.nan, -0.0
    groups[6, :2] = torch.tensor([3e38, -1e-38])
    check_groups(groups, device)


def test_a_keys_bytes_do_not_depend_on_the_others(device: torch.device) -> None:
    inputs = Inputs(9, 96, 32, BF16, device)
    entries = PackedKeys(96, 32)
    whole = inputs.into(entries, BF16).memory
    keys, slots, positions = inputs.keys, inputs.slots, inputs.tokens.positions.clone()
    for token in range(9):
        inputs.keys, inputs.slots = keys[token : token + 1], slots[token : token + 1]
        inputs.tokens.positions[0] = positions[token]
        slot = int(slots[token])
        if slot >= 0:
            assert torch.equal(inputs.into(entries, BF16).memory[slot], whole[slot])


def test_a_cache_for_other_vectors_is_refused(device: torch.device) -> None:
    inputs = Inputs(3, 32, 16, BF16, device)
    for entries, dtype in ((Plain(24), F32), (PackedKeys(32, 8), BF16)):
        with pytest.raises(ValueError, match="do not fit a cache"):
            inputs.into(entries, dtype)
    cache = poisoned_cache(SLOTS, Plain(32), F32, device)
    cache = replace(cache, memory=cache.memory.to(torch.uint8))
    with pytest.raises(ValueError, match="do not fit a cache"):
        entry_constants(cache, 32, 16)
    with pytest.raises(ValueError, match="contiguous"):
        entry_constants(Paged(torch.ones(8, 32).T, Plain(8), cache.block_tables, 1), 8, 4)
