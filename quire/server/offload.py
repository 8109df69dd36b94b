"""Long work off the event loop: templates and long texts, on few threads with a bounded queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quire.errors import Overloaded

T = TypeVar("T")


class WorkPool:
    """Threads for work that blocks. `limit`: jobs running or waiting, beyond it Overloaded.

    A job whose caller has gone away still runs to its end, and counts until then.
    """

    def __init__(self, name: str, threads: int, limit: int):
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"quire-{name}")
        self._name = name
        self._limit = limit
        self._pending = 0
        self._lock = threading.Lock()

    async def run(self, job: Callable[[], T]) -> T:
        """The result of `job` on a thread. Raises what it raises, or Overloaded."""
        if self._pending >= self._limit:
            raise Overloaded(
                "queue_full",
                f"too many requests wait for the {self._name}",
                fix="send this request again later",
            )
        with self._lock:
            self._pending += 1
        future = self._executor.submit(job)
        future.add_done_callback(self._done)
        return await asyncio.wrap_future(future)

    def _done(self, _: object) -> None:
        with self._lock:  # on a worker's thread
            self._pending -= 1

    def close(self) -> None:
        """Drop what waits. Running jobs end by themselves."""
        self._executor.shutdown(wait=False, cancel_futures=True)
