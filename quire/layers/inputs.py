"""Everything of one step that layers need, in one argument."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class GroupInputs:
    """`block_tables` int32 [B, max blocks]; `slots` int64 [T]: where to write, block * tokens of a
    block + offset. What is cached already is not written again: its slots lie in block 0."""

    block_tables: torch.Tensor
    slots: torch.Tensor


@dataclass
class StepInputs:
    """One step over B requests and T tokens.

    `query_start` int32 [B + 1]: where each request's tokens begin; `context_len` int32 [B]:
    its tokens in all after this step. `groups[g]` belongs to KV group g. `state_slots` int64 [B]:
    the request slots, None where no layer keeps state of requests. `rows` int64 [T]: the request
    that each token belongs to, -1 for padding; None where the runner does not say.
    """

    query_start: torch.Tensor
    context_len: torch.Tensor
    groups: list[GroupInputs]
    state_slots: torch.Tensor | None = None
    rows: torch.Tensor | None = None
