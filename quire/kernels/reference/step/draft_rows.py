"""Reference of quire/kernels/triton/step/draft_rows.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, RowFlag


def draft_rows(
    state: DeviceState, rows: torch.Tensor, behind: int, out: torch.Tensor, lags: bool = False
) -> None:
    for i, (slot, start, count, asked) in enumerate(rows.tolist()):
        if slot < 0:
            out[i] = torch.tensor([slot, 0, 0, 0])
            continue
        length, propose = int(state.length[slot]), asked // RowFlag.PROPOSE
        if asked & RowFlag.SAMPLE and lags:
            count = max(length - start - 1, count - asked % RowFlag.BEHIND // RowFlag.DRAFTS)
        elif asked & RowFlag.SAMPLE:
            count = max(length - start - (propose == 0), 0)
        flags = int(RowFlag.SAMPLE) if propose else 0
        if behind and propose:
            known = min(behind, propose - 1)
            start = max(start + count - 1, 0) + known if lags else length + known - 1
            count = 1
            flags += (RowFlag.DRAFTS + RowFlag.BEHIND) * known
        elif behind:
            start, count = max(start + count - 1, 0), 1
        out[i] = torch.tensor([slot, start, count, flags])
