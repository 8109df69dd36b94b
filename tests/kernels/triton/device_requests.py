"""Requests put into a DeviceState, for the tests of kernels that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quire.kernels.device_state import DeviceState
from quire.kernels.reference.step.apply_runs import apply_runs
from quire.kernels.reference.step.count_tokens import count_tokens
from quire.params import SamplingParams
from quire.runner.diffs import Diffs
from quire.runner.packets import PacketRing
from quire.step import Enter

POISON = -(2**30) - 12345  # as a token, block or count: far outside of everything


def request(
    slot: int,
    tokens: Sequence[int],
    num_prompt: int | None = None,
    params: SamplingParams | None = None,
    seed: int = 0,
    choice: int = 0,
    blocks: Sequence[Sequence[int]] = (),
    end_tokens: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
    cached: int = 0,
) -> Enter:
    return Enter(
        slot=slot,
        params=params or SamplingParams(),
        tokens=list(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        seed=seed,
        choice=choice,
        blocks=[list(b) for b in blocks],
        end_tokens=list(end_tokens),
        bad_words=[list(w) for w in bad_words],
        cached=cached,
    )


def state_of(
    enters: Sequence[Enter],
    device: torch.device,
    slots: int = 8,
    max_len: int = 70,
    vocab_size: int = 50,
    groups: int | Sequence[int] = 0,
    max_blocks: int | None = None,
) -> DeviceState:
    """A state that holds these requests, and POISON wherever they brought nothing."""
    state = DeviceState.allocate(slots, max_len, vocab_size, groups, max_blocks, device)
    state.arena.fill_(POISON)
    state.counts.fill_(-12345)
    diffs, ring = Diffs(state.layout), PacketRing(device)
    for enter in enters:
        for packet, num_runs in ring.send(diffs.enter(enter)):
            apply_runs(state.arena, packet, num_runs)
    count_tokens(state, torch.tensor([e.slot for e in enters], dtype=torch.int32, device=device))
    return state


def copy_of(state: DeviceState) -> DeviceState:
    copy = DeviceState(state.layout, state.device)
    copy.arena.copy_(state.arena)
    copy.counts.copy_(state.counts)
    return copy


def rows_of(rows: Sequence[tuple[int, int, int, int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 4)
