"""Which drafts stand: those that the target would have chosen anyway.

At each position the target samples with the noise of that position and with the parameters as they
would be there without drafts. So the tokens are those of a run without speculation, and a draft
only saves a step. (Rejection sampling, which accepts more of a drafter with noise of its own, keeps
the distribution but not the tokens.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quire.step import RowResult


def verify(drafts: Sequence[int], sample: Callable[[int], RowResult]) -> RowResult:
    """Tokens of a row with drafts: one more than are accepted.

    `sample(i)` chooses the token behind the first i drafts; it is called in order, and for i > 0
    only where all of these have been chosen. An error behind a draft is left to the next step,
    which begins with the same position.
    """
    taken = sample(0)
    if taken.error is not None:
        return taken
    for i, draft in enumerate(drafts, 1):
        if taken.tokens[-1] != draft:
            break
        got = sample(i)
        if got.error is not None:
            break
        taken.tokens += got.tokens
        if taken.logprobs is not None and got.logprobs is not None:
            taken.logprobs += got.logprobs
    return taken
