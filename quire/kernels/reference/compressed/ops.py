"""The kernels of compressed attention and of streams in plain torch, on the CPU.

Every token's bits depend on nothing but its request: not on the other tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from quire.kernels.compressed import Mix, Paged, StepTokens, StreamWeights
from quire.kernels.reference.compressed import compress as compressing
from quire.kernels.reference.compressed import select_entries as selecting
from quire.kernels.reference.compressed import sparse_attention as attending
from quire.kernels.reference.compressed.rotate_pairs import rotate_pairs
from quire.kernels.reference.streams.mixing import collapse, mixing, sigmoid, spread


class CompressedKernels:
    """Made of the `linear` and `rms_norm` of the kernels that it belongs to. Streams may have any
    format; what is computed with them is float32."""

    def __init__(
        self, linear: Callable[..., torch.Tensor], rms_norm: Callable[..., torch.Tensor]
    ) -> None:
        self.linear, self.rms_norm = linear, rms_norm

    # -- streams -----------------------------------------------------------------------------

    def mix_streams(
        self,
        streams_TND: torch.Tensor,
        written: tuple[torch.Tensor, Mix] | None,
        weights: StreamWeights,
        norm_D: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Mix]:
        """(streams, the norm [T, D] of what the next layer reads of them, how its result goes
        back). `written`: a layer's result y [T, D] and its mix, which the streams get first."""
        if written is not None:
            streams_TND = self.write_streams(written[0], streams_TND, written[1])
        reads, writes, matrix = mixing(
            self._logits(streams_TND, weights), weights.base, weights.scale,
            weights.streams, weights.stream_eps, weights.steps,
        )  # fmt: skip
        x_TD = self.rms_norm(collapse(streams_TND.float(), reads), norm_D, eps)
        return streams_TND, x_TD.to(streams_TND.dtype), Mix(writes, matrix)

    def write_streams(
        self, y_TD: torch.Tensor, streams_TND: torch.Tensor, mix: Mix
    ) -> torch.Tensor:
        """The streams after a layer that gave y."""
        streams = spread(y_TD.float(), streams_TND.float(), mix.writes, mix.matrix)
        return streams.to(streams_TND.dtype)

    def collapse_streams(self, streams_TND: torch.Tensor, weights: StreamWeights) -> torch.Tensor:
        """The sum of the streams that the head reads: [T, D]."""
        logits_TN = self._logits(streams_TND, weights) * weights.scale + weights.base
        reads = sigmoid(logits_TN) + weights.stream_eps
        return collapse(streams_TND.float(), reads).to(streams_TND.dtype)

    def _logits(self, streams_TND: torch.Tensor, weights: StreamWeights) -> torch.Tensor:
        """A product with all streams of a token, over their root mean square."""
        flat = streams_TND.flatten(1).float()
        square = flat.square().mean(-1, keepdim=True)
        return self.linear(flat, weights.matrix) * torch.rsqrt(square + weights.eps)

    # -- queries and keys ----------------------------------------------------------------------

    def rotate_pairs(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        positions_T: torch.Tensor,
        inverse: bool = False,
        eps: float | None = None,
    ) -> torch.Tensor:
        """x [T, H, D] as in rotate_pairs; with `eps` each head is first divided by its root mean
        square. The memory of x may be overwritten and returned."""
        if eps is not None:
            ones = torch.ones(x.shape[-1])
            x = self.rms_norm(x.reshape(-1, x.shape[-1]), ones, eps).view(x.shape)
        return rotate_pairs(x, cos_sin, positions_T, inverse)

    def insert_keys(
        self,
        keys_TD: torch.Tensor,
        norm_D: torch.Tensor,
        eps: float,
        cos_sin: torch.Tensor,
        tokens: StepTokens,
        slots_T: torch.Tensor,
        cache: Paged,
    ) -> None:
        """Write each token's key to its slot (int64 [T], negative: nowhere), after norm and
        rotation. Rows of `keys` may lie apart."""
        normed_TD = self.rms_norm(keys_TD.contiguous(), norm_D, eps)
        _write(cache, slots_T, rotate_pairs(normed_TD, cos_sin, tokens.positions))

    def rotate_and_insert(
        self,
        q_THD: torch.Tensor,
        keys_TD: torch.Tensor,
        norm_D: torch.Tensor,
        eps: float,
        cos_sin: torch.Tensor,
        tokens: StepTokens,
        slots_T: torch.Tensor,
        cache: Paged,
    ) -> torch.Tensor:
        """rotate_pairs of the queries, each head divided by its root mean square, and insert_keys
        of the same tokens."""
        self.insert_keys(keys_TD, norm_D, eps, cos_sin, tokens, slots_T, cache)
        return self.rotate_pairs(q_THD, cos_sin, tokens.positions, eps=eps)

    # -- compressed entries --------------------------------------------------------------------

    def compress(
        self,
        rows_T2W: torch.Tensor,
        positions_RW: torch.Tensor,
        state_SR2W: torch.Tensor,
        norm_D: torch.Tensor,
        eps: float,
        cos_sin: torch.Tensor,
        tokens: StepTokens,
        slots_T: torch.Tensor,
        cache: Paged,
        ratio: int,
        overlap: bool,
    ) -> None:
        """Pool the windows that the step's tokens complete into entries of the cache, normed and
        rotated by the position of their first token, and keep the step's rows in `state`
        (compress.py).

        rows float32: values and logits of each token, to whose logits `positions` float32 [ratio,
        W] are added by place in the window; they may be overwritten. slots int64 [T]: those of the
        tokens, of which an entry has `ratio`; where one is negative, nothing is written.
        """
        rows_T2W[:, 1] += positions_RW[tokens.positions % ratio]
        pooled_ED, token_E = compressing.compress(
            rows_T2W, state_SR2W, tokens.state_slots, tokens.query_start, tokens.context_len,
            ratio, overlap,
        )  # fmt: skip
        begun_E = tokens.positions[token_E] - (ratio - 1)
        entries_ED = rotate_pairs(self.rms_norm(pooled_ED, norm_D, eps), cos_sin, begun_E)
        _write(cache, slots_T[token_E] // ratio, entries_ED)

    def select_entries(
        self,
        queries_THD: torch.Tensor,
        weights_TH: torch.Tensor,
        tokens: StepTokens,
        keys: Paged,
        ratio: int,
        count: int,
    ) -> torch.Tensor:
        """The `count` best of the entries that each token may see (select_entries.py): integers
        [T, at most `count`] in ascending order, -1 where there are fewer."""
        visible_T = (tokens.positions + 1) // ratio
        width = min(count, int(visible_T.max())) if len(visible_T) else 0
        found = torch.full((len(visible_T), width), -1)
        for row, (first, last) in enumerate(pairwise(tokens.query_start.tolist())):
            if first < last:
                mine = slice(first, last)
                entry_E = torch.arange(int(visible_T[last - 1])).expand(1, -1)
                slots_E = _slots(keys, torch.tensor([row]), entry_E)[0]
                chosen = selecting.select_entries(
                    queries_THD[mine], weights_TH[mine], keys.entries.unpack(keys.memory[slots_E]),
                    visible_T[mine], count,
                )  # fmt: skip
                found[mine, : chosen.shape[1]] = chosen
        return found

    def sparse_attention(
        self,
        q_THD: torch.Tensor,
        tokens: StepTokens,
        sinks_H: torch.Tensor,
        scale: float,
        cos_sin: torch.Tensor | None,
        window: Paged,
        size: int,
        compressed: Paged | None = None,
        ratio: int = 0,
        chosen_TE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H, D]: each token attends to the last `size` tokens in `window`, itself among them,
        and to the `compressed` entries that are `chosen` (integers, -1: none), or to all that it
        may see, one for each `ratio` tokens before it (sparse_attention.py). The result is rotated
        back, where there is a table for it."""
        position_TK = tokens.positions[:, None] - torch.arange(size - 1, -1, -1)
        caches = [(window.memory, _slots(window, tokens.rows, position_TK))]
        if compressed is not None:
            if chosen_TE is None:
                visible_T = (tokens.positions + 1) // ratio
                entry_E = torch.arange(int(visible_T.max()) if len(visible_T) else 0)
                hidden_TE = entry_E >= visible_T[:, None]
                chosen_TE = entry_E.expand(len(visible_T), -1).masked_fill(hidden_TE, -1)
            caches.append((compressed.memory, _slots(compressed, tokens.rows, chosen_TE)))
        mixed_THD = attending.sparse_attention(q_THD, caches, window.entries, sinks_H, scale)
        if cos_sin is None:
            return mixed_THD
        return rotate_pairs(mixed_THD, cos_sin, tokens.positions, inverse=True)


def _slots(cache: Paged, rows_T: torch.Tensor, index_TN: torch.Tensor) -> torch.Tensor:
    """Where in the cache the vectors of each token's request lie; of negative ones -1."""
    table = cache.block_tables[rows_T].long()
    block = table.gather(1, (index_TN // cache.per_block).clamp(min=0))
    slots = block * cache.per_block + index_TN % cache.per_block
    return slots.masked_fill(index_TN < 0, -1)


def _write(cache: Paged, slots_N: torch.Tensor, values_ND: torch.Tensor) -> None:
    kept = slots_N >= 0
    cache.memory[slots_N[kept]] = cache.entries.pack(values_ND[kept], cache.memory.dtype)
