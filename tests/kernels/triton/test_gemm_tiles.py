"""No number of tokens needs a variant of a product's kernel that no warmed step has."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from quire.kernels.triton.gemm.gemm_tiles import gemm_tiles, size_class
from quire.kernels.triton.moe.tiles import tiles
from quire.plan.gpu import graph_sizes
from quire.runner.shapes import Shape, Shapes

H200 = {"sms": 132, "hopper": True, "shared": 232448}
# Heights of SmolLM2's weights and of Qwen3-8B's: queries to values, gate and up, others, the head.
HEIGHTS = [576, 960, 3072, 49152, 4096, 6144, 24576, 151936]
Variant = tuple[object, ...]


@cache
def gemm_variant(tokens: int, height: int) -> Variant:
    """All that the number of tokens decides of the compiled kernel, as run_gemm has it."""
    found = gemm_tiles(tokens, height, 2, **H200)
    return (found, tokens <= found.height)


@cache
def moe_variant(tokens: int, deterministic: bool) -> Variant:
    return tiles(
        tokens * 8, 128, torch.bfloat16, deterministic=deterministic, shared=H200["shared"]
    )


@pytest.mark.parametrize("most", [48, 300, 1000, 2048, 2049, 3000, 6000, 8192, 8193, 16384])
@pytest.mark.parametrize("rows", [4, 512])
def test_every_step_has_the_variants_of_a_warmed_one(most: int, rows: int) -> None:
    shapes = Shapes(most, rows, rows, *graph_sizes(most, rows), drafting=False)
    warmed = {key.tokens for key in shapes.planned() if isinstance(key, Shape)}
    computed = {shapes.of(tokens, 1).tokens for tokens in range(1, most + 1)}
    computed |= {shapes.of(count, count).tokens for count in range(1, min(rows, most) + 1)}
    choices = [lambda t, h=h: gemm_variant(t, h) for h in HEIGHTS]
    choices += [lambda t, d=d: moe_variant(t, d) for d in (False, True)]
    for choose in choices:
        ready = {choose(tokens) for tokens in warmed}
        assert {choose(tokens) for tokens in computed} <= ready


def test_a_class_holds_what_lies_between_it_and_the_next_lower() -> None:
    classes = sorted({size_class(tokens) for tokens in range(1, 9000)})
    assert [c for c in classes if c >= 64] == [
        64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384,
    ]  # fmt: skip
    for tokens in range(1, 9000):
        assert size_class(tokens) == min(c for c in classes if c >= tokens)


def test_steps_that_get_a_graph_choose_by_their_own_size() -> None:
    assert all(size_class(tokens) == tokens for tokens in graph_sizes(2048, 64, True)[1])
