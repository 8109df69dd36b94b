"""Attention over latents: decode against the memory bus, prompts against the MMAs, in both modes.

python -m benchmarks.gpu.latent               # 128, 64 and 16 heads
python -m benchmarks.gpu.latent 128           # those of one number of heads
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.attention import BATCHES, Batch, block_tables, describe
from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, copies, random
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.attention.latent_attention import latent_attention
from quire.kernels.triton.attention.scratch import Scratch
from quire.kernels.triton.gemm.head_linear import head_linear

# DeepSeek V2, V3 and R1; the heads are V3's, Kimi K2's, and V2-Lite's or V3's share of eight.
RANK, REST, NOPE = 512, 64, 128
HEADS = (128, 64, 16)


def attention(heads: int, batch: Batch, deterministic: bool) -> Timed:
    """Bytes are counted where every request has one new token; else operations, of causal pairs."""
    counts = [new for requests, new, _ in batch for _ in range(requests)]
    contexts = [tokens for requests, _, tokens in batch for _ in range(requests)]
    rows, tokens, width = len(counts), sum(counts), RANK + REST
    decode, blocks = rows == tokens, [-(-c // BLOCK) for c in contexts]
    nbytes = 2 * (width * sum(contexts) + tokens * heads * (width + RANK))
    pairs = sum(n * c - n * (n - 1) // 2 for n, c in zip(counts, contexts, strict=True))
    scratch = Scratch.allocate(
        rows, heads, 1, width, RANK, total_tokens=min(sum(contexts), 30000), dtype=torch.bfloat16,
        deterministic=deterministic, device=DEVICE,
    )  # fmt: skip
    start = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    length = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    runs = [
        partial(
            latent_attention, random(tokens, heads * width),
            random(sum(blocks) + 1, 1, BLOCK, width), block_tables(blocks), start, length,
            width**-0.5, RANK, decode=decode, deterministic=deterministic, scratch=scratch,
        )
        for _ in range(copies(nbytes))
    ]  # fmt: skip
    name = f"{heads} heads {describe(batch)}{' deterministic' * deterministic}"
    flops = 2.0 * pairs * heads * (width + RANK)
    return Timed(name, runs, nbytes=nbytes) if decode else Timed(name, runs, flops=flops)


def products(heads: int, tokens: int) -> list[Timed]:
    """Queries to the latents' space, and mixed latents to values."""
    found = []
    for name, k, n in (("absorb", NOPE, RANK), ("expand", RANK, NOPE)):
        nbytes = 2 * heads * (n * k + tokens * (n + k))
        runs = [
            partial(
                head_linear, random(tokens, heads, k), random(heads, n, k), random(tokens, heads, n)
            )
            for _ in range(copies(nbytes))
        ]
        flops = 2.0 * tokens * heads * n * k if tokens > 256 else 0.0
        found.append(Timed(f"{name} {heads} heads, {tokens} tokens", runs, nbytes, flops))
    return found


if __name__ == "__main__":
    [wanted] = command(__doc__, heads=[str(heads) for heads in HEADS])
    for heads in HEADS:
        if wanted not in ("", str(heads)):
            continue
        for deterministic in (False, True):
            report([attention(heads, batch, deterministic) for batch in BATCHES])
        report([case for tokens in (1, 32, 256, 2048) for case in products(heads, tokens)])
