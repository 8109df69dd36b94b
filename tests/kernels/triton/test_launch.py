"""Launching: what cannot be compiled is an error for people, and what will be is known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from quire.errors import QuireError
from quire.kernels.triton import compile_kernels as compiling
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


class Noted(Kernel):
    """Stands for a kernel that is compiled without a launch."""

    def __init__(self, error: Exception | None = None):
        super().__init__(AssertionError("launched"))
        self.compiled: list[tuple[Any, ...]] = []
        self.refused = error

    def warmup(self, *args: Any, grid: tuple[int, ...], **meta: Any) -> None:
        self.compiled.append((*args, meta["ROWS"]))
        if self.refused is not None:
            raise self.refused


def test_kernels_of_a_step_are_compiled_once_for_each_kind_of_arguments() -> None:
    kernel, x = Noted(), torch.zeros(1000)
    with launch.wanted_kernels() as wanted:
        for tensor, size in ((x, 32), (x, 64), (x[4:], 48), (x, 1), (x[1:], 64), (x.half(), 64)):
            launch.launch(kernel, (3,), CPU, tensor, size, None, ROWS=8)
        launch.launch(kernel, (3,), CPU, x, 32, None, ROWS=16)
        launch.launch(kernel, (0,), CPU, x, 32, None, ROWS=32)
        assert not kernel.compiled
    compiling.compile_kernels(wanted, 2)
    found = {(t.dtype, t.data_ptr() % 16 == 0, size, rows) for t, size, _, rows in kernel.compiled}
    assert found == {
        (torch.float32, True, 32, 8), (torch.float32, True, 1, 8), (torch.float32, False, 64, 8),
        (torch.float16, True, 64, 8), (torch.float32, True, 32, 16),
    }  # fmt: skip
    assert len(kernel.compiled) == 5
    assert all(t.untyped_storage().nbytes() <= 16 for t, *_ in kernel.compiled)  # not x's


def test_what_cannot_be_compiled_beforehand_waits_for_its_launch() -> None:
    refused, fault = RuntimeError("PassManager::run failed"), RuntimeError("another")
    for error in (refused, fault):
        with launch.wanted_kernels() as wanted:
            for rows in (8, 16):
                launch.launch(Noted(error), (1,), CPU, ROWS=rows)
        if error is refused:
            compiling.compile_kernels(wanted, 2)
        else:
            with pytest.raises(RuntimeError, match="another"):
                compiling.compile_kernels(wanted, 2)
