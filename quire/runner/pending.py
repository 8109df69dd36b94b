"""A step on its way back from the device: pinned copies of what it gave, read when they are there."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch

from quire.kernels.sampling import SampleOutputs, Status
from quire.step import FORBIDDEN_ERROR, NAN_ERROR, Result, RowResult, TokenLogprobs


def token_logprobs(
    token: int, logprob: float, rank: int, top_ids: list[int], top: list[float]
) -> TokenLogprobs:
    """One position: the token, then the most likely ones with their ranks."""
    return TokenLogprobs([token, *top_ids], [logprob, *top], [rank, *range(1, len(top_ids) + 1)])


def _arrays(outputs: SampleOutputs) -> list[torch.Tensor]:
    """Tokens and status first, then what belongs to log-probabilities."""
    return [getattr(outputs, field.name) for field in fields(outputs)]


class HostOutputs:
    """Pinned copies of one step's sampling outputs, and of which tokens are spoiled."""

    def __init__(self, outputs: SampleOutputs, spoiled: torch.Tensor):
        on_gpu = outputs.tokens.is_cuda

        def pinned(array: torch.Tensor) -> torch.Tensor:
            return torch.empty(array.shape, dtype=array.dtype, pin_memory=on_gpu)

        self._arrays = SampleOutputs(*(pinned(array) for array in _arrays(outputs)))
        self._spoiled = pinned(spoiled)
        self._event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._rows = 0

    def copy(
        self, outputs: SampleOutputs, rows: int, logprobs: bool, spoiled: torch.Tensor
    ) -> None:
        """Start copying the first `rows` of the outputs, and all of `spoiled`."""
        self._rows = rows
        both = zip(_arrays(self._arrays.view(rows)), _arrays(outputs.view(rows)), strict=True)
        for host, device in list(both)[: None if logprobs else 2]:
            host.copy_(device, non_blocking=True)
        if len(spoiled):
            self._spoiled[: len(spoiled)].copy_(spoiled, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def done(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> SampleOutputs:
        """The outputs, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._arrays.view(self._rows)

    def spoiled_rows(self, lengths: list[int]) -> list[int]:
        """Which of rows with these numbers of tokens have one that is spoiled, after `wait`."""
        ends = np.cumsum(lengths)
        flags = self._spoiled[: ends[-1]].numpy()
        found: list[int] = np.flatnonzero(np.maximum.reduceat(flags, ends - lengths)).tolist()
        return found


@dataclass(frozen=True)
class DevicePending:
    """A step on the device. `sampled` are the rows that sample, in the order of the outputs;
    `wanted` says how many top log-probabilities each gets (none: no row asks for any). `lengths`:
    tokens of each row, none where each row samples from the only one it has."""

    step: int
    rows: int
    sampled: list[int]
    wanted: list[int | None]
    host: HostOutputs
    prompts: dict[int, list[TokenLogprobs]]
    lengths: list[int]

    def done(self) -> bool:
        return self.host.done()

    def result(self) -> Result:
        """Wait for the step. Raises what the device raises."""
        outputs = self.host.wait()
        tokens, status = outputs.tokens.tolist(), outputs.status.tolist()
        rows = [RowResult(tokens=[]) for _ in range(self.rows)]
        for place, i in enumerate(self.sampled):
            if status[place] == Status.OK:
                rows[i].tokens = [tokens[place]]
            else:
                rows[i].error = NAN_ERROR if status[place] == Status.NAN else FORBIDDEN_ERROR
        for place, count in enumerate(self.wanted):
            if count is not None and status[place] == Status.OK:
                rows[self.sampled[place]].logprobs = [_at(outputs, place, count)]
        for i, found in self.prompts.items():
            if any(math.isnan(position.logprobs[0]) for position in found):
                rows[i] = RowResult(tokens=[], error=NAN_ERROR)
            else:
                rows[i].prompt_logprobs = found
        for i in self.host.spoiled_rows(self.lengths) if self.lengths else ():
            rows[i] = RowResult(tokens=[], error=NAN_ERROR)
        return Result(self.step, rows)


def _at(outputs: SampleOutputs, place: int, count: int) -> TokenLogprobs:
    """Log-probabilities of one sampled row."""
    return token_logprobs(
        int(outputs.tokens[place]),
        float(outputs.logprob[place]),
        int(outputs.rank[place]),
        outputs.top_ids[place, :count].tolist(),
        outputs.top_logprobs[place, :count].tolist(),
    )
