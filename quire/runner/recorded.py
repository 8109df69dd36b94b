"""Decode steps of few rows, recorded once per number of rows and then run again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.registry import Model
from quire.plan.cpu import RECORDED_ROWS
from quire.runner.slots import Flat

log = logging.getLogger("quire.runner")


class RecordedStep:
    """One number of rows B: input tensors, the program over them, and what it gives: hidden states
    [B, H] and logits [B, V]."""

    def __init__(self, rows: int, num_groups: int, max_blocks: int):
        self.tokens = torch.zeros(rows, dtype=torch.int64)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        groups = [
            GroupInputs(
                torch.zeros(rows, max_blocks, dtype=torch.int32),
                torch.zeros(rows, dtype=torch.int64),
            )
            for _ in range(num_groups)
        ]
        self.inputs = StepInputs(
            torch.arange(rows + 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32), groups
        )
        self.program: Any = None
        self.hidden = self.logits = torch.empty(0)

    def fill(self, flat: Flat) -> None:
        """Copy a step's inputs to where the program reads them."""
        self.tokens.numpy()[:] = flat.tokens_T
        self.positions.numpy()[:] = flat.positions_T
        self.inputs.context_len.numpy()[:] = flat.context_len
        for group, table, slots in zip(
            self.inputs.groups, flat.block_tables, flat.slots, strict=True
        ):
            group.block_tables.numpy()[:, : table.shape[1]] = table
            group.slots.numpy()[:] = slots

    def compute(self, model: Model) -> None:
        """Hidden states and logits by running the model's code."""
        self.hidden = model.forward(self.tokens, self.positions, self.inputs)
        self.logits = model.logits(self.hidden)


class RecordedSteps:
    """The recorded steps of one runner.

    `record` is the kernels' context manager that gives a program. A model whose step cannot be
    recorded, or whose recording gives other bits, is computed step by step, and that is logged.
    """

    def __init__(
        self,
        model: Model,
        record: Callable[[], AbstractContextManager[Any]],
        num_groups: int,
        max_blocks: int,
    ):
        self._model, self._record = model, record
        self._num_groups, self._max_blocks = num_groups, max_blocks
        self._steps: dict[int, RecordedStep] = {}
        self._usable = True

    def compute(self, flat: Flat) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hidden states [B, H] and logits float32 [B, V] of a step with one token per row, valid
        until the next call; None where such a step is not recorded."""
        rows = len(flat.tokens_T)
        if not self._usable or rows > RECORDED_ROWS:
            return None
        step = self._steps.get(rows)
        if step is None:
            return self._new(rows, flat)
        step.fill(flat)
        step.program.run()
        return step.hidden, step.logits

    def _new(self, rows: int, flat: Flat) -> tuple[torch.Tensor, torch.Tensor]:
        step = RecordedStep(rows, self._num_groups, self._max_blocks)
        step.fill(flat)
        step.compute(self._model)
        expected = step.hidden, step.logits
        try:
            with self._record() as program:
                step.compute(self._model)
        except Exception as error:  # whatever it is, the step itself was computed above
            log.info("decode steps are not recorded: %s: %s", type(error).__name__, error)
            self._usable = False
            return expected
        program.run()
        if not np.array_equal(step.logits.numpy(), expected[1].numpy(), equal_nan=True):
            log.warning("a recorded decode step gave other bits; steps are not recorded")
            self._usable = False
            return expected
        step.program = program
        self._steps[rows] = step
        return expected
