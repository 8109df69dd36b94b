"""CUDA graphs: what replaying gives, and what a capture that fails leaves behind."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from quire.errors import QuireError
from quire.runner.graphs import Graphs

pytestmark = pytest.mark.gpu
# What goes wrong in the middle of a capture, beginning one, and not at all; in a process of its own
# because what it proves is that the process goes on and ends well.
PROGRAM = """
import gc, sys
import torch
from quire.runner.graphs import Graphs

device = torch.device("cuda")
graphs = Graphs(device)
x, y = torch.ones(4, device=device), torch.zeros(4, device=device)

def add():
    y.copy_(x + 1)

def wait():
    y.copy_(x + y.sum().item())

assert sys.argv[1] in ("capturing", "beginning")
graphs.capture("before", add)
if sys.argv[1] == "capturing":
    graphs.capture("bad", wait)
else:
    # The stream is capturing already, so that the graph is registered by half.
    other = torch.cuda.CUDAGraph()
    with torch.cuda.stream(graphs._stream):
        other.capture_begin(capture_error_mode="thread_local")
        graphs.capture("bad", add)
        other.capture_end()
    del other
print(graphs.failed["bad"])
assert graphs.known("bad") and not graphs.replay("bad") and len(graphs) == 1
gc.collect()
graphs.capture("after", lambda: y.copy_(2 * x))
x.fill_(3)
assert graphs.replay("before") and y.tolist() == [4] * 4
assert graphs.replay("after") and y.tolist() == [6] * 4
assert torch.rand(1000, device=device).std() > 0
torch.cuda.empty_cache()
del graphs
gc.collect()
print("fine")
"""


@pytest.fixture
def graphs() -> Graphs:
    return Graphs(torch.device("cuda"))


def test_replay_computes_what_was_captured_with_what_memory_now_holds(graphs: Graphs) -> None:
    x, y, z = (torch.zeros(1000, device="cuda") for _ in range(3))
    graphs.capture("product", lambda: y.copy_((x * 2 + 1) @ torch.diag(x)))
    graphs.capture("sum", lambda: z.copy_(y + x.sum()))
    assert len(graphs) == 2 and graphs.known("sum") and not graphs.known("other")
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        assert graphs.replay("product") and graphs.replay("sum")
        assert y.unique().tolist() == [(2 * value + 1) * value]
        assert z.unique().tolist() == [(2 * value + 1) * value + 1000 * value]
    assert not graphs.replay("other")


def failing(error: Exception) -> Callable[[], None]:
    """Computes, unless it is captured."""

    def compute() -> None:
        torch.ones(100, device="cuda").mul_(2)
        if torch.cuda.is_current_stream_capturing():
            raise error

    return compute


def test_what_raises_while_it_is_captured_gets_no_graph_and_a_warning(
    graphs: Graphs, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.zeros(4, device="cuda")
    with caplog.at_level(logging.WARNING, "quire.runner"):
        graphs.capture(("bad", 1), failing(ValueError("no good")))
    assert graphs.failed == {("bad", 1): "ValueError: no good"}
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph for ('bad', 1): ValueError: no good"
    ]
    assert graphs.known(("bad", 1)) and not graphs.replay(("bad", 1)) and len(graphs) == 0
    graphs.capture("good", lambda: x.add_(1))
    before = x.clone()
    assert graphs.replay("good") and torch.equal(x, before + 1)


def test_a_kernel_that_cannot_be_compiled_is_raised_and_others_are_captured_after_it(
    graphs: Graphs,
) -> None:
    x = torch.zeros(4, device="cuda")
    error = QuireError("kernel_failed", "no kernel", why="a reason", fix="a fix")
    with pytest.raises(QuireError, match="no kernel"):
        graphs.capture("bad", failing(error))
    assert not graphs.known("bad") and not graphs.replay("bad")
    graphs.capture("good", lambda: x.add_(1))
    assert graphs.replay("good")


@pytest.mark.parametrize("when", ["capturing", "beginning"])
def test_a_capture_that_cuda_refuses_does_not_end_the_process(when: str) -> None:
    """By waiting for the device, or on a stream that is capturing already."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, when],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine"
    assert "no CUDA graph for bad" in done.stderr
