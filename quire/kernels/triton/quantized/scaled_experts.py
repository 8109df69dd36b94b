"""The chosen experts' gated feed-forward on e4m3 tokens, for many pairs of token and slot.

Tokens are quantised once before the first product, each pair's inner values between the products.
"""

from __future__ import annotations

import torch

from quire.kernels.triton.gemm.shared import is_hopper
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.moe.combine import combine
from quire.kernels.triton.moe.experts import CACHED_BYTES, SMALL_PAIRS
from quire.kernels.triton.quantized.linear import EXACT, Tokens, group_of_tokens
from quire.kernels.triton.quantized.operands import check_experts
from quire.kernels.triton.quantized.pack import COLUMNS, PackedQuantized
from quire.kernels.triton.quantized.quantize import (
    QuantizedTokens,
    add_rms_norm_quantize,
    quantize,
)
from quire.kernels.triton.quantized.scaled_grouped_gemm import GroupedTile, scaled_grouped_gemm

# Pairs for each expert in the mean from which tokens are quantised: with fewer, weights that are
# decoded in registers take about the time of their bytes. An estimate until measured with
# benchmarks/gpu/quantized.py.
SCALED_FROM = 4
Tiles = tuple[GroupedTile, GroupedTile]
# Hopper: (gate and up, down) by tokens. Low tiles want many bytes of weights in flight (two or
# three programs of about 100 or 60 KB on each multiprocessor), high ones much arithmetic for each
# byte that they move to shared memory. Estimates until measured (benchmarks/gpu/sweeps.py).
TILES: dict[int, Tiles] = {
    16: (GroupedTile(16, 128, 4, 5, 2, True), GroupedTile(16, 128, 4, 3, 3, True)),
    32: (GroupedTile(32, 128, 4, 5, 2, True), GroupedTile(32, 128, 4, 3, 3, True)),
    64: (GroupedTile(64, 128, 4, 4, 2), GroupedTile(64, 128, 4, 3, 3)),
    128: (GroupedTile(128, 256, 8, 4, 1), GroupedTile(128, 256, 8, 4, 1)),
}
# With scales by blocks each step's products need registers beside the sums.
BLOCK_TILES: dict[int, Tiles] = {
    **TILES,
    128: (GroupedTile(128, 128, 8, 3, 2), GroupedTile(128, 128, 8, 3, 2)),
}


def takes_quantized_pairs(
    gate_up: PackedQuantized, down: PackedQuantized, pairs: int, device: torch.device
) -> bool:
    """Whether so many pairs are multiplied in e4m3: then a kernel before may quantise the tokens
    as it stores them. Not in deterministic mode, where every number of pairs takes one kernel."""
    assert gate_up.experts is not None
    return (
        pairs > SMALL_PAIRS
        and pairs >= SCALED_FROM * gate_up.experts
        and gate_up.format in ("fp8", "fp8_block")
        and gate_up.format == down.format
        and "none" not in (gate_up.activation, down.activation)
        and (is_hopper(device) or device.type == "cpu")  # the interpreter has all instructions
        and (gate_up.format == "fp8" or down.k % COLUMNS == 0)
    )


def scaled_tiles(pairs: int, experts: int, format: str) -> Tiles:
    """The tiles for as many tokens as an expert has where they are spread evenly: every further
    block reads the weights again."""
    expected = pairs / experts
    tokens = 16 if expected <= 8 else 32 if expected <= 20 else 64 if expected <= 64 else 128
    return (TILES if format == "fp8" else BLOCK_TILES)[tokens]


def norm_for_experts(
    x_TH: torch.Tensor | None,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    gate_up: PackedQuantized,
    down: PackedQuantized,
    slots: int,
) -> tuple[torch.Tensor, QuantizedTokens] | None:
    """residual += x in place (not without an x); its RMS norm, which a router reads, and the same
    as quantized_experts takes it with `slots` experts for each token. None, and nothing is done,
    where those are not so many that they are quantised."""
    pairs, device = residual_TH.shape[0] * slots, residual_TH.device
    if not takes_quantized_pairs(gate_up, down, pairs, device):
        return None
    normed = torch.empty(residual_TH.shape, dtype=residual_TH.dtype, device=device)
    tokens = add_rms_norm_quantize(
        x_TH, residual_TH, norm_weight_H, eps, group_of_tokens(gate_up),
        fixed=gate_up.input_scale, normed=normed,
    )  # fmt: skip
    return normed, QuantizedTokens(*tokens)


def scaled_experts(
    x: Tokens,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: PackedQuantized,
    down: PackedQuantized,
    kind: str,
    *,
    limit: float = 0.0,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """quantized_experts of tokens that are quantised, or are to be: [T, H] bfloat16.

    `gate_up` and `down` both fp8 or both fp8_block, whose `activation` says with which scales;
    gate and up are multiplied with each other in float32, and rounded to bfloat16 before they are
    quantised. `tiles`: others than scaled_tiles'. Raises ValueError for what does not go together.
    """
    given = x if isinstance(x, torch.Tensor) else None
    check_experts(given, weights, ids, gate_up, down, kind, gate_up_bias, down_bias)
    pairs, e = ids.numel(), gate_up.experts
    assert e is not None
    group = group_of_tokens(gate_up)
    if isinstance(x, torch.Tensor):
        x = QuantizedTokens(*quantize(x, group, fixed=gate_up.input_scale))
    first, second = tiles or scaled_tiles(pairs, e, gate_up.format)
    aligned = align(ids, e, first.tokens)
    h = scaled_grouped_gemm(
        x, gate_up, aligned, first, kind=kind, limit=limit, bias=gate_up_bias, from_tokens=True,
        exact=EXACT,
    )  # fmt: skip
    inner = QuantizedTokens(*quantize(h, group, fixed=down.input_scale))
    dtype = torch.float32 if pairs * down.n * 4 <= CACHED_BYTES else torch.bfloat16
    y = scaled_grouped_gemm(
        inner, down, aligned, second, bias=down_bias, from_tokens=False, dtype=dtype, exact=EXACT
    )
    return combine(y, weights, torch.bfloat16)
