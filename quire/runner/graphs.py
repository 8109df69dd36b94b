"""CUDA graphs of step shapes: captured one at a time, kept in one memory pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from quire.errors import QuireError

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
                # Other threads may use the device meanwhile. torch.cuda.graph() would collect
                # garbage and wait for the device each time.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    compute()
                finally:
                    graph.capture_end()
        except QuireError:
            raise
        except Exception as error:  # whatever it is, the step runs without a graph
            log.warning("no CUDA graph for %s: %s: %s", key, type(error).__name__, error)
            self.failed[key] = f"{type(error).__name__}: {error}"
        else:
            self._graphs[key] = graph
        current.wait_stream(self._stream)
