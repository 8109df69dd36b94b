"""A runner whose model is a hash, which proves KV bookkeeping by content.

Every cell of the cache (pool, block, offset) holds what was last written there. Computing a token
writes a value determined by the whole prefix, and then reads back, through the slot's block table,
every position that attention would read: all of them in a full group, the window in a window
group. Tokens that are cached and computed again write nothing. A block that is stale, evicted,
never written, shared wrongly or given to two owners holds another value, and the step raises
AssertionError. The order of step.py is followed literally: leave, enter, rows; all rows of a step
write before any of them reads, as on a device.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import lcm

import msgspec

from quire.kv import NULL_BLOCK
from quire.kv.groups import KVGroup
from quire.params import SamplingParams
from quire.step import (
    DEVICE_TOKEN,
    NAN_ERROR,
    Batch,
    Enter,
    Result,
    Row,
    RowResult,
    TokenLogprobs,
    draft_tokens,
    mask_of,
    sure_tokens,
    written_out,
)

VOCAB = 12
EOS = (0, 1)
POISON = -1  # what a new owner of a block may have written anywhere in it

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Batch)


class StepFailed(Exception):
    """The step gave nothing, and what it should have written is poison."""


# -- the model ---------------------------------------------------------------------------------


def prefix_hashes(label: int, tokens: Sequence[int]) -> list[int]:
    """The hash of each prefix. `label` stands for what must not be shared: tenant and salt."""
    hashes, value = [], label
    for token in tokens:
        value = hash((value, token))  # ints only, so equal in every process
        hashes.append(value)
    return hashes


def choose(prefix: int, seed: int, choice: int, position: int, banned: frozenset[int]) -> int:
    """The token sampled at `position` after the prefix with this hash."""
    attempt = 0
    while True:
        token = hash((prefix, seed, choice, position, attempt)) % VOCAB
        if token not in banned:
            return token
        attempt += 1


def alternating(output: Sequence[int]) -> frozenset[int]:
    """The tokens that a toy gate allows: odd after even, even after odd and at the beginning."""
    parity = 1 - output[-1] % 2 if output else 0
    return frozenset(t for t in range(VOCAB) if t % 2 == parity)


def logprobs_of(prefix: int, token: int) -> TokenLogprobs:
    return TokenLogprobs([token], [-float(hash((prefix, token)) % 1000)], [1])


def label_of(tenant: int, salt: int) -> int:
    return 1000 + 10 * tenant + salt


@dataclass
class Reference:
    """What a request must give, computed without an engine."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str
    stop_reason: int | None
    prompt_logprobs: list[TokenLogprobs]
    beyond: list[int]  # what would be sampled after the end


def reference(
    prompt: list[int],
    params: SamplingParams,
    seed: int,
    choice: int,
    label: int,
    max_model_len: int,
    beyond: int = 40,
    gated: bool = False,
) -> Reference:
    room = max_model_len - len(prompt)
    limit = room if params.max_tokens is None else min(params.max_tokens, room)
    stops = frozenset(params.stop_token_ids or ())
    ends = stops if params.ignore_eos else stops | frozenset(EOS)
    hashes = prefix_hashes(label, prompt)
    ref = Reference([], [], "", None, [], [])
    ref.prompt_logprobs = [logprobs_of(hashes[i - 1], prompt[i]) for i in range(1, len(prompt))]
    value, output = hashes[-1], ref.tokens
    while len(ref.beyond) < beyond:
        done = len(ref.tokens) + len(ref.beyond)
        banned = ends if done < params.min_tokens else frozenset()
        if gated:
            banned |= frozenset(range(VOCAB)) - alternating(ref.tokens + ref.beyond)
        token = choose(value, seed, choice, len(prompt) + done, banned)
        output.append(token)
        if not ref.finish_reason:
            ref.logprobs.append(logprobs_of(value, token))
            if token in ends and len(output) >= params.min_tokens:
                ref.finish_reason = "stop"
                ref.stop_reason = token if token in stops else None
            elif len(output) == limit:
                ref.finish_reason = "length"
            if ref.finish_reason:
                output = ref.beyond
        value = hash((value, token))
    return ref


# -- the runner --------------------------------------------------------------------------------


class Held:
    """A step with gated rows that has not sampled."""

    def __init__(self, open: Callable[[dict[int, bytes]], Result]):
        self.open = open


@dataclass
class Slot:
    enter: Enter
    tokens: list[int]
    hashes: list[int]
    tables: list[list[int]]
    next_start: int | None = None
    last_sampled: int | None = None
    broken: bool = False
    drafted: list[int] = field(default_factory=list)  # hashes of the prefixes with drafts

    @property
    def label(self) -> int:
        return label_of(*self.enter.bad_words[0])

    def hash_at(self, position: int) -> int:
        known = len(self.hashes)
        return self.hashes[position] if position < known else self.drafted[position - known]


