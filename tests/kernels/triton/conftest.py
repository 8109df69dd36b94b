"""Fixtures of the Triton kernels' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this process: a GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _OrderedNumpy:
    """numpy, but with matrix products whose bits do not depend on where a row or column lies.

    An MMA's do not; those of numpy's BLAS, which the interpreter calls, do on some processors.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        return np.einsum("...mk,...kn->...mn", a, b, dtype=dtype)


@pytest.fixture(autouse=True, scope="session")
def ordered_products() -> None:
    if not torch.cuda.is_available():
        interpreter.np = _OrderedNumpy()
