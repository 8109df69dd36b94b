"""Attention to keys of each token's own: the formula, memory that holds NaN, bits."""

from __future__ import annotations

import torch

from quire.kernels.reference.compressed.entries import Plain
from quire.kernels.reference.compressed.sparse_attention import sparse_attention

HEADS, SIZE, SLOTS = 3, 8, 300
PLAIN = Plain(SIZE)


def inputs(tokens: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a cache, slots [T, K] of which some are none, sinks."""
    generator = torch.Generator().manual_seed(4)
    slots = torch.randint(0, SLOTS, (tokens, keys), generator=generator)
    slots[torch.rand(slots.shape, generator=generator) < 0.3] = -1
    return (
        torch.randn(tokens, HEADS, SIZE, generator=generator),
        torch.randn(SLOTS, SIZE, generator=generator),
        slots,
        torch.randn(HEADS, generator=generator),
    )


def test_it_is_the_softmax_over_both_caches_and_the_sink() -> None:
    q, cache, slots, sinks = inputs(9, 90)
    other = cache.flip(0) * 2
    more = slots[:, :70].flip(1)
    found = sparse_attention(q, [(cache, slots), (other, more)], PLAIN, sinks, 0.3)
    for t in range(9):
        keys = torch.cat([cache[slots[t][slots[t] >= 0]], other[more[t][more[t] >= 0]]])
        scores = torch.cat([q[t] @ keys.T * 0.3, sinks[:, None]], dim=1)
        wanted = scores.softmax(-1)[:, :-1] @ keys
        torch.testing.assert_close(found[t], wanted)


def test_what_is_not_named_may_be_anything() -> None:
    q, cache, slots, sinks = inputs(9, 40)
    expected = sparse_attention(q, [(cache, slots)], PLAIN, sinks, 0.3)
    named = torch.zeros(SLOTS, dtype=torch.bool)
    named[slots[slots >= 0]] = True
    cache[~named] = torch.nan
    cache[0] = torch.nan
    slots[slots == 0] = -1
    q2, cache2, slots2, _ = inputs(9, 40)
    slots2[slots2 == 0] = -1
    wanted = sparse_attention(q2, [(cache2, slots2)], PLAIN, sinks, 0.3)
    assert torch.equal(sparse_attention(q, [(cache, slots)], PLAIN, sinks, 0.3), wanted)
    assert expected.isfinite().all()


def test_without_any_key_the_sink_takes_all() -> None:
    q, cache, _, sinks = inputs(2, 1)
    none = torch.full((2, 5), -1)
    assert not sparse_attention(q, [(cache, none)], PLAIN, sinks, 0.3).any()
    assert sparse_attention(q[:0], [(cache, none[:0])], PLAIN, sinks, 0.3).shape == (0, HEADS, SIZE)


def test_a_token_has_its_bits_alone_and_beside_tokens_with_more_keys() -> None:
    q, cache, slots, sinks = inputs(33, 150)
    whole = sparse_attention(q, [(cache, slots)], PLAIN, sinks, 0.3)
    wide = torch.nn.functional.pad(slots, (0, 111), value=-1)
    assert torch.equal(sparse_attention(q, [(cache, wide)], PLAIN, sinks, 0.3), whole)
    for t in range(33):
        one = slice(t, t + 1)
        alone = sparse_attention(q[one], [(cache, slots[one])], PLAIN, sinks, 0.3)
        assert torch.equal(alone[0], whole[t])
