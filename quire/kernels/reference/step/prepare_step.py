"""Reference of quire/kernels/triton/step/prepare_step.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, RowFlag, Scalar, StepBuffers


def prepare_step(state: DeviceState, rows: torch.Tensor, out: StepBuffers, ahead: int = 0) -> None:
    out.tokens.zero_()
    out.positions.zero_()
    out.slots.fill_(-1)
    out.rows.fill_(-1)
    end = 0
    for i, (slot, start, count, flags) in enumerate(rows.tolist()):
        out.query_start[i] = end
        out.context_len[i] = 0
        out.state_slots[i] = slot
        if slot < 0:
            continue
        begin, end = end, end + count
        out.context_len[i] = start + count
        length = int(state.length[slot]) + flags % RowFlag.BEHIND // RowFlag.DRAFTS
        known = state.history[slot, start + ahead : min(start + count + ahead, length)]
        out.tokens[begin : begin + len(known)] = known
        positions = torch.arange(start, start + count, device=state.device)
        out.positions[begin:end] = positions
        out.rows[begin:end] = i
        cached = int(state.scalars[slot, Scalar.CACHED])
        for group, size in enumerate(state.layout.block_sizes):
            num_blocks = -(-(start + count) // size)
            table = state.tables[slot, group, :num_blocks]
            out.block_tables[group, i, :num_blocks] = table
            slots = table[positions // size].long() * size + positions % size
            out.slots[group, begin:end] = slots.masked_fill(positions < cached, -1)
    out.query_start[len(rows)] = end
