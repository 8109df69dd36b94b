"""Processes that compile kernels into Triton's cache for one that holds the GPU.

    python -m quire.kernels.triton.compile_worker JOBS:ANSWERS ...

One for each pair of pipes, given by their file descriptors, forked once all is imported. A line of
JSON on JOBS is a kernel, as `described` gives it; a line on ANSWERS says {} once the cache has it,
or {"error": why not}. A process ends where its JOBS do, the first one after the others. None makes
a CUDA context: on a GPU that is full by then there is no room for one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from itertools import chain
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

from quire.kernels.triton.launch import settle_key

ROOM = "quire.kernels.triton."
# What one kernel may take; the largest need some seconds.
SECONDS = 60
# What a process waits for a kernel at most: a pipe can outlive who should write to it, in another
# child of that one.
IDLE_SECONDS = 1800


def described(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> dict[str, Any]:
    """A kernel as JSON can say it. Raises TypeError where it cannot: every value must come back as
    what it was, since Triton's key of the cache is made of their texts."""
    return {
        "module": source.fn.module,
        "name": source.fn.__qualname__,
        "signature": {name: _said(kind) for name, kind in source.signature.items()},
        "constants": [[path, _said(value)] for path, value in source.constants.items()],
        "attributes": [[path, value] for path, value in source.attrs.items()],
        "target": [target.backend, target.arch, target.warp_size],
        "options": options,
    }


def understood(job: dict[str, Any]) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What `described` was given. Raises ValueError for what is no kernel of ours."""
    module, name = job["module"], job["name"]
    if not module.startswith(ROOM):
        raise ValueError(f"{module} is not below {ROOM}")
    kernel = getattr(import_module(module), name, None)
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{module} has no kernel {name}")
    settle_key(kernel)
    source = ASTSource(
        kernel,
        {name: _meant(kind) for name, kind in job["signature"].items()},
        {tuple(path): _meant(value) for path, value in job["constants"]},
        {tuple(path): value for path, value in job["attributes"]},
    )
    return source, GPUTarget(*job["target"]), tuples(job["options"])


def tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Options as Triton has them, out of JSON, which has no tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def _said(value: object) -> object:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is tuple:
        return [_said(v) for v in value]
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, tl.constexpr):
        return {"constexpr": _said(value.value)}
    raise TypeError(f"{type(value).__name__} cannot be told to another process")


def _meant(said: Any) -> Any:
    if isinstance(said, list):
        return tuple(_meant(v) for v in said)
    if isinstance(said, dict):
        if "dtype" in said:
            return tl.dtype(said["dtype"])
        return tl.constexpr(_meant(said["constexpr"]))
    return said


def answer(line: bytes) -> dict[str, str]:
    """Compile what a line says."""
    try:
        source, target, options = understood(json.loads(line))
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # who asked compiles it, too, and says what is wrong
        return {"error": f"{type(error).__name__}: {error}"}
    if target.backend == "cuda":
        with suppress(Exception):  # likewise
            make_launcher(compiled)
    return {}


def make_launcher(compiled: CompiledKernel) -> None:
    """Have what launches a kernel in the cache as well: Triton 3.6 has a C compiler make it, a
    tenth of a second for each signature."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(compiled.src, compiled.metadata)


def work(jobs: int, answers: int) -> None:
    with open(jobs, "rb") as lines, open(answers, "wb", buffering=0) as out:
        signal.alarm(IDLE_SECONDS)  # ends the process, also where nobody is left to do so
        for line in iter(lines.readline, b""):
            signal.alarm(SECONDS)
            out.write(json.dumps(answer(line)).encode() + b"\n")
            signal.alarm(IDLE_SECONDS)


def main(pairs: list[str]) -> None:
    import_module(ROOM + "ops")  # nearly all kernels
    triton_key()  # reads Triton's libraries
    left = [(int(jobs), int(answers)) for jobs, answers in (pair.split(":") for pair in pairs)]
    while left:
        mine = left.pop()
        if os.fork() == 0:
            for pipe in chain(*left):
                os.close(pipe)  # else the end of the process it belongs to would not show
            try:
                work(*mine)
            finally:
                os._exit(0)
        for pipe in mine:
            os.close(pipe)
    for _ in pairs:
        os.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
