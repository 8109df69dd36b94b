"""Norms, activations and reductions over rows, and the noise, against references in float64."""

from __future__ import annotations

import math

import pytest
import torch

native = pytest.importorskip("quire.kernels.native._native", reason="the extension is not built")
from quire.kernels.native import ops  # noqa: E402
from quire.kernels.reference import ops as reference  # noqa: E402

ROWS = [0, 1, 3, 17, 64]
WIDTHS = [1, 15, 16, 33, 576]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_matches_float64(isa: str, width: int) -> None:
    weight = torch.randn(width)
    for rows in ROWS:
        x = torch.randn(rows, width) * 10
        expected = reference.rms_norm(x.double(), weight.double(), 1e-5).float()
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected, atol=1e-6, rtol=1e-6)
        residual, added = torch.randn(rows, width), torch.randn(rows, width)
        total = residual + added
        out = ops.add_rms_norm(added, residual, weight, 1e-5)
        assert torch.equal(residual, total)
        assert torch.equal(out, ops.rms_norm(total, weight, 1e-5))
        apart = torch.full((rows, width + 5), torch.nan)[:, 5:].copy_(x)
        assert torch.equal(ops.rms_norm(apart, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation_is_within_four_units_in_the_last_place(isa: str, kind: str) -> None:
    gate = torch.cat(
        [torch.linspace(-60, 60, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])]
    )
    x = torch.cat([gate, torch.ones_like(gate)])[None].contiguous()
    expected = reference.gated_activation(x.double(), kind)
    if kind == "gelu_tanh":  # 1 + tanh(u) cancels below zero, in float64 too
        gates = gate.double()
        expected = (
            gates / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (gates + 0.044715 * gates**3)))
        )[None]
    out = ops.gated_activation(x, kind)
    # Far from zero the exponent's argument is itself rounded: its error grows with its size.
    slack = 1 + (
        gate.double().abs() * (1 if kind == "silu" else 1 + gate.double().square() / 20)
    ).clamp(max=110)
    assert ((out - expected).abs() <= 4 * 2.0**-24 * slack * expected.abs() + 1e-37).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activation_multiplies_the_halves(isa: str, width: int) -> None:
    for rows in ROWS:
        x = torch.randn(rows, 2 * width)
        for kind in ("silu", "gelu_tanh", "swiglu_oai"):
            out = torch.full((rows, width), float("nan"))
            ops.gated_activation(x, kind, out)
            torch.testing.assert_close(
                out, reference.gated_activation(x, kind), atol=1e-6, rtol=1e-5
            )


def test_the_swiglu_oai_is_its_formula_on_both_sides_of_its_limits(isa: str) -> None:
    gate = torch.tensor([-9.0, -7.0, -0.5, 0.0, 0.5, 7.0, 9.0, 200.0])
    up = torch.tensor([-9.0, 9.0, -7.0, 7.0, -1.0, 0.25, 3.0, -200.0])
    g, u = gate.double().clamp(max=7.0), up.double().clamp(-7.0, 7.0)
    expected = (g / (1 + torch.exp(-1.702 * g)) * (u + 1)).float()[None]
    x = torch.cat([gate, up])[None]
    for kernels in (ops, reference):
        found = kernels.gated_activation(x, "swiglu_oai")
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "swiglu_oai"])
def test_a_limit_clamps_gate_from_above_and_up_from_both_sides(isa: str, kind: str) -> None:
    gate, up = torch.tensor([[-9.0, 9.0, 1.0]]), torch.tensor([[9.0, -9.0, 0.5]])
    clamped = torch.cat([gate.clamp(max=2.5), up.clamp(-2.5, 2.5)], dim=1)
    given = torch.cat([gate, up], dim=1)
    kept = given.clone()
    for kernels in (ops, reference):
        found = kernels.gated_activation(given, kind, limit=2.5)
        assert torch.equal(found, kernels.gated_activation(clamped, kind))
    assert torch.equal(given, kept)


