"""Mixture of experts at Qwen3-30B-A3B's sizes, tokens routed evenly at random.

    python -m benchmarks.gpu.moe            # each stage and the whole, by number of tokens
    python -m benchmarks.gpu.moe sweep      # tiles of the grouped product, the best by tokens

GB/s counts the weights of the experts that are in use, once; TFLOP/s the pairs' products without
padding.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.gpu.harness import Timed, Work, ceilings, microseconds, need_gpu, report
from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.moe.align import Aligned, align
from quire.kernels.triton.moe.combine import combine
from quire.kernels.triton.moe.experts import SMALL_PAIRS, experts
from quire.kernels.triton.moe.experts_small import experts_small
from quire.kernels.triton.moe.grouped_gemm import grouped_gemm
from quire.kernels.triton.moe.route import route
from quire.kernels.triton.moe.tiles import Tile, fit, tiles

E, K, H, I = 128, 8, 2048, 768  # noqa: E741
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 8192)
DTYPE = torch.bfloat16
# Bytes of one expert: gate and up, down.
EXPERT = (2 * I * H * 2, H * I * 2)


@dataclass(frozen=True)
class Routing:
    """One random batch: its tokens, router logits, weights and experts."""

    x: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


def routings(tokens: int) -> list[Routing]:
    """Several batches where few experts are used, since those could stay in the L2 cache."""
    found = []
    for _ in range(max(1, min(8, 64 // tokens))):
        x = torch.randn(tokens, H, device="cuda", dtype=DTYPE)
        logits = torch.randn(tokens, E, device="cuda", dtype=DTYPE)
        found.append(Routing(x, logits, *route(logits, K, True)))
    return found


def make_weights() -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = torch.randn(E, 2 * I, H, device="cuda", dtype=DTYPE) * H**-0.5
    return gate_up, torch.randn(E, H, I, device="cuda", dtype=DTYPE) * I**-0.5


def used_experts(batches: list[Routing]) -> float:
    """How many experts a batch uses, on average."""
    return sum(len(b.ids.unique()) for b in batches) / len(batches)


def each(batches: list[Routing], work: Callable[[Routing], Work]) -> list[Work]:
    return [work(b) for b in batches]


def stages(tokens: int, gate_up: torch.Tensor, down: torch.Tensor) -> list[Timed]:
    """The stages of the grouped path, and the whole in both modes; both paths where either is
    possible."""
    batches = routings(tokens)
    used, pairs = used_experts(batches), tokens * K
    up_flops, down_flops = 4.0 * pairs * I * H, 2.0 * pairs * I * H
    first, second = tiles(pairs, E, DTYPE, deterministic=False, shared=shared_memory(down.device))

    def sort(b: Routing) -> Aligned:
        return align(route(b.logits, K, True)[1], E, first.rows)

    def make_gate_up(b: Routing) -> Work:
        aligned = sort(b)
        return lambda: grouped_gemm(b.x, gate_up, aligned, first, kind="silu", from_tokens=True)

    def make_down(b: Routing, dtype: torch.dtype) -> Work:
        aligned = sort(b)
        h = torch.randn(pairs, I, device="cuda", dtype=DTYPE)
        return lambda: grouped_gemm(h, down, aligned, second, from_tokens=False, dtype=dtype)

    def make_sum(b: Routing, dtype: torch.dtype) -> Work:
        y = torch.randn(pairs, H, device="cuda", dtype=dtype)
        return lambda: combine(y, b.weights, DTYPE)

    def whole(deterministic: bool) -> Callable[[Routing], Work]:
        return lambda b: (
            lambda: experts(
                b.x, *route(b.logits, K, True), gate_up, down, "silu", deterministic=deterministic
            )
        )

    name = f"T={tokens}"
    cases = [
        Timed(f"{name} route", each(batches, lambda b: lambda: route(b.logits, K, True))),
        Timed(f"{name} route + align", each(batches, lambda b: lambda: sort(b))),
        Timed(f"{name} gate_up", each(batches, make_gate_up), used * EXPERT[0], up_flops),
    ]
    for dtype in (torch.float32, DTYPE):
        label = str(dtype).removeprefix("torch.")
        cases += [
            Timed(
                f"{name} down to {label}",
                each(batches, lambda b, d=dtype: make_down(b, d)),
                used * EXPERT[1],
                down_flops,
            ),
            Timed(
                f"{name} sum of {label}",
                each(batches, lambda b, d=dtype: make_sum(b, d)),
                pairs * H * dtype.itemsize + tokens * H * 2,
            ),
        ]
    if pairs <= 4 * SMALL_PAIRS:
        cases.append(
            Timed(
                f"{name} small path, without route",
                each(
                    batches,
                    lambda b: lambda: experts_small(b.x, b.weights, b.ids, gate_up, down, "silu"),
                ),
                used * sum(EXPERT),
                up_flops + down_flops,
            )
        )
    for deterministic in (False, True):
        cases.append(
            Timed(
                f"{name} all{', deterministic' if deterministic else ''}",
                each(batches, whole(deterministic)),
                used * sum(EXPERT),
                up_flops + down_flops,
            )
        )
    return cases


# Tiles worth trying: (columns, depth, warps, stages) by rows, for gate and up; down takes the same
# with twice the columns, so that a step moves as many bytes.
LOW = ((32, 128, 4, 4), (64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (64, 64, 4, 8))
CANDIDATES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    16: LOW,
    32: LOW,
    64: ((64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 3)),
    128: ((64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4)),
}
SWEPT = (16, 64, 128, 256, 512, 1024, 8192)


def candidates(rows: int, gated: bool) -> list[Tile]:
    shared = shared_memory(torch.device("cuda", 0))
    tall = (False, True) if rows <= 64 else (False,)
    found = [
        Tile(rows, columns * (1 if gated else 2), depth, warps, stages, weight_tall)
        for (columns, depth, warps, stages), weight_tall in itertools.product(
            CANDIDATES[rows], tall
        )
    ]
    if not gated and rows == 128:
        found += [Tile(128, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3)]
    return list(dict.fromkeys(t for t in found if fit(t, gated, 2, shared) == t))


def sweep() -> None:
    """Time every candidate for gate_up and for down; print the best three by tokens."""
    gate_up, down = make_weights()
    jobs: list[tuple[str, int, Tile, float, Callable[[], Work]]] = []
    for tokens in SWEPT:
        batches = routings(tokens)
        batch, used, pairs = batches[0], used_experts(batches), tokens * K
        h = torch.randn(pairs, I, device="cuda", dtype=DTYPE)
        out_dtype = torch.float32 if pairs * H * 4 <= 32 * 2**20 else DTYPE
        for rows in CANDIDATES:
            # Heights from a quarter to eight times what an even routing gives an expert.
            if not pairs / E / 4 <= rows <= max(64, pairs / E * 8):
                continue
            aligned = align(batch.ids, E, rows)
            for gated, tile in [(g, t) for g in (True, False) for t in candidates(rows, g)]:

                def make(
                    aligned: Aligned = aligned, gated: bool = gated, tile: Tile = tile,
                    x: torch.Tensor = batch.x, h: torch.Tensor = h,
                    dtype: torch.dtype = out_dtype,
                ) -> Work:  # fmt: skip
                    if gated:
                        return lambda: grouped_gemm(
                            x, gate_up, aligned, tile, kind="silu", from_tokens=True
                        )
                    return lambda: grouped_gemm(
                        h, down, aligned, tile, from_tokens=False, dtype=dtype
                    )

                part = "gate_up" if gated else "down"
                jobs.append((part, tokens, tile, used * EXPERT[not gated], make))

    def compile_once(job: tuple[str, int, Tile, float, Callable[[], Work]]) -> str | None:
        try:
            job[4]()()
        except Exception as error:  # one tile that cannot run must not lose the others
            return f"{type(error).__name__}: {str(error)[:100]}"
        return None

    unique = list({(job[0], job[2]): job for job in jobs}.values())
    with ThreadPoolExecutor(8) as pool:
        errors = dict(
            zip([(j[0], j[2]) for j in unique], pool.map(compile_once, unique), strict=True)
        )
    torch.cuda.synchronize()
    for key, error in errors.items():
        if error:
            print(*key, error, flush=True)
    bandwidth, compute = ceilings()
    for part, tokens in itertools.product(("gate_up", "down"), SWEPT):
        timed = []
        for job in jobs:
            if job[:2] == (part, tokens) and not errors[part, job[2]]:
                timed.append((microseconds([job[4]()], repeats=3), job[2], job[3]))
        flops = (4.0 if part == "gate_up" else 2.0) * tokens * K * I * H
        for took, tile, nbytes in sorted(timed, key=lambda t: t[0])[:3]:
            print(
                f"{part:<8} T={tokens:<5} {took:8.1f} us {nbytes / took * 1e6 / bandwidth:6.1%} of "
                f"bandwidth {flops / took * 1e6 / compute:6.1%} of compute  {tile}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["stages", "sweep"], default="stages")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    arguments = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    if arguments.what == "sweep":
        sweep()
        return
    weights = make_weights()
    report([case for tokens in arguments.tokens for case in stages(tokens, *weights)])


if __name__ == "__main__":
    main()
