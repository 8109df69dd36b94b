"""A request (one choice of it) as the scheduler sees it, and the ledger of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from quire.engine.wire import Add

if TYPE_CHECKING:
    from quire.engine.gates import Gate
    from quire.engine.visits import Visit
    from quire.speculative.proposer import Drafter


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One sequence being continued.

    The ledger: `tokens` are known (prompt, then committed output), and `promised` is their number
    and that of tokens being sampled by steps in flight; KV of the first `computed` of them is in
    place, and of the first `scheduled` in place or part of submitted steps that have not been
    committed. Every step moves tokens from known to in flight, and every commit from in flight to
    computed, so nothing needs correcting afterwards. A preempted request is admitted again only
    when nothing of it is in flight; what was in flight still gives tokens but no KV. `slot` is -1
    unless it runs. `order`: smaller runs first and is preempted last. `covered`: tokens that its
    blocks have room for. `settle_at`: tokens computed at which KVManager.commit next has
    something to do. `plain_until`: promised tokens up to which its next row is a plain decoding one
    that needs no block, and `quiet_until`: computed ones below which its commit appends a token and
    that is all, unless it is an end token; both 0 where that is not known. `identities`: what
    KVManager.admit keeps between attempts. `longest` and `earliest_end` are max_tokens and
    min_tokens with the prompt. `prompt_logprobs_due`: log-probabilities of the prompt to send in
    all. `gate`: says which tokens may come next.
    `visit`: what the tiers do for it before it is admitted.
    `drafter`: guesses them. Of a row with drafts only the token that is sure to come is promised,
    and only the tokens before the drafts are scheduled; what is accepted is added to both once it
    is known.
    """

    add: Add
    arrival: int
    priority: int
    end_tokens: frozenset[int]
    max_tokens: int
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    scheduled: int = 0
    inflight_steps: int = 0
    slot: int = -1
    cached_tokens: int | None = None
    cached_by_tier: dict[str, int] | None = None
    prompt_logprobs_sent: int = 0
    covered: int = 0
    settle_at: int = 0
    plain_until: int = 0
    quiet_until: int = 0
    blocks_sent: list[int] = field(default_factory=list)
    identities: list[list[bytes]] = field(default_factory=list)
    announced: bool = False
    deadline: float = math.inf
    gate: Gate | None = None
    visit: Visit | None = None
    drafter: Drafter | None = None
    request_id: str = field(init=False)
    order: tuple[int, int] = field(init=False)
    num_prompt: int = field(init=False)
    promised: int = field(init=False)
    prompt_logprobs_due: int = field(init=False)
    longest: int = field(init=False)
    earliest_end: int = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = self.add.request_id
        self.tokens = list(self.add.prompt_token_ids)
        self.num_prompt = self.promised = len(self.tokens)
        asked = self.add.params.prompt_logprobs is not None
        self.prompt_logprobs_due = self.num_prompt - 1 if asked else 0
        self.longest = self.num_prompt + self.max_tokens
        self.earliest_end = self.num_prompt + self.add.params.min_tokens
        self.order = (self.priority, self.arrival)

    def be_quiet(self) -> None:
        """Its row has sampled: commits append a token, and that is all, until a block is full or
        its longest end is near."""
        self.quiet_until = min(self.longest - 1, self.settle_at)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def inflight(self) -> int:
        """Tokens being computed."""
        return self.scheduled - self.computed

    @property
    def inflight_samples(self) -> int:
        """Tokens being sampled."""
        return self.promised - len(self.tokens)

    @property
    def gap(self) -> int:
        """Tokens that a next step could compute; 0 once all output allowed is on its way."""
        return 0 if self.promised >= self.longest else self.promised - self.scheduled

    def check_integrity(self) -> None:
        assert (self.state is State.RUNNING) == (self.slot >= 0)
        assert 0 <= self.computed <= self.scheduled <= self.promised
        assert self.inflight_samples >= 0
        assert self.num_output <= self.max_tokens
        assert self.inflight_steps > 0 or (self.inflight == 0 and self.inflight_samples == 0)
