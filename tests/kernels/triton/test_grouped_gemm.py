"""The grouped product against the reference: short blocks, odd sizes, both ways of loading."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.moe.grouped_gemm import grouped_gemm as reference
from quire.kernels.triton.gemm.shared import HOPPER_SHARED, shared_memory
from quire.kernels.triton.moe import grouped_gemm as module
from quire.kernels.triton.moe.align import align
from quire.kernels.triton.moe.grouped_gemm import grouped_gemm
from quire.kernels.triton.moe.tiles import TILES, Tile, fit, tiles
from tests.kernels.triton.moe_inputs import poisoned_memory, random, random_ids

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SMALL = Tile(16, 32, 32, 4, 3)


def both(
    ids: torch.Tensor,
    sizes: tuple[int, int, int],
    kind: str | None,
    from_tokens: bool,
    dtype: torch.dtype,
    device: torch.device,
    tile: Tile = SMALL,
    out_dtype: torch.dtype | None = None,
) -> None:
    e, n, c = sizes
    rows = ids.shape[0] if from_tokens else ids.numel()
    x = random(1, rows, c).to(device, dtype)
    weight = random(2, e, n * (1 if kind is None else 2), c, scale=c**-0.5).to(device, dtype)
    with poisoned_memory():
        aligned = align(ids.to(device), e, tile.rows)
        out = grouped_gemm(
            x, weight, aligned, tile, kind=kind, from_tokens=from_tokens, dtype=out_dtype
        )
    wanted = reference(x, weight, aligned, kind=kind, from_tokens=from_tokens, dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("from_tokens", [False, True])
@pytest.mark.parametrize("kind", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_product_equals_reference(
    dtype: torch.dtype, kind: str | None, from_tokens: bool, device: torch.device
) -> None:
    both(random_ids(3, 21, 5, 3), (5, 40, 72), kind, from_tokens, dtype, device)


@pytest.mark.parametrize("sizes", [(4, 1, 8), (3, 33, 24), (3, 64, 64), (2, 7, 33)])
@pytest.mark.parametrize("tensor_maps", [False, True])
def test_odd_sizes_with_and_without_the_copy_engine(
    sizes: tuple[int, int, int],
    tensor_maps: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tensor_maps and not module.has_tensor_maps(device):
        pytest.skip("this GPU has no TMA")
    monkeypatch.setattr(module, "has_tensor_maps", lambda device: tensor_maps)
    ids = random_ids(4, 9, sizes[0], 2)
    both(ids, sizes, "silu", True, torch.float32, device)
    both(ids, sizes, None, False, torch.bfloat16, device, out_dtype=torch.float32)


@pytest.mark.parametrize("t", [0, 1, 16, 17, 50])
def test_all_tokens_of_one_expert(t: int, device: torch.device) -> None:
    both(torch.full((t, 1), 2).int(), (4, 24, 32), None, True, torch.float32, device)


def test_more_blocks_than_a_group(device: torch.device) -> None:
    both(random_ids(5, 60, 20, 3), (20, 40, 32), None, False, torch.float32, device)


@pytest.mark.parametrize("rows", TILES)
def test_every_tile_of_this_device(rows: int, device: torch.device) -> None:
    ids = random_ids(6, 70, 3, 2)
    for gated, tile in zip((True, False), TILES[rows], strict=True):
        tile = fit(tile, gated, 2, shared_memory(device))
        kind = "silu" if gated else None
        both(ids, (3, 96, 136), kind, gated, torch.bfloat16, device, tile)


def test_other_experts_and_rows_are_not_read(device: torch.device) -> None:
    """NaN in an expert without tokens, and in a token's row, stays where it is."""
    e, n, c = 4, 40, 64
    ids = torch.tensor([[0], [2], [0], [2], [0]], dtype=torch.int32, device=device)
    x, weight = random(1, 5, c).to(device), random(2, e, n, c).to(device)
    aligned = align(ids, e, 16)
    clean = grouped_gemm(x, weight, aligned, SMALL, from_tokens=True)
    x[4] = torch.nan
    weight[1] = weight[3] = torch.nan
    found = grouped_gemm(x, weight, aligned, SMALL, from_tokens=True)
    bad = (aligned.pairs == 4).nonzero().item()
    assert found[bad].isnan().all()
    others = [i for i in range(5) if i != bad]
    assert torch.equal(found[others], clean[others])


def test_what_does_not_fit_together_is_refused(device: torch.device) -> None:
    aligned = align(torch.zeros(3, 1, dtype=torch.int32, device=device), 2, 16)
    x, weight = torch.zeros(3, 8, device=device), torch.zeros(2, 4, 8, device=device)
    with pytest.raises(ValueError, match="kind"):
        grouped_gemm(x, weight, aligned, SMALL, kind="relu", from_tokens=True)
    with pytest.raises(ValueError, match="blocks of 16"):
        grouped_gemm(x, weight, aligned, Tile(32, 32, 32, 4, 2), from_tokens=True)
    with pytest.raises(ValueError, match="does not fit weight"):
        grouped_gemm(x[:, :4], weight, aligned, SMALL, from_tokens=True)
    with pytest.raises(ValueError, match="contiguous"):
        grouped_gemm(x, weight.mT.contiguous().mT, aligned, SMALL, from_tokens=True)


@pytest.mark.parametrize("shared", [65536, 101376, 166912, HOPPER_SHARED])
def test_tiles_fit_in_shared_memory(shared: int) -> None:
    for pairs in (1, 1000, 4000, 8192, 100_000):
        for dtype in (torch.bfloat16, torch.float32):
            gate_up, down = tiles(pairs, 128, dtype, deterministic=False, shared=shared)
            assert gate_up.rows == down.rows
            for tile, products in ((gate_up, 2), (down, 1)):
                values = (tile.rows + products * tile.columns) * tile.depth * tile.stages
                assert values * dtype.itemsize < shared


def test_deterministic_tiles_are_of_one_instruction() -> None:
    for pairs in (1, 100, 1000, 100_000):
        for tile in tiles(pairs, 128, torch.bfloat16, deterministic=True, shared=HOPPER_SHARED):
            assert tile.rows in (64, 128)
