"""Compressed entries of a layer, and the indexer that chooses among them."""

from __future__ import annotations

from itertools import pairwise

import torch

from quire.kernels.reference.compressed.compress import compress
from quire.kernels.reference.compressed.rotate_pairs import rotate_pairs
from quire.kernels.reference.compressed.select_entries import select_entries
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
        self.layer, self.entries = layer, entries
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
        ratio, step = self.layer.ratio, places.step
        rows_T2W = self.rows(x_TH).view(len(x_TH), 2, -1)
        rows_T2W[:, 1] += self.positions.data[places.positions_T % ratio]
        pooled_ED, token_E = compress(
            rows_T2W, self.state.tensor, places.state_slots_B, step.query_start, step.context_len,
            ratio, self.layer.sparse,
        )  # fmt: skip
        begun_E = places.positions_T[token_E] - (ratio - 1)
        entries_ED = rotate_pairs(self.norm(pooled_ED), self.rope(), begun_E)
        self.entries.write(places.group(self.entries.cache).slots[token_E] // ratio, entries_ED)


class Indexer:
    """Chooses the entries that each token attends to, by keys of its own."""

    def __init__(self, config: Config, build: Build, name: str, layer: Layer, keys: Stored):
        self.config, self.layer = config, layer
        heads, size = config.index_heads, config.index_size
        self.queries = Linear(build, [f"{name}.wq_b"], config.query_rank, [heads * size])
        self.weights = Linear(build, [f"{name}.weights_proj"], config.hidden, [heads])
        self.keys = Compressor(config, build, f"{name}.compressor", layer, keys)
        self.rope = RotaryTable(build, config.rotary_size, config.compressed_rope)
        self.scale = (size * heads) ** -0.5
        build.add_width(2 * heads * size + heads)

    def __call__(self, x_TH: torch.Tensor, latent_TR: torch.Tensor, places: Places) -> torch.Tensor:
        """Entries [T, E] in ascending order, -1 where there are fewer. `latent`: what the
        attention's own queries are made of."""
        c, ratio = self.config, self.layer.ratio
        keys = self.keys.entries
        self.keys(x_TH, places)
        queries = self.queries(latent_TR).view(-1, c.index_heads, c.index_size)
        queries = rotate_pairs(queries, self.rope(), places.positions_T)
        weights = self.weights(x_TH) * self.scale
        visible_T, starts = places.visible(ratio), places.step.query_start.tolist()
        width = min(c.index_topk, int(visible_T.max())) if len(visible_T) else 0
        found = torch.full((len(x_TH), width), -1)
        for row, (first, last) in enumerate(pairwise(starts)):
            if first < last:
                mine = slice(first, last)
                slots = places.entry_slots(keys.cache, ratio, row, int(visible_T[last - 1]))
                chosen = select_entries(
                    queries[mine], weights[mine], keys.read(slots), visible_T[mine], c.index_topk
                )
                found[mine, : chosen.shape[1]] = chosen
        return found
