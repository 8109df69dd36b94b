"""A small model that drafts for the eager runner, behind each step that has been sampled.

It keeps keys and values of its own in the same blocks: its layers belong to KV groups like the
model's. So what it has computed is found, given back and computed again with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from quire.models.registry import Model
from quire.runner.forward import forward
from quire.runner.guesses import guess_on
from quire.runner.recorded import RecordedSteps
from quire.runner.sampler import Sampler
from quire.runner.slots import Slot, Slots, flatten
from quire.step import Batch, Row, RowResult, sure_tokens


class EagerDrafter:
    """Computes its model over the tokens of each step, those that were sampled too, and goes on
    alone for as many drafts as are wanted."""

    def __init__(self, model: Model, sampler: Sampler, slots: Slots, num_groups: int):
        self.model = model
        self._sampler, self._slots = sampler, slots
        self._no_blocks: list[list[int]] = [[] for _ in range(num_groups)]
        self._recorded: RecordedSteps | None = None
        # By slot: the tokens whose keys and values are there, as far as a step left them.
        self._written: dict[int, list[int]] = {}

    def record(
        self, record: Callable[[], AbstractContextManager[Any]], num_groups: int, max_blocks: int
    ) -> None:
        """Run passes of one token a row from recordings (quire/runner/recorded.py)."""
        self._recorded = RecordedSteps(self.model, record, num_groups, max_blocks)

    def draft(self, batch: Batch, results: list[RowResult]) -> None:
        """Behind a step that has been sampled; its results get drafts."""
        for enter in batch.enter:
            self._written.pop(enter.slot, None)
        spans, drafting = list[Row](), dict[int, RowResult]()
        for row, got in zip(batch.rows, results, strict=True):
            span = self._span(row, got.tokens)
            if span.tokens:
                spans.append(span)
            if row.propose and got.tokens:
                drafting[row.slot] = got
        if not spans:
            return
        logits_BV = self._logits(spans, [i for i, row in enumerate(spans) if row.slot in drafting])
        wanted = {row.slot: row.propose for row in batch.rows}
        guess_on(self._sampler, self._slots, drafting, wanted, logits_BV, self._go_on)

    def _go_on(self, branches: Mapping[int, Slot]) -> torch.Tensor:
        rows = [self._one(slot, branch.tokens) for slot, branch in branches.items()]
        return self._logits(rows, list(range(len(rows))))

    def _span(self, row: Row, sampled: list[int]) -> Row:
        """What of a row's tokens counts and is not there yet; with the last one sampled, where
        drafts are to follow it."""
        tokens = self._slots[row.slot].tokens
        end = row.start + len(sure_tokens(row)) + max(0, len(sampled) - 1)
        if row.propose and sampled:
            end = len(tokens)  # its logits are wanted, whether it is there or not
        start, written = row.start, self._written.get(row.slot, [])
        there = min(end - bool(row.propose and sampled), len(written))
        while start < there and written[start] == tokens[start]:
            start += 1
        return Row(row.slot, start, tokens[start:end], self._no_blocks, False)

    def _one(self, slot: int, tokens: list[int]) -> Row:
        """A row of the last of these tokens, which the slot does not know."""
        return Row(slot, len(tokens) - 1, tokens[-1:], self._no_blocks, False, drafts=1)

    def _logits(self, rows: list[Row], chosen: list[int]) -> torch.Tensor:
        """Compute rows; the logits of the last token of those that are `chosen`."""
        for row in rows:
            written = self._written.setdefault(row.slot, [0] * row.start)
            written[row.start :] = row.tokens
        flat = flatten(rows, self._slots)
        if self._recorded is not None and len(flat.tokens_T) == len(chosen) == len(rows):
            found = self._recorded.compute(flat)
            if found is not None:
                return found[1]
        hidden_TH = forward(self.model, flat)
        places = (flat.query_start[1:] - 1)[chosen]
        return self.model.logits(hidden_TH[torch.from_numpy(places).long()])
