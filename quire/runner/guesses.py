"""How drafters on the CPU go on behind a step: token after token, as the target would sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from quire.runner.sampler import Sampler
from quire.runner.slots import Slot, Slots
from quire.step import RowResult


def guess_on(
    sampler: Sampler,
    slots: Slots,
    results: Mapping[int, RowResult],
    wanted: Mapping[int, int],
    logits_BV: torch.Tensor,
    following: Callable[[Mapping[int, Slot]], torch.Tensor],
) -> None:
    """Give `results`, by slot, the drafts that are `wanted` of them: with the target's noise of
    each position, so that where both would choose alike, the draft is right.

    `logits_BV`: a row for each of them, in order. `following` computes the logits that follow the
    last token of the slots that it is given, which the runner's slots do not know.
    """
    branches = {slot: slots[slot].branch() for slot in results}
    while branches:
        guesses = sampler.guess(logits_BV, list(branches.values()))
        for slot, guess in zip(list(branches), guesses, strict=True):
            if guess is None:
                del branches[slot]
                continue
            branches[slot].append(guess)
            results[slot].drafts.append(guess)
            if len(results[slot].drafts) == wanted[slot]:
                del branches[slot]
        if branches:
            logits_BV = following(branches)