def _packed(batch: Batch, results: list[RowResult]) -> Result:
    """Tokens alone, where that is all there is, as a GPU runner gives them."""
    tokens = [token for got in results for token in got.tokens]
    alone = [RowResult([token]) for token in tokens]
    if results == alone and batch.num_tokens == len(results):
        return Result(batch.step, [], tokens)
    return Result(batch.step, results)


class MockRunner:
    """`fails(batch)` true makes that step raise; `nan(slot, row)` true makes what the row writes
    poison, and it and all later rows of the slot an error, whether they sample or not. `wrong`:
    how often a proposed draft is not what will be chosen.

    What makes a request's label travels as its first bad word, which the scheduler must pass on.
    `recomputed`: so many tokens before a hit must be computed again; windows reach as much further.
    """

    def __init__(
        self,
        groups: Sequence[KVGroup],
        pool_blocks: Sequence[int],
        num_slots: int,
        fails: Callable[[Batch, list[Slot]], bool] = lambda batch, slots: False,
        nan: Callable[[Slot, Row], bool] = lambda slot, row: False,
        wrong: float = 0.0,
        recomputed: int = 0,
    ):
        self.groups, self.recomputed = groups, recomputed
        self.hit_tokens = lcm(*(group.block_size for group in groups))
        sizes = {group.pool: group.block_size for group in groups}
        self.pages: list[list[list[object]]] = [
            [[None] * sizes[pool] for _ in range(n)] for pool, n in enumerate(pool_blocks)
        ]
        self.num_slots = num_slots
        self.slots: dict[int, Slot] = {}
        self.fails, self.nan = fails, nan
        self.wrong, self.numbers = wrong, random.Random(0)
        self.last_step = 0
        self.held: Held | None = None
        self.tokens_computed = 0
        self.rows_run = 0

    def reset(self) -> None:
        """Drop all slots, as after a step that raised."""
        self.held = None
        self.slots.clear()

    def submit(self, batch: Batch) -> Result | Held:
        """Compute a step; where a row is gated, sampling is held. Raises StepFailed on request,
        AssertionError for wrong bookkeeping."""
        batch = written_out(_decoder.decode(_encoder.encode(batch)))
        assert batch.step > self.last_step, "steps run in order"
        self.last_step = batch.step
        assert batch.rows, "an empty step"
        assert self.held is None, "a step before has not sampled"
        for slot in batch.leave:
            assert slot in self.slots, f"slot {slot} left but nobody is in it"
            del self.slots[slot]
        for enter in batch.enter:
            self._enter(enter)
        slots = [self.slots[row.slot] for row in batch.rows]
        assert len({row.slot for row in batch.rows}) == len(batch.rows), "two rows of one slot"
        failed = self.fails(batch, slots)
        for slot, row in zip(slots, batch.rows, strict=True):
            self._write(slot, row, poison=failed or self.nan(slot, row))
        if failed:
            raise StepFailed(f"step {batch.step}")
        for slot, row in zip(slots, batch.rows, strict=True):
            if not slot.broken:
                self._read(slot, row)
        both = list(zip(slots, batch.rows, strict=True))
        if not any(row.gated for row in batch.rows):
            return _packed(batch, [self._result(*each) for each in both])

        def open(masks: dict[int, bytes]) -> Result:
            assert self.held is held, "opened twice, or too late"
            assert set(masks) <= {i for i, row in enumerate(batch.rows) if row.gated}
            self.held = None
            return _packed(
                batch, [self._result(*each, masks.get(i)) for i, each in enumerate(both)]
            )

        self.held = held = Held(open)
        return held

    def _enter(self, enter: Enter) -> None:
        assert 0 <= enter.slot < self.num_slots
        assert enter.slot not in self.slots, f"slot {enter.slot} entered twice"
        assert 0 < enter.num_prompt <= len(enter.tokens)
        assert len(enter.blocks) == len(self.groups)
        slot = Slot(enter, list(enter.tokens), [], [list(b) for b in enter.blocks])
        slot.hashes = prefix_hashes(slot.label, slot.tokens)
        self.slots[enter.slot] = slot

    def _write(self, slot: Slot, row: Row, poison: bool) -> None:
        start, end = row.start, row.start + len(row.tokens)
        assert row.tokens, "an empty row"
        fresh: list[tuple[int, int]] = []
        if slot.next_start is None:
            # Blocks behind a hit are new to this request; those before were found.
            hit = slot.enter.cached
            assert hit % self.hit_tokens == 0, "a hit ends where blocks of all groups do"
            assert hit < len(slot.tokens), "a hit must leave a token to compute"
            assert start == max(0, hit - self.recomputed), "what makes the state whole"
            for g, table in enumerate(slot.tables):
                fresh += [(g, block) for block in table[hit // self.groups[g].block_size :]]
        else:
            assert start == slot.next_start, "tokens computed twice or left out"
        for g, new in enumerate(row.new_blocks):
            slot.tables[g] += new
            fresh += [(g, block) for block in new]
        for g, block in fresh:
            assert block != NULL_BLOCK, "the null block given out"
            self.pages[self.groups[g].pool][block] = [POISON] * self.groups[g].block_size
        drafts = draft_tokens(row)
        for position, token in enumerate(() if slot.broken else sure_tokens(row), start):
            if token == DEVICE_TOKEN:
                assert slot.last_sampled is not None, "no token was sampled in this slot"
                assert position == len(slot.tokens) - 1, "the device token is not the last"
                token = slot.last_sampled
            assert token == slot.tokens[position], "the host sent another token"
        slot.next_start = end - row.drafts
        slot.drafted = []
        if drafts and not slot.broken:
            assert row.sample and not row.gated, "drafts where nothing is sampled"
            assert start + len(sure_tokens(row)) == len(slot.tokens), (
                "drafts after an unknown token"
            )
            slot.drafted = prefix_hashes(slot.hashes[-1], drafts)
        slot.broken |= poison
        for g, group in enumerate(self.groups):
            table, size = slot.tables[g], group.block_size
            assert len(table) * size >= end, "tokens without a block"
            for position in range(max(start, slot.enter.cached), end):
                block = table[position // size]
                assert block != NULL_BLOCK, "a write to the null block"
                value = POISON if slot.broken else (g, slot.hash_at(position))
                self.pages[group.pool][block][position % size] = value
        self.tokens_computed += len(row.tokens)
        self.rows_run += 1

    def _read(self, slot: Slot, row: Row) -> None:
        for g, group in enumerate(self.groups):
            size, first = group.block_size, 0
            if group.window is not None:
                first = max(0, row.start - (group.window - self.recomputed) + 1)
            for position in range(first, row.start + len(row.tokens)):
                block = slot.tables[g][position // size]
                found = self.pages[group.pool][block][position % size]
                assert found == (g, slot.hash_at(position)), (
                    f"slot {row.slot} group {g} position {position} block {block}: {found}"
                )

    def _result(self, slot: Slot, row: Row, mask: bytes | None = None) -> RowResult:
        if slot.broken:
            return RowResult([], error=NAN_ERROR)
        result = RowResult([])
        end = row.start + len(sure_tokens(row))
        if row.prompt_logprobs:
            result.prompt_logprobs = [
                logprobs_of(slot.hashes[p - 1], slot.tokens[p])
                for p in range(row.start + 1, min(end, slot.enter.num_prompt - 1) + 1)
            ]
        assert row.sample or not row.gated
        if row.gated and mask is None:
            return result
        if row.sample:
            assert end == len(slot.tokens), "sampling from a token that is not the last"
            self._sample(slot, mask, result)
            for draft in draft_tokens(row):
                if slot.last_sampled != draft:
                    break
                slot.next_start = len(slot.tokens)
                self._sample(slot, mask, result)
            result.drafts = self._propose(slot, row.propose)
        return result

    def _propose(self, slot: Slot, count: int) -> list[int]:
        """Drafts behind the slot's tokens. What a drafter writes from the last of these on is
        poison for who reads it before the next row has written there."""
        first, drafts = len(slot.tokens) - 1, list[int]()
        prefix, enter = slot.hashes[-1], slot.enter
        for i in range(count):
            for g, group in enumerate(self.groups):
                size = group.block_size
                block = slot.tables[g][(first + i) // size]
                assert block != NULL_BLOCK, "a draft written to the null block"
                self.pages[group.pool][block][(first + i) % size] = POISON
            token = choose(prefix, enter.seed, enter.choice, first + 1 + i, frozenset())
            if self.numbers.random() < self.wrong:
                token = self.numbers.randrange(VOCAB)
            drafts.append(token)
            prefix = hash((prefix, token))
        return drafts

    def _sample(self, slot: Slot, mask: bytes | None, result: RowResult) -> None:
        params, done = slot.enter.params, len(slot.tokens) - slot.enter.num_prompt
        banned = frozenset(slot.enter.end_tokens if done < params.min_tokens else ())
        if mask is not None:
            assert mask == mask_of(alternating(slot.tokens[slot.enter.num_prompt :]), VOCAB)
            bits = int.from_bytes(mask, "little")
            banned |= frozenset(t for t in range(VOCAB) if not bits >> t & 1)
        prefix = slot.hashes[-1]
        token = choose(prefix, slot.enter.seed, slot.enter.choice, len(slot.tokens), banned)
        slot.last_sampled = token
        slot.tokens.append(token)
        slot.hashes.append(hash((prefix, token)))
        result.tokens.append(token)
        if params.logprobs is not None:
            result.logprobs = [*(result.logprobs or []), logprobs_of(prefix, token)]
