"""Drafts in the scheduler: whoever makes them, and however wrong they are, outputs stay those of
the reference, no KV of a refused draft is ever read or found, and what is counted is right.
"""

from __future__ import annotations

import random

import pytest
from mock_runner import EOS, VOCAB, choose, prefix_hashes
from test_scheduler import BASES, LAYOUTS, MODEL_LEN, Driver, least_blocks, plain, run_random

from quire.engine.drafting import Drafting
from quire.params import SamplingParams
from quire.speculative.proposer import Drafter, RunnerProposer

FOREVER = SamplingParams(max_tokens=40, ignore_eos=True)


class Guessing:
    """Proposes what the mock's model will choose, for requests whose seeds are their numbers, and
    spoils each token with probability `wrong`."""

    def __init__(self, wrong: float = 0.0, seed: int = 0):
        self.wrong, self.numbers, self.made = wrong, random.Random(seed), 0

    def drafter(self) -> Drafter:
        self.made += 1
        return Guesser(self, self.made - 1)


class Guesser:
    def __init__(self, proposer: Guessing, seed: int):
        self.proposer, self.seed = proposer, seed

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """Of label 1000 and choice 0, without min_tokens: for all others it is wrong by itself."""
        drafts: list[int] = []
        prefix = prefix_hashes(1000, tokens)[-1]
        for i in range(count):
            token = choose(prefix, self.seed, 0, len(tokens) + i, frozenset())
            if self.proposer.numbers.random() < self.proposer.wrong:
                token = self.proposer.numbers.randrange(VOCAB)
            drafts.append(token)
            prefix = hash((prefix, token))
        return drafts


def drafting(wrong: float = 0.0, most: int = 4, max_sampled: int = 64) -> Drafting:
    return Drafting(Guessing(wrong), most, max_sampled)


def returned(most: int = 4, max_sampled: int = 64) -> Drafting:
    """A drafter on the runner."""
    return Drafting(RunnerProposer(), most, max_sampled, ahead=most)


@pytest.mark.parametrize("seed", range(12))
def test_random_life_with_drafts_gives_reference_outputs_and_leaks_nothing(seed: int) -> None:
    """Chunks, preemption, aborts, stops, gates, faults, NaN, any depth; drafts right or wrong."""
    run_random(seed, 120, drafting(wrong=[0.0, 0.1, 0.5, 1.0][seed % 4], most=1 + seed % 7))


@pytest.mark.parametrize("seed", range(12))
def test_random_life_with_a_drafter_on_the_runner(seed: int) -> None:
    """It writes behind each row that samples, where nobody must read."""
    run_random(seed, 120, returned(most=1 + seed % 7), wrong=[0.0, 0.1, 0.5, 1.0][seed % 4])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12, 412))
def test_random_life_with_drafts_gives_reference_outputs_and_leaks_nothing_full(seed: int) -> None:
    wrong, most = [0.0, 0.1, 0.5, 1.0][seed % 4], 1 + seed % 7
    run_random(seed, 200, drafting(wrong, most))
    run_random(seed, 200, returned(most), wrong)


def test_random_lives_with_drafts_reach_what_they_are_meant_to_reach() -> None:
    seen = dict.fromkeys(["preempted", "hit", "rows", "accepted", "refused", "error", "stop"], 0)
    for seed in range(8):
        driver = run_random(seed, 120, drafting(wrong=0.2))
        stats = driver.scheduler.stats()
        seen["preempted"] += stats.preemptions
        seen["hit"] += stats.prefix_hit_tokens
        seen["rows"] += stats.draft_rows
        seen["accepted"] += sum(stats.accepted_at)
        seen["refused"] += stats.draft_tokens - sum(stats.accepted_at)
        for asked in driver.asked.values():
            assert asked.end is not None
            seen["error"] += asked.end.finish_reason == "error"
            seen["stop"] += asked.end.finish_reason == "stop"
    assert min(seen.values()) > 3, seen


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("depth", [1, 2])
def test_in_the_least_pools_a_request_runs_with_drafts_and_without_preemption(
    layout: str, depth: int
) -> None:
    groups = LAYOUTS[layout]
    for wrong, made in [(w, drafting(w)) for w in (0.0, 0.5, 1.0)] + [(0.2, returned())]:
        blocks = least_blocks(groups, MODEL_LEN, 16 + made.ahead)
        driver = Driver(groups, blocks, depth, 16, slots=1, drafting=made, wrong=wrong)
        driver.add(BASES[0][:50], SamplingParams(max_tokens=None, ignore_eos=True))
        driver.drain()
        assert driver.scheduler.stats().preemptions == 0


