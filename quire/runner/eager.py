"""The eager runner: a Batch is computed at once, on the CPU. The reference for other runners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quire.kv import BLOCK_SIZE
from quire.kv.groups import KVGroup
from quire.layers.build import Build, CpuKernels
from quire.layers.inputs import GroupInputs, StepInputs
from quire.models.registry import Model
from quire.plan.memory import LOGIT_ROWS
from quire.runner.recorded import RecordedSteps
from quire.runner.sampler import NAN_ERROR, Sampler
from quire.runner.slots import Flat, Slots, flatten
from quire.step import Batch, Result, Row, RowResult, TokenLogprobs


@dataclass
class Done:
    """A Pending that is finished already."""

    _result: Result

    def done(self) -> bool:
        return True

    def result(self) -> Result:
        return self._result


def allocate_caches(
    build: Build, groups: Sequence[KVGroup], pool_blocks: Sequence[int], dtype: torch.dtype
) -> None:
    """Memory for every attention layer, in the shapes of its kernels.

    Groups of one pool share its memory, as each block belongs to one of them at a time. Pages are
    touched when first written, so a large cache costs nothing until it is used.
    """
    memory: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for group in groups:
        blocks = pool_blocks[group.pool]
        for i, layer in enumerate(group.layers):
            cache = build.caches[layer]
            if (group.pool, i) not in memory:
                shapes = build.kernels.cache_shapes(blocks, cache.kv_heads, cache.head_size)
                keys, values = (torch.empty(s, dtype=dtype, device=build.device) for s in shapes)
                memory[group.pool, i] = (keys, values)
            cache.group = group.index
            cache.keys, cache.values = memory[group.pool, i]


class EagerRunner:
    """Owns the slots; the model and its caches are given built, loaded and allocated.

    `submit` raises whatever the computation raises; the caller then calls `reset`.
    """

    def __init__(
        self,
        model: Model,
        kernels: CpuKernels,
        num_groups: int,
        num_slots: int,
        max_model_len: int,
    ):
        self.model = model
        self.sampler = Sampler(kernels)
        self.replaying = True  # False: the model's code runs in every step
        max_blocks = -(-max_model_len // BLOCK_SIZE) + 1
        self.slots = Slots(num_slots, max_blocks, num_groups)
        record = getattr(kernels, "record", None)  # only the native kernels can be recorded
        self._recorded = record and RecordedSteps(model, record, num_groups, max_blocks)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Done:
        """Compute a step."""
        self.slots.apply(batch)
        rows = batch.rows
        results = [RowResult(tokens=[]) for _ in rows]
        flat = flatten(rows, self.slots)
        if (
            self._recorded
            and self.replaying
            and all(row.sample and len(row.tokens) == 1 and not row.prompt_logprobs for row in rows)
        ):
            logits_BV = self._recorded.logits(flat)
            if logits_BV is not None:
                self._sample(rows, list(range(len(rows))), logits_BV, results)
                return Done(Result(batch.step, results))
        hidden_TH = self._forward(flat)
        self._prompt_logprobs(rows, hidden_TH, results)
        ends = flat.query_start[1:] - 1
        sampling = [i for i, row in enumerate(rows) if row.sample and results[i].error is None]
        if sampling:
            logits_BV = self.model.logits(hidden_TH[torch.from_numpy(ends[sampling]).long()])
            self._sample(rows, sampling, logits_BV, results)
        return Done(Result(batch.step, results))

    def reset(self) -> None:
        """Forget all requests, after a step that raised."""
        self.slots.reset()

    def warm(self) -> int:
        """Nothing to prepare: decode steps are recorded when they first come."""
        return 0

    def _forward(self, flat: Flat) -> torch.Tensor:
        groups = [
            GroupInputs(torch.from_numpy(table), torch.from_numpy(slots))
            for table, slots in zip(flat.block_tables, flat.slots, strict=True)
        ]
        step = StepInputs(
            torch.from_numpy(flat.query_start), torch.from_numpy(flat.context_len), groups
        )
        return self.model.forward(
            torch.from_numpy(flat.tokens_T), torch.from_numpy(flat.positions_T), step
        )

    def _sample(
        self,
        rows: list[Row],
        sampling: list[int],
        logits_BV: torch.Tensor,
        results: list[RowResult],
    ) -> None:
        """Sample for the rows that `sampling` names, in the order of `logits_BV`."""
        slots = [self.slots[rows[i].slot] for i in sampling]
        sampled = self.sampler.sample(logits_BV, slots)
        for i, slot, got in zip(sampling, slots, sampled, strict=True):
            results[i].tokens, results[i].logprobs = got.tokens, got.logprobs
            results[i].error = got.error
            for token in got.tokens:
                slot.append(token)

    def _prompt_logprobs(
        self, rows: list[Row], hidden_TH: torch.Tensor, results: list[RowResult]
    ) -> None:
        end = 0
        for i, row in enumerate(rows):
            begin, end = end, end + len(row.tokens)
            if not row.prompt_logprobs:
                continue
            slot = self.slots[row.slot]
            last = min(row.start + len(row.tokens) + 1, slot.num_prompt)
            targets = slot.tokens[row.start + 1 : last]
            found = self._of_targets(
                hidden_TH[begin : begin + len(targets)], targets, slot.params.prompt_logprobs or 0
            )
            if any(math.isnan(position.logprobs[0]) for position in found):
                results[i].error = NAN_ERROR
            else:
                results[i].prompt_logprobs = found

    def _of_targets(
        self, hidden_TH: torch.Tensor, targets: list[int], count: int
    ) -> list[TokenLogprobs]:
        found = []
        for start in range(0, len(targets), LOGIT_ROWS):
            logits_BV = self.model.logits(hidden_TH[start : start + LOGIT_ROWS])
            some = targets[start : start + LOGIT_ROWS]
            found += self.sampler.logprobs(logits_BV, some, count)
        return found
