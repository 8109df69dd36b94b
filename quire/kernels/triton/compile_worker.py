"""A process that compiles kernels into Triton's cache for one that holds the GPU.

    python -m quire.kernels.triton.compile_worker

A line of JSON on stdin is a kernel, as `described` gives it; a line on stdout answers it: `{}` once
the cache has the kernel, or {"error": why not}. It ends where stdin does, and makes no CUDA
context: on a GPU that is full by then there is no room for one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any, BinaryIO

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quire.kernels.triton.launch import settle_key

ROOM = "quire.kernels.triton."
# What one kernel may take, imports included; the largest need some seconds.
SECONDS = 90


def described(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> dict[str, Any]:
    """A kernel as JSON can say it. Raises TypeError where it cannot: every value must come back as
    what it was, since Triton's key of the cache is made of their texts."""
    return {
        "module": source.fn.module,
        "name": source.fn.__qualname__,
        "signature": {name: _said(kind) for name, kind in source.signature.items()},
        "constants": [[list(path), _said(value)] for path, value in source.constants.items()],
        "attributes": [[list(path), value] for path, value in source.attrs.items()],
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
        triton.compile(source, target=target, options=options)
    except Exception as error:  # the process that asked compiles it again, and says what is wrong
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def main(jobs: BinaryIO, answers: BinaryIO) -> None:
    for line in iter(jobs.readline, b""):
        signal.alarm(SECONDS)  # ends the process, also where nobody is left to do so
        answers.write(json.dumps(answer(line)).encode() + b"\n")
        answers.flush()
        signal.alarm(0)


if __name__ == "__main__":
    # What Triton prints is not an answer.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import_module(ROOM + "ops")  # most kernels, while there is nothing to compile yet
    main(sys.stdin.buffer, pipe)
