"""Multi-head latent attention (DeepSeek-V2, section 2.1), absorbed.

Each token leaves one latent in the cache, which all heads share: `rank` values that keys and values
are made of, and a key of `rope` rotated values. Instead of making the keys, each query is taken
back to the latent's space, and what attention mixes is made into values afterwards: both with the
halves of one weight, `kv_b_proj`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from quire.formats.layout import is_quantized
from quire.kv import BLOCK_SIZE
from quire.layers.build import Build, DenseKernels
from quire.layers.inputs import StepInputs
from quire.layers.linear import Linear
from quire.layers.norm import ResidualStream, RMSNorm
from quire.layers.read import read_matrix, to_dense
from quire.layers.rotary import RotaryTable
from quire.weights.source import TensorInfo, WeightSource

# Of the norms inside, whatever the config says of others (transformers, DeepSeek's own code).
NORM_EPS = 1e-6


@dataclass(frozen=True)
class LatentSizes:
    """Values of a head's query and key without rotary (`nope`) and with it (`rope`), of its value,
    and of a latent without the rotated key."""

    nope: int
    rope: int
    value: int
    rank: int


class HeadProducts:
    """`kv_b_proj` [heads * (nope + value), rank], for each head a matrix towards the latent and one
    away from it. Heads are shared over ranks. Held dense, as quantised rows cannot be transposed.
    """

    def __init__(self, build: Build, name: str, heads: int, sizes: LatentSizes):
        self.build, self.name, self.heads, self.sizes = build, f"{name}.weight", heads, sizes
        self._share = build.group.shard(heads, f"heads of {name}")
        self.local_heads = self._share.stop - self._share.start
        self._keys: Any = None
        self._values: Any = None
        build.add_weight(self)

    def tensors(self) -> list[TensorInfo]:
        rows = self.heads * (self.sizes.nope + self.sizes.value)
        return [TensorInfo(self.name, (rows, self.sizes.rank), "bf16")]

    def nbytes(self, formats: Callable[[str], str]) -> int:
        nbytes, sizes = self.build.kernels.packed_nbytes, self.sizes
        format = formats(self.name)
        each = nbytes(format, sizes.rank, sizes.nope) + nbytes(format, sizes.value, sizes.rank)
        return int(self.local_heads * each)

    def widened(self, formats: Callable[[str], str]) -> dict[str, str]:
        """The reason where the weight is stored as codes."""
        reason = "latent attention multiplies with it in both directions"
        return {self.name: reason} if is_quantized(formats(self.name)) else {}

    def load(self, source: WeightSource) -> None:
        build, sizes = self.build, self.sizes
        height = sizes.nope + sizes.value
        rows = slice(self._share.start * height, self._share.stop * height)
        stored = to_dense(read_matrix(build, source, self.name, rows, layer=""), build.dtype)
        heads = stored.view(-1, height, sizes.rank)
        keys, values = torch.split(heads, [sizes.nope, sizes.value], dim=1)
        self._keys = self._pack(keys.transpose(1, 2).contiguous())
        self._values = self._pack(values.contiguous())

    def absorb(self, q_THN: torch.Tensor, out_THR: torch.Tensor) -> None:
        """Queries taken to the latent's space."""
        self._multiply(q_THN, self._keys, out_THR)

    def expand(self, mixed_THR: torch.Tensor) -> torch.Tensor:
        """Values made of mixed latents, [T, heads, value]."""
        return self._multiply(mixed_THR, self._values)

    def _pack(self, weight_HNK: torch.Tensor) -> Any:
        packed = [self.build.kernels.pack(weight) for weight in weight_HNK]
        if not self.build.kernels.dense:
            return packed
        return cast(DenseKernels, self.build.kernels).stack(len(packed), iter(packed))

    def _multiply(
        self, x_THK: torch.Tensor, weight: Any, out_THN: torch.Tensor | None = None
    ) -> torch.Tensor:
        kernels = self.build.kernels
        if kernels.dense:
            return cast(DenseKernels, kernels).head_linear(x_THK, weight, out_THN)
        if out_THN is None:
            out_THN = torch.empty(x_THK.shape[0], len(weight), weight[0].n)
        for head, packed in enumerate(weight):
            kernels.linear(x_THK[:, head], packed, out=out_THN[:, head])
        return out_THN


