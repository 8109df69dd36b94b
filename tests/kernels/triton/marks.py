"""Marks of test cases."""

import pytest
import torch

# Sizes of production, and more of all others: slow in the interpreter, where `make test-all` runs
# them, and quick on a GPU, where `pytest -m gpu` does.
FULL = (pytest.mark.full, pytest.mark.gpu)
# Sizes that would take the interpreter minutes.
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="too slow in the interpreter"),
)
