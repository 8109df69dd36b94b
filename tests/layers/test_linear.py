"""Linear layers against a product written out, with parts of one format and of several."""

import pytest
import torch

from layers.source import Tensors, load
from quire.comm.group import Group
from quire.formats.blocks import BlockTensor
from quire.formats.gguf import quantize
from quire.kernels.reference import ops
from quire.layers.build import Build
from quire.layers.linear import Linear, merge
from quire.layers.read import to_dense

K = 64


def dense(tensor: torch.Tensor | BlockTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, BlockTensor) else tensor.float()


def part(kind: str, rows: int) -> torch.Tensor | BlockTensor:
    values = torch.randn(rows, K)
    if kind in ("q8_0", "q4_1"):
        return quantize(kind, values)
    return values.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind])


MIXES = [
    (["f32"], 1),
    (["bf16", "bf16", "bf16"], 1),
    (["q8_0", "q8_0", "q8_0"], 1),
    (["q4_1", "q4_1", "q8_0"], 2),
    (["bf16", "q8_0", "bf16"], 3),
    (["f16", "bf16"], 2),
]


@pytest.mark.parametrize(("kinds", "packed"), MIXES)
@pytest.mark.parametrize("bias", [False, True])
def test_parts_of_any_formats_give_their_rows_one_after_another(
    kinds: list[str], packed: int, bias: bool
) -> None:
    build = Build(ops)
    names, sizes = [f"p{i}" for i in range(len(kinds))], [32, 16, 48][: len(kinds)]
    layer = Linear(build, names, K, sizes, bias=bias)
    weights = [part(kind, n) for kind, n in zip(kinds, sizes, strict=True)]
    biases = [torch.randn(n).to(torch.bfloat16) for n in sizes] if bias else []
    tensors = {f"{n}.weight": w for n, w in zip(names, weights, strict=True)}
    tensors |= {f"p{i}.bias": b for i, b in enumerate(biases)}
    load(build, tensors)
    x = torch.randn(7, K)
    expected = x @ torch.cat([dense(w) for w in weights]).T
    if bias:
        expected += torch.cat(biases).float()
    assert torch.allclose(layer(x), expected, atol=1e-4)
    assert layer(x[:0]).shape == (0, sum(sizes))
    assert len(merge(weights)) == packed


def test_a_dtype_makes_all_dense_parts_alike() -> None:
    parts = [part("f16", 4), part("bf16", 4), part("f32", 4)]
    [(merged, rows)] = merge([to_dense(p, torch.float32) for p in parts])
    assert rows == 12
    assert isinstance(merged, torch.Tensor)
    assert torch.equal(merged, torch.cat([dense(p) for p in parts]))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_shares_of_two_ranks_are_columns_or_summands_of_the_whole(kind: str) -> None:
    weights = {"a.weight": part(kind, 32), "b.weight": part(kind, 16)}
    biases = {"a.bias": torch.randn(32), "b.bias": torch.randn(16)}
    x = torch.randn(3, K)
    whole = x @ torch.cat([dense(w) for w in weights.values()]).T + torch.cat([*biases.values()])
    columns, summands = [], []
    for rank in range(2):
        build = Build(ops, group=Group(rank, 2))
        outputs = Linear(build, ["a", "b"], K, [32, 16], bias=True, shard="outputs")
        inputs = Linear(build, ["a", "b"], K, [32, 16], bias=True, shard="inputs", reduce=False)
        for layer in (outputs, inputs):
            layer.load(Tensors({**weights, **biases}))
        columns.append(outputs(x))
        summands.append(inputs(x[:, rank * K // 2 : (rank + 1) * K // 2].contiguous()))
    a, b = zip(*(c.split([16, 8], dim=1) for c in columns), strict=True)
    assert torch.allclose(torch.cat([*a, *b], dim=1), whole, atol=1e-4)
    assert torch.allclose(summands[0] + summands[1], whole, atol=1e-4)


def test_memory_is_the_sum_of_the_parts_that_this_rank_holds() -> None:
    build = Build(ops, group=Group(1, 2))
    layer = Linear(build, ["a", "b"], K, [32, 16], bias=True, shard="outputs")
    assert layer.nbytes(lambda name: "bf16") == (16 + 8) * K * 2 + (16 + 8) * 4
