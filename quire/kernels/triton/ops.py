"""The GPU kernels under the names that layers call (quire/layers/build.py: Kernels)."""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels.dense import DenseWeights
from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.activation.gated_activation import limit_of
from quire.kernels.reference.attention.fp8_cache import head_size_of
from quire.kernels.reference.packed import PackedWeight
from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.attention.latent_attention import latent_attention
from quire.kernels.triton.attention.paged_attention import Scratch, paged_attention
from quire.kernels.triton.compressed.ops import CompressedKernels
from quire.kernels.triton.embedding.embedding import embedding
from quire.kernels.triton.gemm.head_linear import head_linear
from quire.kernels.triton.gemm.linear import add_norm_linear, gated_linear, linear
from quire.kernels.triton.moe.experts import experts
from quire.kernels.triton.moe.route import route
from quire.kernels.triton.moe.route_groups import route_groups
from quire.kernels.triton.moe.route_tokens import route_tokens
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm
from quire.kernels.triton.quantized.experts import quantized_experts
from quire.kernels.triton.quantized.grouped_linear import quantized_grouped_linear
from quire.kernels.triton.quantized.linear import (
    Tokens,
    quantized_gated_linear,
    quantized_linear,
    quantized_norm_linear,
)
from quire.kernels.triton.quantized.pack import PackedQuantized
from quire.kernels.triton.quantized.scaled_experts import norm_for_experts
from quire.kernels.triton.rotary.latent_cache import latent_cache
from quire.kernels.triton.rotary.rotary_cache import check_rotary, rotary_cache