@pytest.mark.parametrize(("wrong", "steps"), [(0.0, 8), (1.0, 40)])
def test_right_drafts_save_steps_and_wrong_ones_cost_none(wrong: float, steps: int) -> None:
    driver = plain(drafting=Drafting(Always(wrong), 4, 64))  # type: ignore[arg-type]
    driver.add(BASES[0][:20], FOREVER)
    driver.drain()
    stats = driver.scheduler.stats()
    assert stats.steps == steps + (wrong == 0.0)  # the first token comes with the prompt
    if wrong:
        # 36 rows of 4, then of 3, 2 and 1: the last token needs none.
        assert (stats.draft_rows, stats.accepted_at) == (38, [0, 0, 0, 0])
        assert stats.draft_tokens == 35 * 4 + 3 + 2 + 1
    else:
        # 7 rows of 4, and one of 3: 39 tokens behind the first.
        assert (stats.draft_rows, stats.draft_tokens) == (8, 31)
        assert stats.accepted_at == [8, 8, 8, 7]


class Always(Guessing):
    """Right, or wrong by one in every token."""

    def drafter(self) -> Drafter:
        guesser = super().drafter()
        if not self.wrong:
            return guesser
        wrong, self.wrong = self.wrong, 0.0
        assert wrong == 1.0
        return Off(guesser)


class Off:
    def __init__(self, guesser: Drafter):
        self.guesser = guesser

    def propose(self, tokens: list[int], count: int) -> list[int]:
        return [(token + 1) % VOCAB for token in self.guesser.propose(tokens, count)]


def test_a_stop_token_among_accepted_drafts_ends_the_request_there() -> None:
    for seed in range(30):
        driver = plain(drafting=drafting())
        for _ in range(seed):  # another noise
            driver.asked[f"unused {len(driver.asked)}"] = None  # type: ignore[assignment]
        made = driver.scheduler._drafting
        assert made is not None
        made._proposer.made = seed  # type: ignore[attr-defined]
        asked = driver.add(BASES[0][:20], SamplingParams(max_tokens=30, stop_token_ids=[5]))
        driver.asked = {asked.add.request_id: asked}
        driver.drain()  # which compares tokens, reason, usage and what can be found
        assert asked.tokens[-1] in (5, *EOS) or len(asked.tokens) == 30


def test_drafts_leave_every_decoding_row_its_token_and_prompts_half_of_the_rest() -> None:
    driver = plain(budget=12, slots=4, drafting=drafting(most=8))
    for i in range(3):
        driver.add(BASES[i][:3], FOREVER)
    driver.iterate()  # three prompts of three tokens
    driver.add(BASES[0][:60], FOREVER)
    batch = driver.scheduler.schedule()
    assert batch is not None
    # Nine of the budget are left: four for drafts, which the first row takes, five for the prompt.
    assert [(len(row.tokens), row.drafts) for row in batch.rows] == [(5, 4), (1, 0), (1, 0), (5, 0)]


def test_no_more_rows_are_sampled_than_the_runner_has_room_for() -> None:
    driver = plain(slots=4, drafting=drafting(most=8, max_sampled=6))
    for i in range(3):
        driver.add(BASES[i][:3], FOREVER)
    driver.iterate()
    batch = driver.scheduler.schedule()
    assert batch is not None
    assert sum(1 + row.drafts for row in batch.rows) == 6


def test_nobody_is_preempted_for_a_draft() -> None:
    """The second request needs the only block that is free for its token, the first for drafts."""
    driver = plain(blocks=6, slots=2, budget=64, drafting=drafting())
    for i, length in enumerate((30, 32)):
        driver.add(BASES[i][:length], SamplingParams(max_tokens=30, ignore_eos=True))
    driver.iterate()
    assert driver.kv.available() == 1
    batch = driver.scheduler.schedule()
    assert batch is not None
    assert [(row.drafts, len(row.new_blocks[0])) for row in batch.rows] == [(1, 0), (0, 1)]
    assert driver.scheduler.stats().preemptions == 0


def test_what_the_runner_drafts_is_the_next_rows_and_has_blocks_in_time() -> None:
    driver = plain(drafting=returned())
    driver.add(BASES[0][:14], FOREVER)
    batch = driver.scheduler.schedule()
    assert batch is not None
    [row] = batch.rows
    assert (len(row.tokens), row.drafts, row.propose) == (14, 0, 4)
    assert len(batch.enter[0].blocks[0]) == 2  # for 14 tokens and 4 behind them
    driver.pending.append((batch, driver.runner.submit(batch)))
    driver.commit()
    again = driver.scheduler.schedule()
    assert again is not None and (again.rows[0].drafts, again.rows[0].propose) == (4, 4)
    driver.pending.append((again, driver.runner.submit(again)))
    driver.drain()
    # 39 tokens behind the first: seven rows of four drafts, all right, and one of three.
    assert driver.scheduler.stats().accepted_at == [8, 8, 8, 7]


def test_a_request_with_drafts_waits_for_its_tokens_and_a_gated_one_has_none() -> None:
    from test_scheduler import Alternating

    driver = plain(depth=2, drafting=drafting())
    driver.add(BASES[0][:5], FOREVER)
    driver.add(BASES[1][:5], FOREVER, gate=Alternating())
    first = driver.scheduler.schedule()
    second = driver.scheduler.schedule()
    assert first is not None and second is not None
    assert [row.slot for row in second.rows] == [first.rows[1].slot]
    assert not second.rows[0].drafts
