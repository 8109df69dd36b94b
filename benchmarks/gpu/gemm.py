"""Dense products of three models: ours with every candidate of tile sizes, beside cuBLAS.

python -m benchmarks.gpu.gemm few       # 1 to 256 tokens, against the bus; where cuBLAS wins
python -m benchmarks.gpu.gemm many      # 512 to 8192 tokens, against the tensor cores
python -m benchmarks.gpu.gemm norm      # residual, norm and product in one kernel or apart
python -m benchmarks.gpu.gemm few 30B   # only shapes whose name contains a text

Each line has the fastest candidate and whether the one chosen in the code is another: `chosen`
and its time. A candidate that is wrong or cannot run is said so and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.harness import ceilings, command, microseconds
from benchmarks.gpu.shapes import DEVICE, copies, random
from quire.kernels.triton.activation.gated_activation import gated_activation
from quire.kernels.triton.gemm import gemv, skinny, tall
from quire.kernels.triton.gemm.gemm import run_gemm
from quire.kernels.triton.gemm.gemm_tiles import LARGE, SMALL, GemmTiles, gemm_tiles
from quire.kernels.triton.gemm.shared import is_hopper, shared_memory
from quire.kernels.triton.launch import num_sms
from quire.kernels.triton.norm.rms_norm import add_rms_norm

FEW = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MANY = (512, 2048, 8192)
EPS = 1e-6
# Above this a candidate's result is wrong: bfloat16 sums of random values of size 1.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Shape:
    """A weight [height, k]; `gated`: gate and up of a feed-forward layer."""

    name: str
    height: int
    k: int
    gated: bool = False


SHAPES = (
    Shape("Qwen3-8B qkv", 6144, 4096),
    Shape("Qwen3-8B o", 4096, 4096),
    Shape("Qwen3-8B gate_up", 24576, 4096, gated=True),
    Shape("Qwen3-8B down", 4096, 12288),
    Shape("Qwen3-8B head", 151936, 4096),
    Shape("Qwen3-30B-A3B qkv", 5120, 2048),
    Shape("Qwen3-30B-A3B o", 2048, 4096),
    Shape("SmolLM2-135M qkv", 960, 576),
    Shape("SmolLM2-135M o", 576, 576),
    Shape("SmolLM2-135M gate_up", 3072, 576, gated=True),
    Shape("SmolLM2-135M down", 576, 1536),
    Shape("SmolLM2-135M head", 49152, 576),
)
SQUARE = Shape("8192 x 8192", 8192, 8192)

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
Tiles = dict[str, int]


def gemv_candidates(k: int) -> list[Tiles]:
    """Rows, columns and warps of gemv_kernel."""
    sizes = [(1, 2048, 4), (2, 2048, 4), (2, 2048, 8), (2, 1024, 4), (4, 1024, 4), (4, 2048, 8)]
    sizes += [(8, 1024, 4)]
    if k < 2048:
        sizes = [(1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (4, 512, 2), (2, 256, 1), (8, 256, 1)]
    return [{"ROWS": r, "BLOCK_K": b, "num_warps": w} for r, b, w in sizes]


def tall_candidates(tokens: int, shape: Shape) -> list[Tiles]:
    """Rows, columns, splits, warps and stages of tall_kernel."""
    sizes = [(32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 4, 6), (128, 64, 4, 5)]
    if tokens <= 16:
        sizes += [(16, 256, 1, 4), (16, 512, 2, 3), (32, 128, 2, 6), (64, 256, 4, 4)]
    found = []
    for rows, block, warps, stages in sizes:
        tiles = -(-shape.height // rows)
        for splits in (1, 2, 4, 8):
            # Splits are for weights that leave multiprocessors idle, and no part below 4 tiles.
            if splits > 1 and (tiles * splits > 300 or shape.k // splits < 4 * block):
                break
            found.append(
                {"ROWS": rows, "BLOCK_K": block, "SPLITS": splits}
                | {"num_warps": warps, "num_stages": stages}
            )
    return found


def gemm_candidates(tokens: int) -> list[GemmTiles]:
    small = [tiles for _, tiles in SMALL]
    if tokens <= 64:
        narrow = small[0]
        others = [replace(narrow, num_stages=12, programs_per_sm=1), replace(narrow, num_stages=5)]
        return [*small, *others, replace(small[1], num_stages=4, programs_per_sm=3)]
    large = [tiles for tiles, _ in LARGE]
    wide = GemmTiles(128, 256, 8, 3)
    return [*large, wide, GemmTiles(128, 128, 8, 4), GemmTiles(256, 128, 8, 4, halves=True)]


def cublas(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def label(tiles: Tiles | GemmTiles) -> str:
    if isinstance(tiles, GemmTiles):
        halves = " halves" if tiles.halves else ""
        size = f"{tiles.height}x{tiles.width}{halves}"
        return f"{size} warps {tiles.num_warps} stages {tiles.num_stages} x{tiles.programs_per_sm}"
    return " ".join(f"{name.removeprefix('num_')} {value}" for name, value in tiles.items())


class Bench:
    """Operands of one shape and number of tokens, and the timing of products over them."""

    def __init__(self, shape: Shape, tokens: int, weights: Sequence[torch.Tensor]):
        self.shape, self.tokens, self.weights = shape, tokens, weights
        self.x, self.out = random(tokens, shape.k), random(tokens, shape.height)
        self.wanted = self.x @ weights[0].t()
        self.nbytes = 2 * (shape.height * shape.k + tokens * (shape.k + shape.height))
        self.flops = 2 * tokens * shape.height * shape.k

    def time(self, name: str, product: Product) -> float | None:
        """Microseconds; None, with a word, for one that fails or is wrong."""
        try:
            self.out.fill_(torch.nan)
            product(self.x, self.weights[0], self.out)
            error = float((self.out - self.wanted).float().norm() / self.wanted.float().norm())
            if not error < TOLERANCE:
                print(f"    WRONG: {name}: relative error {error:.3g}", flush=True)
                return None
            return microseconds([partial(product, self.x, w, self.out) for w in self.weights])
        except Exception as error:  # one candidate that cannot run must not lose the others
            text = str(error).splitlines()[0][:100] if str(error) else ""
            print(f"    failed: {name}: {type(error).__name__}: {text}", flush=True)
            return None

    def rate(self, took: float | None) -> str:
        if took is None:
            return f"{'-':>24}"
        bandwidth, compute = ceilings()
        share = self.nbytes / bandwidth if self.tokens <= 256 else self.flops / compute
        return f"{took:9.2f} us {share / took * 1e6:6.1%}"


def best_of(
    bench: Bench, kernel: str, candidates: Sequence[Any], chosen: Any, product: Callable[..., Any]
) -> float | None:
    """Time candidates and print the fastest beside the chosen one; the fastest's time."""
    every = candidates if chosen in candidates else [*candidates, chosen]
    times = {}
    for tiles in every:
        took = bench.time(f"{kernel} {label(tiles)}", partial(product, tiles))
        if took is not None:
            times[label(tiles)] = took
    if not times:
        return None
    name = min(times, key=lambda key: times[key])
    line = f"  {kernel:<8} {bench.rate(times[name])}  {name}"
    if name != label(chosen):
        line += f"   (chosen {bench.rate(times.get(label(chosen))).strip()}: {label(chosen)})"
    print(line, flush=True)
    return times[name]


