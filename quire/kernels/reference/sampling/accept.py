"""Reference of quire/kernels/triton/sampling/accept.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, Flag, RowFlag
from quire.kernels.sampling import SampleOutputs, Status


def accept(rows: torch.Tensor, state: DeviceState, out: SampleOutputs) -> None:
    for i, (slot, _, _, flags) in enumerate(rows.tolist()):
        if slot < 0 or not flags & RowFlag.SAMPLE or flags // RowFlag.BEHIND:
            continue
        for j in range(1 + flags // RowFlag.DRAFTS):
            if out.status[i + j] != Status.OK:
                break
            token, length = int(out.tokens[i + j]), int(state.length[slot])
            draft = int(state.history[slot, length]) if j < flags // RowFlag.DRAFTS else -1
            append_token(state, slot, token)
            if draft != token:
                break


def append_token(state: DeviceState, slot: int, token: int) -> None:
    """One more token of a slot."""
    length = int(state.length[slot])
    state.history[slot, length] = token
    state.length[slot] = length + 1
    penalised = int(state.flags[slot]) & Flag.PENALTIES
    if penalised and int(state.counts[slot, token]) & 0x7FFF != 0x7FFF:
        state.counts[slot, token] += 1
