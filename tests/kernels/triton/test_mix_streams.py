"""Reading and writing of streams against the reference, and a token's bits in every batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.kernels.compressed import Mix, StreamWeights
from quire.kernels.reference.compressed.ops import CompressedKernels
from quire.kernels.reference.norm.rms_norm import rms_norm
from quire.kernels.triton.streams import write_streams as write_module
from quire.kernels.triton.streams.mix_streams import collapse_streams, mix_streams
from quire.kernels.triton.streams.write_streams import write_streams
from tests.kernels.triton.moe_inputs import poisoned_memory, random

pytestmark = pytest.mark.triton

REFERENCE = CompressedKernels(lambda x, matrix: x @ matrix.T, rms_norm)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# (tokens, streams, channels): more than one part, odd ones, one stream, three as in a test model.
SIZES = [(0, 4, 64), (1, 4, 200), (3, 3, 72), (5, 4, 33), (2, 1, 1), (9, 2, 130)]


def weights_of(n: int, d: int, device: torch.device, head: bool = False) -> StreamWeights:
    rows = n if head else n * (n + 2)
    return StreamWeights(
        random(1, rows, n * d, scale=(n * d) ** -0.5).to(device),
        random(2, rows, scale=0.5).to(device),
        random(3, 1 if head else 3).to(device),
        n, 1e-6, 1e-6, 20,
    )  # fmt: skip


def inputs(
    t: int, n: int, d: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, Mix]]:
    """Streams, and what is written to them: rows of y lie apart, with NaN between them."""
    y = torch.full((t, d + 8), torch.nan, dtype=dtype, device=device)
    y[:, :d] = random(4, t, d)
    mix = Mix(random(5, t, n).to(device), random(6, t, n, n).softmax(-1).to(device))
    return random(7, t, n, d, scale=2.0).to(device, dtype), (y[:, :d], mix)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_mix_equals_reference(
    size: tuple[int, int, int], dtype: torch.dtype, write: bool, device: torch.device
) -> None:
    streams, written = inputs(*size, dtype, device)
    weights, norm = weights_of(*size[1:], device), random(8, size[2]).to(device)
    given: tuple[Any, ...] = (streams, written if write else None, weights, norm, 1e-5)
    with poisoned_memory():
        found, x, mix = mix_streams(*given)
    assert write or found is streams
    close(found, REFERENCE.mix_streams(*given)[0], dtype)
    # Of the streams as they were stored here, whose rounding may go the other way.
    _, wanted, exact = REFERENCE.mix_streams(found, None, weights, norm, 1e-5)
    close(x, wanted, dtype)
    close(mix.writes, exact.writes, torch.float32)
    close(mix.matrix, exact.matrix, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_writing_and_collapsing_equal_reference(
    size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    streams, (y, mix) = inputs(*size, dtype, device)
    weights = weights_of(*size[1:], device, head=True)
    with poisoned_memory():
        found, collapsed = write_streams(y, streams, mix), collapse_streams(streams, weights)
    close(found, REFERENCE.write_streams(y, streams, mix), dtype)
    close(collapsed, REFERENCE.collapse_streams(streams, weights), dtype)


def test_streams_may_be_one_row_of_memory(device: torch.device) -> None:
    """As the first layer has them: each token's embedding is all of its streams."""
    weights, norm = weights_of(4, 80, device), torch.ones(80, device=device)
    one, (y, mix) = inputs(3, 4, 80, torch.bfloat16, device)
    spread = one[:, :1].expand(-1, 4, -1)
    for written in (None, (y, mix)):
        found = mix_streams(spread, written, weights, norm, 1e-6)
        wanted = mix_streams(spread.contiguous(), written, weights, norm, 1e-6)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert torch.equal(found[2].matrix, wanted[2].matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tokens_bits_do_not_depend_on_its_batch(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = 64
    n, d = 4, 4096
    if device.type == "cpu":  # which interprets few programs in the time there is
        few, n, d = 9, 3, 72
        monkeypatch.setattr(write_module, "FEW_TOKENS", few)
    tokens = few + 6
    streams, (y, mix) = inputs(tokens, n, d, dtype, device)
    weights, norm = weights_of(n, d, device), random(8, d).to(device)
    whole = mix_streams(streams, (y, mix), weights, norm, 1e-6)
    for first, count in ((0, 1), (tokens - 1, 1), (3, 7), (5, few)):
        some = slice(first, first + count)
        mine = Mix(mix.writes[some], mix.matrix[some])
        found = mix_streams(streams[some], (y[some], mine), weights, norm, 1e-6)
        assert torch.equal(found[0], whole[0][some]) and torch.equal(found[1], whole[1][some])
        assert torch.equal(found[2].writes, whole[2].writes[some])
        assert torch.equal(found[2].matrix, whole[2].matrix[some])


def test_the_mix_is_nearly_doubly_stochastic_and_no_column_is_a_row(device: torch.device) -> None:
    """By hand: with one logit far above the others of its row, a stream passes into one other."""
    weights = weights_of(2, 64, device)
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 30.0, 0.0, 0.0], device=device)
    weights = replace(weights, scale=torch.zeros(3, device=device), base=base, steps=20)
    streams, _ = inputs(1, 2, 64, torch.float32, device)
    _, _, mix = mix_streams(streams, None, weights, torch.ones(64, device=device), 1e-6)
    torch.testing.assert_close(mix.writes, torch.ones(1, 2, device=device))
    assert float(mix.matrix[0, 0, 1]) > 0.9 and float(mix.matrix[0, 0, 0]) < 0.1
    torch.testing.assert_close(mix.matrix.sum(1), torch.ones(1, 2, device=device))


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    streams, (y, mix) = inputs(2, 4, 64, torch.float32, device)
    weights, norm = weights_of(4, 64, device), torch.ones(64, device=device)
    with pytest.raises(ValueError, match="weights"):
        collapse_streams(streams, weights)
    with pytest.raises(ValueError, match="base"):
        mix_streams(streams, None, replace(weights, base=weights.base[1:]), norm, 1e-6)
    with pytest.raises(ValueError, match="matrix"):
        mix_streams(streams[..., :32], None, weights, norm, 1e-6)
    with pytest.raises(ValueError, match="y"):
        write_streams(y[:1], streams, mix)
    with pytest.raises(ValueError, match="mix"):
        write_streams(y, streams, Mix(mix.writes, mix.matrix.mT))
