"""Pages are gathered and scattered byte for byte, whatever tensors they consist of."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.paged_tensors import PagedTensors
from quire.kernels.reference.step.move_pages import move_pages as reference
from quire.kernels.triton.step.move_pages import move_pages

# Of each tensor of a pool: the shape of a block, and its number format.
KINDS = {
    "keys and values": [((2, 16, 8), torch.bfloat16), ((2, 16, 8), torch.bfloat16)],
    "a latent and bytes": [((16, 36), torch.bfloat16), ((24,), torch.uint8)],
    "more than a tile": [((3, 16, 200), torch.float32), ((1,), torch.int64)],
}


def pool(kind: str, blocks: int, device: torch.device, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in KINDS[kind]:
        count = blocks * torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        made.append(raw.view(dtype).view(blocks, *shape).to(device))
    return made


def raw(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.cpu().view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("kind", list(KINDS))
def test_pages_equal_reference_and_nothing_else_is_written(
    kind: str, count: int, store: bool, device: torch.device
) -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(count))
    blocks = order[:count].to(device, torch.int32)
    slots = order[9 - count :].to(device, torch.int32)
    results = []
    for operation in (move_pages, reference):
        tensors = pool(kind, 9, device, seed=1)
        pages = PagedTensors.of(tensors)
        width = (9, pages.page_words)
        rows = torch.randint(-9, 9, width, generator=torch.Generator().manual_seed(2)).to(device)
        operation(pages, blocks, rows, slots, store)
        results.append(raw([*tensors, rows]))
    assert results[0] == results[1]
    untouched = raw(pool(kind, 9, device, seed=1))
    assert (results[0][:-1] == untouched) == (store or count == 0)


def test_what_was_stored_comes_back(device: torch.device) -> None:
    tensors = pool("a latent and bytes", 6, device, seed=3)
    before, pages = raw(tensors), PagedTensors.of(tensors)
    rows = torch.zeros((8, pages.page_words), dtype=torch.int64, device=device)
    blocks = torch.arange(6, dtype=torch.int32, device=device)
    move_pages(pages, blocks, rows, blocks + 2, True)
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(255)
    move_pages(pages, blocks, rows, blocks + 2, False)
    assert raw(tensors) == before


def test_a_block_that_is_no_whole_number_of_words_is_refused(device: torch.device) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        PagedTensors.of([torch.zeros((4, 3), dtype=torch.int32, device=device)])
