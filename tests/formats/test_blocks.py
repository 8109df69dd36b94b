"""Rows and whole blocks of columns can be cut and moved as bytes."""

import pytest
import torch

from quire.formats.blocks import BlockTensor, concatenate_rows
from quire.formats.gguf import quantize


@pytest.fixture
def tensor() -> BlockTensor:
    return quantize("q4_0", torch.randn(6, 96, generator=torch.Generator().manual_seed(0)))


def test_rows_of_a_permutation_equal_permuted_values(tensor: BlockTensor) -> None:
    index = torch.tensor([5, 0, 3, 3])
    assert torch.equal(tensor.rows(index).dequantize(), tensor.dequantize()[index])


def test_row_slices_are_views(tensor: BlockTensor) -> None:
    part = tensor.rows(slice(2, 4))
    assert part.shape == (2, 96)
    assert part.data.data_ptr() == tensor.data[2:].data_ptr()
    assert torch.equal(part.dequantize(), tensor.dequantize()[2:4])


def test_whole_blocks_of_columns_equal_sliced_values(tensor: BlockTensor) -> None:
    assert torch.equal(tensor.columns(slice(32, 96)).dequantize(), tensor.dequantize()[:, 32:])
    assert tensor.columns(slice(64, 64)).shape == (6, 0)


@pytest.mark.parametrize("cut", [slice(0, 16), slice(1, 32), slice(0, 96, 2)])
def test_cutting_a_block_is_refused(tensor: BlockTensor, cut: slice) -> None:
    with pytest.raises(ValueError):
        tensor.columns(cut)


def test_concatenated_rows_keep_order_and_refuse_other_widths(tensor: BlockTensor) -> None:
    halves = [tensor.rows(slice(3, 6)), tensor.rows(slice(0, 3))]
    expected = torch.cat([tensor.dequantize()[3:], tensor.dequantize()[:3]])
    assert torch.equal(concatenate_rows(halves).dequantize(), expected)
    with pytest.raises(ValueError, match="cannot stack"):
        concatenate_rows([tensor, tensor.columns(slice(0, 32))])


def test_contradicting_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="needs uint8 data"):
        BlockTensor("q8_0", (2, 32), torch.zeros(2, 33, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown block format"):
        BlockTensor("q9", (1, 32), torch.zeros(1, 34, dtype=torch.uint8))
