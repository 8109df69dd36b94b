"""A small model that drafts for the GPU runner, behind each step, without the host.

As quire/runner/eager_drafter.py, in two parts of a graph each: the step's tokens as they now stand,
and then one token a row for each draft. What it guesses stays in the slots' histories, behind what
they know.
"""

from __future__ import annotations

import torch

from quire.kernels.device_state import DeviceState, StepBuffers
from quire.kernels.sampling import SampleOutputs
from quire.kernels.sampling import Scratch as SamplingScratch
from quire.kernels.triton.sampling.sample import sample
from quire.kernels.triton.step.draft_rows import draft_rows
from quire.kernels.triton.step.keep_drafts import keep_drafts
from quire.models.registry import Model
from quire.plan.plan import Plan
from quire.runner.device_forward import forward_table


class Guesser:
    """What drafts behind a step. Reads the step's rows from `step_rows` int32 [rows, 4], a part of
    the state's table; its own rows are in `_rows`, its tokens in `_buffers`. `drafts` int32
    [k, rows]: the last ones made, -1 where there is none."""

    def __init__(
        self, state: DeviceState, step_rows: torch.Tensor, scratch: SamplingScratch, plan: Plan
    ):
        assert plan.speculation is not None
        self.state, self._scratch, self._step_rows = state, scratch, step_rows
        rows, device, layout = len(step_rows), state.device, state.layout
        tokens = plan.max_num_batched_tokens + rows
        sizes = (rows, tokens, layout.groups, layout.max_blocks)
        self._buffers = StepBuffers.allocate(*sizes, device)
        self._rows = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        self._outputs = SampleOutputs.allocate(rows, device)
        count = plan.speculation.num_speculative_tokens
        self.drafts = torch.full((count, rows), -1, dtype=torch.int32, device=device)

    def _guess(self, logits_BV: torch.Tensor, behind: int, variant: str) -> None:
        """Take the draft of each row after `behind` others."""
        rows = len(logits_BV)
        table, outputs = self._rows[:rows], self._outputs.view(rows)
        sample(logits_BV, table, self.state, variant, outputs, self._scratch, append=False)
        kept = self.drafts[behind, :rows]
        keep_drafts(self.state, table, behind, outputs.tokens, outputs.status, kept)


class DeviceDrafter(Guesser):
    """Drafts with a model of its own."""

    def __init__(
        self,
        model: Model,
        state: DeviceState,
        step_rows: torch.Tensor,
        scratch: SamplingScratch,
        plan: Plan,
    ):
        super().__init__(state, step_rows, scratch, plan)
        self.model = model
        self._last: torch.Tensor | None = None  # hidden states of the rows' last tokens

    def read(self, rows: int, tokens: int) -> None:
        """Compute what counts of the step's first `rows` rows, in at most `tokens` tokens: more
        than there are rows."""
        table, size = self._rows[:rows], len(self._rows)
        draft_rows(self.state, self._step_rows[:rows], 0, table)
        hidden_TH = self._forward(table, tokens)
        if self._last is None:
            shape = (size, hidden_TH.shape[1])
            self._last = torch.zeros(shape, dtype=hidden_TH.dtype, device=hidden_TH.device)
        ends = self._buffers.query_start[1 : rows + 1] - 1
        torch.index_select(hidden_TH, 0, ends.clamp(min=0), out=self._last[:rows])

    def draft(self, rows: int, variant: str) -> None:
        """Go on behind what was read; `variant` of the sampler (quire.runner.diffs.variant)."""
        assert self._last is not None
        table, last = self._rows[:rows], self._last[:rows]
        for behind in range(len(self.drafts)):
            if behind:
                draft_rows(self.state, self._step_rows[:rows], behind, table)
                last = self._forward(table, rows)
            self._guess(self.model.logits(last), behind, variant)

    def _forward(self, table: torch.Tensor, tokens: int) -> torch.Tensor:
        buffers = self._buffers.view(len(table), tokens)
        return forward_table(self.model, self.state, table, buffers)
