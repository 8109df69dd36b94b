"""Head norms, rotary and the KV cache's write, in one kernel, to caches in bfloat16 and in e4m3.

python -m benchmarks.gpu.rotary
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, MODELS, TOKENS, Model, copies, random
from quire.kernels.reference.attention.fp8_cache import FP8_CACHE, packed_width
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.rotary.rotary_cache import rotary_cache

BLOCKS, POSITIONS = 8192, 32768


def case(model: Model, t: int, norms: bool, scattered: bool, fp8: bool) -> Timed:
    """`scattered`: each token goes to a block of its own, as in decoding; else blocks are filled
    one after another, as in a prefill."""
    d, kv_heads = model.head_size, model.kv_heads
    width = (model.heads + 2 * kv_heads) * d
    # Read and written: qkv, the table's rows, position and slot.
    cached = 2 * kv_heads * (packed_width(d) if fp8 else 2 * d)
    nbytes = t * (2 * width + 2 * model.heads * d + cached + 4 * d + 16)
    cos_sin = torch.rand(POSITIONS, d, device=DEVICE)
    q_norm, k_norm = torch.randn(2, d, device=DEVICE).unbind() if norms else (None, None)
    shape = BLOCKS, kv_heads, BLOCK, packed_width(d) if fp8 else d
    dtype = FP8_CACHE if fp8 else torch.bfloat16
    k_cache, v_cache = (torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    runs = []
    for _ in range(copies(nbytes)):
        positions = torch.randint(POSITIONS, (t,), device=DEVICE)
        slots = torch.randperm(BLOCKS * BLOCK, device=DEVICE)[:t]
        if not scattered:
            slots = int(torch.randint(BLOCKS * BLOCK - t, (1,))) + torch.arange(t, device=DEVICE)
        runs.append(
            partial(
                rotary_cache, random(t, width), positions, cos_sin, q_norm, k_norm, 1e-6,
                k_cache, v_cache, slots,
            )
        )  # fmt: skip
    kind = f"{' with norms' * norms}{' scattered' * scattered}{' e4m3' * fp8}"
    return Timed(f"rotary_cache{kind} {model.name} T {t}", runs, nbytes)


if __name__ == "__main__":
    command(__doc__)
    for model in MODELS:
        for tokens in TOKENS:
            norms = model.name.startswith("Qwen3")
            for fp8 in (False, True):
                both = (False, True)
                report([case(model, tokens, norms, scattered, fp8) for scattered in both])
