"""`quire bench offline`: the engine's speed on fixed work, without a server."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from quire.cli import workload
from quire.cli.bench_experts import DECODE_STEPS, counting
from quire.cli.bench_record import Record, ceilings
from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.roofline import Work
from quire.cli.terminal import Phases
from quire.cli.workload import CPU_DEFAULT, SCENARIOS, Scenario, find_scenarios, make_prompts
from quire.errors import PlanError
from quire.hardware.machine import detect

if TYPE_CHECKING:
    from quire.cli.bench_filled import FilledCaches
    from quire.cli.local import LocalEngine
    from quire.config.options import Options

MOST_REQUESTS = 256
ROOM = "making room for the scenarios"
Metrics = dict[str, float]


def add_flags(parser: Parser) -> None:
    """Flags of the measurement, the model and the engine."""
    group = parser.add_argument_group(
        "measurement", "; ".join(f"{s.name}: {s.about}" for s in SCENARIOS)
    )
    group.add_argument(
        "--scenarios",
        default=CPU_DEFAULT,
        metavar="NAMES",
        help=f"[{CPU_DEFAULT}]; bN, dBxC, fBxC, prefillN too",
    )
    group.add_argument("--repeat", default="3", metavar="N", help="report the median of N [3]")
    group.add_argument(
        "--scale", default="1", metavar="X", help="shrink counts and lengths, 0 to 1 [1]"
    )
    group.add_argument("--output", metavar="FILE", help="write the record as JSON")
    parser.add_sections("model", "engine")


def run(invocation: Invocation) -> int:
    """Measure and print."""
    flags = invocation.flags
    options = invocation.options(invocation.words[0] if invocation.words else None)
    scenarios = find_scenarios(flags.scenarios)
    repeat = int(number("--repeat", flags.repeat, 1, 100, whole=True))
    scale = number("--scale", flags.scale, 0.0001, 1)
    from quire.cli.local import LocalEngine
    from quire.cli.main import set_up_logging

    set_up_logging(options.server.log_level)
    phases = Phases(quiet=invocation.json)
    phases("loading libraries")
    import_module("quire.engine.startup")
    detect(gpu=options.engine.device != "cpu")  # CUDA's own start is part of any engine's
    phases(ROOM)
    options = _room_for(options, invocation.given(), scenarios, scale, invocation.json)
    engine = LocalEngine(options, phases)
    took = phases.finish() - phases.seconds.pop(ROOM)  # which only benchmarks need
    info, facts = engine.info, {"start_s": took}
    record = Record(invocation.command, info.model, info.plan, facts, phases.seconds)
    bench = Bench(engine)
    record.facts |= bench.warm_up()
    record.ceilings |= ceilings(engine.info.plan["device"])
    work = bench.work()
    drafter = bench.drafter(options, work)
    for scenario in scenarios:
        sized = scenario.scaled(scale, engine.info.max_model_len)
        if not invocation.json:
            print(f"{scenario.name}: {_size(sized)} ...", file=sys.stderr, flush=True)
        runs = [bench.measure(sized) for _ in range(repeat)]
        experts = bench.experts(sized, work) if work.experts else None
        record.add(sized, sized != scenario, runs, work, experts, drafter)
    record.finish(as_json=invocation.json, output=flags.output)
    return 0


def number(flag: str, text: str, low: float, high: float, whole: bool = False) -> float:
    """A flag's number. Raises CommandLineError."""
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        why = f"it must be {kind} from {low:g} to {high:g}"
        raise CommandLineError("invalid_flag", f"{flag}: {text!r} is not allowed", why, field=flag)
    return value


def _size(scenario: Scenario) -> str:
    return f"{scenario.requests} x {scenario.prompt} in, {scenario.output} out"


