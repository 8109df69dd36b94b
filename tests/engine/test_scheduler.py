"""Scheduler and KVManager drive a runner that checks every byte of KV: outputs equal a reference
computed without an engine, whatever arrives, ends, is preempted, is found in the cache or raises.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mock_runner import (
    EOS,
    VOCAB,
    MockRunner,
    Reference,
    Slot,
    StepFailed,
    label_of,
    prefix_hashes,
    reference,
)

from quire.engine.request import State
from quire.engine.scheduler import Limits, Scheduler
from quire.engine.wire import Add, Delta
from quire.errors import Overloaded, QuireError, UsageError
from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup
from quire.kv.identity import BlockIdentity
from quire.kv.manager import KVManager
from quire.params import SamplingParams
from quire.step import DEVICE_TOKEN, Batch, Result, Row, RowResult

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
}


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
    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    end: Delta | None = None

    @property
    def visible(self) -> list[int]:
        return self.tokens if self.abort_length is None else self.tokens[: self.abort_length]


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
    ):
        self.now, self.depth, self.rng = 100.0, depth, rng or random.Random(0)
        self.kv = KVManager(groups, pool_blocks, BlockIdentity(b"test"), caching)
        limits = Limits(slots, budget, MODEL_LEN, VOCAB, EOS, priority, max_queue)
        self.scheduler = Scheduler(limits, self.kv, clock=lambda: self.now)
        self.runner = MockRunner(groups, pool_blocks, slots, self._fails, self._nan)
        self.pending: deque[tuple[Batch, Result | None]] = deque()
        self.asked: dict[str, Asked] = {}
        self.found: list[tuple[int, str, int]] = []  # stop strings on their way to the engine
        self.killers: set[int] = set()  # seeds of requests whose sampling step raises
        self.nans: set[int] = set()
        self.fault = False  # the next step raises, whoever is in it
        self.late = False  # it does so only when its result is asked for
        self.iterations = 0
        self.schedules = 0

    # -- faults ----------------------------------------------------------------------------------

    def _fails(self, batch: Batch, slots: list[Slot]) -> bool:
        fault, self.fault = self.fault, False
        if fault and len(batch.rows) == 1:
            self._by_seed(slots[0].enter.seed).may_fail = True
        return fault or any(
            row.sample and slot.enter.seed in self.killers
            for slot, row in zip(slots, batch.rows, strict=True)
        )

    def _nan(self, slot: Slot, row: Row) -> bool:
        return slot.enter.seed in self.nans

    def _by_seed(self, seed: int) -> Asked:
        return next(a for a in self.asked.values() if a.add.seed == seed)

    # -- frontends -------------------------------------------------------------------------------

    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        stop_length: int | None = None,
        timeout: float | None = None,
        kills: bool = False,
        nan: bool = False,
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
        self.scheduler.add(add)
        ref = reference(prompt, params, seed, choice, label, MODEL_LEN)
        deadline = None if timeout is None else self.now + timeout
        asked = Asked(add, label, ref, deadline, stop_length, may_fail=kills or nan)
        self.asked[add.request_id] = asked
        if kills:
            self.killers.add(seed)
        if nan:
            self.nans.add(seed)
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
            assert asked.add.seed not in self.killers | self.nans
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
        while len(self.pending) < self.depth and not stalled:
            stalled = not self.schedule()
        if self.pending:
            self.commit()
        else:
            assert not self.scheduler.requests, "requests, nothing in flight and nothing scheduled"

    def schedule(self) -> bool:
        batch = self.scheduler.schedule()
        self.check()
        if batch is None:
            return False
        self.schedules += 1
        assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
        failed_before = any(result is None for _, result in self.pending)
        result = None
        if not failed_before:
            try:
                result = self.runner.submit(batch)
            except StepFailed:
                if not self.late:
                    self.pending.append((batch, None))
                    while self.pending[0][1] is not None:
                        self.commit()
                    self.commit()
                    return True
        self.pending.append((batch, result))
        return True

    def commit(self) -> None:
        batch, result = self.pending.popleft()
        if result is None:
            self.runner.reset()
            steps = [batch.step, *(b.step for b, _ in self.pending)]
            self.pending.clear()
            self.scheduler.quarantine(steps, ERROR)
            self._deliver(self.scheduler.take_finished())
        else:
            self._deliver(self.scheduler.commit(result))
        self.check()

    def check(self) -> None:
        self.scheduler.check_integrity()

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
            tokens = asked.add.prompt_token_ids + (
                asked.visible if asked.add.params.stop else asked.tokens
            )
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
            for i in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
                parent = self.kv.identity.block(parent, tokens[i : i + BLOCK_SIZE])
                chain.append((parent, (group.index, hashes[i : i + BLOCK_SIZE])))
        return chain


# -- anything may happen ---------------------------------------------------------------------------

BASES = [[random.Random(b).randrange(2, VOCAB) for _ in range(MODEL_LEN)] for b in range(3)]


def random_driver(rng: random.Random) -> Driver:
    groups = LAYOUTS[rng.choice(list(LAYOUTS))]
    budget = rng.choice([1, 5, 16, 33, 64])
    slots = rng.choice([1, 2, 3, 6])
    slack = rng.choice([0, 0, 1, 3, 10, 60])
    blocks = [n + slack for n in least_blocks(groups, MODEL_LEN, budget)]
    return Driver(
        groups,
        blocks,
        depth=rng.choice([1, 2, 2, 3]),
        budget=budget,
        slots=slots,
        caching=rng.random() < 0.8,
        priority=rng.random() < 0.3,
        rng=rng,
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
    kills, nan = rng.random() < 0.04, rng.random() < 0.04
    leader = ""
    for choice in range(rng.choice([1, 1, 1, 3])):
        asked = driver.add(
            prompt,
            params,
            stop_length=rng.randrange(1, 20) if has_stop else None,
            timeout=timeout,
            kills=kills,
            nan=nan,
            choice=choice,
            leader=leader,
            **fields,
        )
        leader = leader or asked.add.request_id


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
    elif dice < 0.6 and len(driver.pending) < driver.depth:
        driver.schedule()
    else:
        driver.iterate()


def run_random(seed: int, operations: int) -> Driver:
    rng = random.Random(seed)
    driver = random_driver(rng)
    for _ in range(operations):
        random_operation(driver, rng)
    driver.drain()
    return driver
