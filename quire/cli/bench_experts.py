"""How many experts the steps of a scenario read, counted in a pass of its own that is not timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quire.step import Batch, sure_tokens

if TYPE_CHECKING:
    import torch

    from quire.cli.local import LocalEngine
    from quire.engine.core import Pending, Runner

# Decode steps that are looked at, once all requests decode.
DECODE_STEPS = 4


@dataclass
class Step:
    """`rows` that decode, 0 where there are prompts too; `tokens` with drafts. `distinct`: experts
    that each layer read, those of an MTP module behind the model's."""

    rows: int
    tokens: int
    distinct: list[int] = field(default_factory=list)


class ExpertCount:
    """The distinct experts that each layer of each step reads, padding included, by kind of step.

    A runner around the engine's own, so that every layer's count is known to belong to a step of
    so many rows. `layers` of the model have experts; those of an MTP module, which come behind
    them in a step, count apart.
    """

    def __init__(self, runner: Runner, layers: int):
        self._runner, self._layers = runner, layers
        self._steps: list[Step] = []

    def submit(self, batch: Batch) -> Pending:
        decoding = all(len(sure_tokens(row)) == 1 for row in batch.rows)
        self._steps.append(Step(batch.num_rows if decoding else 0, batch.num_tokens))
        return self._runner.submit(batch)

    def reset(self) -> None:
        self._runner.reset()

    def warm(self) -> int:
        return self._runner.warm()

    def see(self, ids_TK: torch.Tensor) -> None:
        """The experts chosen in one layer. Waits for the device."""
        self._steps[-1].distinct.append(len(set(ids_TK.flatten().tolist())))

    def found(self) -> dict[str, float]:
        """Means over layers and steps: `prompt` of steps with prompts in them; `decode` of the
        first decode steps of the most rows, of which there were `decode_rows` with `decode_tokens`
        in them; `draft` of the MTP module's passes behind those."""
        layers, means = self._layers, {}
        prompts = [step for step in self._steps if not step.rows and step.distinct]
        if prompts:
            means["prompt"] = fmean(n for step in prompts for n in step.distinct[:layers])
        rows = max((step.rows for step in self._steps), default=0)
        if rows:
            steps = [step for step in self._steps if step.rows == rows][:DECODE_STEPS]
            means |= {"decode_rows": rows, "decode_tokens": fmean(step.tokens for step in steps)}
            means["decode"] = fmean(n for step in steps for n in step.distinct[:layers])
            if drafting := [n for step in steps for n in step.distinct[layers:]]:
                means["draft"] = fmean(drafting)
        return {name: float(value) for name, value in means.items()}


@contextmanager
def counting(engine: LocalEngine, layers: int) -> Iterator[ExpertCount]:
    """Count in the block, in which every step runs the model's code: no graph is replayed.
    `layers` of the model have experts."""
    core, build = engine.engine.core, engine.engine.build
    runner: Any = core.runner
    count = ExpertCount(runner, layers)
    core.runner, build.on_experts, runner.replaying = count, count.see, False
    try:
        yield count
    finally:
        core.runner, build.on_experts, runner.replaying = runner, None, True
