"""Attention over a sliding window and compressed entries, by latent queries and one key that is
the value too."""

from __future__ import annotations

import torch

from quire.kernels.reference.compressed.sparse_attention import AT_ONCE
from quire.layers.at_once import at_once
from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.layers.rotary import RotaryTable
from quire.layers.vector import Vector
from quire.models.deepseek_v4 import stored
from quire.models.deepseek_v4.compressor import Compressor, Indexer
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.parts import GroupedLinear
from quire.models.deepseek_v4.places import Places

# Of the kernels for CPUs: products of queries and keys, of weights and values, and the keys
# themselves, in float32.
SCRATCH_BYTES = 3 * 4 * AT_ONCE


class Attention:
    """x [T, H] -> [T, H]. Query heads are shared over ranks by output groups; every rank keeps the
    one key that all heads read."""

    def __init__(self, config: Config, build: Build, name: str, layer: Layer):
        self.config, self.compressed, self.layer = config, build.kernels.compressed, layer
        c = config
        width = c.heads * c.head_size
        names = [f"{name}.wq_a", f"{name}.wkv"]
        self.latent = Linear(build, names, c.hidden, [c.query_rank, c.head_size])
        self.query_norm = RMSNorm(build, f"{name}.q_norm", c.query_rank, c.eps)
        self.key_norm = RMSNorm(build, f"{name}.kv_norm", c.head_size, c.eps)
        self.queries = Linear(build, [f"{name}.wq_b"], c.query_rank, [width], shard="outputs")
        self.sinks = Vector(build, f"{name}.attn_sink", c.heads, shared=True)
        self.mix = GroupedLinear(
            build, f"{name}.wo_a", c.output_groups, width // c.output_groups, c.output_rank
        )
        ranks = c.output_groups * c.output_rank
        self.out = Linear(build, [f"{name}.wo_b"], ranks, [c.hidden], shard="inputs")
        compressed = layer.ratio > 0
        self.rope = RotaryTable(build, c.rotary_size, c.compressed_rope if compressed else c.rope)
        self.window = stored.window(c, build)
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        if compressed:
            entries, *index = stored.compressed(c, build, layer)
            self.compressor = Compressor(c, build, f"{name}.compressor", layer, entries)
            if layer.sparse:
                self.indexer = Indexer(c, build, f"{name}.indexer", layer, index[0])
        build.add_width(6 * width + ranks)
        if not build.kernels.dense:
            build.add_scratch(SCRATCH_BYTES)

    def __call__(self, x_TH: torch.Tensor, places: Places) -> torch.Tensor:
        c, tokens, table, kernels = self.config, places.tokens, self.rope(), self.compressed
        latent_TR, key_TD = torch.split(self.latent(x_TH), [c.query_rank, c.head_size], dim=1)
        latent_TR = self.query_norm(latent_TR)
        window, norm = places.paged(self.window), self.key_norm

        def queries() -> torch.Tensor:
            q_THD = self.queries(latent_TR).view(len(x_TH), -1, c.head_size)
            slots = places.slots(self.window)
            return kernels.rotate_and_insert(
                q_THD, key_TD, norm.weight, norm.eps, table, tokens, slots, window
            )

        seen = (tokens, self.sinks.values, c.head_size**-0.5, table, window, c.window)
        if (compressor := self.compressor) is None:
            mixed_THD = kernels.sparse_attention(queries(), *seen)
        else:
            chosen_TE, q_THD = at_once(
                x_TH, lambda: self._compress(compressor, x_TH, latent_TR, places), queries
            )
            entries = places.paged(compressor.entries)
            mixed_THD = kernels.sparse_attention(q_THD, *seen, entries, self.layer.ratio, chosen_TE)
        return self.out(self.mix(mixed_THD.flatten(1)))

    def _compress(
        self, compressor: Compressor, x_TH: torch.Tensor, latent_TR: torch.Tensor, places: Places
    ) -> torch.Tensor | None:
        """Write the entries that the step completes. Returns those that each token attends to,
        [T, E], None for all."""
        compressor(x_TH, places)
        return None if self.indexer is None else self.indexer(x_TH, latent_TR, places)
