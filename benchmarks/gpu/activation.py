"""Gated activations, beside torch's two kernels for the same.

python -m benchmarks.gpu.activation
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import MODELS, TOKENS, copies, random
from quire.kernels.triton.activation.gated_activation import KINDS, gated_activation


def torch_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=1)
    return functional.silu(gate) * up


def cases(name: str, t: int, i: int) -> list[Timed]:
    size = 2 * t * i
    xs = [random(t, 2 * i) for _ in range(copies(3 * size))]
    timed = [
        Timed(f"{kind} {name} T {t}", [partial(gated_activation, x, kind) for x in xs], 3 * size)
        for kind in KINDS
    ]
    peer = [partial(torch_silu, x) for x in xs]
    return [*timed, Timed(f"silu of torch {name} T {t}", peer, 3 * size)]


if __name__ == "__main__":
    command(__doc__)
    for model in MODELS:
        for tokens in TOKENS:
            report(cases(model.name, tokens, model.intermediate))
