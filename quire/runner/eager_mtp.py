"""The model's MTP module as a drafter for the eager runner, behind each step that has been sampled.

Its layer belongs to the KV groups of the model's own and keeps something of every token that the
model does: of a token's hidden state together with the token that follows. So its cache is found,
given back and computed again with the rest. What it has of the last token of a found block was
computed with the token that followed then: a guess may be worse for it, and no token other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from quire.models.registry import MTP
from quire.runner.forward import step_inputs
from quire.runner.guesses import guess_on
from quire.runner.sampler import Sampler
from quire.runner.slots import Slot, Slots, flatten
from quire.step import NAN_ERROR, Batch, Row, RowResult, sure_tokens


class EagerMTP:
    """Computes the module over the tokens of each step, and goes on with what it gives itself for
    as many drafts as are wanted."""

    def __init__(self, mtp: MTP, sampler: Sampler, slots: Slots, num_groups: int):
        self._mtp, self._sampler, self._slots = mtp, sampler, slots
        self._no_blocks: list[list[int]] = [[] for _ in range(num_groups)]

    def draft(
        self,
        batch: Batch,
        results: list[RowResult],
        hidden_TH: torch.Tensor,
        query_start: npt.NDArray[np.int32],
    ) -> None:
        """Behind a step that has been sampled; its results get drafts. `hidden_TH` has the model's
        hidden states of the step's tokens, those of row i from `query_start[i]` on."""
        rows, following, places = list[Row](), list[int](), list[int]()
        drafting, last = dict[int, RowResult](), list[int]()
        for i, (row, got) in enumerate(zip(batch.rows, results, strict=True)):
            if got.error == NAN_ERROR:
                continue  # nothing that it computes is found by others
            count = len(sure_tokens(row)) + max(0, len(got.tokens) - 1)
            known = self._slots[row.slot].tokens[row.start + 1 : row.start + 1 + count]
            rows.append(self._row(row.slot, row.start, count))
            following += known + [0] * (count - len(known))  # where no token could be chosen
            places += range(query_start[i], query_start[i] + count)
            if row.propose and got.tokens:
                drafting[row.slot] = got
                last.append(len(places) - 1)
        if not rows:
            return
        found_TH = self._forward(rows, following, hidden_TH[places])
        if not drafting:
            return
        behind = {slot: found_TH[end] for slot, end in zip(drafting, last, strict=True)}

        def go_on(branches: Mapping[int, Slot]) -> torch.Tensor:
            # The module is at the last token but one, and is told the one that follows.
            rows = [self._row(slot, len(at.tokens) - 2, 1) for slot, at in branches.items()]
            tokens = [at.tokens[-1] for at in branches.values()]
            hidden_BH = torch.stack([behind[slot] for slot in branches])
            found_BH = self._forward(rows, tokens, hidden_BH)
            behind.update(zip(branches, found_BH, strict=True))
            return self._mtp.logits(found_BH)

        wanted = {row.slot: row.propose for row in batch.rows}
        logits_BV = self._mtp.logits(found_TH[last])
        guess_on(self._sampler, self._slots, drafting, wanted, logits_BV, go_on)

    def _row(self, slot: int, start: int, count: int) -> Row:
        """Some tokens of a slot; which they are is not looked at."""
        return Row(slot, start, [0] * count, self._no_blocks, False)

    def _forward(
        self, rows: list[Row], following: list[int], hidden_TH: torch.Tensor
    ) -> torch.Tensor:
        """What the module gives of rows, whose tokens have these hidden states and are followed by
        these tokens."""
        flat = flatten(rows, self._slots)
        positions_T = torch.from_numpy(flat.positions_T)
        return self._mtp.forward(hidden_TH, torch.tensor(following), positions_T, step_inputs(flat))
