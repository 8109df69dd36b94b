"""The model's MTP module as a drafter for the GPU runner, behind each step, without the host.

As quire/runner/eager_mtp.py, in the two parts that quire/runner/device_drafter.py has. It is told
with each token the one that follows, so it is one behind in each pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.kernels.device_state import DeviceState, RowFlag, StepBuffers
from quire.kernels.sampling import Scratch as SamplingScratch
from quire.kernels.triton.step.draft_rows import draft_rows
from quire.kernels.triton.step.prepare_step import prepare_step
from quire.kernels.triton.step.take_hidden import take_hidden
from quire.models.registry import MTP
from quire.plan.plan import Plan
from quire.runner.device_drafter import Guesser
from quire.runner.device_forward import step_inputs


class DeviceMTP(Guesser):
    """Drafts with the model's module, from `kept`, which gives the hidden states [>= T, H] of the
    step's tokens."""

    def __init__(
        self,
        mtp: MTP,
        state: DeviceState,
        step_rows: torch.Tensor,
        scratch: SamplingScratch,
        plan: Plan,
        kept: Callable[[], torch.Tensor],
    ):
        super().__init__(state, step_rows, scratch, plan)
        self.mtp, self._kept = mtp, kept
        # Hidden states: of all tokens that are read; and of each row the last that the module gave,
        # and what it is given next.
        self._read: torch.Tensor | None = None
        self._last = self._next = torch.empty(0)

    def read(self, rows: int, tokens: int) -> None:
        """Compute what counts of the step's first `rows` rows, in at most `tokens` tokens: more
        than there are rows."""
        table, step_rows, kept = self._rows[:rows], self._step_rows[:rows], self._kept()
        if self._read is None:
            self._allocate(kept)
        assert self._read is not None
        draft_rows(self.state, step_rows, 0, table, lags=True)
        buffers = self._prepare(table, tokens)
        given_TH = self._read[:tokens]
        take_hidden(kept, step_rows, buffers.query_start, given_TH)
        found_TH = self._forward(given_TH, buffers)
        ends = (buffers.query_start[1:] - 1).clamp(min=0)
        torch.index_select(found_TH, 0, ends, out=self._last[:rows])
        torch.index_select(given_TH, 0, ends, out=self._next[:rows])
        self._go_on(rows, 0)

    def draft(self, rows: int, variant: str) -> None:
        """Go on behind what was read; `variant` of the sampler (quire.runner.diffs.variant)."""
        table = self._rows[:rows]
        for behind in range(len(self.drafts)):
            if behind:
                draft_rows(self.state, self._step_rows[:rows], behind, table, lags=True)
                buffers = self._prepare(table, rows)
                self._last[:rows].copy_(self._forward(self._next[:rows], buffers))
                self._go_on(rows, behind)
            self._guess(self.mtp.logits(self._last[:rows]), behind, variant)

    def _allocate(self, kept: torch.Tensor) -> None:
        rows, width = len(self._rows), kept.shape[1]

        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, width, dtype=kept.dtype, device=kept.device)

        self._read = zeros(len(self._buffers.tokens))
        self._last, self._next = zeros(rows), zeros(rows)

    def _go_on(self, rows: int, behind: int) -> None:
        """What the next pass is given: what this one gave, or the same again in rows that want no
        more drafts, which then compute the same token again."""
        wanted = self._step_rows[:rows, 3:] // int(RowFlag.PROPOSE)
        given = self._next[:rows]
        given.copy_(torch.where(wanted > behind + 1, self._last[:rows], given))

    def _prepare(self, table: torch.Tensor, tokens: int) -> StepBuffers:
        buffers = self._buffers.view(len(table), tokens)
        prepare_step(self.state, table, buffers, ahead=1)
        return buffers

    def _forward(self, hidden_TH: torch.Tensor, buffers: StepBuffers) -> torch.Tensor:
        return self.mtp.forward(
            hidden_TH, buffers.tokens, buffers.positions, step_inputs(self.state, buffers)
        )
