"""Drafts in the scheduler: which rows of a step get them, how many, and how many were right.

Drafts are worth having where tokens wait for weights to be read, so they take only what is left:
of a step's tokens and sampling rows, and of blocks. Nobody is preempted for a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.engine.request import Request
from quire.speculative.proposer import Drafter, Proposer, Returned
from quire.step import Row

NO_DRAFTS: list[int] = []  # of most rows, so they share it; never changed


@dataclass(frozen=True)
class DraftCounts:
    """Rows with drafts, drafts in them, and how often the draft at each place was accepted. What
    lies past a request's end was not."""

    rows: int
    drafted: int
    accepted_at: list[int]


class Drafting:
    """`most`: drafts of a row. `max_sampled`: rows of logits that a step can sample from. `ahead`:
    drafts that the runner makes behind a row, and tokens that it needs blocks for there. `longest`:
    tokens of a request, drafts included, that who drafts can know (None: any)."""

    def __init__(
        self,
        proposer: Proposer,
        most: int,
        max_sampled: int,
        ahead: int = 0,
        longest: int | None = None,
    ):
        self.most, self.ahead, self.longest = most, ahead, longest
        self._proposer = proposer
        self._max_sampled = max_sampled
        self._rows = self._drafted = 0
        self._accepted_at = [0] * most

    def drafter(self) -> Drafter:
        """Of a new request."""
        return self._proposer.drafter()

    def waits(self, request: Request) -> bool:
        """Whether a request's next row must wait for its tokens in flight: what is drafted, and
        where the row begins, depends on them."""
        return request.drafter is not None and request.inflight_samples > 0

    def room(self, budget: int, decoding: int, sampling: int, others: bool) -> int:
        """Drafts that a step of this token budget may have: each of its `decoding` rows has its
        token, `sampling` rows may sample, and `others` that compute prompts get half of what is
        left."""
        left = budget - decoding
        return min(left // 2 if others else left, self._max_sampled - sampling)

    def drafts(self, request: Request, room: int) -> list[int]:
        """For the next row of a request that decodes, with all its tokens known."""
        # The last token that is allowed needs no draft: another comes behind each.
        room = min(room, self.most, request.longest - request.promised - 1)
        if request.drafter is None or room <= 0:
            return NO_DRAFTS
        return request.drafter.propose(request.tokens, room)

    def proposals(self, request: Request, end: int) -> int:
        """How many drafts the runner is to make behind a row that samples and ends at `end`."""
        if request.drafter is None:
            return 0
        longest = request.longest if self.longest is None else min(request.longest, self.longest)
        return max(0, min(self.ahead, longest - 1 - end))

    def take(self, request: Request, drafts: list[int]) -> None:
        """Drafts that the runner made behind all of a request's tokens."""
        if isinstance(request.drafter, Returned):
            request.drafter.take(len(request.tokens), drafts)

    def count(self, row: Row, accepted: int) -> None:
        """A row with drafts has been computed."""
        self._rows += 1
        self._drafted += row.drafts
        for i in range(accepted):
            self._accepted_at[i] += 1

    def counts(self) -> DraftCounts:
        return DraftCounts(self._rows, self._drafted, list(self._accepted_at))
