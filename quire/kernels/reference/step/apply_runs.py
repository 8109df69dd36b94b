"""Reference of quire/kernels/triton/step/apply_runs.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import RUN_WORDS


def apply_runs(arena: torch.Tensor, packet: torch.Tensor, num_runs: int) -> None:
    table = packet[: RUN_WORDS * num_runs].view(num_runs, RUN_WORDS)
    for low, high, source, length in table.tolist():
        to = high * 2**32 + low % 2**32
        arena[to : to + length] = packet[source : source + length]
