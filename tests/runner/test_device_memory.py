"""The plan's arithmetic against the memory that a GPU really gives (tests/plan/test_measured.py has
the CPU's)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quire.runner.device import SCRATCH_BYTES, DeviceRunner
from runner.engines import FAMILIES, engine, requests, run

WriteModel = Any
pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
ROOM: dict[str, Any] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "max_model_len": 4096,
    "kv_cache_memory": 2**28,
    "dtype": "bfloat16",
}


def taken() -> int:
    """Of the device's memory, by whatever took it."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """Memory that torch has kept from other tests would be taken without being seen."""
    gc.collect()
    torch.ones(2, 2, device="cuda").mm(torch.ones(2, 2, device="cuda"))  # context, cuBLAS
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_what_the_plan_says(
    write_model: WriteModel, family: str, deterministic: bool, replayed: set[str]
) -> None:
    """Of an engine as it is loaded, of its largest step, and of all graphs."""
    model = write_model(**FAMILIES[family] | SIZES)
    before = taken()
    allocated = torch.cuda.memory_allocated()
    made = engine(model, "cuda", warm=False, deterministic=deterministic, **ROOM)
    plan, runner = made.plan, made.core.runner
    assert isinstance(runner, DeviceRunner)
    assert plan.decode_graphs[-1] == 64 and plan.mixed_graphs[-1] == 2048
    loaded = torch.cuda.memory_allocated() - allocated
    # Of the reserve: scratch of attention, and buffers as large as the number of rows says.
    parts = plan.weight_bytes + plan.kv_bytes + plan.state_bytes
    assert parts * 0.9 < loaded < parts + plan.activation_bytes + SCRATCH_BYTES

    # Everything that will be captured is computed without graphs first: what that leaves is
    # kernels' code and the memory of activations, which is torch's to use again.
    graphs, wanted = runner._graphs, list(runner._wanted)
    runner._graphs = None
    while made.core.warm():
        pass
    torch.cuda.reset_peak_memory_stats()
    settled = torch.cuda.memory_allocated()
    with torch.inference_mode():
        for key in wanted:
            runner._compute(key)()
    working = torch.cuda.max_memory_allocated() - settled
    print(f"{family}: a step takes {working} of {plan.activation_bytes}")
    # A plan that says ten times what is taken would be no use either.
    assert plan.activation_bytes / 10 < working <= plan.activation_bytes
    scratch = SCRATCH_BYTES
    assert loaded + working <= parts + plan.activation_bytes + scratch

    runner._graphs = graphs
    runner._wanted.extend(wanted)
    without, reserved = taken(), torch.cuda.memory_reserved()
    while made.core.warm():
        pass
    assert graphs is not None and not graphs.failed and len(graphs) >= 3 * len(plan.decode_graphs)
    captured, pool = taken() - without, torch.cuda.memory_reserved() - reserved
    print(f"{len(graphs)} graphs take {captured} of {plan.graph_bytes}, {pool} of it torch's")
    assert captured <= plan.graph_bytes and pool <= plan.graph_bytes

    run(made, requests(80, 1, logprobs=None))
    assert replayed >= {"decode", "mixed", "sampling"}
    whole = taken() - before
    print(f"all together {whole} of {plan.total_bytes}")
    assert whole <= plan.total_bytes
