"""Products with quantised weights at Qwen3-8B's and Qwen3-30B-A3B's sizes, checked, then timed.

    python -m benchmarks.gpu.quantized                # linear layers and experts, every format
    python -m benchmarks.gpu.quantized linear nvfp4   # one part, one format

A cell is microseconds and the share of the least time possible: the weight's bytes at the measured
bandwidth, or the product's operations at the measured bf16 rate (twice that for e4m3 tokens),
whichever is longer. Experts: bytes of those in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.harness import ceilings, microseconds, need_gpu
from benchmarks.gpu.shapes import DEVICE, copies, random
from quire.kernels.reference.quantized.experts import quantized_experts as reference_experts
from quire.kernels.reference.quantized.quantize import dequantize_rows
from quire.kernels.reference.quantized.scaled_experts import scaled_experts as reference_scaled
from quire.kernels.reference.quantized.weights import (
    FORMATS,
    FOUR_BITS,
    QuantizedWeight,
    dequantize,
)
from quire.kernels.triton.moe.experts import experts
from quire.kernels.triton.moe.route import route
from quire.kernels.triton.quantized.experts import SMALL_PAIRS, quantized_experts
from quire.kernels.triton.quantized.experts_small import experts_small
from quire.kernels.triton.quantized.gemm import quantized_gemm
from quire.kernels.triton.quantized.pack import PackedQuantized, pack
from quire.kernels.triton.quantized.quantize import quantize
from quire.kernels.triton.quantized.scaled_experts import scaled_experts
from quire.kernels.triton.quantized.scaled_gemm import ScaledTile, library_scaled, scaled_gemm
from quire.kernels.triton.quantized.skinny import MAX_TOKENS, skinny
from quire.kernels.triton.quantized.widen import FORMATS as WIDENED_FORMATS
from quire.kernels.triton.quantized.widen import widen

TOKENS = (1, 8, 32, 256, 2048)
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
E, SLOTS, H, I = 128, 8, 2048, 768  # noqa: E741
EXPERT_TOKENS = (*TOKENS, 8192)
# Of a bf16 result, an inner rounding and an e4m3 token's share.
TOLERANCE = 1.5e-2
# Where inner values are quantised, those on a border of two codes may fall to either side.
INNER_TOLERANCE = 3e-2
WHATS = ("all", "linear", "experts")
Work = Callable[[], Any]


def make(format: str, n: int, k: int, experts: int | None = None) -> QuantizedWeight:
    """A random weight of values around 1 / sqrt(k)."""
    lead = () if experts is None else (experts,)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, lead + shape, dtype=torch.uint8, device=DEVICE)

    def positive(*shape: int) -> torch.Tensor:
        return (torch.rand(lead + shape, device=DEVICE) + 0.5) / k**0.5

    if format in ("fp8", "fp8_block"):
        codes = integers(0, 120, n, k) | integers(0, 2, n, k) << 7
        shape = (n,) if format == "fp8" else (n // 128, k // 128)
        return QuantizedWeight(format, codes.view(torch.float8_e4m3fn), positive(*shape) / 64)
    codes = integers(0, 256, n, k // 2 if format in FOUR_BITS else k)
    if format == "nvfp4":
        scales = integers(40, 80, n, k // 16).view(torch.float8_e4m3fn)
        return QuantizedWeight(format, codes, scales, positive(n) / 4)
    if format == "mxfp4":
        return QuantizedWeight(format, codes, integers(118, 123, n, k // 32))
    scales = (positive(n, k // 128) / (8 if format == "int4" else 128)).bfloat16()
    zeros = integers(0, 16, n, k // 128) if format == "int4" else None
    return QuantizedWeight(format, codes, scales, None, zeros)


def again(weight: PackedQuantized, total: int) -> list[PackedQuantized]:
    """Copies of a weight, together several times the L2 cache."""
    parts = {f.name: getattr(weight, f.name) for f in fields(weight)}
    tensors = {name: p for name, p in parts.items() if isinstance(p, torch.Tensor)}
    found = [weight]
    while len(found) < min(24, copies(total)):
        found.append(replace(weight, **{name: t.clone() for name, t in tensors.items()}))
    return found


@dataclass
class Cell:
    """One kernel at one number of tokens: what runs, what it should give, and the least time."""

    row: str
    tokens: int
    runs: Callable[[], Sequence[Work]]
    wanted: torch.Tensor | None
    least: float  # seconds
    tolerance: float = TOLERANCE

    def check(self) -> str:
        """Compile and run once; empty where the result is right."""
        try:
            found = self.runs()[0]()
        except Exception as error:  # one that cannot run must not lose the others
            return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if self.wanted is None:
            return ""
        found, wanted = found[: len(self.wanted)].double(), self.wanted.double()
        error = float((found - wanted).norm() / wanted.norm())
        return "" if error < self.tolerance else f"WRONG: relative error {error:.3g}"


def bind() -> None:
    """Gives a thread the CUDA context, which tensor maps are made in: the first launch does."""
    torch.ones(1, device=DEVICE)


def show(title: str, cells: list[Cell]) -> None:
    """Check all cells, several at a time, since that compiles; time them; print a table."""
    start = time.perf_counter()
    firsts = list({(c.row, c.tokens): c for c in cells}.values())
    with ThreadPoolExecutor(12, initializer=bind) as pool:
        problems = dict(zip([id(c) for c in firsts], pool.map(Cell.check, firsts), strict=True))
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    tokens = sorted({c.tokens for c in cells})
    print(f"{title:<26}" + "".join(f"{f'T={t}':>17}" for t in tokens) + f"   ({ready:.0f} s)")
    rows: dict[str, dict[int, str]] = {}
    for cell in cells:
        text = problems.get(id(cell), "")
        if text:
            print(f"  {cell.row} T={cell.tokens}: {text}", flush=True)
            text = "-"
        else:
            took = microseconds(cell.runs(), repeats=5)
            text = f"{took:.1f} {cell.least / took * 1e6:4.0%}"
        rows.setdefault(cell.row, {})[cell.tokens] = text
    for row, found in rows.items():
        print(f"  {row:<24}" + "".join(f"{found.get(t, ''):>17}" for t in tokens), flush=True)


def least(nbytes: float, flops: float, e4m3: bool = False) -> float:
    bandwidth, compute = ceilings()
    return max(nbytes / bandwidth, flops / compute / (2 if e4m3 else 1))


def linear_cells(name: str, formats: Sequence[str]) -> list[Cell]:
    n, k = SHAPES[name]
    cells = []
    xs = {t: random(t, k) for t in TOKENS}
    for format in formats:
        plain = make(format, n, k)
        values = dequantize(plain)
        packed = pack(plain)
        weights = again(packed, packed.nbytes)
        for t, x in xs.items():
            nbytes, flops = packed.nbytes + 2 * t * (n + k), 2.0 * t * n * k
            some = x[:64]
            wanted = some.float() @ values.T

            def add(
                row: str, call: Callable[..., Any], *args: Any, wanted: torch.Tensor = wanted,
                low: float = least(nbytes, flops), weights: list[PackedQuantized] = weights,
                t: int = t, format: str = format,
            ) -> None:  # fmt: skip
                runs = partial(lambda call, args, ws: [partial(call, *args, w) for w in ws],
                               call, args, weights)  # fmt: skip
                cells.append(Cell(f"{format} {row}", t, runs, wanted, low))

            if t <= MAX_TOKENS:
                add("skinny", skinny, x)
            if t > 32 and format in WIDENED_FORMATS:
                add("widened, cuBLAS", lambda x, w: torch.mm(x, widen(w).t()), x)
            add("gemm", partial(quantized_gemm, deterministic=False), x)
            if format in ("fp8", "fp8_block") and t >= 32:
                codes, scales = quantize(x, 0 if format == "fp8" else 128)
                rows = dequantize_rows(codes, scales)[:64] @ values.T
                low = least(nbytes, flops, True)
                both = [True, False] if format == "fp8" else [True]
                for exact in both:
                    label = " exact" if exact else " fast"
                    add(f"e4m3{label}", partial(scaled_gemm, exact=exact), codes, scales,
                        wanted=rows, low=low)  # fmt: skip
                    if format == "fp8":
                        add(f"torch{label}", partial(library_scaled, exact=exact), codes, scales,
                            wanted=rows, low=low)  # fmt: skip
                if format == "fp8_block" and t >= 256:
                    tile = ScaledTile(128, 128, 8, 4)
                    add("e4m3 one program", partial(scaled_gemm, tile=tile), codes, scales,
                        wanted=rows, low=low)  # fmt: skip
        del values
    dense = [random(n, k) for _ in range(copies(2 * n * k))]
    for t, x in xs.items():
        runs = [partial(torch.mm, x, w.t()) for w in dense]
        cells.append(
            Cell("bf16 cuBLAS", t, partial(list, runs), None, least(2 * n * k, 2.0 * t * n * k))
        )
    return cells


def expert_cells(format: str, dense: tuple[torch.Tensor, torch.Tensor] | None) -> list[Cell]:
    """`dense`: bf16 experts, timed beside."""
    plain = make(format, 2 * I, H, E), make(format, H, I, E)
    gate_up, down = pack(plain[0]), pack(plain[1])
    cells = []
    for t in EXPERT_TOKENS:
        batches = []
        for _ in range(max(1, min(6, 48 // t))):
            x = random(t, H)
            weights, ids = route(random(t, E), SLOTS, True)
            batches.append((x, weights, ids))
        used = sum(len(ids.unique()) for _, _, ids in batches) / len(batches) / E
        flops = 6.0 * t * SLOTS * H * I
        x, weights, ids = batches[0]
        some = slice(0, 32)
        wanted = reference_experts(x[some], weights[some], ids[some], *plain, "silu")
        low = least((gate_up.nbytes + down.nbytes) * used, flops)

        def add(
            row: str, call: Callable[..., Any], last: tuple[Any, ...] = (gate_up, down),
            low: float = low, wanted: torch.Tensor | None = wanted, t: int = t,
            batches: list[Any] = batches, tolerance: float = TOLERANCE,
        ) -> None:  # fmt: skip
            runs = partial(
                lambda call, last, batches: [partial(call, *b, *last, "silu") for b in batches],
                call, last, batches,
            )  # fmt: skip
            cells.append(Cell(row, t, runs, wanted, low, tolerance))

        if t * SLOTS <= 4 * SMALL_PAIRS:
            add(f"{format} small", experts_small)
        if t * SLOTS > SMALL_PAIRS:
            add(f"{format} grouped", partial(quantized_experts, deterministic=False))
        add(f"{format} deterministic", partial(quantized_experts, deterministic=True))
        if format in ("fp8", "fp8_block") and t >= 32:
            wanted = reference_scaled(x[some], weights[some], ids[some], *plain, "silu")
            low = least((gate_up.nbytes + down.nbytes) * used, flops, True)
            add(f"{format} e4m3", scaled_experts, low=low, wanted=wanted,
                tolerance=INNER_TOLERANCE)  # fmt: skip
        if dense is not None:
            low = least(sum(w.nbytes for w in dense) * used, flops)
            add("bf16", partial(experts, deterministic=False), dense, low, None)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=WHATS)
    parser.add_argument("formats", nargs="*", default=[])
    arguments = parser.parse_args()
    need_gpu(parser)
    what, formats = arguments.what or "all", arguments.formats or list(FORMATS)
    torch.manual_seed(0)
    bandwidth, compute = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: {bandwidth / 1e9:.0f} GB/s, {compute / 1e12:.0f} TFLOP/s"
    )
    if what in ("all", "experts"):
        dense = random(E, 2 * I, H) * H**-0.5, random(E, H, I) * I**-0.5
        for format in formats:
            show(f"experts {format}", expert_cells(format, dense if format == formats[0] else None))
        del dense
    if what in ("all", "linear"):
        for name, (n, k) in SHAPES.items():
            show(f"{name} [{n}, {k}]", linear_cells(name, formats))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
