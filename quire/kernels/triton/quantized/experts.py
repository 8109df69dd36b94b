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
FLOATS = ("nvfp4", "mxfp4")
SUMMED = ("int4", "int8", "fp8_block")  # which have sums of groups in registers as well
EIGHT_BITS = ("fp8", "fp8_block", "int8")


def expert_tokens(
    pairs: int, gate_up: PackedQuantized, down: PackedQuantized, *, deterministic: bool
) -> int:
    """Tokens of a block of pairs: as many as an expert has where they are spread evenly, since
    every further block reads and decodes the weights again; in deterministic mode always the same.
    """
    assert gate_up.experts is not None
    if deterministic:
        return 64
    formats, expected = {gate_up.format, down.format}, pairs / gate_up.experts
    if expected <= 4 and formats.issubset(FLOATS):
        return 8
    tokens = 16 if expected <= 8 else 32 if expected <= 20 else 64 if expected <= 64 else 128
    return tokens if formats.isdisjoint(SUMMED) else min(tokens, 64)


def expert_tile(tokens: int, format: str, shared: int) -> QuantizedTile:
    """The tile of a product of blocks of so many tokens. Measured with benchmarks/gpu/sweeps.py for
    nvfp4 and mxfp4 of 8 and 32 tokens on an H200, of 16 on an H100; else estimates."""
    floats = format in FLOATS
    rows = 128 if tokens == 128 or (floats and tokens in (8, 32)) else 64
    blocks = 2 if floats and tokens <= 16 else 1
    for room in (min(shared, 114688), shared):
        stage = int(blocks * 128 * (tokens * 2 + rows * (1 if format in EIGHT_BITS else 0.625)))
        stages = min(3 if floats else 4, (room - 4096) // stage)
        if stages >= 2:
            return QuantizedTile(rows, tokens, blocks, 8 if tokens == 128 else 4, stages)
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
    tokens = expert_tokens(pairs, gate_up, down, deterministic=deterministic)
    first, second = (expert_tile(tokens, w.format, shared) for w in (gate_up, down))
    aligned = align(ids, e, tokens)
    h = quantized_grouped_gemm(
        x, gate_up, aligned, first, kind=kind, limit=limit, bias=gate_up_bias, from_tokens=True
    )
    exact = deterministic or pairs * down.n * 4 <= CACHED_BYTES
    dtype = torch.float32 if exact else x.dtype
    y = quantized_grouped_gemm(
        h, down, aligned, second, bias=down_bias, from_tokens=False, dtype=dtype
    )
    return combine(y, weights, x.dtype)
