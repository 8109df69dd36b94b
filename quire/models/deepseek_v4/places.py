"""Where the tokens of one step, and what they attend to, lie in the caches."""

from __future__ import annotations

from functools import cached_property

import torch

from quire.errors import QuireError
from quire.kv import BLOCK_SIZE
from quire.layers.build import CacheLayer
from quire.layers.inputs import GroupInputs, StepInputs


class Places:
    """One step's places, made once for all layers.

    Slots count values of a cache: those of a window's cache tokens, those of a compressed one
    entries. Negative slots are nobody's.
    """

    def __init__(self, positions_T: torch.Tensor, step: StepInputs):
        self.positions_T, self.step = positions_T, step
        lengths = step.query_start.diff().long()
        self.row_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self._windows: dict[tuple[int, int], torch.Tensor] = {}
        self._entries: dict[tuple[int, int], torch.Tensor] = {}

    @cached_property
    def state_slots_B(self) -> torch.Tensor:
        """Which request's open windows belong to each row."""
        if self.step.state_slots is None:
            raise QuireError("step_failed", "this runner keeps no state of requests")
        return self.step.state_slots

    def group(self, cache: CacheLayer) -> GroupInputs:
        return self.step.groups[cache.group]

    def window(self, cache: CacheLayer, size: int) -> torch.Tensor:
        """Slots [T, size] of each token's window, the token itself last."""
        key = cache.group, size
        if key not in self._windows:
            position = self.positions_T[:, None] - torch.arange(size - 1, -1, -1)
            block = self._block(cache, (position // BLOCK_SIZE).clamp(min=0))
            slots = block * BLOCK_SIZE + position % BLOCK_SIZE
            self._windows[key] = slots.masked_fill(position < 0, -1)
        return self._windows[key]

    def visible(self, ratio: int) -> torch.Tensor:
        """How many compressed entries each token may see: int64 [T]."""
        return (self.positions_T + 1) // ratio

    def all_entries(self, cache: CacheLayer, ratio: int) -> torch.Tensor:
        """Slots [T, E] of all entries that each token may see."""
        key = cache.group, ratio
        if key not in self._entries:
            visible_T = self.visible(ratio)
            entry_E = torch.arange(int(visible_T.max()) if len(visible_T) else 0)
            entries = entry_E.expand(len(visible_T), -1).masked_fill(
                entry_E >= visible_T[:, None], -1
            )
            self._entries[key] = self.entries(cache, ratio, entries)
        return self._entries[key]

    def entries(self, cache: CacheLayer, ratio: int, entries_TE: torch.Tensor) -> torch.Tensor:
        """Slots of compressed entries that each token names; -1 stays -1."""
        each = cache.block_size // ratio
        block = self._block(cache, (entries_TE // each).clamp(min=0))
        return (block * each + entries_TE % each).masked_fill(entries_TE < 0, -1)

    def entry_slots(self, cache: CacheLayer, ratio: int, row: int, count: int) -> torch.Tensor:
        """Slots [count] of the first entries of one row's request."""
        each, entry_E = cache.block_size // ratio, torch.arange(count)
        table = self.group(cache).block_tables[row].long()
        return table[entry_E // each] * each + entry_E % each

    def _block(self, cache: CacheLayer, index_TN: torch.Tensor) -> torch.Tensor:
        """The blocks at these places of each token's block table."""
        table = self.group(cache).block_tables[self.row_T].long()
        return table.gather(1, index_TN)
