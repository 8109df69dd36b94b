"""Where the tokens of one step lie in the caches."""

from __future__ import annotations

import torch

from quire.errors import QuireError
from quire.kernels.compressed import Paged, StepTokens
from quire.layers.inputs import StepInputs
from quire.models.deepseek_v4.stored import Stored


class Places:
    """One step's places, made once for all layers. Raises QuireError for a runner that keeps no
    state of requests."""

    def __init__(self, positions_T: torch.Tensor, step: StepInputs):
        if step.state_slots is None:
            raise QuireError("step_failed", "this runner keeps no state of requests")
        self.step = step
        rows_T = _rows(positions_T, step) if step.rows is None else step.rows
        self.tokens = StepTokens(
            positions_T, rows_T, step.query_start, step.context_len, step.state_slots
        )

    def slots(self, stored: Stored) -> torch.Tensor:
        """int64 [T]: where each token is written, block * tokens of a block + offset."""
        return self.step.groups[stored.cache.group].slots

    def paged(self, stored: Stored) -> Paged:
        tables = self.step.groups[stored.cache.group].block_tables
        return Paged(stored.memory, stored.entries, tables, stored.per_block)


def _rows(positions_T: torch.Tensor, step: StepInputs) -> torch.Tensor:
    token_T = torch.arange(len(positions_T), device=positions_T.device)
    ends_B = step.query_start[1:].long()
    rows_T = torch.searchsorted(ends_B, token_T, right=True)
    return rows_T.masked_fill(rows_T == len(ends_B), -1)