def run_gemv(tiles: Tiles, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    gemv.gemv(x, weight, None, out, "", tiles)


def run_tall(tiles: Tiles, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    tall.tall(x, weight, None, out, "", tiles)


def run_fixed(tiles: GemmTiles, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    run_gemm(x, weight, None, out, "", tiles)


def weights_of(shape: Shape) -> list[torch.Tensor]:
    return [random(shape.height, shape.k) for _ in range(copies(2 * shape.height * shape.k))]


def chosen_gemm(shape: Shape, tokens: int) -> GemmTiles:
    hopper, shared = is_hopper(DEVICE), shared_memory(DEVICE)
    return gemm_tiles(tokens, shape.height, 2, num_sms(DEVICE), hopper, shared)


def few(shape: Shape) -> None:
    """Skinny kernels and the GEMM beside cuBLAS, as shares of the bus."""
    weights, wins = weights_of(shape), []
    for tokens in FEW:
        bench = Bench(shape, tokens, weights)
        peer = bench.time("cuBLAS", cublas)
        print(f"{shape.name} T {tokens}\n  cuBLAS   {bench.rate(peer)}", flush=True)
        found = []
        if tokens <= gemv.MAX_TOKENS:
            chosen: Any = gemv.gemv_tiles(tokens, shape.height, shape.k, False)
            found.append(best_of(bench, "gemv", gemv_candidates(shape.k), chosen, run_gemv))
        if 4 <= tokens <= tall.MAX_TOKENS:
            sizes = (max(8, tokens), shape.height, shape.k, 2)
            chosen = tall.tall_tiles(*sizes, num_sms(DEVICE), shared_memory(DEVICE))
            candidates = tall_candidates(tokens, shape)
            found.append(best_of(bench, "tall", candidates, chosen, run_tall))
        chosen = chosen_gemm(shape, tokens)
        best_of(bench, "gemm", gemm_candidates(tokens), chosen, run_fixed)
        if peer is not None and any(took is not None and took < peer for took in found):
            wins.append(tokens)
    print(f"{shape.name}: skinny wins at T {wins}\n", flush=True)


def many(shape: Shape) -> None:
    """The GEMM beside cuBLAS, as shares of the tensor cores."""
    weights = weights_of(shape)
    for tokens in MANY:
        if tokens > 512 and shape.name.endswith("head"):
            continue  # logits are wanted of few tokens
        bench = Bench(shape, tokens, weights)
        peer = bench.time("cuBLAS", cublas)
        print(f"{shape.name} T {tokens}\n  cuBLAS   {bench.rate(peer)}", flush=True)
        chosen = chosen_gemm(shape, tokens)
        best_of(bench, "gemm", gemm_candidates(tokens), chosen, run_fixed)
        if shape.gated:
            out = random(tokens, shape.height // 2)
            apart = [partial(library_gated, bench.x, w, bench.out, out) for w in weights]
            fused = [partial(run_gemm, bench.x, w, None, out, "silu") for w in weights]
            print(f"  cuBLAS, then the activation {bench.rate(microseconds(apart))}")
            print(f"  gemm with the activation    {bench.rate(microseconds(fused))}", flush=True)


def library_gated(
    x: torch.Tensor, weight: torch.Tensor, between: torch.Tensor, out: torch.Tensor
) -> None:
    torch.mm(x, weight.t(), out=between)
    gated_activation(between, "silu", out)


def norm(shape: Shape) -> None:
    """Residual, norm and product (and activation) in one kernel, or norm and product apart."""
    kind, weights = ("silu" if shape.gated else ""), weights_of(shape)
    scale = torch.randn(shape.k, device=DEVICE)
    for tokens in (1, 2, 4, 8):
        if not skinny.add_norm_fits(tokens, shape.k):
            continue
        bench = Bench(shape, tokens, weights)
        x, residual = random(2, tokens, shape.k).unbind()
        out = random(tokens, shape.height // (2 if shape.gated else 1))

        def product(normed: torch.Tensor, w: torch.Tensor, kind: str = kind) -> torch.Tensor:
            if kind:
                return skinny.gated_linear(normed, w, kind)
            return skinny.skinny_linear(normed, w)

        def apart(
            w: torch.Tensor, x: torch.Tensor = x, residual: torch.Tensor = residual
        ) -> torch.Tensor:
            return product(add_rms_norm(x, residual, scale, EPS), w)

        alone = microseconds([partial(product, x, w) for w in weights])
        both = microseconds([partial(apart, w) for w in weights])
        print(f"{shape.name} T {tokens} {kind}\n  product alone     {bench.rate(alone)}")
        print(f"  norm, then product {bench.rate(both)}", flush=True)
        chosen = gemv.norm_gemv_tiles(tokens, shape.k, shape.gated)
        for rows in (2, 4) if shape.gated else (1, 2, 4):
            for warps in sorted({4, 8, chosen["num_warps"]}):
                for programs in (1, 2, 4):
                    if warps * programs > 32:
                        continue
                    tiles = {"ROWS": rows, "num_warps": warps}
                    fused = partial(gemv.norm_gemv, x, residual, scale, EPS)
                    runs = [partial(fused, w, None, out, kind, tiles, programs) for w in weights]
                    try:
                        took = bench.rate(microseconds(runs))
                    except Exception as error:
                        took = f"failed: {type(error).__name__}"
                    mark = "  <- chosen" if tiles == chosen and warps * programs == 16 else ""
                    print(f"  fused {label(tiles)} x{programs}  {took}{mark}", flush=True)


def main(mode: str, wanted: str) -> None:
    work = {"few": few, "many": many, "norm": norm}[mode]
    shapes = [s for s in SHAPES if mode != "norm" or s.name.endswith(("qkv", "gate_up"))]
    bandwidth, compute = ceilings()
    print(f"ceilings: {bandwidth / 1e9:.0f} GB/s, {compute / 1e12:.0f} TFLOP/s bf16")
    for shape in [*([SQUARE] if mode == "many" else []), *shapes]:
        if wanted in shape.name:
            work(shape)


if __name__ == "__main__":
    mode, wanted = command(__doc__, mode=["few", "many", "norm"], shape=[])
    main(mode or "few", wanted)
