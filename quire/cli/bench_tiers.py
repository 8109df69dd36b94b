"""`quire bench tiers`: what a returning conversation gains from each tier, and what tiers cost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quire.cli.bench_offline import number
from quire.cli.bench_record import machine, plan_facts, write_json
from quire.cli.bench_tiers_report import lines, named
from quire.cli.flags import CommandLineError, Invocation, Parser
from quire.cli.terminal import Phases
from quire.cli.version import versions
from quire.cli.workload import SPECIAL_IDS
from quire.config.tiers import parse_tiers
from quire.tiers.policy import POLICIES

if TYPE_CHECKING:
    from quire.cli.local import LocalEngine

TURN_TOKENS, ANSWER_TOKENS = 64, 16  # what a turn adds: a question and an answer
TURNS = 3
ORDERS = ("random", "cyclic")
STEADY_OUTPUT = 32
SETTLE_SECONDS = 120.0


def add_flags(parser: Parser) -> None:
    """Flags of the measurement, the model and the engine."""
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--lengths", default="1024,4096", metavar="NS", help="tokens of prompts [1024,4096]"
    )
    group.add_argument("--repeat", default="3", metavar="N", help="report the median of N [3]")
    group.add_argument(
        "--overcommit",
        default="4",
        metavar="X",
        help="conversations hold X times what the device does [4]",
    )
    group.add_argument(
        "--returns",
        default="random",
        metavar="ORDER",
        help="which conversation speaks next: random, or cyclic, where each returns after all "
        "others, the worst for an LRU tier [random]",
    )
    group.add_argument("--seed", default="1", metavar="N", help="of prompts and that order [1]")
    group.add_argument("--output", metavar="FILE", help="write the record as JSON")
    parser.add_sections("model", "engine")


def run(invocation: Invocation) -> int:
    """Measure and print. Raises CommandLineError."""
    flags = invocation.flags
    options = invocation.options(invocation.words[0] if invocation.words else None)
    lengths = [
        int(number("--lengths", text, 32, 10**7, whole=True)) for text in flags.lengths.split(",")
    ]
    repeat = int(number("--repeat", flags.repeat, 1, 100, whole=True))
    overcommit = number("--overcommit", flags.overcommit, 1, 1000)
    seed = int(number("--seed", flags.seed, 0, 2**31, whole=True))
    if flags.returns not in ORDERS:
        raise CommandLineError(
            "invalid_flag",
            f"--returns {flags.returns}: there is no such order",
            fix=f"give one of {', '.join(ORDERS)}",
        )
    if not options.engine.kv_tiers:
        raise CommandLineError(
            "invalid_flag", "bench tiers: there are no tiers", fix="give --kv-tiers"
        )
    from quire.cli.local import LocalEngine
    from quire.cli.main import set_up_logging

    set_up_logging(options.server.log_level)
    phases = Phases(quiet=invocation.json)
    engine = LocalEngine(options, phases)
    phases.finish()
    directories = [t.path for t in parse_tiers(options.engine.kv_tiers) if t.kind == "fs"]
    bench = Bench(engine, directories, seed)
    longest = min(engine.info.max_model_len, engine.engine.plan.context_tokens) - 256
    fitting = [length for length in lengths if length <= longest]
    if not fitting:
        raise CommandLineError(
            "invalid_flag",
            f"--lengths {flags.lengths}: the longest prompt here has {longest} tokens",
            fix="raise --max-model-len and --kv-cache-memory",
        )

    def say(what: str) -> None:
        if not invocation.json:
            print(f"{what} ...", file=sys.stderr, flush=True)

    bench.warm_up()
    results: dict[str, Any] = {"returns": []}
    for length in fitting:
        say(f"returns of {length} tokens")
        results["returns"].append(bench.returns(length, repeat))
    say(f"conversations of {fitting[0]} tokens")
    results["conversations"] = bench.conversations(fitting[0], overcommit, flags.returns)
    say("steady load")
    results["steady"] = bench.steady(fitting[0], repeat)
    core, plan = engine.engine.core, engine.info.plan
    record = {
        "command": invocation.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": engine.info.model,
        "machine": machine(),
        "versions": versions(),
        "plan": plan_facts(plan),
        "tiers": [c for c in plan["choices"] if c["what"].startswith("kv tier")],
        "left_out": [length for length in lengths if length > longest],
        "results": results,
    }
    core.close()
    print(json.dumps(record) if invocation.json else "\n".join(lines(record)))
    if flags.output:
        write_json(flags.output, record)
    return 0


class Spent(NamedTuple):
    """Steps so far, and seconds of the engine thread in what tiers add to them: see Tiering."""

    steps: int
    lookups: float
    copies: float


def _per_step(before: Spent, after: Spent) -> dict[str, float]:
    """Milliseconds a step."""
    steps, lookups, copies = (b - a for a, b in zip(before, after, strict=True))
    return {
        "lookups": round(1000 * lookups / steps, 5),
        "copies": round(1000 * copies / steps, 5),
    }


class Bench:
    """Runs on one engine, whose tiers can be taken away and given back: both ways are measured in
    turn on the same machine, minute by minute. `directories`: of the filesystem tiers."""

    def __init__(self, engine: LocalEngine, directories: list[str], seed: int):
        self.engine, self.core = engine, engine.engine.core
        self._directories = directories
        tiering = self.core.tiering
        assert tiering is not None
        self._tiering = tiering
        self._seed, self._random = seed, random.Random(seed)

    # -- controlled returns ------------------------------------------------------------------

    def returns(self, length: int, repeat: int) -> dict[str, Any]:
        """Milliseconds to the first token of a prompt: computed, and from each tier. Where an
        engine prefers to compute, that is what is measured, and `sources` says so; `loaded` comes
        from below DRAM whatever that takes."""
        places: dict[str, Callable[[], None]] = {
            "device": lambda: None,
            "dram": self._leave_device,
            "below": self._leave_dram,
            "loaded": self._leave_dram,
        }
        times: dict[str, list[float]] = {name: [] for name in ("computed", *places)}
        sources: dict[str, dict[str, int]] = {}
        for _ in range(repeat):
            prompt = self._prompt(length)
            times["computed"].append(self._first_token(prompt)[0])
            self._settle()
            for name, leave in places.items():
                leave()
                with self._unmeasured() if name == "loaded" else contextlib.nullcontext():
                    seconds, cached = self._first_token(prompt)
                times[name].append(seconds)
                sources[name] = cached
                self._settle()
        medians = {name: round(1000 * statistics.median(t), 2) for name, t in times.items()}
        return {"tokens": length, "ttft_ms": medians, "sources": sources}

    def _leave_device(self) -> None:
        self.core.scheduler.kv.clear_cache()

    def _leave_dram(self) -> None:
        """Only what lies below DRAM is left, and of files nothing in the page cache."""
        self._leave_device()
        self._tiering.chain.dram.clear()
        for directory in self._directories:
            for path in (Path(directory) / "blocks").iterdir():
                with contextlib.suppress(OSError):
                    handle = os.open(path, os.O_RDONLY)
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(handle)

    @contextmanager
    def _unmeasured(self) -> Iterator[None]:
        """An engine that does not know yet how fast it computes loads whatever it finds."""
        costs = self._tiering.costs
        known, costs.prefill = costs.prefill, None
        try:
            yield
        finally:
            costs.prefill = known

    # -- conversations -----------------------------------------------------------------------

    def conversations(self, length: int, overcommit: float, order: str) -> dict[str, Any]:
        """Conversations that take turns, with more KV together than the device holds: times to the
        first token of returning turns, without tiers and with DRAM under each policy. All have the
        same turns in the same order, and begin with empty tiers."""
        from quire.tiers.dram import DramTier

        held = self.engine.engine.plan.context_tokens
        count = max(2, round(overcommit * held / length))
        found: dict[str, Any] = {"count": count, "tokens": length, "turns": TURNS, "order": order}
        chain = self._tiering.chain
        own = chain.dram
        for name in ("off", *POLICIES):
            self._clear()
            if name != "off":
                chain.dram = DramTier(own.slab, name)
            with self._tiers(name != "off"):
                found[name] = self._turns(count, length, order)
        self._clear()
        chain.dram = own
        return found

    def _turns(self, count: int, length: int, order: str) -> dict[str, Any]:
        rng = random.Random(self._seed)
        histories = [self._prompt(length, rng) for _ in range(count)]
        speaking = list(range(count)) * TURNS
        if order == "random":
            rng.shuffle(speaking)
        turns: list[tuple[float, dict[str, int]]] = []
        before, spent, spoken = self._pages(), self._spent(), set[int]()
        begun = time.perf_counter()
        for each in speaking:
            history = histories[each]
            turn = self._first_token(history, ANSWER_TOKENS, answer=history)
            history += self._prompt(TURN_TOKENS, rng)
            if each in spoken:
                turns.append(turn)
            spoken.add(each)
        seconds, after = time.perf_counter() - begun, self._pages()
        by_source: dict[str, list[float]] = {}
        cached: dict[str, int] = {}
        for taken, sources in turns:
            by_source.setdefault(named(sources), []).append(taken)
            for source, tokens in sources.items():
                cached[source] = cached.get(source, 0) + tokens
        return {
            **_milliseconds([taken for taken, _ in turns]),
            "seconds": round(seconds, 3),
            "cached_tokens": cached,
            "tiers_ms_per_step": _per_step(spent, self._spent()),
            "by_source": {name: _milliseconds(times) for name, times in by_source.items()},
            "pages": {
                name: {kind: pages[kind] - before[name][kind] for kind in pages}
                for name, pages in after.items()
            },
        }

    def _pages(self) -> dict[str, dict[str, int]]:
        """Pages that requests asked each tier for, so far."""
        stats = self._tiering.stats()
        return {tier.name: {"hits": tier.hits, "misses": tier.misses} for tier in stats}

    def _clear(self) -> None:
        """Empty device and tiers."""
        self._settle()
        self.core.clear_cache()
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(level.threads.writing for level in self._tiering.chain.levels):
            assert time.monotonic() < deadline, "a tier does not end"
            time.sleep(0.002)
        self._settle()

    # -- steady load ---------------------------------------------------------------------------

    def steady(self, length: int, repeat: int) -> dict[str, Any]:
        """Tokens a second of prompts that nobody asked before, with tiers and without."""
        requests = max(2, min(8, self.engine.engine.plan.context_tokens // (2 * length)))
        rates: dict[str, list[float]] = {"off": [], "on": []}
        host: dict[str, list[float]] = {"off": [], "on": []}
        tiers: list[dict[str, float]] = []
        for _ in range(repeat):
            for name in ("off", "on"):
                with self._tiers(name == "on"):
                    prompts = [self._prompt(length) for _ in range(requests)]
                    before, busy = self._spent(), self.core.host_seconds
                    begun = time.perf_counter()
                    self._answer(prompts, STEADY_OUTPUT)
                    seconds = time.perf_counter() - begun
                    after = self._spent()
                    rates[name].append(requests * (length + STEADY_OUTPUT) / seconds)
                    host[name].append(
                        (self.core.host_seconds - busy) / (after.steps - before.steps)
                    )
                    if name == "on":
                        tiers.append(_per_step(before, after))
                self._settle()
        on, off = (statistics.median(rates[name]) for name in ("on", "off"))
        return {
            "requests": requests,
            "tokens": length,
            "tokens_s_off": round(off, 1),
            "tokens_s_on": round(on, 1),
            "loss_percent": round(100 * (1 - on / off), 2),
            "host_ms_per_step": {
                name: round(1000 * statistics.median(each), 4) for name, each in host.items()
            },
            "tiers_ms_per_step": {
                kind: statistics.median(each[kind] for each in tiers) for kind in tiers[0]
            },
        }

    def _spent(self) -> Spent:
        tiering = self._tiering
        steps = self.core.scheduler.stats().steps
        return Spent(steps, tiering.lookup_seconds, tiering.copy_seconds)

    # -- shared ----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """First calls pay for allocations and CUDA graphs."""
        self._answer([self._prompt(40), self._prompt(40)], 4)
        while self.core.warm():
            pass

    @contextmanager
    def _tiers(self, on: bool) -> Iterator[None]:
        """An engine as it would be with or without `--kv-tiers`."""
        self._settle()
        self.core.scheduler.kv.clear_cache()
        if not on:
            self.core.tiering = self.core.scheduler.tiering = None
            self.core.scheduler.kv.published = None
        try:
            yield
        finally:
            self.core.tiering = self.core.scheduler.tiering = self._tiering
            self.core.scheduler.kv.published = []

    def _settle(self) -> None:
        """Let everything that is on its way down arrive."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self.core.settle() and time.monotonic() < deadline:
            self._tiering.wait(0.002)

    def _prompt(self, length: int, rng: random.Random | None = None) -> list[int]:
        top = max(SPECIAL_IDS + 2, self.engine.info.vocab_size - SPECIAL_IDS)
        rng = rng or self._random
        return [rng.randrange(SPECIAL_IDS, top) for _ in range(length)]

    def _answer(self, prompts: list[list[int]], output: int) -> None:
        from quire.params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for _ in self.engine.stream([self.engine.request(p, params) for p in prompts]):
            pass

    def _first_token(
        self, prompt: list[int], output: int = 1, answer: list[int] | None = None
    ) -> tuple[float, dict[str, int]]:
        """(seconds to the first token, cached tokens by source). `answer` takes all tokens."""
        from quire.params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        begun, first, cached = time.perf_counter(), 0.0, dict[str, int]()
        asked = self.engine.request(list(prompt), params)
        for news in self.engine.stream([asked]):
            tokens = [token for choice in news.choices for token in choice.token_ids]
            if tokens and not first:
                first = time.perf_counter() - begun
            if answer is not None:
                answer += tokens
            cached = news.cached_tokens_by_tier or {"device": news.num_cached_tokens}
        return first, {name: count for name, count in cached.items() if count}


def _milliseconds(times: list[float]) -> dict[str, float]:
    """Of first tokens in so many turns."""
    return {
        "turns": len(times),
        "ttft_ms": round(1000 * statistics.median(times), 2),
        "ttft_worst_ms": round(1000 * max(times), 2),
    }
