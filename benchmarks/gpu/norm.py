"""RMS norms, alone and fused, beside torch's.

python -m benchmarks.gpu.norm
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, MODELS, TOKENS, copies, random
from quire.kernels.triton.norm.rms_norm import add_rms_norm, rms_norm

EPS = 1e-6


def cases(name: str, t: int, h: int) -> list[Timed]:
    weight, x_norm = torch.randn(2, h, device=DEVICE).unbind()
    weight_16 = weight.bfloat16()
    size = 2 * t * h
    xs = [random(t, h) for _ in range(copies(2 * size))]
    residuals = [random(t, h) for _ in xs]
    outs = [torch.empty_like(x) for x in xs]
    norms = [partial(rms_norm, x, weight, EPS, out) for x, out in zip(xs, outs, strict=True)]
    pairs = list(zip(xs, residuals, strict=True))
    added = [partial(add_rms_norm, x, r, weight, EPS) for x, r in pairs]
    both = [partial(add_rms_norm, x, r, weight, EPS, x_norm) for x, r in pairs]
    peer = [partial(functional.rms_norm, x, (h,), weight_16, EPS) for x in xs]
    return [
        Timed(f"rms_norm {name} T {t}", norms, 2 * size + 4 * h),
        Timed(f"rms_norm of torch {name} T {t}", peer, 2 * size + 2 * h),
        Timed(f"add_rms_norm {name} T {t}", added, 4 * size + 4 * h),
        Timed(f"add_rms_norm of a normed x {name} T {t}", both, 4 * size + 8 * h),
    ]


if __name__ == "__main__":
    command(__doc__)
    for model in MODELS:
        for tokens in TOKENS:
            report(cases(model.name, tokens, model.hidden))
