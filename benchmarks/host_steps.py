"""Host time of decode steps: scheduling, submitting and committing, without a GPU.

    python -m benchmarks.host_steps [--rows 256] [--steps 400] [--wait 0] [--profile]

The scheduler and the GPU runner are the real ones; what they would launch is left out (kernels and
CUDA graphs; copies run, between places in memory), and every sampled token is 5. One step is kept
in flight, as an engine does. Must: schedule, submit and commit together under 1 ms at 256 rows,
launches included. With `--wait 10` the thread sleeps 10 ms before each step, as one does that waits
for a large model: its data has left the processor's caches by then, and the same work takes two to
three times as long. Figures are medians of this thread's processor time; how fast a shared machine
is just then, a loop that does nothing shows.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from quire.config.parse import build_options
from quire.engine.core import EngineCore
from quire.engine.startup import assemble, find_model
from quire.engine.weights import dummy_source
from quire.engine.wire import Add
from quire.hardware.machine import Gpu, Machine
from quire.params import SamplingParams
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.resolve import resolve
from quire.runner import device

GIB = 2**30
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
GPU = Gpu("a GPU", "sm_90", (9, 0), 132, 232448, 140 * GIB, 139 * GIB)
MACHINE = Machine("a processor", "x86_64", 2, 8 * GIB, 8 * GIB, GPU, "")
TOKEN = 5
LOOP = 5000  # says how fast this machine runs Python at the moment


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Kernels and models are not run while this holds."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    with (
        mock.patch.object(device.DeviceRunner, "_forward", nothing),
        mock.patch.object(device.DeviceRunner, "_sample", nothing),
        mock.patch.object(device, "apply_runs", nothing),
        mock.patch.object(device, "count_tokens", nothing),
    ):
        yield


def engine(rows: int) -> EngineCore:
    """An engine on an imagined GPU whose memory is the CPU's."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        options = build_options(
            {"model": directory, "load_format": "dummy", "device": "cuda", "runner": "eager"}
            | {"max_num_seqs": rows, "kv_cache_memory": 2**28, "skip_tokenizer_init": True}
        )
        files = find_model(options)
        found = KernelFacts(None, None, "", "", "3.6.0")
        plan = resolve(options, ModelFacts("m", files.config(), None), MACHINE, found)
        cpu = torch.device("cpu")
        source = dummy_source(options, files)
        made = assemble(options, files, plan, source, found, cpu, lambda phase, done: None)
    made.core.runner._outputs.tokens.fill_(TOKEN)  # type: ignore[attr-defined]
    return made.core


def measure(
    core: EngineCore, rows: int, steps: int, wait: float, profile: bool
) -> dict[str, list[float]]:
    """Seconds of each part of `steps` decode steps of `rows` rows, `wait` seconds apart."""
    params = SamplingParams(temperature=0.0, max_tokens=3000, ignore_eos=True)
    for i in range(rows):
        assert not core.add(Add(str(i), [3 + i % 300] * (100 + i % 16), params, seed=i))
    spent: dict[str, list[float]] = {"schedule": [], "submit": [], "result": [], "commit": []}
    spent["loop"] = []
    pending: deque[Any] = deque()
    clock, profiler = time.thread_time, cProfile.Profile()

    def step(record: bool) -> None:
        time.sleep(wait if record else 0)
        start = clock()
        batch = core.scheduler.schedule()
        scheduled = clock()
        assert batch is not None
        pending.append(core.runner.submit(batch))
        submitted = clock()
        if len(pending) < 2:
            return
        result = pending.popleft().result()
        ready = clock()
        core.scheduler.commit(result)
        done = clock()
        if record:
            assert batch.num_rows == batch.num_tokens == rows
            parts = (scheduled - start, submitted - scheduled, ready - submitted, done - ready)
            number = LOOP
            while number:
                number -= 1
            parts += (clock() - done,)
            for part, seconds in zip(spent.values(), parts, strict=True):
                part.append(seconds)

    while core.scheduler.stats().generated_tokens < 2 * rows:
        step(False)
    gc.collect()
    gc.freeze()
    if profile:
        profiler.enable()
    for _ in range(steps):
        step(True)
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--wait", type=float, default=0, help="milliseconds before each step")
    parser.add_argument("--profile", action="store_true", help="print what takes the time")
    given = parser.parse_args()
    with nothing_launched():
        spent = measure(
            engine(given.rows), given.rows, given.steps, given.wait / 1000, given.profile
        )
    spent["schedule, submit and commit"] = [
        sum(parts)
        for parts in zip(spent["schedule"], spent["submit"], spent["commit"], strict=True)
    ]
    loop = spent.pop("loop")
    for name, times in spent.items():
        tenths = statistics.quantiles(times, n=10)
        print(f"{name:>28} {1e6 * tenths[4]:6.0f} us (a tenth below {1e6 * tenths[0]:.0f} us)")
    tenths = statistics.quantiles(loop, n=10)
    print(
        f"a loop of {LOOP} additions, meanwhile: {1e6 * tenths[4]:.0f} us ({1e6 * tenths[0]:.0f})"
    )


if __name__ == "__main__":
    main()
