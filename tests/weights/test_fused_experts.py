"""Fused tensors of experts read as those of single experts, whole and in parts."""

from __future__ import annotations

import torch
from layers.source import Tensors

from quire.weights.fused_experts import FusedExperts
from quire.weights.source import TensorInfo

E, H, WIDTH = 3, 64, 5
NAME = "model.layers.0.mlp.experts"


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return (torch.arange(size) % 251).reshape(shape).to(dtype)


def split(tensors: Tensors) -> FusedExperts:
    return FusedExperts(tensors, {NAME}, E)


def test_gate_and_up_alternate_and_matrices_are_transposed() -> None:
    gate_up, down = numbers(E, H, 2 * WIDTH), numbers(E, WIDTH, H)
    bias, down_bias = numbers(E, 2 * WIDTH), numbers(E, H)
    source = split(
        Tensors(
            {
                f"{NAME}.gate_up_proj": gate_up,
                f"{NAME}.gate_up_proj_bias": bias,
                f"{NAME}.down_proj": down,
                f"{NAME}.down_proj_bias": down_bias,
                "model.norm.weight": torch.ones(4),
            }
        )
    )
    assert len(source.names()) == E * 6 + 1
    for e in range(E):
        for part, first in (("gate", 0), ("up", 1)):
            name = f"{NAME}.{e}.{part}_proj"
            expected = torch.stack([gate_up[e, :, first + 2 * i] for i in range(WIDTH)])
            assert source.info(f"{name}.weight").shape == (WIDTH, H)
            assert torch.equal(source.read(f"{name}.weight"), expected)
            found = source.read(f"{name}.weight", slice(1, 4), slice(8, 24))
            assert torch.equal(found, expected[1:4, 8:24])
            assert torch.equal(source.read(f"{name}.bias"), bias[e, first::2])
            assert torch.equal(source.read(f"{name}.bias", slice(2, 4)), bias[e, first::2][2:4])
        assert torch.equal(source.read(f"{NAME}.{e}.down_proj.weight"), down[e].T)
        assert torch.equal(source.read(f"{NAME}.{e}.down_proj.bias"), down_bias[e])


def test_blocks_and_scales_keep_their_rows() -> None:
    blocks = numbers(E, 2 * WIDTH, H // 32, 16, dtype=torch.uint8)
    scales = numbers(E, 2 * WIDTH, H // 32, dtype=torch.uint8)
    source = split(
        Tensors({f"{NAME}.gate_up_proj_blocks": blocks, f"{NAME}.gate_up_proj_scales": scales})
    )
    for e in range(E):
        for part, first in (("gate", 0), ("up", 1)):
            name = f"{NAME}.{e}.{part}_proj"
            assert source.info(f"{name}.weight_packed").shape == (WIDTH, H // 2)
            rows = blocks[e, first::2].reshape(WIDTH, H // 2)
            assert torch.equal(source.read(f"{name}.weight_packed"), rows)
            assert torch.equal(source.read(f"{name}.weight_scale"), scales[e, first::2])


def test_what_is_not_fused_stays_as_it_is() -> None:
    names = [f"{NAME}.0.down_proj.weight", "model.mlp.gate_up_proj", f"{NAME}.gate_up_proj_other"]
    tensors = {name: numbers(4, 6, 2) for name in names}
    odd = {f"{NAME}.gate_up_proj": numbers(E, H, 7), f"{NAME}.down_proj": numbers(4, 6)}
    source = split(Tensors({**tensors, **odd}))
    assert source.names() == sorted({**tensors, **odd})
    for name, tensor in {**tensors, **odd}.items():
        assert torch.equal(source.read(name), tensor)


class Header(Tensors):
    """A file of one tensor, of which there is only what its header says."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        super().__init__({name: torch.empty(0)})
        self.only = TensorInfo(name, shape, "bf16")

    def info(self, name: str) -> TensorInfo:
        assert name == self.only.name
        return self.only


def test_only_as_many_experts_as_the_config_has_are_taken_apart() -> None:
    """A header of a hundred bytes may tell of any number, in any module, where they are empty."""
    for name, shape in (
        (f"{NAME}.gate_up_proj", (200_000_000, 2, 0)),
        (f"{NAME}.down_proj_bias", (2**60, 0)),
        ("model.layers.1.mlp.experts.down_proj", (E, 2, 0)),
    ):
        assert split(Header(name, shape)).names() == [name]
    name = f"{NAME}.down_proj"
    assert len(split(Header(name, (E, 2, 0))).names()) == E
