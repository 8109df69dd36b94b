"""Processor, cores, memory and GPU of this machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process computes on: the first that is visible.

    `architecture` is "sm_90" or "gfx942", `capability` (9, 0) on NVIDIA. `shared_bytes`: shared
    memory that one block of threads can have.
    """

    name: str
    architecture: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    memory_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Machine:
    """`memory_bytes` and `available_bytes` respect a container's limit; `cores` are physical ones
    that this process may use. `gpu` None: there is none, and `no_gpu` says why."""

    name: str
    architecture: str
    cores: int
    memory_bytes: int
    available_bytes: int
    gpu: Gpu | None = None
    no_gpu: str = "none was looked for"


def detect(gpu: bool = True) -> Machine:
    """Read the machine once. `gpu` False: do not look for one, which costs time where it is."""
    memory = psutil.virtual_memory()
    limit = _container_limit()
    total, available = memory.total, memory.available
    if limit is not None and limit < total:
        total = limit
        available = min(available, max(0, limit - psutil.Process().memory_info().rss))
    found, no_gpu = find_gpu() if gpu else (None, "none was looked for")
    return Machine(
        name=_processor_name(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        memory_bytes=total,
        available_bytes=available,
        gpu=found,
        no_gpu=no_gpu,
    )


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU, or None and the reason."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return None, "this build of torch is for CPUs"
    if not torch.cuda.is_available():
        return None, "torch finds no usable GPU"
    properties = torch.cuda.get_device_properties(0)
    available, total = torch.cuda.mem_get_info(0)
    capability = (properties.major, properties.minor)
    architecture = f"sm_{capability[0]}{capability[1]}"
    if torch.version.hip is not None:
        architecture = str(properties.gcnArchName).split(":")[0]
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    gpu = Gpu(
        name=properties.name,
        architecture=architecture,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=shared or properties.shared_memory_per_block,
        memory_bytes=total,
        available_bytes=available,
    )
    return gpu, ""


def _usable_cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False) or allowed or 1
    quota = _cpu_quota()
    return max(1, min(physical, allowed or 1, quota or physical))


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _read_cgroup(name: str) -> str | None:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None


def _container_limit() -> int | None:
    text = _read_cgroup("memory.max")
    return int(text) if text is not None and text.isdigit() else None


def _cpu_quota() -> int | None:
    text = _read_cgroup("cpu.max")
    if text is None or text.startswith("max"):
        return None
    quota, period = text.split()
    return max(1, int(quota) // int(period))
