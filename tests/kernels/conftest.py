"""Fixtures of the kernel tests: every instruction set of this machine, with one and two threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quire.kernels import native

if native.available():
    from quire.kernels.native import ops


def usable_isas() -> list[str]:
    if not native.available():
        return []
    chosen, found = ops.isa(), []
    for name in ("avx512", "avx2", "portable"):
        try:
            ops.set_isa(name)
            found.append(name)
        except ValueError:
            continue
    ops.set_isa(chosen)
    return found


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=usable_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set, and puts the best one back."""
    if not native.available():
        pytest.skip(native.why_not())
    chosen, threads = ops.isa(), ops.num_threads()
    ops.set_isa(request.param)
    ops.set_num_threads(2)
    yield request.param
    ops.set_isa(chosen)
    ops.set_num_threads(threads)
