"""Speed of the CPU kernels on a model's shapes, against this machine's measured ceilings.

    python benchmarks/cpu_kernels.py [--threads 2] [--isa avx512]

Ceilings, measured in the same run: memory, by reading a block-format weight far larger than the
caches with one row (reported as GB/s of packed bytes; `sum` is torch adding up as many bytes);
arithmetic, by the same linear with its weights in the cache. Shapes are SmolLM2-135M's. Every
figure is the best of several runs: the machine may be shared.
"""

import argparse
import time
from collections.abc import Callable

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
    layers = [
        {name: random_weight(format, n, k) for name, (n, k) in WEIGHTS.items()}
        for _ in range(LAYERS)
    ]
    head = random_weight(head_format, VOCABULARY, HIDDEN)
    body_bytes = sum(w.data.nbytes for layer in layers for w in layer.values())
    macs = LAYERS * sum(n * k for n, k in WEIGHTS.values())
    for rows in row_counts:
        inputs = {k: torch.randn(rows, k) for k in (HIDDEN, INTERMEDIATE)}
        outputs = {
            n: torch.empty(rows, n)
            for n in {n for n, _ in WEIGHTS.values()} | {VOCABULARY if rows <= 16 else 1}
        }

        def body(
            inputs: dict[int, torch.Tensor] = inputs, outputs: dict[int, torch.Tensor] = outputs
        ) -> None:
            for layer in layers:
                for weight in layer.values():
                    ops.linear(inputs[weight.k], weight, out=outputs[weight.n])

        seconds = best(body)
        line = f"linear {format:5} x30 layers  T={rows:4}  {seconds * 1e3:8.2f} ms {body_bytes / seconds / 1e9:6.1f} GB/s"
        line += f" ({100 * body_bytes / seconds / 1e9 / ceiling:3.0f}% of memory) {2 * macs * rows / seconds / 1e9:7.0f} GOP/s"
        if rows <= 16:

            def with_head(
                inputs: dict[int, torch.Tensor] = inputs, outputs: dict[int, torch.Tensor] = outputs
            ) -> None:
                body(inputs, outputs)
                ops.linear(inputs[HIDDEN], head, out=outputs[VOCABULARY])

            seconds = best(with_head)
            total = body_bytes + head.data.nbytes
            line += f"   with {head_format} head {seconds * 1e3:6.2f} ms {total / seconds / 1e9:5.1f} GB/s"
        print(line)


def cached_linear(format: str) -> None:
    """Weights and activations in the caches: the kernel's own arithmetic speed."""
    weight = random_weight(format, 256, HIDDEN * 2 if HIDDEN * 2 % 256 == 0 else 1024)
    x, out = torch.randn(256, weight.k), torch.empty(256, 256)
    seconds = best(lambda: ops.linear(x, weight, out=out), 0.3)
    print(
        f"linear {format:5} cached 256x256x{weight.k}  {2 * 256 * 256 * weight.k / seconds / 1e9:7.0f} GOP/s"
    )


def caches(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = -(-tokens // 16)
    k = torch.randn(blocks, KV_HEADS, HEAD_SIZE, 16).to(dtype)
    v = torch.randn(blocks, KV_HEADS, 16, HEAD_SIZE).to(dtype)
    return k, v, torch.randperm(blocks).int()[None]


def attention(queries: int, context: int, dtype: torch.dtype) -> None:
    k, v, table = caches(context, dtype)
    q = torch.randn(queries, HEADS * HEAD_SIZE)
    start, length = (
        torch.tensor([0, queries], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32),
    )
    seconds = best(lambda: ops.attention(q, k, v, table, start, length, 0.125), 0.4)
    pairs = queries * (context - queries) + queries * (queries + 1) // 2
    print(
        f"attention {str(dtype)[6:]:8} queries={queries:4} context={context:5}  {seconds * 1e6:8.0f} us"
        f" ({seconds * LAYERS * 1e3:6.1f} ms x30) {4 * pairs * HEADS * HEAD_SIZE / seconds / 1e9:6.0f} GOP/s"
        f" {(k.nbytes + v.nbytes) / seconds / 1e9:5.1f} GB/s"
    )


def small_operations() -> None:
    for rows in (1, 512):
        x, residual, weight = (
            torch.randn(rows, HIDDEN),
            torch.randn(rows, HIDDEN),
            torch.randn(HIDDEN),
        )
        gate = torch.randn(rows, 2 * INTERMEDIATE)
        qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_SIZE)
        k, v, _ = caches(max(rows, 16), torch.float32)
        cos_sin, positions = torch.randn(rows, HEAD_SIZE), torch.arange(rows)
        table = random_weight("q8_0", VOCABULARY, HIDDEN) if rows == 1 else None
        runs: dict[str, Callable[[], object]] = {
            "rms_norm": lambda x=x, weight=weight: ops.rms_norm(x, weight, 1e-5),
            "add_rms_norm": lambda x=x, residual=residual, weight=weight: ops.add_rms_norm(
                x, residual, weight, 1e-5
            ),
            "gated_activation": lambda gate=gate: ops.gated_activation(gate, "silu"),
            "rotary_cache": lambda qkv=qkv, k=k, v=v, c=cos_sin, p=positions: ops.rotary_cache(
                qkv, p, c, None, None, 1e-5, k, v, p
            ),
        }
        if table is not None:
            logits = torch.randn(1, VOCABULARY)
            ids = torch.tensor([7])
            runs |= {
                "embedding": lambda: ops.embedding(ids, table),
                "argmax": lambda: ops.argmax(logits),
                "logsumexp": lambda: ops.logsumexp(logits),
                "gumbel": lambda: ops.gumbel(1, 2, 3, VOCABULARY),
                "torch.empty": lambda: torch.empty(1, HIDDEN),
            }
        for name, run in runs.items():
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
    small_operations()


if __name__ == "__main__":
    main()
