"""CUDA graphs of step shapes: captured one at a time, kept in one memory pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from ctypes import py_object, pythonapi

import torch

from quire.errors import QuireError
from quire.garbage import uncollected

log = logging.getLogger("quire.runner")


class Graphs:
    """Graphs by key. They share memory for what is computed inside, so they must run one after
    the other on one stream, and whatever outlives a graph belongs in a buffer from outside."""

    def __init__(self, device: torch.device):
        self.device = device
        self.failed: dict[Hashable, str] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._graphs)

    def known(self, key: Hashable) -> bool:
        """Captured, or known to be impossible."""
        return key in self._graphs or key in self.failed

    def replay(self, key: Hashable) -> bool:
        """Launch the graph on the current stream; False where there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def capture(self, key: Hashable, compute: Callable[[], object]) -> None:
        """Run `compute` once, which compiles and loads its kernels, then capture it.

        A failure leaves this key without a graph, and is logged. A kernel that cannot be compiled
        is raised: the step could not run without a graph either.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            compute()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._record(graph, compute)
        except QuireError:
            raise
        except Exception as error:  # whatever it is, the step runs without a graph
            self.failed[key] = _named(error.__context__ or error)  # what made the end fail, too
            log.warning("no CUDA graph for %s: %s", key, self.failed[key])
        else:
            self._graphs[key] = graph
            current.wait_stream(self._stream)

    def _record(self, graph: torch.cuda.CUDAGraph, compute: Callable[[], object]) -> None:
        """Capture on the current stream, which is this object's."""
        # Another engine's graphs must not be destroyed by a collection in the middle: CUDA may
        # forbid that while this thread captures.
        ended = False
        with uncollected():
            try:
                # Other threads may use the device meanwhile. torch.cuda.graph() would collect
                # garbage and wait for the device each time.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    compute()
                finally:
                    graph.capture_end()
                    ended = True
            finally:
                if not ended:
                    self._abandon(graph)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Leave a capture that could not be begun or ended, so that others can follow.

        The graph is never destroyed, not even when the process ends: its destructor aborts the
        process where registering it with the random generator had failed half way ("The graph
        should be registered to the state"), and torch's allocators go on to ask it what it captures
        (torch 2.11, aten/src/ATen/cuda/CUDAGraph.cpp). Pool and stream may be in any state: others
        take their place, with memory of their own.
        """
        pythonapi.Py_IncRef(py_object(graph))
        with suppress(RuntimeError):  # where recording to the pool had not begun
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
