"""The grouped product of quire.kernels.triton.moe in plain torch: expert by expert."""

from __future__ import annotations

import torch

from quire.kernels.reference.activation.gated_activation import gated_activation
from quire.kernels.reference.moe.align import Aligned


def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    aligned: Aligned,
    tile: object = None,
    *,
    kind: str | None = None,
    limit: float = 0.0,
    from_tokens: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    pairs = aligned.pairs.long()
    # Each sorted position's expert, from the blocks that cover all positions.
    blocks = int(aligned.blocks)
    lengths = (aligned.ends - aligned.starts)[:blocks].long()
    experts = aligned.experts[:blocks].long().repeat_interleave(lengths)
    rows = x[pairs // aligned.experts_per_token] if from_tokens else x
    n = weight.shape[1] // (1 if kind is None else 2)
    out = torch.empty((len(pairs), n), dtype=dtype or x.dtype, device=x.device)
    for expert in set(experts.tolist()):
        mine = experts == expert
        y = rows[mine].float() @ weight[expert].float().T
        if kind is not None:
            y = gated_activation(y, kind, limit=limit)
        out[mine if from_tokens else pairs[mine]] = y.to(out.dtype)
    return out
