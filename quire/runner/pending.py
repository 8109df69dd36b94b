"""A step on its way back from the device: pinned copies of what it gave."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from quire.kernels.sampling import SampleOutputs, Status
from quire.runner.diffs import Columns
from quire.speculative.verify import verify
from quire.step import FORBIDDEN_ERROR, NAN_ERROR, Result, RowResult, TokenLogprobs


def token_logprobs(
    token: int, logprob: float, rank: int, top_ids: list[int], top: list[float]
) -> TokenLogprobs:
    """One position: the token, then the most likely ones with their ranks."""
    return TokenLogprobs([token, *top_ids], [logprob, *top], [rank, *range(1, len(top_ids) + 1)])


class HostOutputs:
    """Pinned copies of one step's sampling outputs, of which tokens are spoiled, and of the drafts
    that follow. `outputs`, `spoiled` and `drafts` (int32 [k, rows], where a model drafts) are those
    of the device, which every step writes anew."""

    def __init__(
        self, outputs: SampleOutputs, spoiled: torch.Tensor, drafts: torch.Tensor | None = None
    ):
        on_gpu = outputs.tokens.is_cuda

        def pinned(array: torch.Tensor) -> torch.Tensor:
            return torch.empty(array.shape, dtype=array.dtype, pin_memory=on_gpu)

        self._device_chosen, self._device_spoiled = outputs.chosen(), spoiled
        self._chosen, self._spoiled = pinned(self._device_chosen), pinned(spoiled)
        self._numbers = self._chosen.numpy()  # the same memory, quicker to cut
        self._device_drafts = drafts
        self._drafts = None if drafts is None else pinned(drafts)
        rest = [outputs.logprob, outputs.rank, outputs.top_ids, outputs.top_logprobs]
        self._logprobs = [(pinned(array), array) for array in rest]
        self._host = SampleOutputs(*self._chosen, *(host for host, _ in self._logprobs))
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._rows = 0

    def copy(self, rows: int, logprobs: bool, tokens: int, drafts: bool = False) -> None:
        """Start copying the outputs of `rows` rows that sampled, their log-probabilities too where
        these are wanted, which of the first `tokens` tokens are spoiled, and `drafts`."""
        self._rows = rows
        self._chosen.copy_(self._device_chosen, non_blocking=True)
        if logprobs:
            for host, device in self._logprobs:
                host[:rows].copy_(device[:rows], non_blocking=True)
        if tokens:
            self._spoiled[:tokens].copy_(self._device_spoiled[:tokens], non_blocking=True)
        if drafts:
            assert self._drafts is not None and self._device_drafts is not None
            self._drafts.copy_(self._device_drafts, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def drafts(self, row: int, count: int) -> list[int]:
        """At most `count` drafts of one row, after `wait`."""
        assert self._drafts is not None
        found = self._drafts[:count, row].tolist()
        return found[: found.index(-1)] if -1 in found else found

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[list[int], list[int]]:
        """Tokens and status of the rows that sampled, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        tokens, status = self._numbers[:, : self._rows].tolist()
        return tokens, status

    def outputs(self) -> SampleOutputs:
        """All of these rows' outputs, after `wait`."""
        return self._host.view(self._rows)

    def spoiled_rows(self, lengths: list[int]) -> dict[int, int]:
        """Which of rows with these numbers of tokens have one that is spoiled, and how many come
        before it, after `wait`."""
        starts = np.cumsum([0, *lengths], dtype=np.int64)
        spoiled = np.flatnonzero(self._spoiled[: starts[-1]].numpy())
        rows = np.searchsorted(starts, spoiled, side="right") - 1
        before = (spoiled - starts[rows]).tolist()
        return dict(zip(reversed(rows.tolist()), reversed(before), strict=True))  # the first stays


class DevicePending:
    """A step on the device. `rows` are those that are computed and, among them, those that sample;
    `wanted` says how many top log-probabilities each of the latter gets (none: no row asks for
    any), `prompts` has those of prompts by row."""

    def __init__(
        self, step: int, rows: Columns, host: HostOutputs, prompts: dict[int, list[TokenLogprobs]]
    ):
        self.step, self.rows, self.host, self.prompts = step, rows, host, prompts
        self.wanted: list[int | None] = []
        self.drafted = False
        self._sample: Sample | None = None

    def hold(self, sample: Sample) -> None:
        """Sampling is launched by `sample`, once masks are there."""
        self._sample = sample

    def open(self, masks: dict[int, bytes]) -> None:
        """Launch sampling; see Pending in quire/engine/core.py."""
        sample, self._sample = self._sample, None
        assert sample is not None, "no row of this step is gated, or it is open already"
        sample(self, masks)

    def done(self) -> bool:
        return self._sample is None and self.host.done()

    def result(self) -> Result:
        """Wait for the step. Raises what the device raises."""
        assert self._sample is None, "a step with gated rows must be opened first"
        tokens, status = self.host.wait()
        special = self.wanted or self.prompts or self.drafted or self.rows.drafts
        if self.rows.decode and not (any(status) or special):
            return Result(self.step, [], tokens)
        rows = [RowResult(tokens=[]) for _ in self.rows.slots]
        chosen = Chosen(self.host.outputs(), tokens, status, self.wanted)
        samples = zip(self.rows.sampling, self.rows.behind, strict=True)
        for place, (i, behind) in enumerate(samples):
            if not behind:
                drafts = self.rows.drafts.get(i, ())
                rows[i] = verify(drafts, partial(chosen.behind, place))
        for i, found in self.prompts.items():
            if any(math.isnan(position.logprobs[0]) for position in found):
                rows[i] = RowResult(tokens=[], error=NAN_ERROR)
            else:
                rows[i].prompt_logprobs = found
        if not self.rows.decode:
            self._fail_spoiled(rows)
        for i, count in self.rows.propose.items() if self.drafted else ():
            if rows[i].tokens:
                rows[i].drafts = self.host.drafts(i, count)
        return Result(self.step, rows)

    def _fail_spoiled(self, rows: list[RowResult]) -> None:
        """Those of which a token that counts is spoiled: refused drafts do not."""
        for i, fine in self.host.spoiled_rows(self.rows.lengths).items():
            refused = len(self.rows.drafts.get(i, ())) - max(0, len(rows[i].tokens) - 1)
            if fine < self.rows.lengths[i] - refused:
                rows[i] = RowResult(tokens=[], error=NAN_ERROR)


class Chosen(NamedTuple):
    """What was sampled: the outputs, as lists too, and how many log-probabilities are wanted."""

    outputs: SampleOutputs
    tokens: list[int]
    status: list[int]
    wanted: list[int | None]

    def behind(self, first: int, drafts: int) -> RowResult:
        """Of a row whose samples begin at the place `first`, the one behind so many drafts."""
        place = first + drafts
        status = self.status[place]
        if status != Status.OK:
            return RowResult([], error=NAN_ERROR if status == Status.NAN else FORBIDDEN_ERROR)
        count = self.wanted[place] if self.wanted else None
        found = None if count is None else [_at(self.outputs, place, count)]
        return RowResult([self.tokens[place]], found)


Sample = Callable[[DevicePending, dict[int, bytes]], None]


def _at(outputs: SampleOutputs, place: int, count: int) -> TokenLogprobs:
    """Log-probabilities of one sampled row."""
    return token_logprobs(
        int(outputs.tokens[place]),
        float(outputs.logprob[place]),
        int(outputs.rank[place]),
        outputs.top_ids[place, :count].tolist(),
        outputs.top_logprobs[place, :count].tolist(),
    )
