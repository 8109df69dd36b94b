"""The chosen experts' gated feed-forward of each token with quantised weights, and their sum."""

from __future__ import annotations

import torch

from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.moe.combine import combine
from quire.kernels.triton.moe.experts import CACHED_BYTES
from quire.kernels.triton.quantized.experts_small import experts_small
from quire.kernels.triton.quantized.gemm import QuantizedTile
from quire.kernels.triton.quantized.grouped_gemm import quantized_grouped_gemm
from quire.kernels.triton.quantized.linear import Tokens
from quire.kernels.triton.quantized.operands import check_experts
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.quantize import QuantizedTokens
from quire.kernels.triton.quantized.scaled_experts import scaled_experts, takes_quantized_pairs

# Up to here each pair reads its expert's weights by itself. Measured on an H200 with
# benchmarks/gpu/quantized.py: faster at 64 pairs, much slower at 256.
SMALL_PAIRS = 64


def expert_tile(
    pairs: int, experts: int, k: int, format: str, *, deterministic: bool, shared: int
) -> QuantizedTile:
    """The tile for blocks of pairs: as many tokens as an expert has where they are spread evenly,
    since every further block reads and decodes the weights again.

    Deterministic mode starts at 64 tokens for the same instruction in every batch. Measured on an
    H100 with benchmarks/gpu/sweeps.py for nvfp4 and mxfp4 up to 32 tokens; else estimates.
    """
    expected = pairs / experts
    summed = format in ("int4", "int8", "fp8_block")
    eight = format in ("fp8", "fp8_block", "int8")
    tokens = 64
    if not deterministic:
        tokens = 16 if expected <= 8 else 32 if expected <= 20 else 64 if expected <= 64 else 128
    tokens = min(tokens, 64) if summed else tokens
    rows = 128 if tokens == 128 else 64
    floats = format in ("nvfp4", "mxfp4")
    blocks = 2 if floats and (tokens == 16 or (tokens == 32 and k >= 1024)) else 1
    for room in (min(shared, 114688), shared):
        stage = int(blocks * 128 * (tokens * 2 + rows * (1 if eight else 0.625)))
        stages = min(3 if floats else 4, (room - 4096) // stage)
        if stages >= 2:
            return QuantizedTile(rows, tokens, blocks, rows // 16, stages)
    return QuantizedTile(64, tokens, 1, 4, 2)


def quantized_experts(
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
    deterministic: bool,
) -> torch.Tensor:
    """sum over k of weights[t, k] * (down[e] @ h + down_bias[e]), [T, H] bfloat16; operands as in
    experts_small, for any number of tokens, which may be quantised already where
    takes_quantized_pairs says so.

    The path follows from shapes alone. `deterministic`: one path for every T, with one order of
    sums, on which tokens are never quantised; the experts' results are float32 until summed.
    Otherwise those of many pairs are rounded to bfloat16. Raises ValueError for what does not go
    together.
    """
    pairs, e = ids.numel(), gate_up.experts
    assert e is not None
    if isinstance(x, QuantizedTokens) or (
        not deterministic and takes_quantized_pairs(gate_up, down, pairs, x.device)
    ):
        return scaled_experts(
            x, weights, ids, gate_up, down, kind, limit=limit,
            gate_up_bias=gate_up_bias, down_bias=down_bias,
        )  # fmt: skip
    if pairs <= SMALL_PAIRS and not deterministic:
        return experts_small(
            x, weights, ids, gate_up, down, kind, limit=limit,
            gate_up_bias=gate_up_bias, down_bias=down_bias,
        )  # fmt: skip
    check_experts(x, weights, ids, gate_up, down, kind, gate_up_bias, down_bias)
    shared = shared_memory(x.device)
    first, second = (
        expert_tile(pairs, e, w.k, w.format, deterministic=deterministic, shared=shared)
        for w in (gate_up, down)
    )
    if second.tokens != first.tokens:
        raise ValueError(f"gate_up is {gate_up.format}, down {down.format}: not served together")
    aligned = align(ids, e, first.tokens)
    h = quantized_grouped_gemm(
        x, gate_up, aligned, first, kind=kind, limit=limit, bias=gate_up_bias, from_tokens=True
    )
    exact = deterministic or pairs * down.n * 4 <= CACHED_BYTES
    dtype = torch.float32 if exact else x.dtype
    y = quantized_grouped_gemm(
        h, down, aligned, second, bias=down_bias, from_tokens=False, dtype=dtype
    )
    return combine(y, weights, x.dtype)
