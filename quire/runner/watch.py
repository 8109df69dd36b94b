"""Looking at a runner's numbers as they pass."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Is shown logits [B, V] of a prompt's positions, before anything is made of them, and the token
# that follows each. They are those of requests that want their prompt's log-probabilities, each
# request's in order; to keep them is to copy them.
WatchLogits = Callable[[torch.Tensor, list[int]], None]
