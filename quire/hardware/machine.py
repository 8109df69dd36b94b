"""Processor, cores and memory of this machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Machine:
    """`memory_bytes` and `available_bytes` respect a container's limit; `cores` are physical ones
    that this process may use."""

    name: str
    architecture: str
    cores: int
    memory_bytes: int
    available_bytes: int


def detect() -> Machine:
    """Read the machine once."""
    memory = psutil.virtual_memory()
    limit = _container_limit()
    total, available = memory.total, memory.available
    if limit is not None and limit < total:
        total = limit
        available = min(available, max(0, limit - psutil.Process().memory_info().rss))
    return Machine(
        name=_processor_name(),
        architecture=platform.machine(),
        cores=_usable_cores(),
        memory_bytes=total,
        available_bytes=available,
    )


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