class LatentAttention:
    """Projections to queries and latents, the cache, attention, output projection.

    `q_rank`: queries, too, are made of a latent of so many values; None: of the layer's input.
    `interleaved`: which values rotate together, as in the kernels' latent_cache. Heads are shared
    over ranks; every rank has all latents.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        *,
        hidden: int,
        heads: int,
        sizes: LatentSizes,
        q_rank: int | None,
        rope: dict[str, Any],
        scale: float,
        interleaved: bool = True,
        bias: bool = False,
    ):
        self.kernels, self.sizes, self.scale = build.kernels, sizes, scale
        self.interleaved, self.q_rank = interleaved, q_rank or 0
        width, query = sizes.rank + sizes.rope, heads * (sizes.nope + sizes.rope)
        latents = f"{name}.kv_a_proj_with_mqa"
        self.q_norm: RMSNorm | None = None
        if q_rank is None:
            self.down = Linear(build, [latents], hidden, [width], bias=bias)
            self.q = Linear(build, [f"{name}.q_proj"], hidden, [query], shard="outputs")
        else:
            names = [f"{name}.q_a_proj", latents]
            self.down = Linear(build, names, hidden, [q_rank, width], bias=bias)
            self.q_norm = RMSNorm(build, f"{name}.q_a_layernorm", q_rank, NORM_EPS)
            self.q = Linear(build, [f"{name}.q_b_proj"], q_rank, [query], shard="outputs")
        self.norm = RMSNorm(build, f"{name}.kv_a_layernorm", sizes.rank, NORM_EPS)
        self.up = HeadProducts(build, f"{name}.kv_b_proj", heads, sizes)
        self.out = Linear(
            build, [f"{name}.o_proj"], heads * sizes.value, [hidden], bias=bias, shard="inputs"
        )
        self.heads = self.up.local_heads
        build.add_width(
            self.down.local_out + self.q.local_out + self.heads * (width + sizes.rank + sizes.value)
        )
        self.cache = build.add_cache(
            ((1, BLOCK_SIZE, width),),
            None,
            heads=self.heads,
            kv_heads=1,
            key_size=width,
            value_size=sizes.rank,
        )
        self.rope = RotaryTable(build, sizes.rope, rope)

    def __call__(
        self, norm: RMSNorm, stream: ResidualStream, positions_T: torch.Tensor, step: StepInputs
    ) -> torch.Tensor:
        """Attention over the norm of the stream: what to add to it, [T, H]."""
        group, sizes = step.groups[self.cache.group], self.sizes
        [cache] = self.cache.tensors
        q_TD, latents_TW = self._project(norm, stream)
        queries_TD = self.kernels.latent_cache(
            q_TD, latents_TW, positions_T, self.rope(), self.norm.weight, NORM_EPS, cache,
            group.slots, self.heads, self.interleaved,
        )  # fmt: skip
        tokens = q_TD.shape[0]
        shape = (tokens, self.heads, -1)
        self.up.absorb(
            q_TD.view(shape)[:, :, : sizes.nope], queries_TD.view(shape)[:, :, : sizes.rank]
        )
        mixed_TD = self.kernels.latent_attention(
            queries_TD, cache, group.block_tables, step.query_start, step.context_len, self.scale,
            sizes.rank,
        )  # fmt: skip
        values_THV = self.up.expand(mixed_TD.view(tokens, self.heads, sizes.rank))
        return self.out(values_THV.view(tokens, self.heads * sizes.value))

    def _project(self, norm: RMSNorm, stream: ResidualStream) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, heads * (nope + rope)] and latents [T, rank + rope]."""
        if self.q_norm is None:
            x_TH = norm.read(stream)
            return self.q(x_TH), self.down(x_TH)
        both_TD = self.down.after(norm, stream)
        q_TQ = both_TD[:, : self.q_rank]
        return self.q.after(self.q_norm, ResidualStream(q_TQ)), both_TD[:, self.q_rank :]
