"""Log-probabilities of given tokens against the reference."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from quire.kernels.reference.sampling.logprobs_of import logprobs_of as reference
from quire.kernels.sampling import Scratch
from quire.kernels.triton.sampling.logprobs_of import logprobs_of

SHAPES = [(0, 5, 3), (1, 1, 100), (3, 50, 0), (2, 130, 100), (2, 3000, 5), (2, 8500, 100)]


def scratch_of(rows: int, vocab_size: int, device: torch.device) -> Scratch:
    scratch = Scratch.allocate(rows + 1, vocab_size, device)
    for field in fields(scratch):
        tensor = getattr(scratch, field.name)
        tensor.fill_(math.nan if tensor.is_floating_point() else -(2**30))
    return scratch


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("rows", "vocab_size", "count"), SHAPES)
def test_log_probabilities_equal_reference(
    rows: int, vocab_size: int, count: int, dtype: torch.dtype, ties: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(rows, vocab_size, generator=generator) * 4
    logits = (logits.round() if ties else logits).to(device, dtype)
    targets = torch.randint(vocab_size, (rows,), generator=generator).to(device)
    found = logprobs_of(logits, targets, count, scratch_of(rows, vocab_size, device))
    wanted = reference(logits, targets, count, scratch_of(rows, vocab_size, device))
    for i in (0, 3):
        torch.testing.assert_close(found[i], wanted[i], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], wanted[2])
    # Rounded log-probabilities can tie where logits do not.
    assert ((found[1] - wanted[1]).abs() <= 1).all()


def test_only_the_row_with_nan_has_nan(device: torch.device) -> None:
    logits = torch.randn(3, 40, device=device)
    logits[1, 17] = math.nan
    targets = torch.tensor([1, 2, 3], device=device)
    logprob, _, _, top = logprobs_of(logits, targets, 4, scratch_of(3, 40, device))
    assert logprob.isnan().tolist() == [False, True, False]
    assert top.isnan().all(dim=1).tolist() == [False, True, False]


def test_forbidden_tokens_have_no_probability(device: torch.device) -> None:
    logits = torch.full((1, 300), -math.inf, device=device)
    logits[0, [5, 7]] = 0.0
    logprob, rank, ids, top = logprobs_of(
        logits, torch.tensor([9], device=device), 4, scratch_of(1, 300, device)
    )
    assert (float(logprob[0]), int(rank[0])) == (-math.inf, 3)
    assert ids[0].tolist() == [5, 7, 0, 1]
    assert top[0].tolist() == [pytest.approx(-math.log(2))] * 2 + [-math.inf] * 2


def test_more_than_a_hundred_is_refused(device: torch.device) -> None:
    logits, targets = torch.zeros(2, 200, device=device), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="count"):
        logprobs_of(logits, targets, 101, scratch_of(2, 200, device))
    with pytest.raises(ValueError, match="scratch"):
        logprobs_of(logits, targets, 1, Scratch.allocate(1, 200, device))
