"""The fastest tiles of kernels with quantised weights: what their tables of tiles come from.

    python -m benchmarks.gpu.sweeps                 # all of these, long
    python -m benchmarks.gpu.sweeps skinny nvfp4    # few tokens, by the matrix instruction
    python -m benchmarks.gpu.sweeps gemv fp8        # one token, by multiply-adds
    python -m benchmarks.gpu.sweeps small nvfp4     # experts of one token, by the same instruction
    python -m benchmarks.gpu.sweeps norm_gemv fp8   # residual addition and norm with it, in one
    python -m benchmarks.gpu.sweeps grouped nvfp4   # sorted pairs of tokens and experts
    python -m benchmarks.gpu.sweeps scaled fp8      # the same on e4m3 tokens

For each shape the tile that is chosen now, then the fastest: microseconds, and the share of the
least time possible (quantized.py).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial

import torch

from benchmarks.gpu.harness import microseconds, need_gpu
from benchmarks.gpu.quantized import SHAPES, SLOTS, Cell, E, H, I, Work, again, bind, least, make
from benchmarks.gpu.shapes import DEVICE, random
from quire.kernels.reference.quantized.weights import FORMATS
from quire.kernels.triton.gemm.shared import shared_memory
from quire.kernels.triton.launch import num_sms
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.moe.route import route
from quire.kernels.triton.norm.rms_norm import add_rms_norm
from quire.kernels.triton.quantized.experts import expert_tile, expert_tokens
from quire.kernels.triton.quantized.experts_small import SmallTile, experts_small, small_tiles
from quire.kernels.triton.quantized.gemm import QuantizedTile
from quire.kernels.triton.quantized.gemv import down_gemv, down_tiles, gemv, gemv_tiles
from quire.kernels.triton.quantized.grouped_gemm import quantized_grouped_gemm
from quire.kernels.triton.quantized.norm_gemv import norm_gemv, norm_gemv_tiles
from quire.kernels.triton.quantized.pack import PackedQuantized, pack
from quire.kernels.triton.quantized.quantize import QuantizedTokens, quantize
from quire.kernels.triton.quantized.scaled_experts import scaled_tiles
from quire.kernels.triton.quantized.scaled_grouped_gemm import GroupedTile, scaled_grouped_gemm
from quire.kernels.triton.quantized.skinny import skinny, skinny_tiles

# Products after a norm: Qwen3-8B's, and the attention's of Qwen3-30B-A3B.
EPS = 1e-6
NORMED = {"qkv": (6144, 4096, ""), "gate_up": (24576, 4096, "silu"), "30b qkv": (5120, 2048, "")}
# DeepSeek V4 Flash's, beside those of Qwen3.
MORE = {"q_b": (32768, 1024), "o_b": (4096, 8192), "q_a kv": (1536, 4096), "shared": (4096, 2048)}


@dataclass(frozen=True)
class Experts:
    """Sizes of a layer's experts, and how many a token goes to."""

    name: str
    hidden: int
    inner: int
    count: int
    slots: int


EXPERTS = (Experts("Qwen3-30B-A3B", H, I, E, SLOTS), Experts("DeepSeek V4", 4096, 2048, 64, 6))


def print_fastest(title: str, cells: list[Cell], most: int = 5) -> None:
    """Check and time; the first, and the fastest."""
    print(title)
    with ThreadPoolExecutor(12, initializer=bind) as pool:
        problems = list(pool.map(Cell.check, cells))
    for cell, problem in zip(cells, problems, strict=True):
        if problem:
            print(f"  {cell.row}: {problem}", flush=True)
    good = [c for c, problem in zip(cells, problems, strict=True) if not problem]
    if good:
        microseconds(good[0].runs(), repeats=3)  # the first that is timed finds the clocks low
    timed = [(microseconds(c.runs(), repeats=3), c) for c in good]
    for took, cell in [*timed[:1], *sorted(timed, key=lambda p: p[0])[:most]]:
        print(f"  {cell.row:<18} {took:8.2f} us {cell.least / took * 1e6:5.1%}", flush=True)


def _words(values: Iterable[object]) -> str:
    return " ".join(str(v if isinstance(v, str) else int(v)) for v in values)  # type: ignore[call-overload]


