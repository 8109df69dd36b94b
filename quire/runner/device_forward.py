"""One pass of a model over a table of rows on the device."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, StepBuffers
from quire.kernels.triton.step.prepare_step import prepare_step
from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.registry import Model


def forward_table(
    model: Model, state: DeviceState, table: torch.Tensor, buffers: StepBuffers
) -> torch.Tensor:
    """Hidden states [T, H] of the rows of `table`, whose step `buffers` are made to hold."""
    prepare_step(state, table, buffers)
    return model.forward(buffers.tokens, buffers.positions, step_inputs(state, buffers))


def step_inputs(state: DeviceState, buffers: StepBuffers) -> StepInputs:
    """What layers need of a step that was prepared."""
    groups = [
        GroupInputs(table[:, : state.layout.blocks(group)], slots)
        for group, (table, slots) in enumerate(
            zip(buffers.block_tables, buffers.slots, strict=True)
        )
    ]
    given = buffers.query_start, buffers.context_len, groups, buffers.state_slots, buffers.rows
    return StepInputs(*given)
