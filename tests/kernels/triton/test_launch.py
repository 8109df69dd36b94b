"""A kernel that cannot be compiled is an error for people: which kernel, where, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from quire.errors import QuireError
from quire.kernels.triton import launch

CPU = torch.device("cpu")


class Kernel:
    """Stands for a compiled kernel whose launch raises."""

    __name__ = "some_kernel"
    __module__ = "quire.kernels.triton.norm.rms_norm"

    def __init__(self, error: Exception):
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **meta: Any) -> None:
            raise self.error

        return run


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)


@pytest.mark.parametrize(
    "error",
    [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")],
)
def test_what_the_compiler_refuses_names_kernel_and_architecture(error: Exception) -> None:
    with pytest.raises(QuireError) as caught:
        launch.launch(Kernel(error), (1,), CPU)
    found = caught.value
    assert found.code == "kernel_not_compiled" and found.__cause__ is error
    assert found.what == "some_kernel (norm.rms_norm) cannot be compiled for cpu"
    assert type(error).__name__ in found.why and "--device cpu" in found.fix


def test_other_faults_pass_unchanged() -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError) as caught:
        launch.launch(Kernel(error), (1,), CPU)
    assert caught.value is error
    launch.launch(Kernel(error), (0, 3), CPU)  # no program, no launch
