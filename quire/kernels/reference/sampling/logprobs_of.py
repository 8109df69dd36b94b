"""Reference of quire/kernels/triton/sampling/logprobs_of.py."""

from __future__ import annotations

import torch

from quire.kernels.sampling import Scratch


def logprobs_of(
    logits: torch.Tensor, targets: torch.Tensor, count: int, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`scratch` is not used here."""
    x = logits.float()
    x = x - x.double().logsumexp(dim=1, keepdim=True).float()
    logprob = x.gather(1, targets.long()[:, None])
    rank = (x > logprob).sum(dim=1).int() + 1
    ids = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :count]
    return logprob[:, 0], rank, ids.int(), x.gather(1, ids)
