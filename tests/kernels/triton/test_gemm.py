"""The GEMM of deterministic mode: against the reference, and a row's bits in every batch."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.gemm import gemm as reference
from quire.kernels.triton.gemm.gemm import gemm, run_gemm
from quire.kernels.triton.gemm.gemm_tiles import LARGE, SMALL, GemmTiles, gemm_tiles
from quire.kernels.triton.rows import empty_rows, rows_with_room
from tests.kernels.triton.aot import SHARED
from tests.kernels.triton.gemm_inputs import (
    DTYPES,
    assert_close,
    flat,
    magnitude,
    matrix,
    vector,
)

SHAPES = [(0, 8, 16), (1, 1, 8), (3, 5, 33), (64, 65, 72), (65, 20, 130), (200, 70, 24)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="bits of a GPU's instructions")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_product_equals_reference(
    t: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = matrix(t, k, dtype, device, 1), flat(n, k, dtype, device, 2), None
    if k % 3 == 0:
        bias = vector(n, device, 3)
    out = matrix(t, n, dtype, device, 4).fill_(torch.nan)
    assert gemm(x, weight, bias, out) is out
    assert_close(out, reference.gemm(x, weight, bias), magnitude(x, weight, bias))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 16), (65, 24, 136)])
def test_a_float32_result_is_not_rounded(
    t: int, n: int, k: int, tma: bool, device: torch.device
) -> None:
    x, weight = matrix(t, k, torch.bfloat16, device, 1), flat(n, k, torch.bfloat16, device, 2)
    out = matrix(t, n, torch.float32, device, 4).fill_(torch.nan)
    run_gemm(x, weight, None, out, "", GemmTiles(64, 64, 4, 3, halves=True), tma)
    assert_close(out, x.float() @ weight.float().T, magnitude(x, weight))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("t", "n", "k"), SHAPES)
def test_gated_product_equals_reference(
    t: int, n: int, k: int, kind: str, device: torch.device
) -> None:
    dtype = torch.bfloat16
    x, weight = matrix(t, k, dtype, device, 1) / k**0.5, flat(2 * n, k, dtype, device, 2)
    bias = vector(2 * n, device, 3) if k % 3 == 0 else None
    gate, up = magnitude(x, weight, bias).chunk(2, dim=1)
    found = gemm(x, weight, bias, gated=kind)
    assert_close(found, reference.gemm(x, weight, bias, gated=kind), (gate + 1) * (up + 1))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 16), (70, 40, 136), (130, 56, 72)])
def test_descriptors_reach_the_same_elements(
    t: int, n: int, k: int, activation: str, halves: bool, device: torch.device
) -> None:
    dtype = torch.float16
    height = n if activation == "" else 2 * n
    x, weight = matrix(t, k, dtype, device, 1) / k**0.5, flat(height, k, dtype, device, 2)
    bias = vector(height, device, 3)
    out = matrix(t, n, dtype, device, 4).fill_(torch.nan)
    run_gemm(x, weight, bias, out, activation, GemmTiles(64, 64, 4, 3, halves), tma=True)
    size = magnitude(x, weight, bias)
    if activation != "":
        gate, up = size.chunk(2, dim=1)
        size = (gate + 1) * (up + 1)
    assert_close(out, reference.gemm(x, weight, bias, gated=activation), size)


@pytest.mark.parametrize("t", [1, 37, 64])
def test_what_lies_behind_the_tokens_is_multiplied_and_not_stored(
    t: int, device: torch.device
) -> None:
    x, weight = empty_rows(t, 72, torch.float16, device), flat(24, 72, torch.float16, device, 2)
    assert rows_with_room(x, 64) == 64 and rows_with_room(x.clone(), 64) == t
    x.untyped_storage().fill_(0xFF)  # NaN
    x.copy_(matrix(t, 72, torch.float16, device, 1))
    found, wanted = (torch.full((t + 1, 24), 7, dtype=x.dtype, device=device) for _ in range(2))
    run_gemm(x, weight, None, found[:t], "", tma=True)
    run_gemm(x.clone(), weight, None, wanted[:t], "", tma=True)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("tma", [False, True])
def test_only_the_result_is_written(tma: bool, device: torch.device) -> None:
    n = 24 if tma else 21  # the copy engine is not used for columns that end within 16 bytes
    whole = torch.full((9, 48), torch.nan, dtype=torch.float16, device=device)
    x, weight = (torch.ones(r, 40, dtype=torch.float16, device=device) for r in (7, n))
    run_gemm(x, weight, None, whole[1:-1, 8 : 8 + n], "", tma=tma)
    written = torch.zeros_like(whole, dtype=torch.bool)
    written[1:-1, 8 : 8 + n] = True
    assert torch.equal(~whole.isnan(), written)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hopper", [False, True])
def test_tiles_keep_to_the_instruction_that_fixes_the_bits(hopper: bool, itemsize: int) -> None:
    for tokens in (1, 64, 65, 128, 500, 8192):
        for height in (1, 576, 4096, 24576, 151936):
            tiles = gemm_tiles(tokens, height, itemsize, 132, hopper, SHARED["sm_90"])
            assert tiles.height % 64 == 0
            assert tiles.height == 64 or tokens > 64


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("gated", ["", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (576, 1536), (1000, 2056), (320, 1003)])
def test_a_rows_bits_do_not_depend_on_its_batch(
    n: int, k: int, dtype: torch.dtype, gated: str
) -> None:
    device = torch.device("cuda")
    x, weight = matrix(1024, k, dtype, device, 1), flat(n, k, dtype, device, 2)
    bias = vector(n, device, 3)
    whole = gemm(x, weight, bias, gated=gated)
    for t in (1, 3, 64, 65, 200, 1024):
        for first in {0, 1024 - t, (1024 - t) // 2}:
            part = gemm(x[first : first + t], weight, bias, gated=gated)
            assert torch.equal(part, whole[first : first + t]), (t, first)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_every_tile_gives_the_same_bits(activation: str, tma: bool) -> None:
    device, n, k = torch.device("cuda"), 1024, 4096
    hopper = torch.cuda.get_device_capability()[0] == 9
    if tma and not hopper:
        pytest.skip("descriptors are used on Hopper")
    x = matrix(300, k, torch.bfloat16, device, 1)
    weight = flat(n, k, torch.bfloat16, device, 2)
    wanted = gemm(x, weight, gated=activation)
    candidates = [GemmTiles(64, 64, 4, 2), GemmTiles(128, 128, 8, 2)]
    if tma:
        candidates = [tiles for tiles, _ in LARGE] + [tiles for _, tiles in SMALL]
    for tiles in candidates:
        found = torch.full_like(wanted, torch.nan)
        run_gemm(x, weight, None, found, activation, tiles, tma)
        assert torch.equal(found, wanted), tiles


@pytest.mark.gpu
@gpu
def test_offsets_beyond_two_to_the_31_elements() -> None:
    device, k = torch.device("cuda"), 4096
    tall = torch.empty(2**19 + 72, k, dtype=torch.bfloat16, device=device)
    tall[-72:] = flat(72, k, torch.bfloat16, device, 1)
    few = flat(40, k, torch.bfloat16, device, 2)
    for tma in {False, torch.cuda.get_device_capability()[0] == 9}:
        y = torch.empty(72, len(tall), dtype=torch.bfloat16, device=device)
        run_gemm(tall[-72:], tall, None, y, "", tma=tma)
        wanted = reference.gemm(tall[-72:], tall[-72:])
        assert_close(y[:, -72:], wanted, magnitude(tall[-72:], tall[-72:]))
        y = torch.empty(len(tall), 40, dtype=torch.bfloat16, device=device)
        run_gemm(tall, few, None, y, "", tma=tma)
        assert_close(y[-72:], reference.gemm(tall[-72:], few), magnitude(tall[-72:], few))
