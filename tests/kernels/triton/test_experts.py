"""Mixture of experts as a whole against the reference; deterministic bits of a row."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.experts import experts as reference
from quire.kernels.reference.moe.experts import experts_small as small_reference
from quire.kernels.triton.gemm.shared import HOPPER_SHARED
from quire.kernels.triton.moe import experts_small as small_module
from quire.kernels.triton.moe.experts import SMALL_PAIRS, experts
from quire.kernels.triton.moe.experts_small import experts_small
from quire.kernels.triton.moe.tiles import tiles
from tests.kernels.triton.moe_inputs import poisoned_memory, random, random_ids

pytestmark = pytest.mark.triton

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    t: int, e: int, k: int, h: int, i: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """x, weights, ids, gate_up, down."""
    return (
        random(1, t, h).to(device, dtype),
        random(2, t, k).softmax(-1).to(device),
        random_ids(3, t, e, k).to(device),
        random(4, e, 2 * i, h, scale=2 * h**-0.5).to(device, dtype),
        random(5, e, h, i, scale=2 * i**-0.5).to(device, dtype),
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """By the size of the whole: where large terms cancel, one value may be far off relatively."""
    assert torch.isfinite(found).all()
    error = (found.double() - wanted.double()).norm()
    assert error <= TOLERANCE[wanted.dtype] * wanted.double().norm()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "silu"), (torch.float16, "gelu_tanh"), (torch.float32, "silu")],
)
@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"),
    [(0, 4, 2, 32, 16), (1, 4, 2, 16, 24), (3, 5, 3, 33, 7), (2, 9, 8, 8, 6), (7, 2, 1, 1, 1)],
)
def test_few_tokens_equal_reference(
    t: int, e: int, k: int, h: int, i: int, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    given = inputs(t, e, k, h, i, dtype, device)
    with poisoned_memory():
        found = experts_small(*given, kind)
    close(found, small_reference(*given, kind))


@pytest.mark.parametrize(("h", "i"), [(1100, 1032), (1024, 2100)])
def test_rows_of_several_steps(
    h: int, i: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(small_module, "ROWS", 512)  # fewer programs to interpret
    given = inputs(1, 3, 2, h, i, torch.bfloat16, device)
    with poisoned_memory():
        found = experts_small(*given, "silu")
    close(found, small_reference(*given, "silu"))


@pytest.mark.parametrize(("t", "deterministic"), [(2, False), (2, True), (24, False)])
def test_a_limit_clamps_gate_and_up(t: int, deterministic: bool, device: torch.device) -> None:
    given = inputs(t, 5, 3, 72, 40, torch.bfloat16, device)
    with poisoned_memory():
        found = experts(*given, "silu", limit=0.3, deterministic=deterministic)
    close(found, reference(*given, "silu", limit=0.3))
    with pytest.raises(AssertionError):
        close(found, reference(*given, "silu"))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("t", "e", "k", "h", "i"), [(0, 4, 2, 32, 16), (1, 4, 2, 32, 24), (24, 5, 3, 72, 40)]
)
def test_experts_equal_reference(
    t: int, e: int, k: int, h: int, i: int, dtype: torch.dtype, deterministic: bool,
    device: torch.device,
) -> None:  # fmt: skip
    given = inputs(t, e, k, h, i, dtype, device)
    with poisoned_memory():
        found = experts(*given, "silu", deterministic=deterministic)
    assert found.dtype == dtype
    close(found, reference(*given, "silu"))


def test_all_tokens_to_one_expert(device: torch.device) -> None:
    x, weights, ids, gate_up, down = inputs(90, 5, 1, 40, 24, torch.float32, device)
    ids.fill_(3)
    gate_up[:3], down[4] = torch.nan, torch.nan
    with poisoned_memory():
        found = experts(x, weights, ids, gate_up, down, "silu", deterministic=False)
    close(found, reference(x, weights, ids, gate_up, down, "silu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deterministic_bits_do_not_depend_on_the_other_tokens(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, weights, ids, gate_up, down = inputs(37, 6, 3, 72, 40, dtype, device)
    together = experts(x, weights, ids, gate_up, down, "silu", deterministic=True)
    for row in (0, 17, 36):
        mine = slice(row, row + 1)
        alone = experts(
            x[mine], weights[mine], ids[mine], gate_up, down, "silu", deterministic=True
        )
        assert torch.equal(alone[0], together[row])


def test_deterministic_bits_are_equal_for_both_tile_heights(device: torch.device) -> None:
    # Long sums show a difference sooner; the interpreter has no time for them.
    h, i = (136, 40) if device.type == "cpu" else (2048, 768)
    x, weights, ids, gate_up, down = inputs(150, 2, 1, h, i, torch.bfloat16, device)
    heights = [
        tiles(n, 2, torch.bfloat16, deterministic=True, shared=HOPPER_SHARED)[0].rows
        for n in (150, 20)
    ]
    assert heights == [128, 64]
    together = experts(x, weights, ids, gate_up, down, "silu", deterministic=True)
    some = slice(100, 120)
    fewer = experts(x[some], weights[some], ids[some], gate_up, down, "silu", deterministic=True)
    assert torch.equal(fewer, together[some])


def test_the_path_follows_from_the_number_of_pairs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quire.kernels.triton.moe import experts as module

    taken = []

    def small(*args: object) -> torch.Tensor:
        taken.append(args)
        return torch.empty(0)

    monkeypatch.setattr(module, "experts_small", small)
    for t, deterministic in ((SMALL_PAIRS // 2, False), (SMALL_PAIRS // 2, True), (33, False)):
        given = inputs(t, 4, 2, 16, 16, torch.float32, device)
        experts(*given, "silu", deterministic=deterministic)
    assert len(taken) == 1 and len(taken[0][0]) == SMALL_PAIRS // 2


def test_what_does_not_go_together_is_refused(device: torch.device) -> None:
    for t in (1, 60):
        x, weights, ids, gate_up, down = inputs(t, 4, 2, 16, 16, torch.float32, device)
        with pytest.raises(ValueError, match="kind"):
            experts(x, weights, ids, gate_up, down, "relu", deterministic=False)
        with pytest.raises(ValueError, match="x: expected"):
            experts(x[:, :8], weights, ids, gate_up, down, "silu", deterministic=False)
        with pytest.raises(ValueError, match="weights: expected"):
            experts(x, weights.half(), ids, gate_up, down, "silu", deterministic=False)
        apart = gate_up.mT.contiguous().mT
        with pytest.raises(ValueError, match="gate_up: must be contiguous"):
            experts(x, weights, ids, apart, down, "silu", deterministic=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 8 GB of GPU memory")
@pytest.mark.parametrize("t", [2, 70])
def test_weights_past_two_to_the_31_elements(t: int, device: torch.device) -> None:
    e, h, i = 600, 1024, 2048
    gate_up = torch.empty(e, 2 * i, h, dtype=torch.bfloat16, device=device)
    down = torch.empty(e, h, i, dtype=torch.bfloat16, device=device)
    x, weights, _, some_gate_up, some_down = inputs(t, 1, 1, h, i, torch.bfloat16, device)
    gate_up[-1], down[-1] = some_gate_up[0], some_down[0]
    ids = torch.full((t, 1), e - 1, dtype=torch.int32, device=device)
    found = experts(x, weights, ids, gate_up, down, "silu", deterministic=False)
    close(found, reference(x, weights, torch.zeros_like(ids), some_gate_up, some_down, "silu"))
