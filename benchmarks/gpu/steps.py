"""Where a step of the engine goes on a GPU: time by kernel, gaps, the host's parts, the floor.

    python -m benchmarks.gpu.steps MODEL [engine flags] --rows 1,32,256 --context 290 --steps 20
    python -m benchmarks.gpu.steps MODEL [engine flags] --rows 1 --prompts 8192 --output FILE

Decode steps of so many requests after so many tokens, one behind the other as in serving; with
--prompts also steps of one prompt of so many tokens, each alone. Both are measured twice: without
tracing (wall time, the device's busy and idle time, the engine thread's parts), and traced by
torch.profiler, which makes steps longer. Floors take experts as chosen evenly, which those of
dummy weights are with --moe-routing uniform.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.trace import Event, split, summarize, table
from quire.cli.bench_filled import FilledCaches
from quire.cli.bench_offline import Bench, number
from quire.cli.bench_record import Record, ceilings, write_json
from quire.cli.flags import Invocation, Parser
from quire.cli.local import LocalEngine
from quire.cli.main import set_up_logging
from quire.cli.report import report
from quire.cli.roofline import Ceilings
from quire.cli.terminal import Phases
from quire.cli.workload import DECODE, PREFILL, Scenario, make_prompts
from quire.engine.core import EngineCore
from quire.engine.wire import Add
from quire.errors import QuireError, UsageError
from quire.hardware.machine import find_gpu
from quire.params import SamplingParams

PROGRAM = "python -m benchmarks.gpu.steps"
LEAD = 3  # steps before those that are measured: CUPTI can lose a trace's first events
PROMPT_STEPS = 3
MARKER = "spin_kernel"  # of torch.cuda._sleep, which nothing else calls: begins a traced step


class Watch:
    """The engine thread's seconds by part, and (rows, tokens) of each step that was submitted."""

    def __init__(self) -> None:
        self.seconds = {"schedule": 0.0, "submit": 0.0, "commit": 0.0}
        self.batches: list[tuple[int, int]] = []


@contextmanager
def watched(core: EngineCore, before: Callable[[], object] = lambda: None) -> Iterator[Watch]:
    """Watch in the block; `before` is called before each step is submitted."""
    watch = Watch()

    def timed(part: str, work: Callable[..., Any], *given: Any) -> Any:
        if part == "submit":
            before()
            watch.batches.append((given[0].num_rows, given[0].num_tokens))
        start = time.perf_counter()
        try:
            return work(*given)
        finally:
            watch.seconds[part] += time.perf_counter() - start

    with ExitStack() as stack:
        for part in watch.seconds:
            owner = core.runner if part == "submit" else core.scheduler
            replaced = partial(timed, part, getattr(owner, part))
            stack.enter_context(mock.patch.object(owner, part, replaced))
        yield watch


def timed_steps(core: EngineCore, advance: Callable[[], object], steps: int) -> dict[str, Any]:
    """Microseconds of a step: `wall_us`, and `host_us` by part (`other`: what else
    EngineCore.host_seconds counts). Raises UsageError where `advance` is not one step of always as
    many rows."""
    clock = core.runner.clock  # type: ignore[attr-defined]
    with watched(core) as watch:
        host, own, start = core.host_seconds, clock.host_seconds, time.perf_counter()
        for _ in range(steps):
            advance()
        wall, own = time.perf_counter() - start, clock.host_seconds - own
        host = core.host_seconds - host - own
    watch.seconds["submit"] -= own  # which only benchmarks pay for
    rows = sorted({rows for rows, _ in watch.batches})
    if len(watch.batches) != steps or len(rows) != 1:
        what = f"{len(watch.batches)} steps ran of {rows} rows, where {steps} alike were asked for"
        fix = "raise --max-num-batched-tokens or --kv-cache-memory"
        raise UsageError("invalid_value", what, "a prompt took several, or requests waited", fix)
    parts = watch.seconds | {"other": host - sum(watch.seconds.values()), "all": host}
    return {
        "rows": rows[0],
        "tokens": sum(tokens for _, tokens in watch.batches) / steps,
        "wall_us": wall / steps * 1e6,
        "host_us": {part: seconds / steps * 1e6 for part, seconds in parts.items()},
    }


def trace(core: EngineCore, advance: Callable[[], object], steps: int) -> list[list[Event]]:
    """What the device does in `steps` steps."""
    torch.cuda.synchronize()
    mark = partial(torch.cuda._sleep, 1)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler, watched(core, mark):
        for _ in range(LEAD + steps):
            advance()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    events = [Event(e.name, e.time_range.start, e.time_range.end) for e in on_device]
    return split(events, MARKER, steps)


def measure(core: EngineCore, advance: Callable[[], object], steps: int) -> dict[str, Any]:
    """Both measurements, JSON data; `device_us` and `idle_us` are within and between steps."""
    clock = core.runner.clock  # type: ignore[attr-defined]
    clock.read()
    for _ in range(LEAD):
        advance()
    found = {"steps": steps} | timed_steps(core, advance, steps)
    busy, idle = (seconds / (LEAD + steps) * 1e6 for seconds in clock.read())
    return found | {
        "device_us": busy,
        "idle_us": idle,
        "traced": summarize(trace(core, advance, steps)),
    }


