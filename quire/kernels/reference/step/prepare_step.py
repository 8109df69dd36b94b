"""Reference of quire/kernels/triton/step/prepare_step.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import BLOCK, DeviceState, RowFlag, StepBuffers


def prepare_step(state: DeviceState, rows: torch.Tensor, out: StepBuffers) -> None:
    out.tokens.zero_()
    out.positions.zero_()
    out.slots.fill_(-1)
    end = 0
    for i, (slot, start, count, flags) in enumerate(rows.tolist()):
        out.query_start[i] = end
        out.context_len[i] = 0
        if slot < 0:
            continue
        begin, end = end, end + count
        out.context_len[i] = start + count
        length = int(state.length[slot]) + flags % RowFlag.BEHIND // RowFlag.DRAFTS
        known = state.history[slot, start : min(start + count, length)]
        out.tokens[begin : begin + len(known)] = known
        positions = torch.arange(start, start + count, device=state.device)
        out.positions[begin:end] = positions
        num_blocks = -(-(start + count) // BLOCK)
        table = state.tables[slot, :, :num_blocks]
        out.block_tables[:, i, :num_blocks] = table
        out.slots[:, begin:end] = table[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
    out.query_start[len(rows)] = end
