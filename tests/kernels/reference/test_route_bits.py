"""The router among groups of experts on a CPU, whose plan promises bits."""

import pytest
import torch

from quire.kernels.reference.moe.route_groups import route_groups


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_tokens_bits_do_not_depend_on_the_others_of_its_step(sigmoid: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(67, 12, generator=generator)
    correction = torch.rand(12, generator=generator) if sigmoid else None
    given = (correction, 4, 4, 2, sigmoid, True, 2.5)
    weights, ids = route_groups(logits, *given)
    for count in range(1, 8):
        for first in range(0, 67 - count, count):
            part = slice(first, first + count)
            found_weights, found_ids = route_groups(logits[part], *given)
            assert torch.equal(found_weights, weights[part])
            assert torch.equal(found_ids, ids[part])
