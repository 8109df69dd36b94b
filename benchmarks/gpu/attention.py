"""Paged attention: decode against the memory bus, prompts against the MMAs, in both modes, with
caches in bfloat16 and in e4m3.

python -m benchmarks.gpu.attention            # all models
python -m benchmarks.gpu.attention Qwen3-8B   # those with this in their name
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, copies, random
from quire.kernels.reference.attention.fp8_cache import codes_and_scales, encode_heads, packed_width
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.attention.paged_attention import Scratch, paged_attention


@dataclass(frozen=True)
class Model:
    name: str
    heads: int
    kv_heads: int
    head_size: int


MODELS = (
    Model("Qwen3-8B", 32, 8, 128),
    Model("SmolLM2-135M", 9, 3, 64),
    Model("Qwen3-30B-A3B", 32, 4, 128),
)

# (requests, tokens that are new, tokens in all) of each part of a batch.
BATCHES = (
    [(1, 1, 256)],
    [(1, 1, 8192)],
    [(32, 1, 512)],
    [(256, 1, 384)],
    [(256, 1, 2048)],
    [(8, 1, 32768)],
    [(250, 1, 512), (6, 1, 32768)],
    [(1, 8192, 8192)],
    [(16, 512, 512)],
    [(1, 2048, 8192)],
    [(8, 5, 8192)],
    [(255, 1, 384), (1, 1024, 1024)],
)


Batch = list[tuple[int, int, int]]


def describe(batch: Batch) -> str:
    return " + ".join(f"{requests} x {new} of {tokens}" for requests, new, tokens in batch)


def block_tables(blocks: list[int]) -> torch.Tensor:
    """Of requests with so many blocks each, in random order from block 1 on."""
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=DEVICE)
    order = (torch.randperm(sum(blocks)) + 1).to(DEVICE, torch.int32)
    for row, part in enumerate(order.split(blocks)):
        tables[row, : len(part)] = part
    return tables


def cache(blocks: int, model: Model, fp8: bool) -> torch.Tensor:
    """Keys or values."""
    shape = blocks, model.kv_heads, BLOCK
    if not fp8:
        return random(*shape, model.head_size)
    width = packed_width(model.head_size)
    packed = torch.empty(*shape, width, dtype=torch.uint8, device=DEVICE)
    codes, scales = codes_and_scales(packed)
    for block in range(0, blocks, 1024):
        part = slice(block, block + 1024)
        coded = encode_heads(torch.randn(*codes[part].shape, device=DEVICE))
        codes[part], scales[part] = coded
    return packed


def case(model: Model, batch: Batch, deterministic: bool, fp8: bool) -> Timed:
    """Bytes are counted where every request has one new token; else operations, of causal pairs."""
    counts = [new for requests, new, _ in batch for _ in range(requests)]
    contexts = [tokens for requests, _, tokens in batch for _ in range(requests)]
    rows, tokens, d = len(counts), sum(counts), model.head_size
    decode = rows == tokens
    blocks = [-(-c // BLOCK) for c in contexts]
    cached = packed_width(d) if fp8 else 2 * d
    nbytes = 2 * (cached * sum(contexts) * model.kv_heads + 2 * d * tokens * model.heads)
    pairs = sum(n * c - n * (n - 1) // 2 for n, c in zip(counts, contexts, strict=True))
    scratch = Scratch.allocate(
        rows, model.heads, model.kv_heads, d, total_tokens=sum(contexts), dtype=torch.bfloat16,
        deterministic=deterministic, device=DEVICE,
    )  # fmt: skip
    start = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    length = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    runs = []
    for _ in range(copies(nbytes)):
        k_cache, v_cache = (cache(sum(blocks) + 1, model, fp8) for _ in range(2))
        tables = block_tables(blocks)
        runs.append(
            partial(
                paged_attention, random(tokens, model.heads * d), k_cache, v_cache, tables, start,
                length, d**-0.5, None, None, None, decode=decode, deterministic=deterministic,
                scratch=scratch,
            )
        )  # fmt: skip
    name = f"{model.name} {describe(batch)}{' e4m3' * fp8}{' deterministic' * deterministic}"
    if decode:
        return Timed(name, runs, nbytes=nbytes)
    return Timed(name, runs, flops=4.0 * pairs * model.heads * d)


if __name__ == "__main__":
    [wanted] = command(__doc__, model=[])
    for model in MODELS:
        if wanted not in model.name:
            continue
        for deterministic in (False, True):
            for fp8 in (False, True):
                report([case(model, batch, deterministic, fp8) for batch in BATCHES])
