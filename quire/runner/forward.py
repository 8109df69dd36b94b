"""One pass of a model over rows that are laid out flat, on the CPU."""

from __future__ import annotations

import torch

from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.registry import Model
from quire.runner.slots import Flat


def step_inputs(flat: Flat) -> StepInputs:
    """What layers need of the rows."""
    groups = [
        GroupInputs(torch.from_numpy(table), torch.from_numpy(slots))
        for table, slots in zip(flat.block_tables, flat.slots, strict=True)
    ]
    return StepInputs(
        torch.from_numpy(flat.query_start),
        torch.from_numpy(flat.context_len),
        groups,
        torch.from_numpy(flat.state_slots),
    )


def forward(model: Model, flat: Flat) -> torch.Tensor:
    """Hidden states [T, H]."""
    tokens_T, positions_T = torch.from_numpy(flat.tokens_T), torch.from_numpy(flat.positions_T)
    return model.forward(tokens_T, positions_T, step_inputs(flat))