def _room_for(
    options: Options, given: dict[str, Any], scenarios: list[Scenario], scale: float, quiet: bool
) -> Options:
    """Options with slots and KV cache for the largest scenario, where they were not given."""
    from quire.engine.startup import find_model, kernel_facts, make_plan
    from quire.plan.memory import bytes_for_tokens

    engine = options.engine
    files, found = find_model(options), kernel_facts()
    plan = make_plan(options, files, None, found)
    if "max_num_seqs" not in given:
        most = max(round(s.requests * scale) for s in scenarios)
        slots = max(plan.max_num_seqs, min(MOST_REQUESTS, most))
        engine = replace(engine, max_num_seqs=slots)
    sized = replace(options, engine=engine)
    if engine.kv_cache_memory is not None or plan.device != "cpu":
        return sized  # the KV cache is as asked for, or fills the GPU anyway
    plan = make_plan(sized, files, None, found)
    longest, seats = plan.max_model_len, plan.max_num_seqs
    work = [s.scaled(scale, longest) for s in scenarios]
    need = max(min(s.requests, seats) * (s.prompt + s.output) for s in work)
    if need <= plan.context_tokens:
        return sized
    size = bytes_for_tokens(plan.groups, need, plan.max_num_batched_tokens, seats)
    larger = replace(sized, engine=replace(engine, kv_cache_memory=size))
    try:
        make_plan(larger, files, None, found)
    except PlanError as error:
        if not quiet:
            print(f"some requests will wait or be preempted: {error}", file=sys.stderr)
        return sized
    return larger


@dataclass
class Timed:
    """One pass: seconds to the first token, to the last, and in all; tokens of output. `decoding`:
    the engine thread's seconds, and steps, once all requests have their first token."""

    first: float
    last: float
    seconds: float
    tokens: int
    cached: int
    decoding: tuple[float, float] = (0.0, 0.0)


