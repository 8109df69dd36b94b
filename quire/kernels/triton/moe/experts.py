"""The chosen experts' gated feed-forward of each token, and their weighted sum."""

from __future__ import annotations

import torch

from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.moe.combine import combine
from quire.kernels.triton.moe.experts_small import experts_small
from quire.kernels.triton.moe.grouped_gemm import grouped_gemm
from quire.kernels.triton.moe.operands import check_experts
from quire.kernels.triton.moe.tiles import tiles

# Up to here pairs mostly have experts of their own, and reading some weights twice costs less than
# sorting.
SMALL_PAIRS = 64
# Results of pairs up to this many bytes of float32 stay in a large GPU's L2 cache.
CACHED_BYTES = 32 * 2**20


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    *,
    limit: float = 0.0,
    deterministic: bool,
) -> torch.Tensor:
    """sum over k of weights[t, k] * down[e] @ (act(gate[e] @ x[t]) * (up[e] @ x[t])) with
    e = ids[t, k]: [T, H] in x's dtype.

    x [T, H], `weights` float32 [T, K], `ids` int32 [T, K], `gate_up` [E, 2 I, H] with gate rows
    first, `down` [E, H, I], all contiguous; x and the experts' weights bfloat16, float16 or
    float32. `kind`: the activation, "silu" or "gelu_tanh", with `limit` as in gated_activation.

    Products are in float32; act(gate) * up is rounded to x's dtype, a token's slots are added in
    their order in float32, and the sum is rounded. The path follows from shapes alone.
    `deterministic`: one path for every T, with one order of sums, so that a token's bits do not
    depend on the others; the experts' results are float32 until summed. Otherwise those of many
    pairs are rounded to x's dtype, which halves what the sum reads. Raises ValueError for what does
    not go together.
    """
    (t, k), (e, hidden, _) = ids.shape, down.shape
    pairs = t * k
    if pairs <= SMALL_PAIRS and not deterministic:
        return experts_small(x, weights, ids, gate_up, down, kind, limit)
    check_experts(x, weights, ids, gate_up, down, kind)
    first, second = tiles(
        pairs, e, x.dtype, deterministic=deterministic, shared=shared_memory(x.device)
    )
    aligned = align(ids, e, first.rows)
    h = grouped_gemm(x, gate_up, aligned, first, kind=kind, limit=limit, from_tokens=True)
    exact = deterministic or pairs * hidden * 4 <= CACHED_BYTES
    dtype = torch.float32 if exact else x.dtype
    y = grouped_gemm(h, down, aligned, second, from_tokens=False, dtype=dtype)
    return combine(y, weights, x.dtype)
