"""Reference of quire/kernels/triton/step/keep_drafts.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, RowFlag
from quire.kernels.sampling import Status


def keep_drafts(
    state: DeviceState,
    rows: torch.Tensor,
    behind: int,
    tokens: torch.Tensor,
    status: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    for i, (slot, _, _, flags) in enumerate(rows.tolist()):
        kept[i] = -1
        if slot < 0 or not flags & RowFlag.SAMPLE or flags // RowFlag.BEHIND != behind:
            continue
        if status[i] == Status.OK:
            kept[i] = tokens[i]
        at = int(state.length[slot]) + behind
        if at < state.history.shape[1]:
            state.history[slot, at] = max(int(kept[i]), 0)
