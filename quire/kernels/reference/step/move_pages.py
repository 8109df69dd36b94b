"""Reference of quire/kernels/triton/step/move_pages.py."""

from __future__ import annotations

import torch

from quire.kernels.paged_tensors import PagedTensors


def move_pages(
    pages: PagedTensors,
    blocks: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    store: bool,
) -> None:
    begins = 0
    for tensor in pages.tensors:
        columns = rows[:, begins : begins + tensor.shape[1]]
        begins += tensor.shape[1]
        if store:
            columns[slots] = tensor[blocks]
        else:
            tensor[blocks] = columns[slots]