def sweep_skinny(format: str) -> None:
    blocks = (1, 2) if format in ("nvfp4", "mxfp4", "fp8") else (1,)
    options = list(itertools.product((16, 32, 64), (2, 4, 8), blocks, (2, 3, 4, 6, 8)))
    shared = shared_memory(DEVICE)
    for (name, (n, k)), t in itertools.product((SHAPES | MORE).items(), (1, 8, 32)):
        packed = pack(make(format, n, k))
        weights, x = again(packed, packed.nbytes), random(t, k)
        tiles = [skinny_tiles(max(8, t), n, format, 128, num_sms(DEVICE), shared)] + [
            {"ROWS": r, "PARTS": p, "BLOCKS": b, "num_warps": p, "num_stages": s}
            for r, p, b, s in options
            if p * b * 128 * s * (max(8, t) * 2 + r * 0.6) < shared - 8192
        ]

        def runs(
            tile: dict[str, int], x: torch.Tensor = x, ws: list[PackedQuantized] = weights
        ) -> list[Work]:
            return [partial(skinny, x, w, tiles=tile) for w in ws]

        low = least(packed.nbytes, 2.0 * t * n * k)
        cells = [Cell(_words(e.values()), t, partial(runs, e), None, low) for e in tiles]
        print_fastest(f"{format} {name} T={t}: rows parts blocks warps stages", cells)


def _cells(tiles: list[dict[str, int]], runs: Callable[..., list[Work]], low: float) -> list[Cell]:
    """Of one token, compared with the first tile's result."""
    wanted = runs(tiles[0])[0]()
    return [Cell(_words(e.values()), 1, partial(runs, e), wanted, low) for e in tiles]


def sweep_gemv(format: str) -> None:
    options = [
        {"ROWS": r, "COLUMNS": c, "num_warps": w}
        for r, c, w in itertools.product((2, 4, 8, 16), (64, 128, 256, 512), (1, 2, 4, 8))
        if 64 <= c // w <= 128 and r * c // w <= 1024
    ]
    for name, (n, k) in (SHAPES | MORE).items():
        packed = pack(make(format, n, k))
        weights, x = again(packed, packed.nbytes), random(1, k)

        def one(
            tile: dict[str, int], x: torch.Tensor = x, ws: list[PackedQuantized] = weights
        ) -> list[Work]:
            out = torch.empty(1, ws[0].n, dtype=x.dtype, device=DEVICE)
            return [lambda w=w: (gemv(x, w, None, out, "", 0.0, tiles=tile), out)[1] for w in ws]

        cells = _cells([gemv_tiles(k, False), *options], one, least(packed.nbytes, 0))
        print_fastest(f"{format} {name}: rows columns warps", cells)
    gate_up, down = pack(make(format, 2 * I, H, E)), pack(make(format, H, I, E))
    batches = [(random(1, H), *route(random(1, E), SLOTS, True)) for _ in range(10)]
    h = random(SLOTS, I)

    def first(tile: dict[str, int]) -> list[Work]:
        out = torch.empty_like(h)
        return [
            lambda x=x, ids=ids: (
                gemv(x, gate_up, None, out, "silu", 0.0, ids=ids, tiles=tile), out,
            )[1]
            for x, _, ids in batches
        ]  # fmt: skip

    def second(tile: dict[str, int]) -> list[Work]:
        out = torch.empty(1, H, dtype=h.dtype, device=DEVICE)
        return [
            lambda w=w, ids=ids: (down_gemv(h, w, ids, down, None, out, tile), out)[1]
            for _, w, ids in batches
        ]

    cells = _cells([gemv_tiles(H, True), *options], first, least(gate_up.nbytes * SLOTS / E, 0))
    print_fastest(f"{format} experts, gate and up: rows columns warps", cells)
    more = [
        {"PARTS": SLOTS, "ROWS": r, "COLUMNS": c, "num_warps": w}
        for r, c, w in itertools.product((2, 4, 8, 16), (64, 128), (1, 2, 4, 8))
        if SLOTS * r * c // w <= 160 * 32
    ]
    cells = _cells([down_tiles(SLOTS), *more], second, least(down.nbytes * SLOTS / E, 0))
    print_fastest(f"{format} experts, down: parts rows columns warps", cells)


