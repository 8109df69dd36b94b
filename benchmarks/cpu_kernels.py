"""Speed of the CPU kernels on a model's shapes, against this machine's measured ceilings.

    python benchmarks/cpu_kernels.py [--threads 2] [--isa avx512]

The memory ceiling is measured in the same run: torch adding up 400 MB. Bytes of a linear are those
of its packed weights. "cached" lines show the arithmetic alone, with all operands in the caches.
Shapes are SmolLM2-135M's. Every figure is the best of several runs: the machine may be shared.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from quire.kernels.native import ops
from quire.kernels.reference.packed import GGUF_BLOCKS

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 576, 1536, 30, 49152
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
WEIGHTS = {
    "qkv": (960, HIDDEN),
    "out": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}


def best(run: Callable[[], object], seconds: float = 0.6) -> float:
    run()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def random_weight(format: str, n: int, k: int) -> ops.PackedWeight:
    if format in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]
        return ops.pack(torch.randn(n, k).to(dtype))
    elements, size = GGUF_BLOCKS[format]
    return ops.pack(
        (format, torch.randint(0, 60, (n, k // elements * size), dtype=torch.uint8), n, k)
    )


def memory_ceiling() -> float:
    """GB/s of torch summing 400 MB of fp32."""
    big = torch.ones(100_000_000)
    return big.nbytes / best(big.sum) / 1e9


def linears(format: str, head_format: str, row_counts: list[int], ceiling: float) -> None:
    layers = [[random_weight(format, n, k) for n, k in WEIGHTS.values()] for _ in range(LAYERS)]
    head = random_weight(head_format, VOCABULARY, HIDDEN)
    nbytes = sum(weight.data.nbytes for layer in layers for weight in layer)
    products = LAYERS * sum(n * k for n, k in WEIGHTS.values())
    for rows in row_counts:
        x = {k: torch.randn(rows, k) for k in (HIDDEN, INTERMEDIATE)}
        out = {n: torch.empty(rows, n) for n, _ in WEIGHTS.values()}
        seconds = best(partial(run_layers, layers, x, out))
        rate = nbytes / seconds / 1e9
        line = (
            f"linear {format:5} x30 layers  T={rows:4}  {seconds * 1e3:8.2f} ms {rate:6.1f} GB/s"
            f" ({100 * rate / ceiling:3.0f}% of memory)"
            f" {2 * products * rows / seconds / 1e9:7.0f} GOP/s"
        )
        if rows <= 16:
            logits = torch.empty(rows, VOCABULARY)
            seconds += best(partial(ops.linear, x[HIDDEN], head, out=logits))
            rate = (nbytes + head.data.nbytes) / seconds / 1e9
            line += f"   with {head_format} head {seconds * 1e3:6.2f} ms {rate:5.1f} GB/s"
        print(line)


def run_layers(
    layers: list[list[ops.PackedWeight]], x: dict[int, torch.Tensor], out: dict[int, torch.Tensor]
) -> None:
    for layer in layers:
        for weight in layer:
            ops.linear(x[weight.k], weight, out=out[weight.n])


def cached_linear(format: str) -> None:
    """Weights and activations in the caches: the kernel's own arithmetic speed."""
    weight = random_weight(format, 256, 1024)
    x, out = torch.randn(256, 1024), torch.empty(256, 256)
    seconds = best(partial(ops.linear, x, weight, out=out), 0.3)
    print(
        f"linear {format:5} cached 256x256x1024  {2 * 256 * 256 * 1024 / seconds / 1e9:7.0f} GOP/s"
    )


def caches(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = -(-tokens // 16)
    k = torch.randn(blocks, KV_HEADS, HEAD_SIZE, 16).to(dtype)
    v = torch.randn(blocks, KV_HEADS, 16, HEAD_SIZE).to(dtype)
    return k, v, torch.randperm(blocks).int()[None]


def attention(queries: int, context: int, dtype: torch.dtype) -> None:
    k, v, table = caches(context, dtype)
    q = torch.randn(queries, HEADS * HEAD_SIZE)
    start = torch.tensor([0, queries], dtype=torch.int32)
    length = torch.tensor([context], dtype=torch.int32)
    seconds = best(partial(ops.attention, q, k, v, table, start, length, 0.125), 0.4)
    pairs = queries * (context - queries) + queries * (queries + 1) // 2
    print(
        f"attention {str(dtype)[6:]:8} queries={queries:4} context={context:5}"
        f"  {seconds * 1e6:8.0f} us ({seconds * LAYERS * 1e3:6.1f} ms x30)"
        f" {4 * pairs * HEADS * HEAD_SIZE / seconds / 1e9:6.0f} GOP/s"
        f" {(k.nbytes + v.nbytes) / seconds / 1e9:5.1f} GB/s"
    )


def small_operations(rows: int) -> None:
    x, residual, weight = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN), torch.randn(HIDDEN)
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)
    k, v, _ = caches(max(rows, 16), torch.float32)
    cos_sin, positions = torch.randn(rows, HEAD_SIZE), torch.arange(rows)
    gate_up = torch.randn(rows, 2 * INTERMEDIATE)
    report("torch.empty", rows, partial(torch.empty, rows, HIDDEN))
    report("rms_norm", rows, partial(ops.rms_norm, x, weight, 1e-5))
    report("add_rms_norm", rows, partial(ops.add_rms_norm, x, residual, weight, 1e-5))
    report("gated_activation", rows, partial(ops.gated_activation, gate_up, "silu"))
    rotary = partial(ops.rotary_cache, qkv, positions, cos_sin, None, None, 1e-5, k, v, positions)
    report("rotary_cache", rows, rotary)


def sampling_operations() -> None:
    logits, table = torch.randn(1, VOCABULARY), random_weight("q8_0", VOCABULARY, HIDDEN)
    report("embedding", 1, partial(ops.embedding, torch.tensor([7]), table))
    report("argmax", 1, partial(ops.argmax, logits))
    report("logsumexp", 1, partial(ops.logsumexp, logits))
    report("gumbel", 1, partial(ops.gumbel, 1, 2, 3, VOCABULARY))


def report(name: str, rows: int, run: Callable[[], object]) -> None:
    print(f"{name:17} T={rows:4} {best(run, 0.15) * 1e6:8.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    arguments = parser.parse_args()
    ops.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    if arguments.isa:
        ops.set_isa(arguments.isa)
    ceiling = memory_ceiling()
    print(f"isa {ops.isa()}, {ops.num_threads()} threads, memory ceiling (sum) {ceiling:.1f} GB/s")
    linears("q4_1", "q8_0", [1, 2, 4, 8, 16, 64, 512], ceiling)
    linears("bf16", "bf16", [1, 4, 64], ceiling)
    for format in ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k", "bf16", "f32"):
        cached_linear(format)
    for dtype in (torch.float32, torch.bfloat16):
        attention(512, 512, dtype)
        attention(2000, 2000, dtype)
        attention(1, 512, dtype)
        attention(1, 8192, dtype)
    small_operations(1)
    small_operations(512)
    sampling_operations()


if __name__ == "__main__":
    main()
