"""The sampler's noise: Philox words equal the reference's bits, and its logarithms are good."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quire.kernels.reference import ops
from quire.kernels.triton.sampling.noise import gumbel, noise_of, noise_of_tile, philox

TILE = 64


@triton.jit
def words_kernel(key_ptr, words_ptr, tile_ptr, single_ptr, first, TILE: tl.constexpr):
    position = tl.load(key_ptr).to(tl.uint32, bitcast=True)
    choice = tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    low = tl.load(key_ptr + 2).to(tl.uint32, bitcast=True)
    high = tl.load(key_ptr + 3).to(tl.uint32, bitcast=True)
    group = tl.arange(0, TILE // 4)
    counter = (first // 4 + group).to(tl.uint32)
    w0, w1, w2, w3 = philox(counter, position, choice, low, high)
    tl.store(words_ptr + 4 * group, w0.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * group + 1, w1.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * group + 2, w2.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 4 * group + 3, w3.to(tl.int32, bitcast=True))
    index = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    noise = noise_of_tile(first, position, choice, low, high, TILE)
    tl.store(tile_ptr + index, noise)
    token = tl.arange(0, TILE)
    tl.store(single_ptr + token, noise_of(first + token, position, choice, low, high))


@triton.jit
def gumbel_kernel(words_ptr, out_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words_ptr + index, mask=index < size, other=0).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + index, gumbel(word), mask=index < size)


KEYS = [
    (0, 0, 0, 0),
    (1, 0, 5, 64),
    (2**64 - 1, 127, 2**31 - 1, 2**18 - 64),
    (0x8000_0000_0000_0000, 1, 17, 0),
    (0x1234_5678_9ABC_DEF0, 3, 4096, 152000 - 152000 % 64),
]


@pytest.mark.parametrize(("seed", "choice", "position", "first"), KEYS)
def test_words_and_noise_are_the_references(
    seed: int, choice: int, position: int, first: int, device: torch.device
) -> None:
    key = np.array([position, choice, seed & 0xFFFF_FFFF, seed >> 32], dtype=np.uint32)
    key_ptr = torch.from_numpy(key.view(np.int32)).to(device)
    words = torch.zeros(TILE, dtype=torch.int32, device=device)
    tile, single = (torch.full((TILE,), torch.nan, device=device) for _ in range(2))
    words_kernel[(1,)](key_ptr, words, tile, single, first, TILE=TILE)
    wanted = ops._philox(seed, choice, position, (first + TILE) // 4)[first:]
    assert words.cpu().numpy().view(np.uint32).tolist() == wanted.tolist()
    assert torch.equal(tile, single)
    noise = ops.gumbel(seed, choice, position, first + TILE)[first:]
    torch.testing.assert_close(single.cpu(), noise, rtol=1e-6, atol=1e-6)


def test_noise_is_good_at_both_ends_and_everywhere_between(device: torch.device) -> None:
    edges = np.arange(1500)
    middle = np.random.default_rng(0).integers(0, 2**24, 5000)
    upper = np.concatenate([edges, middle, 2**24 - 1 - edges, 2**23 + edges - 750])
    words = (upper << 8).astype(np.uint32).view(np.int32)
    found = torch.full((len(words),), torch.nan, device=device)
    grid = (triton.cdiv(len(words), 1024),)
    gumbel_kernel[grid](torch.from_numpy(words).to(device), found, len(words), BLOCK=1024)
    wanted = -np.log(-np.log((upper + 0.5) * 2.0**-24))
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=2e-7, atol=3e-7)