def add(bench: Bench, scenario: Scenario, seed: int, output: int | None, filled: bool) -> set[str]:
    """Queue a scenario's requests; their names."""
    prompts = make_prompts(scenario, bench.engine.info.vocab_size, seed)
    if filled:
        FilledCaches(bench.engine).claim(prompts)
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    names = [f"{scenario.name} {seed} {i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        bench.core.scheduler.add(Add(name, prompt, params, seed=0), bounded=False)
    return set(names)


def step(core: EngineCore) -> set[str]:
    """One step; whose tokens it gave. Raises UsageError where a request failed."""
    deltas = core.step()
    for delta in deltas:
        if delta.error is not None:
            raise UsageError(*delta.error)
    return {delta.request_id for delta in deltas}


def decode(bench: Bench, rows: int, context: int, steps: int, filled: bool) -> dict[str, Any]:
    """Decode steps of `rows` requests after `context` tokens each."""
    core, scenario = bench.core, Scenario("decode", DECODE, rows, context, 1, "")
    waiting = add(bench, scenario, rows, None, filled)
    try:
        while waiting:
            waiting -= step(core)
        found = measure(core, partial(step, core), steps)
    finally:
        for name in list(core.scheduler.requests):
            core.scheduler.abort(name)
        while not core.idle:
            core.step()
        core.scheduler.take_finished()
    attention = bench.work().decoding(context + LEAD + steps / 2).times(rows)
    needs = bench.work().products(rows, rows), attention
    return {"context_tokens": context, "computed": not filled, "needs": needs} | found


def prefill(bench: Bench, tokens: int) -> dict[str, Any]:
    """Steps of a prompt of `tokens` tokens, no two of the same."""
    core, seeds = bench.core, count()
    scenario = Scenario("prompt", PREFILL, 1, tokens, 1, "")

    def advance() -> None:
        add(bench, scenario, next(seeds), 1, False)
        while not core.idle:
            step(core)

    needs = bench.work().products(tokens, 1), bench.work().reading(0, tokens)
    return {"needs": needs} | measure(core, advance, PROMPT_STEPS)


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """A measurement for people."""
    host = ", ".join(f"{part} {us:.0f}" for part, us in found["host_us"].items())
    return [
        f"\n{name}: means of {found['steps']} steps of {found['tokens']:g} tokens, traced\n",
        *table(found["traced"]),
        f"\ndevice {found['traced']['device_us']:.1f} us a step; not traced "
        f"{found['device_us']:.1f}, idle until the next {found['idle_us']:.1f}, "
        f"wall {found['wall_us']:.1f}",
        f"floor {found['floor_us']:.1f} us: {found['share']:.1%} reached by the wall time",
        f"engine thread, us a step: {host}",
    ]


def run(invocation: Invocation) -> None:
    """Measure and print. Raises QuireError."""
    flags = invocation.flags
    sizes = [int(number("--rows", text, 1, 4096, whole=True)) for text in flags.rows.split(",")]
    context = int(number("--context", flags.context, 1, 10**7, whole=True))
    steps = int(number("--steps", flags.steps, 1, 1000, whole=True))
    prompt = int(number("--prompts", flags.prompts, 0, 10**6, whole=True))
    options = invocation.options(invocation.words[0] if invocation.words else None)
    gpu, why = find_gpu()
    if gpu is None or options.engine.device == "cpu":
        fix = "run it where there is one, without --device cpu; a CPU: quire bench offline"
        raise UsageError("no_gpu", "steps are traced on a GPU", why or "--device cpu", fix)
    set_up_logging(options.server.log_level)
    phases = Phases(quiet=invocation.json)
    engine = LocalEngine(options, phases)
    plan, facts = engine.info.plan, {"start_s": phases.finish()}
    most = min(plan["max_num_seqs"], plan["context_tokens"] // (context + 2 * (LEAD + steps)))
    if max(sizes) > most:
        what = f"--rows: {most} requests of --context {context} fit at a time"
        fix = "raise --max-num-seqs or --kv-cache-memory"
        raise UsageError("invalid_value", what, fix=fix, field="rows")
    bench = Bench(engine)
    facts |= bench.warm_up()
    record = Record(invocation.command, engine.info.model, plan, facts, phases.seconds)
    record.ceilings |= ceilings(plan["device"])
    work = {f"decode{n}": partial(decode, bench, n, context, steps, flags.filled) for n in sizes}
    if prompt:
        work["prompt"] = partial(prefill, bench, prompt)
    for name, measured in work.items():
        found = measured()
        floor = Ceilings.of(record.ceilings).seconds(*found.pop("needs")) * 1e6
        found |= {"floor_us": floor, "share": floor / found["wall_us"]}
        record.results[name] = found
        if not invocation.json:
            print("\n".join(lines(name, found)), flush=True)
    data = json.loads(json.dumps(record.to_dict()), parse_float=lambda text: round(float(text), 4))
    if invocation.json:
        print(json.dumps(data))
    if flags.output:
        write_json(flags.output, data)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser("", "", "where a step goes on a GPU")
    parser.prog, parser.usage = PROGRAM, f"{PROGRAM} MODEL [options]"
    group = parser.add_argument_group("measurement")
    group.add_argument("--rows", default="1,32,256", metavar="NS", help="requests [1,32,256]")
    group.add_argument("--context", default="290", metavar="N", help="tokens of each [290]")
    group.add_argument("--filled", action="store_true", help="contexts are not computed, as fBxC")
    group.add_argument("--steps", default="20", metavar="N", help="decode steps to measure [20]")
    group.add_argument("--prompts", default="0", metavar="N", help="steps of N prompt tokens too")
    group.add_argument("--output", metavar="FILE", help="write the record as JSON")
    parser.add_sections("model", "engine")
    try:
        flags, words = parser.parse_words(argv, 1)
        run(Invocation(f"{PROGRAM} {shlex.join(argv)}", flags, words))
    except (QuireError, KeyboardInterrupt) as error:
        return report(error, "--json" in argv, debug=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
