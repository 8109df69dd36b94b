"""How many experts the steps of a scenario read, counted in a pass of its own that is not timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quire.cli.local import LocalEngine
    from quire.engine.core import Pending, Runner
    from quire.step import Batch

# Decode steps that are looked at, once all requests decode.
DECODE_STEPS = 4


class ExpertCount:
    """The distinct experts that each layer of each step reads, padding included, by kind of step.

    A runner around the engine's own, so that every layer's count is known to belong to a step of
    so many rows.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._rows = 0
        self._decode: dict[int, list[int]] = defaultdict(list)
        self._prompt: list[int] = []

    def submit(self, batch: Batch) -> Pending:
        decoding = batch.num_tokens == batch.num_rows
        self._rows = batch.num_rows if decoding else 0
        return self._runner.submit(batch)

    def reset(self) -> None:
        self._runner.reset()

    def warm(self) -> int:
        return self._runner.warm()

    def see(self, ids_TK: torch.Tensor) -> None:
        """The experts chosen in one layer. Waits for the device."""
        distinct = len(set(ids_TK.flatten().tolist()))
        (self._decode[self._rows] if self._rows else self._prompt).append(distinct)

    def found(self) -> dict[str, float]:
        """Means over layers and steps: `prompt` of steps with prompts in them, `decode` of the
        decode steps of the most rows, of which there were `decode_rows`."""
        means = {"prompt": fmean(self._prompt)} if self._prompt else {}
        if self._decode:
            rows = max(self._decode)
            means |= {"decode_rows": float(rows), "decode": fmean(self._decode[rows])}
        return means


@contextmanager
def counting(engine: LocalEngine) -> Iterator[ExpertCount]:
    """Count in the block, in which every step runs the model's code: no graph is replayed."""
    core, build = engine.engine.core, engine.engine.build
    runner: Any = core.runner
    count = ExpertCount(runner)
    core.runner, build.on_experts, runner.replaying = count, count.see, False
    try:
        yield count
    finally:
        core.runner, build.on_experts, runner.replaying = runner, None, True
