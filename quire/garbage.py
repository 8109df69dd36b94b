"""Python's collector of garbage, where it may not come in between."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_collecting = False  # before the first thread came in


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected by itself as long as any thread is in here."""
    global _inside, _collecting
    with _lock:
        if _inside == 0:
            _collecting = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _collecting:
                gc.enable()
