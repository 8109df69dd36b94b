"""Token embedding against the reference."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference.embedding import embedding as reference
from quire.kernels.triton.embedding.embedding import embedding
from quire.kernels.triton.launch import INTERPRETED

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "vocab", "h"), [(0, 5, 8), (1, 1, 16), (3, 7, 33), (9, 50, 1096)])
def test_embedding_equals_reference(
    t: int, vocab: int, h: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(t)
    whole = torch.full((vocab, h + 16), torch.nan, dtype=dtype, device=device)
    table = whole[:, 8 : 8 + h]
    table.copy_(torch.randn(vocab, h, generator=generator))
    ids = torch.randint(vocab, (t,), generator=generator).to(device)
    assert torch.equal(embedding(ids, table), table[ids])
    # 33.94: the square root of Gemma 3's hidden size, as the caller rounds it.
    scale = float(torch.tensor(1152**0.5).to(dtype))
    found = embedding(ids, table, scale)
    assert found.dtype == dtype
    wanted = reference.embedding(ids, table, scale)
    assert torch.equal(wanted, table[ids] * torch.tensor(scale, dtype=dtype, device=device))
    # Triton's interpreter cuts to bfloat16 where a GPU rounds.
    cut = INTERPRETED and dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2**-7 if cut else 0, atol=0)


def test_ids_outside_the_table_take_its_ends(device: torch.device) -> None:
    table = torch.randn(5, 24).to(device)
    ids = torch.tensor([-1, 5, 2**40, -(2**40), 2], device=device)
    assert torch.equal(embedding(ids, table), table[[0, 4, 4, 0, 2]])


def test_an_empty_table_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="no rows"):
        embedding(
            torch.zeros(1, dtype=torch.int64, device=device), torch.empty(0, 8, device=device)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_beyond_two_billion_values() -> None:
    table = torch.empty(2**20, 2**11 + 64, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([0, 2**20 - 1, 2**19], device="cuda")
    table[ids] = torch.randn(3, table.shape[1], device="cuda", dtype=torch.bfloat16)
    assert torch.equal(embedding(ids, table), table[ids])
