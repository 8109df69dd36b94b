"""Queries and keys in one launch: what the two kernels that it stands for give."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.compressed.entries import Entries, PackedKeys, Plain
from quire.kernels.triton.compressed.insert_keys import insert_keys
from quire.kernels.triton.compressed.rotate_and_insert import rotate_and_insert
from quire.kernels.triton.compressed.rotate_pairs import rotate_pairs
from tests.kernels.triton.compressed_inputs import (
    poisoned_cache,
    random,
    rotary_table,
    step_tokens,
    untouched_before,
)

pytestmark = pytest.mark.triton

BF16, EPS = torch.bfloat16, 1e-6


def columns(t: int, width: int, device: torch.device) -> torch.Tensor:
    """Rows among NaN."""
    wide = torch.full((t, width + 10), torch.nan)
    wide[:, 2 : 2 + width] = random(t + width, t, width)
    return wide.to(device, BF16)[:, 2 : 2 + width]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("t", "heads", "size", "rotary"), [(0, 2, 8, 4), (1, 1, 24, 8), (5, 7, 96, 32), (2, 9, 512, 64)]
)
def test_results_are_those_of_two_launches(
    t: int, heads: int, size: int, rotary: int, packed: bool, device: torch.device
) -> None:
    q, keys = columns(t, heads * size, device), columns(t, size, device)
    norm, table = random(3, size).to(device), rotary_table(rotary).to(device)
    tokens = step_tokens([20], [t], [0], 0, device)
    slots = torch.randperm(8, generator=torch.Generator().manual_seed(t))[:t].to(device)
    slots[1::3] = -1
    entries: Entries = PackedKeys(size, rotary) if packed else Plain(size)
    found, wanted = (poisoned_cache(8, entries, BF16, device) for _ in range(2))
    insert_keys(keys, norm, EPS, table, tokens, slots, wanted)
    turned = rotate_pairs(q.clone().view(t, heads, size), table, tokens.positions, eps=EPS)
    given = q.view(t, heads, size)
    mine = rotate_and_insert(given, keys, norm, EPS, table, tokens, slots, found)
    assert mine is given and untouched_before(found)
    # Sums may be in another order.
    torch.testing.assert_close(mine, turned, atol=1e-2, rtol=1e-2)
    values = [cache.entries.unpack(cache.memory.cpu()) for cache in (found, wanted)]
    torch.testing.assert_close(*values, atol=1e-2, rtol=0.13, equal_nan=True)
    written = torch.zeros(8, dtype=torch.bool)
    written[slots[slots >= 0].cpu()] = True
    assert torch.equal(~values[0].isnan().all(1), written)


def test_bits_of_a_token_do_not_depend_on_the_others(device: torch.device) -> None:
    q, keys = columns(6, 3 * 48, device).view(6, 3, 48), columns(6, 48, device)
    norm, table = random(3, 48).to(device), rotary_table(16).to(device)
    entries, slots = PackedKeys(48, 16), torch.arange(6, device=device)
    given, together = q.clone(), poisoned_cache(6, entries, BF16, device)
    tokens = step_tokens([20], [6], [0], 0, device)
    rotate_and_insert(q, keys, norm, EPS, table, tokens, slots, together)
    for token in range(6):
        mine, alone = slice(token, token + 1), poisoned_cache(6, entries, BF16, device)
        tokens = step_tokens([20 + token], [1], [0], 0, device)
        rotate_and_insert(given[mine], keys[mine], norm, EPS, table, tokens, slots[mine], alone)
        assert torch.equal(given[token], q[token])
        assert torch.equal(alone.memory[token], together.memory[token])


def test_keys_of_other_tokens_are_refused(device: torch.device) -> None:
    cache, table = poisoned_cache(4, Plain(8), BF16, device), rotary_table(4).to(device)
    q, norm = torch.ones(3, 2, 8, device=device), torch.ones(8, device=device)
    tokens = step_tokens([0], [3], [0], 0, device)
    for keys in (torch.ones(2, 8, device=device), torch.ones(3, 6, device=device)):
        with pytest.raises(ValueError, match="not those of q"):
            rotate_and_insert(q, keys, norm, EPS, table, tokens, tokens.rows, cache)
