"""The embedding table, its scale, and heads that share it or have their own weight."""

import pytest
import torch

from layers.source import Tensors, load
from quire.comm.group import Group
from quire.formats.gguf import quantize
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.embedding import Embedding, Head, TiedHead

V, H = 40, 64
SCALE = 1152**0.5  # 33.94: 34 in bfloat16


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, SCALE), (torch.bfloat16, 34.0), (torch.float16, 33.9375)]
)
def test_rows_are_scaled_by_the_factor_in_the_tables_dtype(
    dtype: torch.dtype, factor: float
) -> None:
    build = Build(ops)
    embedding = Embedding(build, "e", V, H, scale=SCALE)
    table = torch.randn(V, H).to(dtype)
    load(build, {"e.weight": table})
    tokens = torch.tensor([3, 3, 39, 0])
    assert torch.allclose(embedding(tokens), table[tokens].float() * factor, rtol=1e-6)


def test_a_packed_table_gives_its_dequantised_rows_with_the_exact_factor() -> None:
    build = Build(ops)
    embedding = Embedding(build, "e", V, H, scale=SCALE)
    table = quantize("q8_0", torch.randn(V, H))
    load(build, {"e.weight": table})
    assert torch.allclose(embedding(torch.arange(V)), table.dequantize() * SCALE, rtol=1e-6)


def test_a_tied_head_is_the_product_with_the_unscaled_table() -> None:
    build = Build(ops)
    embedding = Embedding(build, "e", V, H, scale=SCALE)
    table = torch.randn(V, H)
    load(build, {"e.weight": table})
    x = torch.randn(3, H)
    assert torch.allclose(TiedHead(embedding)(x), x @ table.T, atol=1e-4)
    assert embedding.nbytes(lambda name: "f32") == 4 * V * H


@pytest.mark.parametrize(("vocab", "share"), [(40, 20), (41, 41)])
def test_a_head_is_shared_over_ranks_where_its_vocabulary_divides(vocab: int, share: int) -> None:
    build = Build(ops, group=Group(1, 2))
    head = Head(build, "h", vocab, H)
    head.linear.load(Tensors({"h.weight": torch.randn(vocab, H)}))
    assert head.linear.local_out == share
