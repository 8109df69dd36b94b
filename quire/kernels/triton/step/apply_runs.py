"""Taking over what the host has sent: runs of int32 into the arena."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.device_state import RUN_WORDS
from quire.kernels.triton.launch import launch, let_next_start, wait_for_inputs

_RUN_WORDS = tl.constexpr(RUN_WORDS)


@triton.jit
def apply_runs_kernel(arena_ptr, packet_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    let_next_start(PDL)
    wait_for_inputs(PDL)
    run_ptr = packet_ptr + tl.program_id(0) * _RUN_WORDS
    low = tl.load(run_ptr).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(run_ptr + 1).to(tl.int64)
    source = tl.load(run_ptr + 2)
    length = tl.load(run_ptr + 3)
    to_ptr = arena_ptr + (high << 32 | low)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        values = tl.load(packet_ptr + source + index, mask=index < length)
        tl.store(to_ptr + index, values, mask=index < length)


def apply_runs(arena: torch.Tensor, packet: torch.Tensor, num_runs: int) -> None:
    """Copy the first `num_runs` runs of `packet` int32 (PacketRing.send) into `arena` int32.

    The runs of a packet must not overlap. The grid is `num_runs`: a CUDA graph has packets of one
    number of runs.
    """
    launch(apply_runs_kernel, (num_runs,), arena.device, arena, packet, BLOCK=1024, num_warps=4)
