"""One pass of a model over rows that are laid out flat, on the CPU."""

from __future__ import annotations

import torch

from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.registry import Model
from quire.runner.slots import Flat


def forward(model: Model, flat: Flat) -> torch.Tensor:
    """Hidden states [T, H]."""
    groups = [
        GroupInputs(torch.from_numpy(table), torch.from_numpy(slots))
        for table, slots in zip(flat.block_tables, flat.slots, strict=True)
    ]
    step = StepInputs(
        torch.from_numpy(flat.query_start), torch.from_numpy(flat.context_len), groups
    )
    return model.forward(torch.from_numpy(flat.tokens_T), torch.from_numpy(flat.positions_T), step)
