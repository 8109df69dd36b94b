"""Cold and warm starts of a few kernels, without a GPU: they are only compiled, for one.

    python -m tests.kernels.triton.cold_start cuda 90 32

Prints for a start with Triton's cache as it is, and for one after it: which kernels processes were
given, how many of these they compiled, which this process compiled and which it loaded. In a
process of its own, since that of the tests has chosen Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from quire.kernels.triton import compile_kernels as compiling
from quire.kernels.triton.launch import launch, wanted_kernels
from quire.kernels.triton.norm.rms_norm import rms_norm_kernel
from quire.kernels.triton.sampling.slots import sampling_slot
from quire.kernels.triton.step.keep_drafts import keep_drafts_kernel

CPU = torch.device("cpu")


class Gpu:
    """Triton's driver of a GPU that nothing runs on; `loaded` are the kernels that it was given."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.loaded: list[str] = []
        self.utils = self

    def launcher_cls(self, source: ASTSource, metadata: object) -> object:
        return source.name

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**16}

    def load_binary(self, name: str, *of: object) -> tuple[object, object, int, int, int]:
        self.loaded.append(name)
        return name, name, 32, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def start(gpu: Gpu) -> dict[str, Any]:
    given, compiled, here = list[str](), list[int](), list[str]()
    in_processes, make_ir = compiling.compile_in_processes, ASTSource.make_ir

    def one_process(jobs: list[bytes], workers: object) -> int:
        given.extend(json.loads(job)["name"] for job in jobs)
        compiled.append(in_processes(jobs, partial(compiling.Workers, 1)))
        return compiled[0]

    def noted(source: ASTSource, *args: Any) -> Any:
        here.append(source.name)
        return make_ir(source, *args)

    x, ids = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32)
    with wanted_kernels() as wanted:
        for tokens in (3, 4, 4):  # one kernel: Triton tells `rows` and `behind` not apart
            norm = {"X_STRIDE": 64, "OUT_STRIDE": 64, "H": 64, "ROWS": 4, "BLOCK_H": 64}
            launch(rms_norm_kernel, (1,), CPU, x, torch.ones(64), x, tokens, 1e-6, **norm)
            kept = {"RECORD": 48, "HISTORY": 32, "num_warps": 1}
            launch(keep_drafts_kernel, (1,), CPU, *[ids] * 6, tokens, **kept)
    compiling.compile_in_processes, ASTSource.make_ir = one_process, noted
    compiling.FEW = 2
    try:
        compiling.compile_kernels(wanted, 2)
    finally:
        compiling.compile_in_processes, ASTSource.make_ir = in_processes, make_ir
    loaded, gpu.loaded = sorted(gpu.loaded), []
    return {"given": sorted(given), "compiled": sum(compiled), "here": here, "loaded": loaded}


def main(backend: str, architecture: str, warp: str) -> None:
    number = int(architecture) if architecture.isdigit() else architecture
    gpu = Gpu(GPUTarget(backend, number, int(warp)))
    driver.set_active(gpu)
    # Another kernel that calls it was compiled before: no reason for another key.
    _ = sampling_slot.cache_key
    print(json.dumps(start(gpu)))
    for kernel in (rms_norm_kernel, keep_drafts_kernel):
        kernel.device_caches.clear()
    print(json.dumps(start(gpu)))


if __name__ == "__main__":
    main(*sys.argv[1:])
