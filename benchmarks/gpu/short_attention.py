"""Decode attention of few requests with short contexts: the kernel whose programs hand states on
(decode.py), and the one whose programs do not, in tiles of several sizes (decode_short.py); this
one after rotary_cache, with head norms, and with what that does as a part of it.

    python -m benchmarks.gpu.short_attention            # all models
    python -m benchmarks.gpu.short_attention Qwen3-8B   # those with this in their name

Microseconds a layer in a chain of such layers, with keys and values from memory. "-": the kernel
does not serve so long a context. The floor is a kernel that only reads the context's length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.gpu.attention import MODELS, Model, block_tables
from benchmarks.gpu.harness import Work, command, microseconds
from benchmarks.gpu.shapes import DEVICE, random
from quire.kernels.new_tokens import NewTokens
from quire.kernels.reference.packed import BLOCK
from quire.kernels.triton.attention.decode_short import SHORT_CONTEXT, ShortTile, decode_short
from quire.kernels.triton.attention.decode_short import TILES as CHOSEN
from quire.kernels.triton.attention.paged_attention import Scratch, paged_attention
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs
from quire.kernels.triton.rotary.rotary_cache import rotary_cache

# (requests, tokens of each).
CONTEXTS = [(1, n) for n in (128, 256, 290, 385, 512, 1000, 4000)] + [(2, 290), (4, 290)]
TILES = list(CHOSEN) + [
    ShortTile(keys, chunk, warps)
    for chunk in (32, 64, 128)
    for keys, warps in ((32, 4), (64, 4), (64, 8), (128, 8), (64, 16), (128, 16))
    if (keys, chunk, warps) not in map(astuple, CHOSEN) and keys * chunk // warps <= 1024
]
TABLE = 2560  # blocks of the longest context
COLD = 200_000_000  # bytes of keys and values to rotate over: four times an H200's L2


@triton.jit
def _floor_kernel(length_ptr, out_ptr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    if tl.load(length_ptr) < 0:
        tl.store(out_ptr, 0)


class Layers:
    """Layers of one model, all with the same lengths and each with keys and values of its own."""

    def __init__(self, model: Model, requests: int, tokens: int):
        self.model, d = model, model.head_size
        blocks = -(-tokens // BLOCK)
        layers = COLD // (4 * d * model.kv_heads * tokens * requests) + 1
        tables = torch.zeros(layers, requests, TABLE, dtype=torch.int32, device=DEVICE)
        owned = block_tables([blocks] * (requests * layers))
        tables[:, :, :blocks] = owned.unflatten(0, (layers, requests))
        shape = requests * layers * blocks + 1, model.kv_heads, BLOCK, d
        self.k_cache, self.v_cache = random(*shape), random(*shape)
        self.tables = tables.unbind()
        self.q = [random(requests, model.heads * d) for _ in self.tables]
        self.out = torch.empty_like(self.q[0])
        last = torch.full((requests,), tokens - 1, device=DEVICE)
        cos_sin = torch.rand(tokens, d, device=DEVICE)
        norms = torch.rand(2, d, device=DEVICE).unbind()
        width = (model.heads + 2 * model.kv_heads) * d
        self.new = [
            NewTokens(
                random(requests, width), last, cos_sin, *norms, 1e-6,
                table[:, last[0] // BLOCK].long() * BLOCK + last % BLOCK,
            )
            for table in self.tables
        ]  # fmt: skip
        self.start = torch.arange(requests + 1, device=DEVICE, dtype=torch.int32)
        self.length = torch.full((requests,), tokens, device=DEVICE, dtype=torch.int32)
        self.scratch = Scratch.allocate(
            requests, model.heads, model.kv_heads, d, total_tokens=0, dtype=torch.bfloat16,
            deterministic=False, device=DEVICE,
        )  # fmt: skip

    def _each(self, work: Callable[[torch.Tensor, torch.Tensor], object]) -> list[Work]:
        return [partial(work, q, tables) for q, tables in zip(self.q, self.tables, strict=True)]

    def floor(self) -> list[Work]:
        sms, out = torch.cuda.get_device_properties(DEVICE).multi_processor_count, self.out
        return [partial(launch, _floor_kernel, (sms,), DEVICE, self.length, out)] * 20

    def general(self, q: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        return paged_attention(
            q, self.k_cache, self.v_cache, tables, self.start, self.length,
            self.model.head_size**-0.5, None, None, None, decode=True, deterministic=False,
            scratch=self.scratch, out=self.out,
        )  # fmt: skip

    def short(
        self,
        tile: ShortTile | None,
        q: torch.Tensor,
        tables: torch.Tensor,
        new: NewTokens | None = None,
    ) -> torch.Tensor:
        factor = self.model.head_size**-0.5 * math.log2(math.e)
        decode_short(
            q, self.k_cache, self.v_cache, tables, self.length, factor, 1.0, None, False, None,
            self.out, tile, new,
        )  # fmt: skip
        return self.out

    def after_rotary(self, new: NewTokens, tables: torch.Tensor) -> torch.Tensor:
        q = new.written(rotary_cache, self.k_cache, self.v_cache)
        return self.short(None, q, tables)

    def with_rotary(self, new: NewTokens, tables: torch.Tensor) -> torch.Tensor:
        return self.short(None, new.qkv[:, : self.q[0].shape[1]], tables, new)

    def rotary(self) -> tuple[float, float]:
        """Microseconds of two kernels and of one."""
        works = self.after_rotary, self.with_rotary
        two, one = (work(self.new[0], self.tables[0]).clone() for work in works)
        torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)
        each = list(zip(self.new, self.tables, strict=True))
        after, within = (microseconds([partial(w, *layer) for layer in each]) for w in works)
        return after, within

    def handing_on(self) -> tuple[float, torch.Tensor]:
        """Microseconds, and the first layer's result."""
        took = microseconds(self._each(self.general))
        return took, self.general(self.q[0], self.tables[0]).clone()

    def alone(self, tile: ShortTile, expected: torch.Tensor) -> float:
        found = self.short(tile, self.q[0], self.tables[0])
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
        return microseconds(self._each(partial(self.short, tile)))


def row(name: str, times: list[float | None]) -> None:
    cells = ("       -" if t is None else f"{t:8.2f}" for t in times)
    print(f"{name:<34}{''.join(cells)}", flush=True)


def table(model: Model) -> None:
    print(f"{model.name}: requests x tokens" + " " * 6, *CONTEXTS)
    cases = [Layers(model, *context) for context in CONTEXTS]
    row("floor", [microseconds(case.floor()) for case in cases])
    handing = [case.handing_on() for case in cases]
    row("states handed on", [took for took, _ in handing])
    for tile in TILES:
        keys, chunk, warps = astuple(tile)
        times: list[float | None] = []
        for case, (_, tokens), (_, expected) in zip(cases, CONTEXTS, handing, strict=True):
            times.append(case.alone(tile, expected) if tokens <= SHORT_CONTEXT else None)
        row(f"none: {keys} keys {chunk} columns {warps} warps", times)
    both = [
        case.rotary() if tokens <= SHORT_CONTEXT else (None, None)
        for case, (_, tokens) in zip(cases, CONTEXTS, strict=True)
    ]
    row("rotary_cache, then the chosen tile", [after for after, _ in both])
    row("one kernel for both", [within for _, within in both])


if __name__ == "__main__":
    [wanted] = command(__doc__, model=[])
    torch.manual_seed(0)
    for model in MODELS:
        if wanted in model.name:
            table(model)