def sweep_small(format: str) -> None:
    shared = shared_memory(DEVICE)
    for each in EXPERTS:
        gate_up = pack(make(format, 2 * each.inner, each.hidden, each.count))
        down = pack(make(format, each.hidden, each.inner, each.count))
        batches = [
            (random(1, each.hidden), *route(random(1, each.count), each.slots, True))
            for _ in range(10)
        ]
        rows = 2 * each.inner * each.slots
        chosen = small_tiles(format, format, each.slots, rows, num_sms(DEVICE))

        def runs(
            tiles: tuple[SmallTile, SmallTile], gate_up: PackedQuantized = gate_up,
            down: PackedQuantized = down, batches: list[tuple[torch.Tensor, ...]] = batches,
        ) -> list[Work]:  # fmt: skip
            return [partial(experts_small, *batch, gate_up, down, "silu", tiles=tiles)
                    for batch in batches]  # fmt: skip

        options = [
            SmallTile(rows, parts, blocks, warps, stages)
            for rows, parts, blocks, warps, stages in itertools.product(
                (16, 32), (2, 4, 8), (1, 2, 4), (2, 4, 8), (2, 3, 4)
            )
            if parts / 2 <= warps <= parts * rows // 16
            and parts * blocks * 128 * stages * (16 + rows * 0.6) < shared - 8192
        ]
        firsts = [(t, chosen[1]) for t in options if t.parts * t.blocks * 128 <= each.hidden]
        seconds = [(chosen[0], t) for t in options if t.parts == chosen[1].parts]
        low = least((gate_up.nbytes + down.nbytes) * each.slots / each.count, 0)
        wanted = runs(chosen)[0]()
        for name, part, tiles in (("gate and up", 0, firsts), ("down", 1, seconds)):
            cells = [
                Cell(_words(astuple(pair[part])), 1, partial(runs, pair), wanted, low)
                for pair in [chosen, *tiles]
            ]
            title = f"{format} experts of {each.name}, {name}"
            print_fastest(f"{title}: rows parts blocks warps stages", cells)


