"""A GPU that has less memory than planned: which term is the largest, and what makes it smaller.

The plan leaves room for everything, so this is what other programs take, or a term that the plan
has too small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.errors import PlanError
from quire.plan.gpu import SMALLER
from quire.plan.plan import Plan, format_bytes

LESS_CACHE = "lower --gpu-memory-utilization or --kv-cache-memory: the KV cache is then smaller"
# For a step at run time: all that still takes memory then is its activations.
STEP_FIX = "lower --max-num-batched-tokens, or --gpu-memory-utilization for a smaller KV cache"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory: torch's allocator says so by type, CUDA's driver and
    Triton's launches by text."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "cublas_status_alloc_failed" in text)
    )


@contextmanager
def explained(plan: Plan, doing: str) -> Iterator[None]:
    """Turn a device's shortage in the block into a PlanError with the plan's terms."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        parts = terms(plan)
        # What CUDA itself takes no option makes smaller.
        largest = max(parts, key=lambda name: parts[name] * (name != "context and libraries"))
        fixes = [f"the largest term is {largest}: {(SMALLER | {'KV cache': LESS_CACHE})[largest]}"]
        if largest != "KV cache":
            fixes.append(LESS_CACHE)
        raise PlanError(
            "out_of_memory",
            f"{plan.device_name} had no memory left while {doing}",
            why=f"{str(error).splitlines()[0]}; planned: "
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items()),
            fix="; or ".join([*fixes, "end other programs on the GPU"]),
        ) from error


def terms(plan: Plan) -> dict[str, int]:
    """Bytes by the names that the fixes have (quire/plan/gpu.py)."""
    return {
        "weights": plan.weight_bytes,
        "KV cache": plan.kv_bytes,
        "activations": plan.activation_bytes,
        "graphs": plan.graph_bytes,
        "request state": plan.state_bytes,
        "context and libraries": plan.reserve_bytes,
    }