class TritonKernels(DenseWeights):
    """Kernels for one GPU, activations in one number format; shapes as in the references
    (quire/kernels/reference/ops.py).

    `deterministic`: a row's bits depend on nothing but the row. `scratch` is the attention
    kernels' memory; who allocates caches sets it. `own_requests`: no two rows of a step for
    decoding are of one request, of which one would read what the other writes.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, deterministic: bool):
        super().__init__(dtype, device)
        self.deterministic = deterministic
        self.scratch: Scratch | None = None
        self.own_requests = True
        self.compressed = CompressedKernels(deterministic)

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    rotary_cache = staticmethod(rotary_cache)
    latent_cache = staticmethod(latent_cache)
    head_linear = staticmethod(head_linear)
    route = staticmethod(route)
    route_groups = staticmethod(route_groups)
    route_tokens = staticmethod(route_tokens)

    def embedding(
        self, ids: torch.Tensor, weight: PackedWeight, scale: float = 1.0
    ) -> torch.Tensor:
        return embedding(ids, weight.data, scale)

    def gated_activation(self, x: torch.Tensor, kind: str, *, limit: float = 0.0) -> torch.Tensor:
        return gated_activation(x, kind, limit=limit_of(kind, limit))

    def linear(
        self,
        x: Tokens,
        weight: PackedWeight | PackedQuantized,
        bias: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(weight, PackedQuantized):
            return quantized_linear(x, weight, bias, deterministic=self.deterministic, out=out)
        assert isinstance(x, torch.Tensor)
        return linear(x, weight.data, bias, deterministic=self.deterministic, out=out)

    def grouped_linear(
        self, x: torch.Tensor, weight: torch.Tensor | PackedQuantized
    ) -> torch.Tensor:
        """[T, G N] of x [T, G K] and a stack of weights [G, N, K], each group's own."""
        if isinstance(weight, PackedQuantized):
            return quantized_grouped_linear(x, weight, deterministic=self.deterministic)
        groups, _, k = weight.shape
        return head_linear(x.view(x.shape[0], groups, k), weight).flatten(1)

    def gated_linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight | PackedQuantized,
        bias: torch.Tensor | None,
        kind: str,
        then: PackedWeight | PackedQuantized | None = None,
        *,
        limit: float = 0.0,
    ) -> Tokens:
        """The gated product, stored as `linear` takes it fastest with the weight `then`. `limit`:
        as in gated_activation, where it is not the kind's own."""
        limit = limit_of(kind, limit)
        if isinstance(weight, PackedQuantized):
            return quantized_gated_linear(
                x, weight, kind, bias, limit=limit, deterministic=self.deterministic,
                then=_quantized(then),
            )  # fmt: skip
        if limit:
            return self.gated_activation(self.linear(x, weight, bias), kind, limit=limit)
        return gated_linear(x, weight.data, kind, bias, deterministic=self.deterministic)

    def add_norm_linear(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        weight: PackedWeight | PackedQuantized,
        bias: torch.Tensor | None,
        kind: str,
        then: PackedWeight | PackedQuantized | None = None,
        normed: torch.Tensor | None = None,
        *,
        limit: float = 0.0,
    ) -> tuple[Tokens, torch.Tensor]:
        """(product with the norm of residual + x, that sum), gated where a `kind` is named, then
        stored as in gated_linear. The residual given may be overwritten; the norm itself is also
        written to `normed` where that is given, which takes a dense weight."""
        given = (x, residual, norm_weight, eps)
        limit = limit_of(kind, limit)
        if isinstance(weight, PackedQuantized):
            assert normed is None
            return quantized_norm_linear(
                *given, weight, bias, kind, limit=limit,
                deterministic=self.deterministic, then=_quantized(then),
            )  # fmt: skip
        y, residual = add_norm_linear(
            *given, weight.data, bias, "" if limit else kind, normed,
            deterministic=self.deterministic,
        )  # fmt: skip
        return self.gated_activation(y, kind, limit=limit) if limit else y, residual

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        context_len: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        *,
        new: NewTokens | None = None,
    ) -> torch.Tensor:
        """As many tokens as rows of tables: each has one, and the kernel for decoding serves them;
        so a step of other kinds must have more tokens than rows, padding included."""
        assert self.scratch is not None
        return paged_attention(
            q, k_cache, v_cache, block_tables, query_start, context_len, scale, window, softcap,
            sinks, decode=q.shape[0] == block_tables.shape[0], deterministic=self.deterministic,
            scratch=self.scratch, new=new,
        )  # fmt: skip

    def rotary_attention(
        self, new: NewTokens, k_cache: torch.Tensor, v_cache: torch.Tensor, *others: Any
    ) -> torch.Tensor:
        heads = check_rotary(new.qkv, new.cos_sin, k_cache, v_cache, new.fixed)
        if not self.own_requests:
            q = new.written(rotary_cache, k_cache, v_cache)
            return self.attention(q, k_cache, v_cache, *others)
        q = new.qkv[:, : heads * head_size_of(k_cache.shape[3], k_cache.dtype)]
        return self.attention(q, k_cache, v_cache, *others, new=new)

    def latent_attention(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        context_len: torch.Tensor,
        scale: float,
        rank: int,
    ) -> torch.Tensor:
        """As many tokens as requests: as in `attention`."""
        assert self.scratch is not None
        return latent_attention(
            q, cache, block_tables, query_start, context_len, scale, rank,
            decode=q.shape[0] == block_tables.shape[0], deterministic=self.deterministic,
            scratch=self.scratch,
        )  # fmt: skip

    def norm_for_experts(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor | PackedQuantized,
        down: torch.Tensor | PackedQuantized,
        slots: int,
    ) -> tuple[torch.Tensor, Tokens] | None:
        """(norm of residual + x, the same as `experts` takes it fastest with `slots` experts for
        each token), the sum stored in `residual`; None where they take the norm as it is."""
        if self.deterministic or isinstance(gate_up, torch.Tensor):
            return None
        assert isinstance(down, PackedQuantized)
        return norm_for_experts(x, residual, norm_weight, eps, gate_up, down, slots)

    def experts(
        self,
        x: Tokens,
        weights: torch.Tensor,
        ids: torch.Tensor,
        gate_up: torch.Tensor | PackedQuantized,
        down: torch.Tensor | PackedQuantized,
        kind: str,
        gate_up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        limit: float = 0.0,
    ) -> torch.Tensor:
        limit = limit_of(kind, limit)
        if isinstance(gate_up, PackedQuantized):
            assert isinstance(down, PackedQuantized)
            return quantized_experts(
                x, weights, ids, gate_up, down, kind, limit=limit,
                gate_up_bias=gate_up_bias, down_bias=down_bias, deterministic=self.deterministic,
            )  # fmt: skip
        assert isinstance(down, torch.Tensor) and isinstance(x, torch.Tensor)
        assert gate_up_bias is None  # the plan refuses such experts
        return experts(
            x, weights, ids, gate_up, down, kind, limit=limit, deterministic=self.deterministic
        )


def _quantized(weight: PackedWeight | PackedQuantized | None) -> PackedQuantized | None:
    return weight if isinstance(weight, PackedQuantized) else None