class Bench:
    """Runs scenarios on one engine. No two passes share a prompt, so the prefix cache serves
    only what a scenario means it to."""

    def __init__(self, engine: LocalEngine):
        self.engine = engine
        self.core = engine.engine.core
        self._passes = 0
        self._filled: FilledCaches | None = None
        self._clock = None
        if engine.info.plan["device"] != "cpu":
            from quire.runner.clock import DeviceClock

            self._clock = self.core.runner.clock = DeviceClock()  # type: ignore[attr-defined]

    def warm_up(self) -> Metrics:
        """First calls pay for allocations, caches and CUDA graphs; they are not measured beyond
        the times that are returned."""
        length = max(1, min(64, self.engine.info.max_model_len // 2))
        output = min(8, self.engine.info.max_model_len - length)
        started = time.perf_counter()
        self._pass(Scenario("warm-up", workload.TOTAL, 2, length, output, ""))
        answered = time.perf_counter()
        while self.core.warm():
            pass
        ready = time.perf_counter()
        return {"first_answer_s": answered - started, "graphs_s": ready - answered}

    def measure(self, scenario: Scenario) -> Metrics:
        """One repetition."""
        before = self.core.scheduler.stats()
        metrics: Metrics = getattr(self, f"_{scenario.kind}")(scenario)
        after = self.core.scheduler.stats()
        preempted = after.preemptions - before.preemptions
        drafted = after.draft_tokens - before.draft_tokens
        if drafted:
            accepted = after.accepted_tokens - before.accepted_tokens
            rows = after.draft_rows - before.draft_rows
            # Every decode row gives one token, and the drafts that are accepted.
            decoded = scenario.requests * (scenario.output - 1) - accepted
            metrics |= {
                "accepted": accepted / drafted,
                "tokens_per_drafted_row": 1 + accepted / rows,
                "drafts_per_row": drafted / decoded,
            }
        return metrics | ({"preemptions": float(preempted)} if preempted else {})

    def work(self) -> Work:
        """What of the model counts for a floor."""
        from quire.models.registry import read_config
        from quire.plan.facts import KV_DTYPES

        plan, engine = self.engine.info.plan, self.engine.engine
        config = read_config(engine.files.config())
        itemsize = KV_DTYPES[plan["kv_dtype"]].itemsize
        return Work.of(config, plan["weight_parts"], engine.build.caches, itemsize)

    def drafter(self, options: Options, work: Work) -> Work | None:
        """What of the model or module that drafts counts, if one does: with the head of the model,
        whose `work` is given, where it has none of its own."""
        from quire.engine.startup import draft_options, find_model
        from quire.models.registry import read_config

        if not (parts := self.engine.info.plan["draft_parts"]):
            return None
        own = draft_options(options)
        files = self.engine.engine.files if own is None else find_model(own)
        found = Work.of(read_config(files.config()), parts)
        return found if found.head.values else replace(found, head=work.head)

    def experts(self, scenario: Scenario, work: Work) -> Metrics:
        """Distinct experts of a layer's step, counted in a pass that is long enough for all
        requests to decode together, where they do in the scenario."""
        budget = self.engine.info.plan["max_num_batched_tokens"]
        prompts = -(-scenario.requests * scenario.prompt // budget)
        asked = self.engine.engine.plan.speculation
        drafts = 0 if asked is None else asked.num_speculative_tokens
        # As many steps even if every draft is accepted, and none of them among the last tokens,
        # where fewer are drafted.
        output = min(scenario.output, prompts + DECODE_STEPS * (1 + drafts) + drafts)
        with counting(self.engine, work.sparse) as count:
            self._pass(replace(scenario, output=output))
        return count.found() | {"of": float(work.experts)}

    def _decode(self, scenario: Scenario) -> Metrics:
        """ITL = (t(n) - t(1)) / (n - 1), t(k) the time to answer all requests with k tokens."""
        if scenario.filled:
            self._fill()  # whose steps are no part of what is measured
        first = self._pass(replace(scenario, output=1)).seconds
        self._read_clock()
        timed = self._pass(scenario)
        whole = timed.seconds
        host, steps = (b - a for a, b in zip(timed.decoding, self._host(), strict=True))
        gaps = scenario.output - 1
        itl = max(whole - first, 1e-9) / gaps
        metrics = {"itl_ms": itl * 1e3, "output_tok_s": scenario.requests / itl}
        metrics["t1_ms"] = first * 1e3
        if scenario.filled:
            metrics["cached_share"] = timed.cached / (scenario.requests * scenario.prompt)
        metrics["host_ms_per_step"] = host / max(1.0, steps) * 1e3
        busy, idle = self._read_clock()
        return metrics | ({"gpu_idle": idle / (busy + idle)} if busy else {})

    def _host(self) -> tuple[float, float]:
        """The engine thread's seconds, the clock's apart, and steps, so far."""
        clock = 0.0 if self._clock is None else self._clock.host_seconds
        return self.core.host_seconds - clock, self.core.scheduler.stats().steps

    def _read_clock(self) -> tuple[float, float]:
        """The device's busy and idle seconds since the last reading; zeros on a CPU."""
        return (0.0, 0.0) if self._clock is None else self._clock.read()

    def _total(self, scenario: Scenario) -> Metrics:
        timed = self._pass(scenario)
        return {"output_tok_s": timed.tokens / timed.seconds, "seconds": timed.seconds}

    def _prefill(self, scenario: Scenario) -> Metrics:
        timed = self._pass(scenario)
        prompts = scenario.requests * scenario.prompt
        return {"prefill_tok_s": prompts / timed.seconds, "seconds": timed.seconds}

    def _prefix(self, scenario: Scenario) -> Metrics:
        """The shared tokens are computed before, and not timed."""
        prompts = self._prompts(scenario)
        opening = replace(scenario, requests=1, output=1)
        self._run([prompts[0][: scenario.shared + 1]], opening.output)
        timed = self._run(prompts, scenario.output)
        return {
            "output_tok_s": timed.tokens / timed.seconds,
            "seconds": timed.seconds,
            "cached_share": timed.cached / (scenario.requests * scenario.prompt),
        }

    def _single(self, scenario: Scenario) -> Metrics:
        timed = self._pass(scenario)
        rate = (timed.tokens - 1) / max(timed.last - timed.first, 1e-9)
        return {"decode_tok_s": rate, "ttft_ms": timed.first * 1e3}

    def _pass(self, scenario: Scenario) -> Timed:
        prompts = self._prompts(scenario)
        if scenario.filled:
            self._fill().claim(prompts)
        return self._run(prompts, scenario.output)

    def _fill(self) -> FilledCaches:
        from quire.cli.bench_filled import FilledCaches

        if self._filled is None:
            self._filled = FilledCaches(self.engine)
        return self._filled

    def _prompts(self, scenario: Scenario) -> list[list[int]]:
        self._passes += 1
        return make_prompts(scenario, self.engine.info.vocab_size, self._passes)

    def _run(self, prompts: list[list[int]], output: int) -> Timed:
        from quire.params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        requests = [self.engine.request(prompt, params) for prompt in prompts]
        timed = Timed(0.0, 0.0, 0.0, 0, 0)
        waiting = {request.request_id for request in requests}
        start = time.perf_counter()
        for news in self.engine.stream(requests):
            timed.last = time.perf_counter() - start
            timed.first = timed.first or timed.last
            if waiting and news.choices:
                waiting.discard(news.request_id)
                if not waiting:
                    timed.decoding = self._host()
            timed.tokens += sum(len(choice.token_ids) for choice in news.choices)
            timed.cached += news.num_cached_tokens if news.finished else 0
        timed.seconds = time.perf_counter() - start
        return timed
