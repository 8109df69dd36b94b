"""The thread pool: calls from several Python threads, resizing, and fork."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

native = pytest.importorskip("quire.kernels.native._native", reason="the extension is not built")
from quire.kernels.native import ops  # noqa: E402


@pytest.fixture(autouse=True)
def restore_threads():  # type: ignore[no-untyped-def]
    threads = ops.num_threads()
    yield
    ops.set_num_threads(threads)


def test_python_threads_may_call_at_the_same_time() -> None:
    ops.set_num_threads(3)
    packed, x = ops.pack(torch.randn(400, 300)), torch.randn(40, 300)
    expected = ops.linear(x, packed)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.linear(x, packed), range(200)))
    assert all(torch.equal(result, expected) for result in results)


def test_the_pool_can_be_resized_between_calls() -> None:
    packed, x = ops.pack(torch.randn(400, 300)), torch.randn(40, 300)
    expected = ops.linear(x, packed)
    for threads in (1, 4, 2, 3, 1, 2):
        ops.set_num_threads(threads)
        assert ops.num_threads() == threads
        assert torch.equal(ops.linear(x, packed), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same() -> None:
    ops.set_num_threads(2)
    packed, x = ops.pack(torch.randn(400, 300)), torch.randn(40, 300)
    expected, out = ops.linear(x, packed), torch.zeros(40, 400)
    child = os.fork()
    if child == 0:  # only kernels here: torch's own threads do not survive the fork
        ops.linear(x, packed, out=out)
        os._exit(0 if out.numpy().tobytes() == expected.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ops.linear(x, packed), expected)
