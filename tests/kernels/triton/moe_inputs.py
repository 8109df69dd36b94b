"""Inputs of the mixture-of-experts tests, and memory that shows who reads what nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

POISON = -7777


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and empty_like give NaN, and integers that no kernel can take for an index."""

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)

    empty, empty_like = torch.empty, torch.empty_like

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty(*args, **kwargs))

    def make_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        return poisoned(empty_like(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", make)
        patch.setattr(torch, "empty_like", make_like)
        yield


def random(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def random_ids(seed: int, tokens: int, experts: int, slots: int) -> torch.Tensor:
    """Distinct random experts for each token, int32 [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    return scores.argsort(dim=1)[:, :slots].int().contiguous()
