"""Compressed entries of a layer, and the indexer that chooses among them."""

from __future__ import annotations

import torch

from quire.layers.build import Build
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.layers.rotary import RotaryTable
from quire.models.deepseek_v4.config import Config, Layer
from quire.models.deepseek_v4.parts import FloatTable
from quire.models.deepseek_v4.places import Places
from quire.models.deepseek_v4.stored import Stored

# Rows that a request's open windows have room for beyond what an entry pools: with them up to as
# many tokens of a step that were drafted and refused have overwritten nothing that is still needed.
SPARE_ROWS = 32


class Compressor:
    """Pools every `layer.ratio` tokens into one of the layer's `entries`.

    What tokens of an open window give is kept for each request in `state`, a row of values and
    logits at the token's position modulo the number of rows.
    """

    def __init__(self, config: Config, build: Build, name: str, layer: Layer, entries: Stored):
        self.kernels, self.layer, self.entries = build.kernels.compressed, layer, entries
        size = entries.entries.size
        width = 2 * size if layer.sparse else size
        self.rows = Linear(build, [f"{name}.wkv", f"{name}.wgate"], config.hidden, [width, width])
        self.positions = FloatTable(build, f"{name}.ape", layer.ratio, width)
        self.norm = RMSNorm(build, f"{name}.norm", size, config.eps)
        self.rope = RotaryTable(build, config.rotary_size, config.compressed_rope)
        span = 2 * layer.ratio if layer.sparse else layer.ratio
        # After a prefix hit the window before, which the next entry pools too, is computed again.
        self.state = build.add_state(
            (span + SPARE_ROWS, 2, width), layer.ratio if layer.sparse else 0
        )
        build.add_width(4 * width + 2 * span * width // layer.ratio)

    def __call__(self, x_TH: torch.Tensor, places: Places) -> None:
        """Takes in a step's tokens and writes the entries that they complete to the cache."""
        layer, norm, entries = self.layer, self.norm, self.entries
        self.kernels.compress(
            self.rows.exact(x_TH).view(len(x_TH), 2, -1), self.positions.data, self.state.tensor,
            norm.weight, norm.eps, self.rope(), places.tokens, places.slots(entries),
            places.paged(entries), layer.ratio, layer.sparse,
        )  # fmt: skip


class Indexer:
    """Chooses the entries that each token attends to, by keys of its own.

    The published scores are (size * heads) ** -0.5 of these: a factor that orders nothing."""

    def __init__(self, config: Config, build: Build, name: str, layer: Layer, keys: Stored):
        self.config, self.kernels, self.layer = config, build.kernels.compressed, layer
        heads, size = config.index_heads, config.index_size
        self.queries = Linear(build, [f"{name}.wq_b"], config.query_rank, [heads * size])
        self.weights = Linear(build, [f"{name}.weights_proj"], config.hidden, [heads])
        self.keys = Compressor(config, build, f"{name}.compressor", layer, keys)
        self.rope = RotaryTable(build, config.rotary_size, config.compressed_rope)
        build.add_width(2 * heads * size + heads)

    def __call__(self, x_TH: torch.Tensor, latent_TR: torch.Tensor, places: Places) -> torch.Tensor:
        """Entries [T, E] in ascending order, -1 where there are fewer. `latent`: what the
        attention's own queries are made of."""
        c, tokens = self.config, places.tokens
        self.keys(x_TH, places)
        queries = self.queries(latent_TR).view(-1, c.index_heads, c.index_size)
        queries = self.kernels.rotate_pairs(queries, self.rope(), tokens.positions)
        return self.kernels.select_entries(
            queries, self.weights.exact(x_TH), tokens, places.paged(self.keys.entries),
            self.layer.ratio, c.index_topk,
        )  # fmt: skip
