"""The eager runner: a Batch is computed at once, on the CPU. The reference for other runners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from quire.kv import most_blocks
from quire.kv.groups import KVGroup
from quire.layers.build import Build, CacheLayer, CpuKernels
from quire.models.registry import MTP, Model
from quire.plan.memory import LOGIT_ROWS
from quire.runner.eager_drafter import EagerDrafter
from quire.runner.eager_mtp import EagerMTP
from quire.runner.forward import forward
from quire.runner.recorded import RecordedSteps
from quire.runner.sampler import NAN_ERROR, Sampler
from quire.runner.slots import Flat, Slots, flatten
from quire.runner.watch import WatchLogits
from quire.step import (
    Batch,
    Result,
    Row,
    RowResult,
    TokenLogprobs,
    draft_tokens,
    sure_tokens,
    written_out,
)


class EagerPending:
    """A step that is computed, and sampled too unless `sample` will do it, given masks."""

    def __init__(self, result: Result, sample: Callable[[dict[int, bytes]], None] | None = None):
        self._result = result
        self._sample = sample

    def done(self) -> bool:
        return self._sample is None

    def open(self, masks: dict[int, bytes]) -> None:
        """Sample; see Pending in quire/engine/core.py."""
        sample, self._sample = self._sample, None
        assert sample is not None, "no row of this step is gated, or it is open already"
        sample(masks)

    def result(self) -> Result:
        assert self._sample is None, "a step with gated rows must be opened first"
        return self._result


def allocate_caches(
    build: Build,
    groups: Sequence[KVGroup],
    pool_blocks: Sequence[int],
    dtype: torch.dtype,
    more: Sequence[CacheLayer] = (),
) -> None:
    """Memory for every attention layer: its tensors, of as many blocks as its pool has.
    `more`: layers of another model, numbered behind those of this one.

    Groups of one pool share its memory, as each block belongs to one of them at a time. Pages are
    touched when first written, so a large cache costs nothing until it is used.
    """
    caches = [*build.caches, *more]
    memory: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
    for group in groups:
        blocks = pool_blocks[group.pool]
        for i, layer in enumerate(group.layers):
            cache = caches[layer]
            if (group.pool, i) not in memory:
                memory[group.pool, i] = tuple(
                    torch.empty((blocks, *shape), dtype=dtype, device=build.device)
                    for shape in cache.page
                )
            cache.group, cache.tensors = group.index, memory[group.pool, i]


def allocate_states(build: Build, num_slots: int) -> None:
    """Memory for what layers keep of each request besides their caches."""
    for state in build.states:
        state.tensor = torch.empty((num_slots, *state.shape), device=build.device)


class EagerRunner:
    """Owns the slots; the model and its caches are given built, loaded and allocated.

    `block_sizes`: as in Slots. `draft_model` drafts, or `mtp`, the model's own module. `stateful`:
    layers keep state of requests, so that no step can be computed twice to be recorded. `submit`
    raises whatever the computation raises; the caller then calls `reset`.
    """

    def __init__(
        self,
        model: Model,
        kernels: CpuKernels,
        num_groups: int,
        num_slots: int,
        max_model_len: int,
        draft_model: Model | None = None,
        block_sizes: Sequence[int] | None = None,
        stateful: bool = False,
        mtp: MTP | None = None,
    ):
        self.model = model
        self.sampler = Sampler(kernels)
        self.replaying = True  # False: the model's code runs in every step
        self.watch: WatchLogits | None = None  # set by who wants to measure
        max_blocks = most_blocks(max_model_len)
        self.slots = Slots(num_slots, max_blocks, num_groups, block_sizes)
        # Only the native kernels can be recorded.
        record = None if stateful else getattr(kernels, "record", None)
        self._recorded = record and RecordedSteps(model, record, num_groups, max_blocks)
        self._drafter: EagerDrafter | None = None
        if draft_model is not None:
            self._drafter = EagerDrafter(draft_model, self.sampler, self.slots, num_groups)
            if record:
                self._drafter.record(record, num_groups, max_blocks)
        self._mtp: EagerMTP | None = None
        if mtp is not None:
            self._mtp = EagerMTP(mtp, self.sampler, self.slots, num_groups)

    @torch.inference_mode()
    def submit(self, batch: Batch) -> EagerPending:
        """Compute a step; where a row is gated, all but sampling."""
        batch = written_out(batch)
        self.slots.apply(batch)
        rows = batch.rows
        results = [RowResult(tokens=[]) for _ in rows]
        flat = flatten(rows, self.slots)
        if (
            self._recorded
            and self.replaying
            and all(row.sample and len(row.tokens) == 1 and not row.prompt_logprobs for row in rows)
        ):
            found = self._recorded.compute(flat)
            if found is not None:
                hidden_TH, logits_BV = found
                everyone = list(range(len(rows)))
                return self._sampled(batch, flat, hidden_TH, everyone, logits_BV, results)
        hidden_TH = forward(self.model, flat)
        self._prompt_logprobs(rows, hidden_TH, results)
        fine = _fine_tokens(hidden_TH, flat.query_start)
        for i, row in enumerate(rows):
            if fine[i] < len(sure_tokens(row)):
                results[i] = RowResult(tokens=[], error=NAN_ERROR)
        sampling = [i for i, row in enumerate(rows) if row.sample and results[i].error is None]
        if not sampling:
            return self._sampled(batch, flat, hidden_TH, [], hidden_TH[:0], results)
        # What lies behind a draft that is not fine is left to the next step.
        drafts = [draft_tokens(rows[i])[: fine[i] - len(sure_tokens(rows[i]))] for i in sampling]
        places = [
            flat.query_start[i + 1] - 1 - rows[i].drafts + k
            for i, some in zip(sampling, drafts, strict=True)
            for k in range(1 + len(some))
        ]
        logits_RV = self.model.logits(hidden_TH[torch.tensor(places)])
        return self._sampled(batch, flat, hidden_TH, sampling, logits_RV, results, drafts)

    def reset(self) -> None:
        """Forget all requests, after a step that raised."""
        self.slots.reset()

    def warm(self) -> int:
        """Nothing to prepare: decode steps are recorded when they first come."""
        return 0

    def _sampled(
        self,
        batch: Batch,
        flat: Flat,
        hidden_TH: torch.Tensor,
        sampling: list[int],
        logits_RV: torch.Tensor,
        results: list[RowResult],
        drafts: list[list[int]] | None = None,
    ) -> EagerPending:
        """Sample for the rows that `sampling` names, in the order of `logits_RV`, which has a row
        for each and one for each of its `drafts`: now, or once the masks of gated rows are there.
        Then what drafts goes on; `hidden_TH` has the hidden states of the step's tokens.
        """
        rows, result = batch.rows, Result(batch.step, results)
        drafts = [[] for _ in sampling] if drafts is None else drafts

        @torch.inference_mode()
        def sample(masks: dict[int, bytes]) -> None:
            chosen = [k for k, i in enumerate(sampling) if i in masks or not rows[i].gated]
            if chosen:
                extend(chosen, masks)
            if self._drafter is not None:
                self._drafter.draft(batch, results)
            if self._mtp is not None:
                self._mtp.draft(batch, results, hidden_TH, flat.query_start)

        def extend(chosen: list[int], masks: dict[int, bytes]) -> None:
            slots = [self.slots[rows[sampling[k]].slot] for k in chosen]
            for k, slot in zip(chosen, slots, strict=True):
                mask = masks.get(sampling[k])
                slot.mask = None if mask is None else _bools(mask, logits_RV.shape[1])
            some = logits_RV
            if len(chosen) < len(sampling):
                places = [p for k, p in enumerate(_spans(drafts)) if k in chosen]
                some = logits_RV[[i for place in places for i in place]]
            found = self.sampler.extend(some, slots, [drafts[k] for k in chosen])
            for k, got in zip(chosen, found, strict=True):
                mine = results[sampling[k]]
                mine.tokens, mine.logprobs, mine.error = got.tokens, got.logprobs, got.error

        if any(row.gated for row in rows):
            return EagerPending(result, sample)
        sample({})
        return EagerPending(result)

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
            if self.watch is not None:
                self.watch(logits_BV, some)
            found += self.sampler.logprobs(logits_BV, some, count)
        return found


def _bools(mask: bytes, size: int) -> torch.Tensor:
    """bool [size] of a mask (quire/step.py)."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), count=size, bitorder="little")
    return torch.from_numpy(bits).bool()


def _spans(drafts: list[list[int]]) -> list[range]:
    """Where among rows of logits those of each row of a step are."""
    ends = list(accumulate(1 + len(some) for some in drafts))
    return [range(end - 1 - len(some), end) for end, some in zip(ends, drafts, strict=True)]


def _fine_tokens(hidden_TH: torch.Tensor, query_start: npt.NDArray[np.int32]) -> list[int]:
    """How many tokens of each row come before one whose hidden state is not all finite: then its
    keys and values may not be either, and if they are not, neither is its hidden state, as it
    attends to itself."""
    spoiled = np.flatnonzero((~torch.isfinite(hidden_TH)).any(1).numpy())
    starts, ends = query_start[:-1], query_start[1:]
    first = np.append(spoiled, len(hidden_TH))[np.searchsorted(spoiled, starts)]
    found: list[int] = (np.minimum(first, ends) - starts).tolist()
    return found
