"""What of a GPU decides on tiles: its generation and its shared memory."""

from __future__ import annotations

from functools import cache

import torch
import triton

# Bytes for one program on sm_90; sm_80 has 166912, sm_120 101376, gfx942 65536.
HOPPER_SHARED = 232448


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the GPU is of the generation that tiles are tuned for (sm_90)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory for one program. The interpreter has no limit and takes the smallest
    GPU's, which gives the smallest tiles."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 65536
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
