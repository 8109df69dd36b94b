"""Sampling and a step's preparation on the GPU, against the memory bus.

python -m benchmarks.gpu.sampling
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.harness import Timed, command, report
from quire.kernels.device_state import DeviceState, StepBuffers
from quire.kernels.sampling import SampleOutputs, Scratch
from quire.kernels.triton.sampling.logprobs_of import logprobs_of
from quire.kernels.triton.sampling.sample import sample
from quire.kernels.triton.step.apply_runs import apply_runs
from quire.kernels.triton.step.count_tokens import count_tokens
from quire.kernels.triton.step.prepare_step import prepare_step
from quire.params import SamplingParams
from quire.runner.diffs import Diffs, variant
from quire.runner.packets import PacketRing
from quire.step import Enter

REQUESTS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
}
LENGTH, MAX_LEN = 500, 4096


def state_of(rows: int, vocab_size: int, fields: dict[str, float]) -> tuple[DeviceState, str]:
    """State of `rows` equal requests of LENGTH tokens, and the variant that serves them."""
    device = torch.device("cuda")
    state = DeviceState.allocate(rows, MAX_LEN, vocab_size, 1, device=device)
    diffs, ring = Diffs(state.layout), PacketRing(device)
    for slot in range(rows):
        tokens = [(slot + 7 * i) % vocab_size for i in range(LENGTH)]
        blocks = [list(range(1, LENGTH // 16 + 2))]
        params = SamplingParams(**fields)  # type: ignore[arg-type]
        enter = Enter(slot, params, tokens, LENGTH - 100, slot, 0, blocks, [], [])
        for packet, num_runs in ring.send(diffs.enter(enter)):
            apply_runs(state.arena, packet, num_runs)
    count_tokens(state, torch.arange(rows, dtype=torch.int32, device=device))
    return state, variant(diffs.flags)


def rows_of(count: int) -> torch.Tensor:
    rows = [(slot, LENGTH - 1, 1, 1) for slot in range(count)]
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def logits_of(rows: int, vocab_size: int, dtype: torch.dtype, peaked: bool) -> list[torch.Tensor]:
    """Logits like a model's, with one token in a thousand well above the rest, or flat ones; as
    many as the L2 cache does not hold."""
    copies = max(1, min(20, 2**28 // (rows * vocab_size * dtype.itemsize)))
    logits = torch.randn(copies, rows, vocab_size, device="cuda")
    if peaked:
        likely = torch.rand(copies, rows, vocab_size, device="cuda") < 1e-3
        logits = logits * 2 + likely * torch.randn_like(logits).abs() * 8
    return list(logits.to(dtype))


def sampling_case(name: str, rows: int, vocab_size: int, dtype: torch.dtype, peaked: bool) -> Timed:
    state, kind = state_of(rows, vocab_size, REQUESTS[name])
    out, scratch = SampleOutputs.allocate(rows, "cuda"), Scratch.allocate(rows, vocab_size, "cuda")
    every = logits_of(rows, vocab_size, dtype, peaked)
    runs = [partial(sample, x, rows_of(rows), state, kind, out, scratch) for x in every]
    label = f"{name} ({kind}) B={rows} V={vocab_size} {str(dtype)[6:]}{'' if peaked else ' flat'}"
    return Timed(label, runs, nbytes=every[0].nbytes)


def logprobs_case(rows: int, vocab_size: int) -> Timed:
    scratch = Scratch.allocate(rows, vocab_size, "cuda")
    every = logits_of(rows, vocab_size, torch.bfloat16, True)
    targets = torch.arange(rows, device="cuda", dtype=torch.int32)
    runs = [partial(logprobs_of, x, targets, 20, scratch) for x in every]
    return Timed(f"logprobs of 20, R={rows} V={vocab_size} bfloat16", runs, every[0].nbytes)


def step_case(rows: int) -> Timed:
    state, _ = state_of(rows, 49152, REQUESTS["greedy"])
    out = StepBuffers.allocate(rows, rows, 1, state.layout.max_blocks, "cuda")
    return Timed(f"prepare_step B={rows}", [partial(prepare_step, state, rows_of(rows), out)])


def main() -> None:
    command(__doc__)
    for rows in (1, 32, 256):
        report([step_case(rows)])
        for vocab_size in (49152, 151936):
            for name in REQUESTS:
                for dtype in (torch.bfloat16, torch.float32):
                    report([sampling_case(name, rows, vocab_size, dtype, True)])
            report([sampling_case("top-p", rows, vocab_size, torch.bfloat16, False)])
            report([logprobs_case(rows, vocab_size)])


if __name__ == "__main__":
    main()
