"""Scheduler and KVManager drive a runner that checks every byte of KV: outputs equal a reference
computed without an engine, whatever arrives, ends, is preempted, is found in the cache or raises.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mock_runner import (
    EOS,
    POISON,
    VOCAB,
    Held,
    MockRunner,
    Reference,
    Slot,
    StepFailed,
    alternating,
    label_of,
    prefix_hashes,
    reference,
)

from quire.engine.drafting import Drafting
from quire.engine.limits import Limits
from quire.engine.request import State
from quire.engine.scheduler import Scheduler
from quire.engine.wire import Add, Delta
from quire.errors import Overloaded, QuireError, UsageError
from quire.kernels.device_state import MAX_WORD_TOKENS, MAX_WORDS
from quire.kv.groups import KVGroup
from quire.kv.identity import BlockIdentity
from quire.kv.manager import KVManager
from quire.params import SamplingParams
from quire.step import (
    DEVICE_TOKEN,
    FORBIDDEN_ERROR,
    Batch,
    Result,
    Row,
    RowResult,
    mask_of,
    written_out,
)

ERROR = QuireError("step_failed", "the step raised")
MODEL_LEN = 96


def kv_groups(*windows: int | None, pools: tuple[int, ...] | None = None) -> list[KVGroup]:
    pools = pools or (0,) * len(windows)
    return [
        KVGroup(index=i, window=w, layers=(i,), page_bytes=1, pool=p)
        for i, (w, p) in enumerate(zip(windows, pools, strict=True))
    ]


LAYOUTS = {
    "full": kv_groups(None),
    "window": kv_groups(20),
    "one pool": kv_groups(None, 24),
    "two pools": kv_groups(None, 24, pools=(0, 1)),
    "mixed": kv_groups(7, None, 40, pools=(0, 1, 0)),
    "tiny window": kv_groups(None, 1),
    "pages": [
        KVGroup(0, 24, (0,), 1, 0, checkpoint=64),
        KVGroup(1, None, (1,), 1, 1, block_size=32),
    ],
}


def recomputed_tokens(groups: list[KVGroup]) -> int:
    """Layers whose windows are checkpointed are taken to keep state of four tokens besides."""
    return 4 if any(group.checkpoint for group in groups) else 0


def least_blocks(groups: list[KVGroup], tokens: int, budget: int) -> list[int]:
    """The smallest pools in which a request of `tokens` fits alone (with the null block)."""
    blocks = [1] * (1 + max(g.pool for g in groups))
    for group in groups:
        blocks[group.pool] += group.peak_blocks(tokens, budget)
    return blocks


@dataclass
class Asked:
    """A request as its frontend sees it."""

    add: Add
    label: int
    ref: Reference
    deadline: float | None
    stop_length: int | None  # a stop string is found in the text of this many tokens
    abort_length: int | None = None
    aborted: bool = False
    may_fail: bool = False
    gated: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    end: Delta | None = None

    @property
    def visible(self) -> list[int]:
        return self.tokens if self.abort_length is None else self.tokens[: self.abort_length]

    @property
    def confirmed(self) -> list[int]:
        """Output that others may find: with stop strings only what the frontend has confirmed."""
        if not self.add.params.stop:
            return self.tokens
        return [] if self.abort_length is None else self.visible


class Alternating:
    """A gate by parity, which counts and can be told to raise."""

    def __init__(self, raises_at: int = -1):
        self.raises_at, self.asked = raises_at, 0

    def allowed(self, output: list[int]) -> bytes:
        self.asked += 1
        if len(output) == self.raises_at:
            raise KeyError("no such state")
        return mask_of(alternating(output), VOCAB)


class Driver:
    """The engine loop and the frontends around one Scheduler, with `depth` steps in flight."""

    def __init__(
        self,
        groups: list[KVGroup],
        pool_blocks: list[int],
        depth: int = 1,
        budget: int = 32,
        slots: int = 4,
        caching: bool = True,
        priority: bool = False,
        rng: random.Random | None = None,
        max_queue: int = 1000,
        drafting: Drafting | None = None,
        wrong: float = 0.0,
    ):
        self.now, self.depth, self.rng = 100.0, depth, rng or random.Random(0)
        self.kv = KVManager(groups, pool_blocks, BlockIdentity(b"test"), caching)
        recomputed = recomputed_tokens(groups)
        limits = Limits(slots, budget, MODEL_LEN, VOCAB, EOS, priority, max_queue, recomputed)
        self.scheduler = Scheduler(limits, self.kv, lambda: self.now, drafting)
        self.runner = MockRunner(
            groups, pool_blocks, slots, self._fails, self._nan, wrong, recomputed
        )
        self.pending: deque[tuple[Batch, Result | Held | None]] = deque()
        self.asked: dict[str, Asked] = {}
        self.found: list[tuple[int, str, int]] = []  # stop strings on their way to the engine
        self.killers: set[int] = set()  # seeds of requests whose sampling step raises
        self.nans: dict[int, int] = {}  # seed and position of what comes out as NaN
        self.spoiled: set[int] = set()  # those of them that were computed
        self.fault = False  # the next step raises, whoever is in it
        self.late = False  # it does so only when its result is asked for
        self.commits_first = self.rng.random() < 0.5  # ... steps before one that raised
        self.iterations = 0
        self.faults = 0

    # -- faults ----------------------------------------------------------------------------------

    def _fails(self, batch: Batch, slots: list[Slot]) -> bool:
        fault, self.fault = self.fault, False
        return fault or any(
            row.sample and slot.enter.seed in self.killers
            for slot, row in zip(slots, batch.rows, strict=True)
        )

    def _nan(self, slot: Slot, row: Row) -> bool:
        seed = slot.enter.seed
        position = self.nans.get(seed, -1)
        spoiled = row.start <= position < row.start + len(row.tokens)
        if spoiled:
            self.spoiled.add(seed)
        return spoiled

    # -- frontends -------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        stop_length: int | None = None,
        timeout: float | None = None,
        kills: bool = False,
        nan: int | None = None,
        gate: Alternating | None = None,
        **fields: object,
    ) -> Asked:
        seed = len(self.asked)
        params = params or SamplingParams()
        tenant, salt = str(fields.get("tenant", "")), str(fields.get("cache_salt", ""))
        label = label_of(len(tenant), len(salt))
        choice = int(fields.get("choice", 0))  # type: ignore[call-overload]
        add = Add(
            request_id=f"r{seed}",
            prompt_token_ids=prompt,
            params=params,
            seed=seed,
            timeout=timeout,
            bad_words=[[len(tenant), len(salt)]],
            **fields,  # type: ignore[arg-type]
        )
        self.scheduler.add(add, gate=gate)
        gated = gate is not None
        ref = reference(prompt, params, seed, choice, label, MODEL_LEN, gated=gated)
        deadline = None if timeout is None else self.now + timeout
        may_fail = kills or nan is not None or (gate is not None and gate.raises_at >= 0)
        asked = Asked(add, label, ref, deadline, stop_length, may_fail=may_fail, gated=gated)
        self.asked[add.request_id] = asked
        if kills:
            self.killers.add(seed)
        if nan is not None:
            self.nans[seed] = nan
        return asked

    def abort(self, request_id: str, length: int = -1, reason: str = "abort") -> None:
        asked = self.asked[request_id]
        if asked.end is None and length >= 0:
            asked.abort_length = length
        asked.aborted |= asked.end is None
        self.scheduler.abort(request_id, reason, length)
        self._deliver(self.scheduler.take_finished())

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            asked = self.asked[delta.request_id]
            assert asked.end is None, "a delta after the end"
            asked.tokens += delta.token_ids
            asked.logprobs += delta.logprobs or []
            asked.prompt_logprobs += delta.prompt_logprobs or []
            if delta.finish_reason is not None:
                asked.end = delta
                self._check_end(asked, delta)
            elif asked.stop_length is not None and len(asked.tokens) >= asked.stop_length:
                due = self.iterations + self.rng.randrange(3)
                self.found.append((due, delta.request_id, asked.stop_length))
                asked.stop_length = None

    def _check_end(self, asked: Asked, end: Delta) -> None:
        ref, params = asked.ref, asked.add.params
        assert asked.tokens == ref.tokens[: len(asked.tokens)]
        if params.logprobs is not None:
            assert asked.logprobs == ref.logprobs[: len(asked.tokens)]
        if end.finish_reason == "error":
            assert asked.may_fail and end.error is not None
        elif asked.aborted:
            assert end.finish_reason in ("abort", "stop")
        elif end.finish_reason == "abort":
            assert asked.deadline is not None and asked.deadline <= self.now
        else:
            assert asked.add.seed not in self.killers
            assert asked.tokens == ref.tokens
            assert (end.finish_reason, end.stop_reason) == (ref.finish_reason, ref.stop_reason)
        wanted = ref.prompt_logprobs if params.prompt_logprobs is not None else []
        assert asked.prompt_logprobs == wanted[: len(asked.prompt_logprobs)]
        assert asked.prompt_logprobs == wanted or not asked.tokens

    # -- the loop --------------------------------------------------------------------------------

    def iterate(self) -> None:
        """One turn of the engine loop: fill the pipeline, then take the oldest result."""
        self.iterations += 1
        self.scheduler.expire()
        self._deliver(self.scheduler.take_finished())
        for due, request_id, length in list(self.found):
            if due <= self.iterations:
                self.found.remove((due, request_id, length))
                self.abort(request_id, length, "stop")
        stalled = False
        while len(self.pending) < self.depth and not self.runner.held and not stalled:
            stalled = not self.schedule()
        if self.pending:
            self.commit()
        else:
            assert self.may_stall() or not self.scheduler.requests, "requests, and nothing moves"

    def may_stall(self) -> bool:
        """Whether requests may wait while nothing computes."""
        return False

    def schedule(self) -> bool:
        batch = self.scheduler.schedule()
        self.check()
        if batch is None:
            return False
        assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
        failed_before = any(result is None for _, result in self.pending)
        result: Result | Held | None = None
        if not failed_before:
            try:
                result = self.runner.submit(batch)
            except StepFailed:
                if not self.late:
                    self.pending.append((batch, None))
                    while self.commits_first and self.pending[0][1] is not None:
                        self.commit()
                    self.recover()
                    return True
        self.pending.append((batch, result))
        assert self.scheduler.is_gated(batch.step) is any(row.gated for row in batch.rows)
        self.open()
        return True

    def open(self) -> None:
        """Let the newest step sample, if it waits and can."""
        if self.pending and isinstance(self.pending[-1][1], Held):
            batch, held = self.pending.pop()
            assert isinstance(held, Held)
            masks = self.scheduler.masks(batch.step)
            self._deliver(self.scheduler.take_finished())
            self.pending.append((batch, held if masks is None else held.open(masks)))

    def commit(self) -> None:
        result = self.pending[0][1]
        if result is None:
            self.recover()
        else:
            assert isinstance(result, Result), "a step is committed that has not sampled"
            self.pending.popleft()
            self._deliver(self.scheduler.commit(result))
            self.open()
            self.check()

    def recover(self) -> None:
        """A step raised: those after it never ran, and the engine does not know which it was."""
        self.faults += 1
        steps = [batch.step for batch, _ in self.pending]
        requests = {r for step in steps for r, _ in self.scheduler._inflight[step].rows()}
        if len(requests) == 1:
            self.asked[requests.pop().request_id].may_fail = True
        self.pending.clear()
        self.runner.reset()
        self.scheduler.quarantine(steps, ERROR)
        self._deliver(self.scheduler.take_finished())
        self.check()

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.scheduler.check_slice()
        for pool, pages in zip(self.kv.pools, self.runner.pages, strict=True):
            assert not any(POISON in pages[block] for block in pool._index.values())

    def drain(self) -> None:
        """Run until all is done, within a bound on steps, and look for what should not be left."""
        most = 200 + 20 * sum(
            len(a.add.prompt_token_ids) + len(a.ref.tokens) for a in self.asked.values()
        )
        begin = self.iterations
        while not self.scheduler.idle:
            self.iterate()
            assert self.iterations - begin < most, "no progress"
        assert all(a.end is not None for a in self.asked.values())
        assert self.kv.usage()[0] == 0, "blocks are left"
        stats = self.scheduler.stats()
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.generated_tokens == sum(len(a.visible) for a in self.asked.values())
        self.check_index()

    def check_index(self) -> None:
        """What can be found is exactly what sequences that count have in their blocks."""
        right: dict[bytes, tuple[int, list[int]]] = {}
        beyond: set[bytes] = set()
        for asked in self.asked.values():
            tokens = asked.add.prompt_token_ids + asked.confirmed
            for identity, value in self._chain(asked, tokens):
                right[identity] = value
            full = asked.add.prompt_token_ids + asked.ref.tokens + asked.ref.beyond
            beyond |= {identity for identity, _ in self._chain(asked, full)}
        for p, pool in enumerate(self.kv.pools):
            assert not any(pool.find(identity) for identity in beyond - set(right))
            for identity, block in pool._index.items():
                g, hashes = right[identity]
                assert self.kv.groups[g].pool == p
                assert self.runner.pages[p][block] == [(g, h) for h in hashes]

    def _chain(self, asked: Asked, tokens: list[int]) -> list[tuple[bytes, tuple[int, list[int]]]]:
        chain, hashes = [], prefix_hashes(asked.label, tokens)
        for group in self.kv.groups:
            parent = self.kv.identity.root(group.index, asked.add.tenant, asked.add.cache_salt)
            size = group.block_size
            for i in range(0, len(tokens) - size + 1, size):
                parent = self.kv.identity.block(parent, tokens[i : i + size])
                chain.append((parent, (group.index, hashes[i : i + size])))
        return chain


# -- anything may happen ---------------------------------------------------------------------------

BASES = [[random.Random(b).randrange(2, VOCAB) for _ in range(MODEL_LEN)] for b in range(3)]


def random_driver(
    rng: random.Random, drafting: Drafting | None = None, wrong: float = 0.0
) -> Driver:
    groups = LAYOUTS[rng.choice(list(LAYOUTS))]
    budget = rng.choice([1, 5, 16, 33, 64])
    slots = rng.choice([1, 2, 3, 6])
    slack = rng.choice([0, 0, 1, 3, 10, 60])
    ahead = 0 if drafting is None else drafting.ahead
    blocks = [n + slack for n in least_blocks(groups, MODEL_LEN, budget + ahead)]
    return Driver(
        groups,
        blocks,
        depth=rng.choice([1, 2, 2, 3]),
        budget=budget,
        slots=slots,
        caching=rng.random() < 0.8,
        priority=rng.random() < 0.3,
        rng=rng,
        drafting=drafting,
        wrong=wrong,
    )


def random_add(driver: Driver, rng: random.Random) -> None:
    base = rng.choice(BASES)
    length = rng.choice([1, 2, 15, 16, 17, 31, 32, 33, 48, rng.randrange(1, MODEL_LEN)])
    shared = rng.randrange(length + 1)
    prompt = base[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
    if rng.random() < 0.6:
        prompt = base[:length]
    most = rng.choice([None, 1, 2, 17, 40])
    has_stop = rng.random() < 0.3
    params = SamplingParams(
        max_tokens=most,
        min_tokens=rng.choice([0, 0, 1, 9, 40]) if most in (None, 40) else 0,
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([None, None, [5], [0, 7]]),
        stop=["x"] if has_stop else None,
        logprobs=rng.choice([None, 2]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
    )
    fields: dict = {
        "priority": rng.randrange(3),
        "tenant": rng.choice(["", "", "t"]),
        "cache_salt": rng.choice(["", "", "s"]),
    }
    timeout = rng.choice([None, None, None, 3.0, 20.0])
    kills, gated = rng.random() < 0.04, rng.random() < 0.25
    raises_at = rng.randrange(20) if rng.random() < 0.1 else -1
    for choice in range(rng.choice([1, 1, 1, 3])):
        driver.add(
            prompt,
            params,
            stop_length=rng.randrange(1, 20) if has_stop else None,
            timeout=timeout,
            kills=kills,
            nan=rng.randrange(length + 20) if rng.random() < 0.06 else None,
            gate=Alternating(raises_at) if gated else None,
            choice=choice,
            **fields,
        )


def random_operation(driver: Driver, rng: random.Random) -> None:
    dice = rng.random()
    if dice < 0.25 and len(driver.asked) < 60:
        random_add(driver, rng)
    elif dice < 0.32 and driver.asked:
        length = rng.choice([-1, -1, 0, 1, 5, 50])
        driver.abort(rng.choice(list(driver.asked)), length)
    elif dice < 0.36:
        driver.now += rng.choice([0.5, 5.0])
    elif dice < 0.37:
        driver.kv.clear_cache()
    elif dice < 0.39:
        driver.fault, driver.late = True, rng.random() < 0.5
    elif dice < 0.5 and driver.pending:
        driver.commit()
    elif dice < 0.6 and len(driver.pending) < driver.depth and not driver.runner.held:
        driver.schedule()
    else:
        driver.iterate()


def run_random(
    seed: int, operations: int, drafting: Drafting | None = None, wrong: float = 0.0
) -> Driver:
    rng = random.Random(seed)
    driver = random_driver(rng, drafting, wrong)
    for _ in range(operations):
        random_operation(driver, rng)
    driver.drain()
    return driver


@pytest.mark.parametrize("seed", range(40))
def test_random_life_gives_reference_outputs_and_leaks_nothing(seed: int) -> None:
    run_random(seed, operations=120)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40, 640))
def test_random_life_gives_reference_outputs_and_leaks_nothing_full(seed: int) -> None:
    run_random(seed, operations=200)


def test_random_lives_reach_what_they_are_meant_to_reach() -> None:
    """The random tests prove nothing about what never happens in them."""
    seen = dict.fromkeys(["preempted", "hit", "error", "abort", "stop", "length", "faults"], 0)
    seen |= {"gated": 0, "gate_failed": 0, "numerical_error": 0, "step_failed": 0}
    for seed in range(12):
        driver = run_random(seed, operations=120)
        stats = driver.scheduler.stats()
        seen["preempted"] += stats.preemptions
        seen["hit"] += stats.prefix_hit_tokens
        for asked in driver.asked.values():
            assert asked.end is not None
            seen[asked.end.finish_reason or ""] += 1
            seen["gated"] += asked.gated and len(asked.tokens) > 1
            if asked.end.error:
                seen[asked.end.error[0]] += 1
        seen["faults"] += driver.faults
    assert min(seen.values()) > 3, seen


class Life(RuleBasedStateMachine):
    """The same Driver, with operations that hypothesis can shorten to the ones that matter."""

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)),
        depth=st.integers(1, 3),
        budget=st.sampled_from([1, 16, 33, 64]),
        slots=st.sampled_from([1, 2, 4]),
        slack=st.sampled_from([0, 2, 30]),
        priority=st.booleans(),
    )
    def begin(
        self, layout: str, depth: int, budget: int, slots: int, slack: int, priority: bool
    ) -> None:
        groups = LAYOUTS[layout]
        blocks = [n + slack for n in least_blocks(groups, MODEL_LEN, budget)]
        self.driver = Driver(groups, blocks, depth, budget, slots, priority=priority)

    @rule(
        base=st.integers(0, 2),
        length=st.sampled_from([1, 15, 16, 17, 33, 48, 90]),
        most=st.sampled_from([1, 3, 20, None]),
        stop=st.sampled_from([None, None, 1, 16]),
        choices=st.sampled_from([1, 1, 2]),
        priority=st.integers(0, 1),
        tenant=st.sampled_from(["", "t"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        nan=st.sampled_from([None, None, None, 0, 15, 16, 40, 89]),
        gate=st.sampled_from([None, None, -1, 0, 3]),
    )
    def add(
        self,
        base: int,
        length: int,
        most: int | None,
        stop: int | None,
        choices: int,
        priority: int,
        tenant: str,
        prompt_logprobs: int | None,
        nan: int | None,
        gate: int | None,
    ) -> None:
        params = SamplingParams(
            max_tokens=most, stop=["x"] if stop else None, prompt_logprobs=prompt_logprobs
        )
        for choice in range(choices):
            self.driver.add(
                BASES[base][:length],
                params,
                stop_length=stop,
                choice=choice,
                priority=priority,
                tenant=tenant,
                nan=None if choice else nan,
                gate=None if gate is None else Alternating(gate),
            )

    @rule()
    def iterate(self) -> None:
        self.driver.iterate()

    @precondition(lambda self: len(self.driver.pending) < self.driver.depth)
    @precondition(lambda self: not self.driver.runner.held)
    @rule()
    def schedule(self) -> None:
        self.driver.schedule()

    @precondition(lambda self: self.driver.pending)
    @rule()
    def commit(self) -> None:
        self.driver.commit()

    @precondition(lambda self: self.driver.asked)
    @rule(which=st.integers(0, 1000), length=st.sampled_from([-1, 0, 2, 100]))
    def abort(self, which: int, length: int) -> None:
        self.driver.abort(f"r{which % len(self.driver.asked)}", length)

    @rule(late=st.booleans())
    def next_step_raises(self, late: bool) -> None:
        self.driver.fault, self.driver.late = True, late

    @rule()
    def clear_cache(self) -> None:
        self.driver.kv.clear_cache()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "driver"):
            self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=QUIET
)


class LongLife(Life):
    pass


TestLongLife = pytest.mark.full(LongLife.TestCase)
TestLongLife.settings = settings(
    max_examples=400, stateful_step_count=80, deadline=None, suppress_health_check=QUIET
)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_outputs_do_not_depend_on_depth_budget_pool_or_cache(layout: str) -> None:
    groups = LAYOUTS[layout]
    outputs = set()
    for depth, budget, slack, caching in [(1, 64, 80, False), (2, 7, 0, True), (3, 33, 2, True)]:
        blocks = [n + slack for n in least_blocks(groups, MODEL_LEN, budget)]
        driver = Driver(groups, blocks, depth, budget, caching=caching)
        asked = [
            driver.add(BASES[i % 2][: 20 + 9 * i], SamplingParams(max_tokens=30, logprobs=1))
            for i in range(8)
        ]
        driver.drain()
        ends = [(a.end.finish_reason, a.end.stop_reason) for a in asked if a.end]
        outputs.add(repr([(a.tokens, a.logprobs) for a in asked] + ends))
    assert len(outputs) == 1


# -- by hand ---------------------------------------------------------------------------------------


def plain(groups: list[KVGroup] | None = None, blocks: int = 100, **options: int) -> Driver:
    groups = groups or LAYOUTS["full"]
    return Driver(groups, [blocks] * (1 + max(g.pool for g in groups)), **options)


def ids(driver: Driver, batch: Batch) -> list[str]:
    return [r.request_id for r, _ in driver.scheduler._inflight[batch.step].rows()]


FOREVER = SamplingParams(max_tokens=40, ignore_eos=True)


def test_a_prompt_is_cut_by_the_budget_and_sampled_at_its_end() -> None:
    driver = plain(budget=20)
    driver.add(BASES[0][:45], FOREVER)
    rows = []
    for _ in range(4):
        batch = driver.scheduler.schedule()
        assert batch is not None
        rows += written_out(batch).rows
        driver._deliver(driver.scheduler.commit(driver.runner.submit(batch)))
    assert [(r.start, len(r.tokens), r.sample) for r in rows] == [
        (0, 20, False),
        (20, 20, False),
        (40, 5, True),
        (45, 1, True),
    ]


def test_running_ahead_sends_the_device_token_and_stops_at_max_tokens() -> None:
    driver = plain(depth=2)
    driver.add(BASES[0][:4], SamplingParams(max_tokens=2, ignore_eos=True))
    first, second = driver.scheduler.schedule(), driver.scheduler.schedule()
    assert first is not None and second is not None
    assert written_out(first).rows[0].tokens == BASES[0][:4]
    assert (written_out(second).rows[0].start, written_out(second).rows[0].tokens) == (
        4,
        [DEVICE_TOKEN],
    )
    assert driver.scheduler.schedule() is None, "two samples are on their way"


def test_decoding_comes_before_prompts_so_that_nobody_waits_for_a_long_one() -> None:
    driver = plain(budget=8)
    driver.add(BASES[0][:40], FOREVER)
    driver.add(BASES[1][:2], FOREVER)
    for _ in range(5):
        driver.iterate()
    driver.iterate()  # the second request's prompt comes behind the last chunk of the first
    batch = driver.scheduler.schedule()
    assert batch is not None
    assert ids(driver, batch) == ["r0", "r1"]
    driver.add(BASES[2][:40], FOREVER)
    driver._deliver(driver.scheduler.commit(driver.runner.submit(batch)))
    batch = driver.scheduler.schedule()
    assert batch is not None
    assert [
        (i, len(r.tokens)) for i, r in zip(ids(driver, batch), written_out(batch).rows, strict=True)
    ] == [
        ("r0", 1),
        ("r1", 1),
        ("r2", 6),
    ]


def first_rows(driver: Driver) -> list[str]:
    order: list[str] = []
    while not driver.scheduler.idle:
        batch = driver.scheduler.schedule()
        assert batch is not None
        order += [i for i in ids(driver, batch) if i not in order]
        driver._deliver(driver.scheduler.commit(driver.runner.submit(batch)))
    return order


@pytest.mark.parametrize(
    ("priority", "order"),
    [(False, ["r0", "r1", "r2", "r3"]), (True, ["r3", "r1", "r2", "r0"])],
)
def test_order_is_arrival_or_priority_then_arrival(priority: bool, order: list[str]) -> None:
    driver = plain(slots=1, priority=priority)
    for level in (5, 1, 1, -2):
        driver.add(BASES[0][:3], SamplingParams(max_tokens=2, ignore_eos=True), priority=level)
    assert first_rows(driver) == order


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    driver = plain(blocks=7, slots=4, caching=False)  # 6 blocks
    driver.add(BASES[0][:60], SamplingParams(max_tokens=4, ignore_eos=True))  # 4 blocks
    driver.iterate()
    driver.add(BASES[1][:40], SamplingParams(max_tokens=2, ignore_eos=True))  # 3 blocks
    driver.add(BASES[2][:10], SamplingParams(max_tokens=2, ignore_eos=True))  # 1 block
    driver.iterate()
    assert [r.request_id for r in driver.scheduler.roster.running] == ["r0"]
    assert driver.kv.usage() == (4, 6)
    driver.drain()


def test_the_last_in_order_is_preempted_and_its_tokens_stay() -> None:
    driver = plain(blocks=5, slots=2, caching=False, budget=64)  # 4 blocks
    first = driver.add(BASES[0][:30], SamplingParams(max_tokens=20, ignore_eos=True))
    second = driver.add(BASES[1][:30], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(4):
        driver.iterate()
    # 30 prompt tokens and 2 outputs fill 2 blocks each; computing the third needs another block.
    assert driver.scheduler.stats().preemptions == 1
    assert driver.scheduler.requests["r1"].state is State.WAITING
    assert (len(first.tokens), len(second.tokens)) == (4, 3)
    assert driver.scheduler.requests["r1"].num_output == 3
    driver.drain()
    assert driver.scheduler.stats().preemptions == 1


def test_nobody_is_admitted_while_a_running_request_is_short_of_blocks() -> None:
    driver = Driver(LAYOUTS["window"], [6], depth=3, budget=32, slots=2)  # 5 blocks
    driver.add(BASES[0][:90], SamplingParams(max_tokens=1))
    assert driver.schedule() and driver.schedule()
    assert driver.kv.usage() == (4, 5)  # the next 26 tokens need 2 blocks more
    driver.add(BASES[1][:4], SamplingParams(max_tokens=1))  # needs 1
    assert driver.scheduler.schedule() is None
    assert driver.kv.usage() == (4, 5)
    driver.drain()


def test_a_preempted_request_is_not_overtaken_while_its_last_step_is_in_flight() -> None:
    driver = plain(blocks=5, slots=2, caching=False, depth=2, budget=64)  # 4 blocks
    driver.add(BASES[0][:30], SamplingParams(max_tokens=10, ignore_eos=True))
    driver.add(BASES[1][:20], SamplingParams(max_tokens=20, ignore_eos=True))
    driver.add(BASES[2][:4], SamplingParams(max_tokens=2, ignore_eos=True))
    while not driver.scheduler.stats().preemptions:
        driver.iterate()
    for _ in range(3):
        # 1 block is free: too few for r1, enough for r2.
        assert driver.kv.usage() == (3, 4)
        assert [r.request_id for r in driver.scheduler.roster.running] == ["r0"]
        driver.iterate()
    driver.drain()
    assert driver.scheduler.stats().preemptions == 1


def test_a_request_with_a_row_in_the_step_is_not_preempted_by_one_before_it() -> None:
    groups = LAYOUTS["window"]
    driver = Driver(groups, [5], budget=8, slots=2, priority=True, caching=False)  # 4 blocks
    driver.add(BASES[0][:14], SamplingParams(max_tokens=30, ignore_eos=True), priority=5)
    driver.iterate()
    driver.iterate()
    driver.add(BASES[1][:90], SamplingParams(max_tokens=1))
    for _ in range(4):
        driver.iterate()
    # r1 has 28 of 90 tokens in 2 blocks and needs a third; r0 decodes in the other 2.
    assert driver.scheduler.requests["r1"].computed == 28
    assert driver.kv.usage() == (4, 4)
    batch = driver.scheduler.schedule()
    assert batch is not None and ids(driver, batch) == ["r0"]
    driver._deliver(driver.scheduler.commit(driver.runner.submit(batch)))
    driver.drain()


def test_a_request_waits_for_its_own_step_before_it_takes_blocks_of_others() -> None:
    driver = plain(blocks=5, slots=2, caching=False, depth=2, budget=64)
    driver.add(BASES[0][:30], SamplingParams(max_tokens=20, ignore_eos=True))
    driver.add(BASES[1][:30], SamplingParams(max_tokens=3, ignore_eos=True))
    driver.drain()
    assert driver.scheduler.stats().preemptions == 0, "r1 ends in the step that is in flight"


def test_equal_prompts_wait_for_the_first_and_then_share_its_blocks() -> None:
    driver = plain(budget=32)
    driver.add(BASES[0][:64], FOREVER)
    for choice in (1, 2):
        driver.add(BASES[0][:64], FOREVER, choice=choice)
    driver.iterate()
    assert [r.request_id for r in driver.scheduler.roster.running] == ["r0"]
    driver.iterate()
    driver.iterate()
    assert [r.request_id for r in driver.scheduler.roster.running] == ["r0", "r1", "r2"]
    # 64 tokens and one more to sample from: 3 blocks are found, the 4th is computed by each.
    assert [r.cached_tokens for r in driver.scheduler.roster.running] == [0, 48, 48]
    driver.drain()
    assert len({tuple(a.tokens) for a in driver.asked.values()}) == 3


def test_who_shares_little_or_nothing_does_not_wait() -> None:
    driver = plain(budget=200)
    driver.add(BASES[0][:64], FOREVER)
    driver.add(BASES[0][:33] + BASES[1][:40], FOREVER)  # two blocks: not worth a step
    driver.add(BASES[0][:64], FOREVER, tenant="another")
    driver.iterate()
    assert [r.request_id for r in driver.scheduler.roster.running] == ["r0", "r1", "r2"]


def test_nobody_waits_for_a_prompt_that_will_not_be_computed() -> None:
    driver = plain(budget=16)
    first = driver.add(BASES[0][:64], FOREVER)
    driver.add(BASES[0][:64], SamplingParams(max_tokens=2))
    driver.iterate()
    first.aborted = True
    driver.scheduler.abort(first.add.request_id)
    assert driver.scheduler.roster.sharing.computing == {}
    driver.iterate()
    assert [r.request_id for r in driver.scheduler.roster.running] == ["r1"]


def test_tenants_and_salts_do_not_share() -> None:
    driver = plain()
    for fields in ({}, {"tenant": "a"}, {"cache_salt": "a"}, {"tenant": "\ud800"}, {}):
        driver.add(BASES[0][:40], SamplingParams(max_tokens=1), **fields)
        driver.drain()
    cached = [a.end.cached_tokens for a in driver.asked.values() if a.end]
    assert cached == [0, 0, 0, 0, 32]


def test_prompt_logprobs_are_computed_even_where_the_prompt_is_cached() -> None:
    driver = plain(budget=10)
    driver.add(BASES[0][:40], SamplingParams(max_tokens=1))
    driver.drain()
    asked = driver.add(BASES[0][:40], SamplingParams(max_tokens=1, prompt_logprobs=0))
    driver.drain()
    assert len(asked.prompt_logprobs) == 39
    assert asked.end is not None and asked.end.cached_tokens == 0


def test_output_of_a_request_with_stop_strings_is_found_only_as_far_as_confirmed() -> None:
    driver = plain()
    params = SamplingParams(max_tokens=60, ignore_eos=True, stop=["x"])
    asked = driver.add(BASES[0][:8], params)
    for _ in range(50):
        driver.iterate()
    assert len(asked.tokens) == 50
    assert not driver.kv.pools[0]._index
    driver.abort("r0", 30, "stop")  # 8 + 30 tokens: 2 full blocks
    driver.drain()
    assert len(driver.kv.pools[0]._index) == 2
    assert driver.scheduler.stats().generated_tokens == 30


@pytest.mark.parametrize("end", ["abort", "deadline", "length"])
def test_without_confirmation_only_the_prompt_is_found(end: str) -> None:
    driver = plain()
    params = SamplingParams(max_tokens=40, ignore_eos=True, stop=["x"])
    driver.add(BASES[0][:24], params, timeout=9.0)
    for _ in range(30 if end != "length" else 40):
        driver.iterate()
    if end == "abort":
        driver.abort("r0")
    driver.now += 9.0
    driver.drain()
    assert len(driver.kv.pools[0]._index) == 1


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    driver = plain(slots=1)
    running = driver.add(BASES[0][:8], FOREVER, timeout=5.0)
    waiting = driver.add(BASES[0][:8], FOREVER, timeout=2.0)
    patient = driver.add(BASES[0][:8], FOREVER)
    driver.iterate()
    driver.now += 2.0
    driver.iterate()
    assert (waiting.end is not None, running.end is None) == (True, True)
    driver.now += 3.0
    driver.iterate()
    assert running.end is not None and len(running.tokens) == 2
    driver.drain()
    assert len(patient.tokens) == 40


def test_late_and_unknown_aborts_do_nothing() -> None:
    driver = plain()
    driver.add(BASES[0][:8], SamplingParams(max_tokens=1))
    driver.drain()
    driver.abort("r0")
    driver.scheduler.abort("nobody", length=3)
    assert driver.scheduler.take_finished() == []


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("commits_first", [True, False])
def test_the_request_that_makes_steps_raise_is_found_and_all_others_finish(
    depth: int, slots: int, commits_first: bool
) -> None:
    driver = plain(depth=depth, slots=slots, blocks=16)
    driver.commits_first = commits_first
    for i in range(4):
        driver.add(BASES[i % 3][: 30 + i], SamplingParams(max_tokens=9), kills=i == 2)
    driver.drain()
    reasons = [a.end.finish_reason for a in driver.asked.values() if a.end]
    assert [reason == "error" for reason in reasons] == [False, False, True, False]
    assert driver.faults <= 2, "once among others and once alone"
    assert driver.asked["r2"].end is not None
    assert driver.asked["r2"].end.error == ["step_failed", "the step raised", "", ""]


def test_a_request_alone_in_a_later_step_is_not_blamed_for_an_earlier_one() -> None:
    driver = plain(depth=2)
    driver.add(BASES[0][:8], SamplingParams(max_tokens=1))
    driver.add(BASES[1][:8], SamplingParams(max_tokens=4))
    driver.fault, driver.late = True, True
    assert driver.schedule() and driver.schedule()
    assert [batch.num_rows for batch, _ in driver.pending] == [2, 1]
    driver.drain()
    assert all(a.end and a.end.finish_reason != "error" for a in driver.asked.values())


def test_a_window_request_computed_again_still_fits_the_least_pools() -> None:
    groups = LAYOUTS["window"]
    blocks = least_blocks(groups, MODEL_LEN - 1, 7)
    driver = Driver(groups, blocks, budget=7, slots=1, caching=False)
    driver.add(BASES[0][:70], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(12):
        driver.iterate()
    driver.runner.reset()
    driver.scheduler.quarantine([], ERROR)
    driver.drain()


def test_nan_ends_one_request_and_its_blocks_are_never_found() -> None:
    driver = plain()
    driver.add(BASES[0][:40], nan=39)
    driver.add(BASES[1][:40])
    driver.drain()
    nan = driver.asked["r0"].end
    assert nan is not None and nan.error is not None and nan.error[0] == "numerical_error"
    driver.add(BASES[0][:40])
    driver.drain()
    again = driver.asked["r2"].end
    assert again is not None and again.cached_tokens == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("layout", ["full", "window", "mixed"])
@pytest.mark.parametrize("position", [0, 17, 35, 70, 79, 80, 84, 100])
def test_nan_in_any_chunk_ends_its_request_there_and_who_shares_the_prompt_computes_it(
    depth: int, layout: str, position: int
) -> None:
    prompt = BASES[0][:80]
    driver = plain(LAYOUTS[layout], depth=depth, budget=16, slots=4)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    spoilt = driver.add(prompt, params, nan=position)
    others = [driver.add(prompt, params, choice=choice) for choice in (1, 2)]
    # Several chunks, and at depth 2 one in flight, when it is known; then the others come in.
    driver.drain()
    happens = position < 80 + 8  # the last token is never computed
    assert driver.spoiled == ({0} if happens else set())
    assert spoilt.end is not None
    assert (spoilt.end.finish_reason == "error") is happens
    assert len(spoilt.tokens) == max(0, min(9, position - 79))
    assert all(other.tokens == other.ref.tokens for other in others)
    later = driver.add(prompt, params)
    driver.drain()
    assert later.tokens == later.ref.tokens and later.end is not None
    if not 80 <= position < 88:  # else the others found the prompt, and it is forgotten with r0
        assert later.end.cached_tokens == 64


@pytest.mark.parametrize("position", [5, 40])
def test_nan_after_a_preemption_in_mid_prompt_is_found_by_nobody(position: int) -> None:
    driver = plain(blocks=10, budget=16, slots=2, depth=2)  # 9 blocks
    first = driver.add(BASES[1][:16], SamplingParams(max_tokens=60, ignore_eos=True))
    driver.iterate()
    spoilt = driver.add(BASES[0][:80], SamplingParams(max_tokens=4), nan=position)
    driver.iterate()
    request = driver.scheduler.requests["r1"]
    assert request.state is State.RUNNING and request.inflight
    driver.scheduler.roster.preempt(request)
    driver.drain()
    assert spoilt.end is not None and spoilt.end.finish_reason == "error"
    assert first.tokens == first.ref.tokens
    assert driver.asked["r1"].tokens == []


def test_a_request_without_an_allowed_token_leaves_its_prompt_to_others() -> None:
    driver = plain()
    driver.add(BASES[0][:40])
    batch = driver.scheduler.schedule()
    assert batch is not None
    driver.runner.submit(batch)
    first = driver.scheduler.commit(Result(batch.step, [RowResult([])]))
    assert not first
    batch = driver.scheduler.schedule()
    assert batch is not None
    driver.runner.submit(batch)
    [delta] = driver.scheduler.commit(Result(batch.step, [RowResult([], error=FORBIDDEN_ERROR)]))
    assert delta.error is not None and delta.error[0] == "invalid_value"
    del driver.asked["r0"]
    again = driver.add(BASES[0][:40], SamplingParams(max_tokens=1))
    driver.drain()
    assert again.end is not None and again.end.cached_tokens == 32


# -- gates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gated_rows_run_ahead_with_their_forward_pass_and_wait_for_their_mask(depth: int) -> None:
    driver = plain(depth=depth)
    gate = Alternating()
    gated = driver.add(BASES[0][:20], FOREVER, gate=gate)
    free = driver.add(BASES[1][:9], FOREVER)
    ahead = 0
    while not driver.scheduler.idle:
        driver.iterate()
        ahead += len(driver.pending) > 0
    assert gated.tokens == gated.ref.tokens and free.tokens == free.ref.tokens
    assert all(a % 2 != b % 2 for a, b in zip(gated.tokens, gated.tokens[1:], strict=False))
    assert gate.asked == 40
    assert (ahead >= 38) is (depth > 1), "a step is in flight while the one before is committed"


def test_steps_without_gated_rows_do_not_wait() -> None:
    driver = plain(depth=2)
    driver.add(BASES[0][:20], SamplingParams(max_tokens=2, ignore_eos=True), gate=Alternating())
    driver.add(BASES[1][:9], FOREVER)
    batch = driver.scheduler.schedule()
    assert batch is not None and [row.gated for row in batch.rows] == [True, False]
    assert driver.scheduler.is_gated(batch.step)
    masks = driver.scheduler.masks(batch.step)
    assert masks == {0: mask_of(range(0, VOCAB, 2), VOCAB)}, "nothing before it is in flight"
    assert not driver.scheduler.is_gated(batch.step)
    second = driver.scheduler.schedule()
    assert second is not None and [row.gated for row in written_out(second).rows] == [False, True]
    assert driver.scheduler.masks(second.step) is None, "its token is not known"
    held = driver.runner.submit(batch)
    assert isinstance(held, Held)
    driver._deliver(driver.scheduler.commit(held.open(masks)))
    assert driver.scheduler.masks(second.step) == {1: mask_of(range(1, VOCAB, 2), VOCAB)}
    third = driver.scheduler.schedule()  # the gated request has all its tokens under way
    assert third is not None and [row.gated for row in written_out(third).rows] == [False]
    assert driver.scheduler.masks(third.step) == {}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_gate_that_raises_fails_its_request_alone(depth: int) -> None:
    driver = plain(depth=depth)
    broken = driver.add(BASES[0][:20], FOREVER, gate=Alternating(raises_at=3))
    others = [driver.add(BASES[1][:20], FOREVER, gate=Alternating()), driver.add([3], FOREVER)]
    driver.drain()
    assert broken.end is not None and broken.end.error is not None
    assert broken.end.error[0] == "gate_failed" and "no such state" in broken.end.error[2]
    assert broken.tokens == broken.ref.tokens[:3]
    assert all(other.tokens == other.ref.tokens for other in others)


def test_a_mask_of_another_size_is_a_gate_that_fails() -> None:
    class Short:
        def allowed(self, output: list[int]) -> bytes:
            return b""

    driver = plain()
    asked = driver.add([3, 4], FOREVER)
    driver.scheduler.abort("r0")
    driver.scheduler.add(asked.add, gate=Short())
    batch = driver.scheduler.schedule()
    assert batch is not None and driver.scheduler.masks(batch.step) == {}
    failed = driver.scheduler.take_finished()[-1]
    assert failed.error is not None and "0 bytes, where 4" in failed.error[2]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([], "empty_prompt"),
        ([3] * MODEL_LEN, "context_length_exceeded"),
        ([3, VOCAB], "invalid_token"),
        ([-1, 3], "invalid_token"),
        ([2**63], "invalid_token"),
    ],
)
def test_prompts_that_cannot_run_are_refused(prompt: list[int], code: str) -> None:
    driver = plain()
    with pytest.raises(UsageError) as caught:
        driver.add(prompt)
    assert caught.value.code == code
    assert driver.scheduler.idle and driver.scheduler.schedule() is None


def test_the_longest_prompt_gives_one_token() -> None:
    driver = plain()
    asked = driver.add([3] * (MODEL_LEN - 1), SamplingParams(max_tokens=None, ignore_eos=True))
    driver.drain()
    assert len(asked.tokens) == 1 and asked.end and asked.end.finish_reason == "length"


def test_token_ids_of_options_outside_the_vocabulary_are_refused() -> None:
    driver = plain()
    with pytest.raises(UsageError, match="stop_token_ids"):
        driver.add([3], SamplingParams(stop_token_ids=[VOCAB]))
    add = Add("x", [3], SamplingParams(), seed=0, bad_words=[[3], [4, VOCAB]])
    with pytest.raises(UsageError, match="bad_words"):
        driver.scheduler.add(add)


def test_bad_words_that_no_slot_holds_are_refused() -> None:
    for words in ([[3]] * (MAX_WORDS + 1), [[3] * (MAX_WORD_TOKENS + 1)]):
        with pytest.raises(UsageError, match="bad_words"):
            plain().scheduler.add(Add("x", [3], SamplingParams(), seed=0, bad_words=words))


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("-inf")])
def test_timeouts_that_are_no_time_are_refused(timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        plain().add([3], timeout=timeout)


def test_aborting_all_that_waits_takes_time_in_proportion_and_leaves_the_queue_right() -> None:
    driver = plain(slots=1)
    count, scheduler = 4000, driver.scheduler
    for i in range(count):
        scheduler.add(Add(str(i), [3], FOREVER, seed=0), bounded=False)
    assert scheduler.stats().waiting == count
    start = time.process_time()
    for i in range(count - 2):
        scheduler.abort(str(i))
    assert time.process_time() - start < 1
    assert scheduler.stats().waiting == 2 and len(scheduler.roster.waiting) < 100
    scheduler.check_integrity()
    batch = scheduler.schedule()
    assert batch is not None and ids(driver, batch) == [str(count - 2)]
    assert (scheduler.stats().waiting, scheduler.stats().running) == (1, 1)


def test_a_running_request_id_is_refused_and_free_again_after_its_end() -> None:
    driver = plain()
    add = driver.add([3]).add
    with pytest.raises(UsageError) as caught:
        driver.scheduler.add(add)
    assert caught.value.code == "duplicate_request"
    driver.drain()
    driver.scheduler.add(add)


@pytest.mark.parametrize(("blocks", "fits"), [(5, False), (6, True)])
def test_a_request_that_can_never_fit_is_refused_and_the_least_that_fits_runs(
    blocks: int, fits: bool
) -> None:
    # 50 prompt tokens and 31 of output, the last never computed: 80 tokens, 5 blocks.
    driver = plain(blocks=blocks, slots=1)
    params = SamplingParams(max_tokens=31, ignore_eos=True)
    if fits:
        driver.add(BASES[0][:50], params)
        driver.drain()
    else:
        with pytest.raises(UsageError) as caught:
            driver.add(BASES[0][:50], params)
        assert caught.value.code == "prompt_too_large"
        assert "50 tokens with 31 tokens of output" in caught.value.what
        assert f"{blocks - 1} blocks" in caught.value.what


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_alone_in_the_least_pools_a_request_runs_without_preemption(
    layout: str, depth: int, budget: int
) -> None:
    groups = LAYOUTS[layout]
    driver = Driver(groups, least_blocks(groups, MODEL_LEN - 1, budget), depth, budget, slots=2)
    driver.add(BASES[0][:50], SamplingParams(max_tokens=None, ignore_eos=True))
    driver.drain()
    assert driver.scheduler.stats().preemptions == 0


def test_the_queue_is_bounded() -> None:
    driver = plain(slots=2, max_queue=3)
    for _ in range(5):
        driver.add([3], FOREVER)
    with pytest.raises(Overloaded) as caught:
        driver.add([3], FOREVER)
    assert caught.value.code == "queue_full"
    driver.iterate()  # two run, three wait
    with pytest.raises(Overloaded):
        driver.add([3], FOREVER)
    driver.abort("r4")
    driver.add([3], FOREVER)
    driver.drain()


def test_results_must_match_their_batch() -> None:
    driver = plain()
    driver.add([3], FOREVER)
    batch = driver.scheduler.schedule()
    assert batch is not None
    with pytest.raises(ValueError):
        driver.scheduler.commit(Result(batch.step, [RowResult([1]), RowResult([1])]))