def test_rows_do_not_depend_on_their_batch_or_a_value_on_its_lane(isa: str) -> None:
    x, weight = torch.randn(300, 578), torch.randn(578)
    for run in (
        lambda x: ops.rms_norm(x, weight, 1e-5),
        lambda x: ops.gated_activation(x, "silu"),
        lambda x: ops.gated_activation(x, "swiglu_oai"),
        lambda x: ops.gated_activation(x, "silu", limit=0.5),
        lambda x: ops.logsumexp(x)[:, None],
    ):
        whole = run(x)
        for threads in (1, 2):
            ops.set_num_threads(threads)
            assert torch.equal(torch.cat([run(row[None]) for row in x]), whole)
    same = torch.full((1, 2 * 37), 0.7)
    assert len(ops.gated_activation(same, "gelu_tanh").unique()) == 1


def test_argmax_takes_the_first_of_equals_and_minus_one_for_nan(isa: str) -> None:
    for width in (1, 16, 17, 1024, 5000):
        logits = torch.randn(7, width).round(decimals=1)
        assert torch.equal(ops.argmax(logits), reference.argmax(logits))
    logits = torch.zeros(5, 3000)
    logits[1, 2999], logits[2, 5], logits[4, :] = 1, float("nan"), float("-inf")
    logits[3, 1500] = logits[3, 2500] = float("inf")
    assert ops.argmax(logits).tolist() == [0, 2999, -1, 1500, 0]
    wide = torch.randn(4, 100)
    assert torch.equal(ops.argmax(wide[:, 10:60]), wide[:, 10:60].argmax(-1))
    assert ops.argmax(torch.empty(0, 9)).tolist() == []


def test_logsumexp_matches_float64(isa: str) -> None:
    for width in (1, 17, 49152):
        logits = torch.randn(3, width) * 20
        torch.testing.assert_close(
            ops.logsumexp(logits), reference.logsumexp(logits), atol=1e-6, rtol=2e-7
        )
    special = torch.tensor(
        [[1.0, float("nan")], [float("-inf")] * 2, [float("inf"), 0.0], [float("-inf"), 2.0]]
    )
    assert torch.equal(
        ops.logsumexp(special).nan_to_num(nan=99),
        torch.tensor([99.0, -math.inf, math.inf, 2.0]).nan_to_num(nan=99),
    )


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123's kat_vectors for philox4x32-10."""
    words = reference._philox(0, 0, 0, 1)
    assert [f"{int(word):08x}" for word in words] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_gumbel_equals_the_reference(seed: int) -> None:
    for choice, position, size in [(0, 0, 1), (3, 17, 5), (2**31, 2**31 + 5, 4097)]:
        torch.testing.assert_close(
            ops.gumbel(seed, choice, position, size),
            reference.gumbel(seed, choice, position, size),
            atol=1e-6,
            rtol=1e-6,
        )
    assert ops.gumbel(seed, 0, 0, 0).shape == (0,)
    assert torch.equal(ops.gumbel(seed, 1, 2, 9000)[:700], ops.gumbel(seed, 1, 2, 700))


def test_gumbel_noise_has_the_distributions_mean_and_variance() -> None:
    noise = ops.gumbel(7, 0, 0, 400_000).double()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


def test_wrong_arguments_are_refused_by_name() -> None:
    x = torch.randn(2, 8)
    for call, message in [
        (lambda: ops.rms_norm(x, torch.randn(7), 1e-5), "weight"),
        (lambda: ops.rms_norm(x.t(), torch.randn(2), 1e-5), "x: expected"),
        (lambda: ops.add_rms_norm(x, x[:1], torch.randn(8), 1e-5), "residual"),
        (lambda: ops.gated_activation(x, "relu"), "kind"),
        (lambda: ops.gated_activation(x[:, :7].contiguous(), "silu"), "x: expected"),
        (lambda: ops.argmax(torch.empty(2, 0)), "logits"),
        (lambda: ops.argmax(x.double()), "logits"),
        (lambda: ops.set_num_threads(0), "threads"),
        (lambda: ops.set_isa("quantum"), "isa"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
