"""A step recorded once and run again: the same native calls on the same memory.

Between the kernels of a small step most time goes into Python and into allocating results. A
Program keeps only the calls; running it again costs a microsecond per call. It is to the CPU what a
captured graph is to a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Call = tuple[Callable[..., Any], tuple[Any, ...]]

# What torch may be asked while recording: it computes nothing, so it need not be done again.
_PROPERTIES = frozenset(["shape", "dtype", "is_cpu", "device"])
_LOOKS = frozenset(["data_ptr", "dim", "is_contiguous", "numel", "size", "stride", "view"])

_recording: list[list[Call]] = []


class Unrecordable(Exception):
    """The recorded code computed something with torch, which a Program would not repeat."""


class Program:
    """Native calls with fixed arguments, and the memory they work on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.memory: list[torch.UntypedStorage] = []

    @property
    def nbytes(self) -> int:
        """Memory of all intermediate results."""
        return sum(storage.nbytes() for storage in self.memory)

    def run(self) -> None:
        """Do it again, on what the input tensors hold now."""
        for function, arguments in self.calls:
            function(*arguments)


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a native kernel; a recording notes it."""
    function(*arguments)
    if _recording:
        _recording[-1].append((function, arguments))


@contextmanager
def record() -> Iterator[Program]:
    """Record what the block does. Raises Unrecordable where it computes with torch itself.

    Tensors that exist before the block must stay alive as long as the Program, and so must results
    that are read after a run.
    """
    program = Program()
    _recording.append(program.calls)
    try:
        with _Memory(program.memory):
            yield program
    finally:
        _recording.pop()


class _Memory(TorchFunctionMode):
    """Gives `torch.empty` memory of tensors that have died: every run repeats the same order of
    uses, so what one result leaves can hold a later one. Refuses what computes."""

    def __init__(self, memory: list[torch.UntypedStorage]):
        super().__init__()
        self._memory = memory
        self._free: dict[int, list[torch.UntypedStorage]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.empty:
            return self._place(result)
        if not _only_looks(func, args):
            raise Unrecordable(func.__name__)
        return result

    def _place(self, fresh: torch.Tensor) -> torch.Tensor:
        size = fresh.untyped_storage().nbytes()
        if self._free.get(size):
            storage = self._free[size].pop()
            fresh = torch.empty(0, dtype=fresh.dtype).set_(storage, 0, fresh.shape, fresh.stride())
        else:
            self._memory.append(fresh.untyped_storage())
        weakref.finalize(fresh, self._give_back, fresh.untyped_storage(), size)
        return fresh

    def _give_back(self, storage: torch.UntypedStorage, size: int) -> None:
        self._free.setdefault(size, []).append(storage)


def _only_looks(func: Any, args: Any) -> bool:
    """Whether a function of torch reads a tensor's properties or makes a view of its memory."""
    if func.__name__ == "__get__":  # a property, such as Tensor.shape
        return func.__self__.__name__ in _PROPERTIES
    if func is torch.Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(isinstance(i, int | slice) for i in index)
    return func.__name__ in _LOOKS
