"""Reference of quire/kernels/triton/step/count_tokens.py."""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, Flag


def count_tokens(state: DeviceState, slots: torch.Tensor) -> None:
    for slot in slots.tolist():
        if slot < 0 or not int(state.flags[slot]) & Flag.PENALTIES:
            continue
        num_prompt = int(state.num_prompt[slot])
        tokens = state.history[slot, : int(state.length[slot])].long()
        prompt, output = tokens[:num_prompt], tokens[num_prompt:]
        size = state.counts.shape[1]
        counts = output.bincount(minlength=size).clamp(max=2**15 - 1)
        counts[prompt] -= 2**15
        state.counts[slot] = counts.to(torch.int16)