def sweep_norm_gemv(format: str) -> None:
    for (name, (n, k, kind)), t in itertools.product(NORMED.items(), (1, 2)):
        packed = pack(make(format, n, k))
        weights, scale = again(packed, packed.nbytes), torch.rand(k, device=DEVICE)
        x, residual = random(2, t, k).unbind()
        summed = residual.clone()
        sizes, programs = norm_gemv_tiles(t, k)
        tiles = [sizes | {"programs": programs}] + [
            {"ROWS": r, "num_warps": w, "programs": warps // w}
            for r, w, warps in itertools.product((2, 4, 8), (1, 2, 4, 8), (8, 12, 16, 20, 24))
            if 16 <= t * k // (32 * w) <= 64 and r * k // (32 * w) <= 128 and warps % w == 0
        ]

        def apart(
            w: PackedQuantized, x: torch.Tensor = x, residual: torch.Tensor = summed,
            scale: torch.Tensor = scale, kind: str = kind,
        ) -> torch.Tensor:  # fmt: skip
            return skinny(add_rms_norm(x, residual, scale, EPS), w, kind=kind)

        def runs(
            tile: dict[str, int], x: torch.Tensor = x, residual: torch.Tensor = residual,
            scale: torch.Tensor = scale, kind: str = kind, ws: list[PackedQuantized] = weights,
        ) -> list[Work]:  # fmt: skip
            tile = dict(tile)
            programs = tile.pop("programs")
            fused = partial(norm_gemv, x, residual, scale, EPS)
            return [
                lambda w=w: fused(w, None, kind, tiles=tile, programs_per_sm=programs)[0]
                for w in ws
            ]

        wanted, low = apart(packed), least(packed.nbytes, 0)
        _, both, alone = (  # the first that is timed finds the clocks low
            microseconds([partial(call, w) for w in weights])
            for call in (apart, apart, partial(skinny, x, kind=kind))
        )
        cells = [Cell(_words(e.values()), t, partial(runs, e), wanted, low) for e in tiles]
        print_fastest(
            f"{format} norm and {name} T={t} ({both:.2f} us by two kernels, {alone:.2f} by the "
            "second alone): rows warps programs",
            cells,
        )


def sweep_grouped(format: str) -> None:
    gate_up, down = pack(make(format, 2 * I, H, E)), pack(make(format, H, I, E))
    shared = shared_memory(DEVICE)
    for t, (weight, kind) in itertools.product((32, 256), ((gate_up, "silu"), (down, ""))):
        _, ids = route(random(t, E), SLOTS, True)
        pairs, used = t * SLOTS, len(ids.unique()) / E
        x = random(t if kind else pairs, weight.k)
        block = expert_tokens(pairs, gate_up, down, deterministic=False)
        chosen = expert_tile(block, format, shared)
        tiles = [chosen] + [
            QuantizedTile(rows, tokens, blocks, warps, stages)
            for tokens, rows, blocks, warps, stages in itertools.product(
                (8, 16, 32, 64), (64, 128), (1, 2), (4, 8), (2, 3, 4, 5)
            )
            if pairs / E / 2 <= tokens <= max(16, 4 * pairs / E)
            and warps * 16 <= rows * 2
            and blocks * 128 * (tokens * 2 + rows) * stages < shared - 8192
        ]

        def runs(
            tile: QuantizedTile, x: torch.Tensor = x, weight: PackedQuantized = weight,
            kind: str = kind, ids: torch.Tensor = ids,
        ) -> list[Work]:  # fmt: skip
            aligned = align(ids, E, tile.tokens)
            return [partial(quantized_grouped_gemm, x, weight, aligned, tile, kind=kind,
                            from_tokens=kind != "")]  # fmt: skip

        low = least(weight.nbytes * used, (4.0 if kind else 2.0) * pairs * H * I)
        wanted = runs(chosen)[0]()
        cells = [Cell(_words(astuple(e)), t, partial(runs, e), wanted, low) for e in tiles]
        name = "gate and up" if kind else "down"
        print_fastest(f"{format} {name} T={t}: rows tokens blocks warps stages", cells)


def _scaled_options(pairs: int, chosen: GroupedTile, blockwise: bool) -> list[GroupedTile]:
    """The chosen tile, and others whose stages and sums find room."""
    found = [chosen]
    widths = [t for t in (16, 32, 64, 128) if pairs / E / 4 <= t <= max(16, 4 * pairs / E)]
    for tokens, rows, warps, stages, programs, tall in itertools.product(
        widths or [128], (64, 128, 256), (4, 8), (3, 4, 5, 6), (1, 2, 3), (True, False)
    ):
        stage, sums = (tokens + rows) * 128, tokens * rows // (warps * 32)
        registers = 65536 // (programs * warps * 32)
        if (
            ((tall and tokens <= 64) or (not tall and tokens >= 64))
            and stages * stage + 4096 <= shared_memory(DEVICE) // programs
            and stages * stage * programs >= 98304  # enough bytes in flight
            and sums * (1 + blockwise) + 48 <= min(255, registers)
            and (warps == 4 or sums >= 16)
            and not (blockwise and rows > 128)
        ):
            found.append(GroupedTile(tokens, rows, warps, stages, programs, tall))
    return found


def sweep_scaled(format: str) -> None:
    gate_up, down = pack(make(format, 2 * I, H, E)), pack(make(format, H, I, E))
    group, blockwise = 0 if format == "fp8" else 128, format == "fp8_block"
    for t in (32, 256, 2048, 8192):
        _, ids = route(random(t, E), SLOTS, True)
        pairs, used = t * SLOTS, len(ids.unique()) / E
        x = QuantizedTokens(*quantize(random(t, H), group))
        h = QuantizedTokens(*quantize(random(pairs, I), group))
        for which, chosen in enumerate(scaled_tiles(pairs, E, format)):
            name, given, weight, kind = (
                ("gate and up", x, gate_up, "silu") if which == 0 else ("down", h, down, "")
            )

            def runs(
                tile: GroupedTile, given: QuantizedTokens = given, weight: PackedQuantized = weight,
                kind: str = kind, ids: torch.Tensor = ids,
            ) -> list[Work]:  # fmt: skip
                aligned = align(ids, E, tile.tokens)
                return [partial(scaled_grouped_gemm, given, weight, aligned, tile, kind=kind,
                                from_tokens=kind != "")]  # fmt: skip

            low = least(weight.nbytes * used, (4.0 if kind else 2.0) * pairs * H * I, True)
            wanted = runs(chosen)[0]()
            tiles = _scaled_options(pairs, chosen, blockwise)
            cells = [Cell(_words(astuple(e)), t, partial(runs, e), wanted, low) for e in tiles]
            title = f"{format} {name} T={t}: tokens rows warps stages programs tall"
            print_fastest(title, cells)


# What sweeps, and the formats that it does where none are named.
SWEEPS = {
    "skinny": (sweep_skinny, FORMATS),
    "gemv": (sweep_gemv, ("fp8", "fp8_block")),
    "small": (sweep_small, ("nvfp4", "mxfp4")),
    "norm_gemv": (sweep_norm_gemv, ("fp8", "fp8_block")),
    "grouped": (sweep_grouped, ("nvfp4", "mxfp4")),
    "scaled": (sweep_scaled, ("fp8", "fp8_block")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", nargs="?", choices=SWEEPS)
    parser.add_argument("formats", nargs="*", choices=[[], *FORMATS], default=[])
    arguments = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    for name, (sweep, formats) in SWEEPS.items():
        if arguments.kernel in (None, name):
            for format in arguments.formats or formats:
                sweep(format)


if __name__ == "__main__":
    main()
