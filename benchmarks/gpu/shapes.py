"""The shapes that GPU kernels are timed at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOKENS = (1, 32, 256, 8192)
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    name: str
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int


MODELS = (
    Model("Qwen3-8B", 151936, 4096, 32, 8, 128, 12288),
    Model("SmolLM2-135M", 49152, 576, 9, 3, 64, 1536),
)


def copies(nbytes: int) -> int:
    """How many runs of `nbytes` to rotate over: together four times an H200's L2 of 50 MB, but at
    most 64. Where 64 are less, inputs come from L2, as in a model: the kernel before wrote them."""
    return max(1, min(64, 200_000_000 // nbytes + 1))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
