"""What all Triton kernels share when they are launched.

Programmatic dependent launch (CUDA 12, Hopper and later): a kernel may start while the one before
it still runs. Three rules keep that correct. Every program calls `wait_for_inputs` before it reads
or writes anything but weights, on every way out. Nothing that an earlier kernel wrote is read
before that call. `let_next_start` is a hint and may be called at any point.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from quire.errors import QuireError

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns once everything that earlier kernels wrote can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs may be placed where this one leaves room."""
    if PDL:
        gdc_launch_dependents()


@cache
def _dependent_launch(device: torch.device) -> bool:
    if INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 for the interpreter, so that loops over programs are tested."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Kernels by what they are compiled for, with what compiles them.
Wanted = dict[tuple[Any, ...], Callable[[], object]]
# What a launch is of: the key of its kernel in Wanted, its grid, its arguments' shapes and numbers.
Launch = tuple[Any, ...]
_noting = threading.local()


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid` with its constexpr PDL set for the device. No program: no launch.

    `meta` are the kernel's other constexprs by name, num_warps and num_stages. Raises QuireError
    where Triton cannot compile it for the device.
    """
    if any(n == 0 for n in grid):
        return
    # Said here because Triton's default changes with 3.10.
    meta |= {"enable_fp_fusion": True, "PDL": _dependent_launch(device)}
    if meta["PDL"]:
        meta["launch_pdl"] = True
    if getattr(kernel, "hash", "") is None:
        settle_key(kernel)
    wanted: Wanted | None = getattr(_noting, "wanted", None)
    if wanted is not None:
        key = (kernel, *map(_kind, args), *meta.items())
        if key not in wanted:
            small = [_small(a) for a in args]
            wanted[key] = partial(kernel.warmup, *small, grid=tuple(grid), **meta)
        launches: list[Launch] | None = getattr(_noting, "launches", None)
        if launches is not None:
            launches.append((key, *grid, *map(_size, args)))
        return
    try:
        kernel[tuple(grid)](*args, **meta)
    except Exception as error:
        if INTERPRETED or not from_compiler(error):
            raise
        raise _not_compiled(kernel, device, error) from error


@contextmanager
def wanted_kernels() -> Iterator[Wanted]:
    """Nothing that this thread launches inside runs: kernels are only noted, for compile_kernels.
    What they would have written is whatever the memory held."""
    found: Wanted = {}
    _noting.wanted = found
    try:
        yield found
    finally:
        _noting.wanted = None


@contextmanager
def launches_noted(launches: list[Launch]) -> Iterator[None]:
    """What this thread would launch inside is added to `launches`, where kernels are noted."""
    _noting.launches = launches
    try:
        yield
    finally:
        _noting.launches = None


def settle_key(kernel: Any) -> None:
    """Have Triton compute its key of a kernel's source, those of the functions it calls first.

    Triton 3.6 leaves the globals of a function out of its callers' keys unless it has the
    function's own key by then (DependenciesFinder._update_hash): whether its cache has a kernel
    would depend on which others a process launched before.
    """
    for name in kernel.fn.__code__.co_names:
        called = kernel.__globals__.get(name)
        if isinstance(called, triton.JITFunction) and called.hash is None:
            settle_key(called)
    _ = kernel.cache_key


def _kind(value: object) -> object:
    """What Triton compiles a kernel of its own for, or something finer."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    if isinstance(value, int):
        return type(value), value == 1, value % 16 == 0, value.bit_length() > 31
    return repr(value) if value is None or isinstance(value, str | float) else type(value)


def _size(value: Any) -> object:
    """The shape of a tensor or of what describes one; anything else itself."""
    return tuple(value.shape) if isinstance(value, torch.Tensor | TensorDescriptor) else value


def _small(value: Any) -> Any:
    """An argument of the same kind that keeps no memory of a step alive."""
    if isinstance(value, torch.Tensor):
        aligned = value.data_ptr() % 16 == 0
        return torch.empty(2, dtype=value.dtype, device=value.device)[0 if aligned else 1 :]
    if isinstance(value, TensorDescriptor):
        value = copy(value)
        value.base = _small(value.base)
    return value


def from_compiler(error: Exception) -> bool:
    """Whether Triton could not make a kernel: its own errors, and failed passes."""
    text = str(error)
    return isinstance(error, TritonError) or (
        isinstance(error, RuntimeError) and ("PassManager" in text or "failed to translate" in text)
    )


def _not_compiled(kernel: Any, device: torch.device, error: Exception) -> QuireError:
    area = str(getattr(kernel, "__module__", "")).removeprefix("quire.kernels.triton.")
    name = f"{getattr(kernel, '__name__', 'a kernel')} ({area})"
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return QuireError(
        "kernel_not_compiled",
        f"{name} cannot be compiled for {_architecture(device)}",
        why=f"Triton {triton.__version__}: {type(error).__name__}: {reason}",
        fix="report it with what `quire version` prints; another version of Triton may compile it, "
        "and --device cpu needs none",
    )


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
