"""Self-attention over the paged KV cache, as one object per layer."""

from __future__ import annotations

from typing import Any

import torch

from quire.kernels.new_tokens import NewTokens
from quire.layers.build import Build
from quire.layers.cache_scales import fixed_scales
from quire.layers.inputs import StepInputs
from quire.layers.linear import Linear
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.rotary import RotaryTable
from quire.layers.vector import Vector


class Attention:
    """Query, key, value projections, rotary, cache, attention, output projection.

    `window`: sliding window in tokens. `qk_norm`: RMS norm of every query and key head before
    rotary, with `norm_offset` as in RMSNorm. `sinks`: a logit of each head joins the softmax and
    has no value. `scale` defaults to head_size ** -0.5. Query heads
    and KV heads are shared over ranks.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        rope: dict[str, Any],
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ):
        self.kernels = build.kernels
        self.scale = head_size**-0.5 if scale is None else scale
        self.softcap, self.window, self.eps = softcap, window, norm_eps
        width, kv_width = heads * head_size, kv_heads * head_size
        names = [f"{name}.{p}_proj" for p in "qkv"]
        self.qkv = Linear(
            build, names, hidden, [width, kv_width, kv_width], bias=qkv_bias, shard="outputs"
        )
        self.out = Linear(build, [f"{name}.o_proj"], width, [hidden], bias=out_bias, shard="inputs")
        self.norms: tuple[RMSNorm, RMSNorm] | None = None
        if qk_norm:
            self.norms = (
                RMSNorm(build, f"{name}.q_norm", head_size, norm_eps, norm_offset),
                RMSNorm(build, f"{name}.k_norm", head_size, norm_eps, norm_offset),
            )
        self.sinks = Vector(build, f"{name}.sinks", heads, shared=True) if sinks else None
        share = build.group.shard(kv_heads, f"KV heads of {name}")
        build.add_width(self.qkv.local_out + 2 * width // build.group.size)
        kv_share = share.stop - share.start
        fp8, build.packs_fp8 = build.kv_dtype == "fp8", True
        self.fixed_scales = fixed_scales(build, name, kv_heads, share) if fp8 else None
        self.cache = build.add_cache(
            build.kernels.cache_page(kv_share, head_size, fp8),
            window,
            heads=heads * kv_share // kv_heads,
            kv_heads=kv_share,
            key_size=head_size,
            value_size=head_size,
        )
        self.rope = RotaryTable(build, head_size, rope)

    def __call__(
        self, norm: RMSNorm, stream: ResidualStream, positions_T: torch.Tensor, step: StepInputs
    ) -> torch.Tensor:
        """Attention over the norm of the stream: what to add to it, [T, H]."""
        group = step.groups[self.cache.group]
        keys, values = self.cache.tensors
        q_norm, k_norm = (n.weight for n in self.norms) if self.norms else (None, None)
        new = NewTokens(
            self.qkv.after(norm, stream),
            positions_T,
            self.rope(),
            q_norm,
            k_norm,
            self.eps,
            group.slots,
            self.fixed_scales,
        )
        out_TD = self.kernels.rotary_attention(
            new,
            keys,
            values,
            group.block_tables,
            step.query_start,
            step.context_len,
            self.scale,
            self.window,
            self.softcap,
            None if self.sinks is None else self.sinks.values,
        )
        return self.out(out_TD)
