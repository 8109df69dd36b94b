"""From logits to tokens, one request at a time.

Every row is sampled by itself, so a request's tokens do not depend on the batch. The order of
operations is vLLM's: reported log-probabilities come from the raw logits; then allowed tokens,
bad words, min_tokens, logit bias, penalties; temperature; min-p; top-k; top-p; and the choice by
Gumbel-max with noise keyed by (seed, choice, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from quire.layers.build import CpuKernels
from quire.runner.slots import Slot
from quire.speculative.verify import verify
from quire.step import FORBIDDEN_ERROR as FORBIDDEN_ERROR
from quire.step import NAN_ERROR as NAN_ERROR
from quire.step import RowResult, TokenLogprobs

# vLLM takes lower temperatures for 0; dividing by much less would overflow.
LEAST_TEMPERATURE = 1e-5


class Sampler:
    """Samples rows of logits float32 [B, V]."""

    def __init__(self, kernels: CpuKernels):
        self.kernels = kernels

    def sample(self, logits_BV: torch.Tensor, slots: list[Slot]) -> list[RowResult]:
        """One token per row, for the slots' next positions. A row whose logits hold NaN or whose
        largest one is infinite gets an error, and so does one that forbids every token."""
        best = self.kernels.argmax(logits_BV).tolist()
        return [self._sample_row(logits_BV[i], best[i], slot) for i, slot in enumerate(slots)]

    def guess(self, logits_BV: torch.Tensor, slots: Sequence[Slot]) -> list[int | None]:
        """What `sample` would choose, None where it would fail, and no log-probabilities."""
        best = self.kernels.argmax(logits_BV).tolist()
        rows = zip(logits_BV, best, slots, strict=True)
        return [self._choice(logits_V, found, slot)[0] for logits_V, found, slot in rows]

    def extend(
        self, logits_RV: torch.Tensor, slots: Sequence[Slot], drafts: Sequence[Sequence[int]]
    ) -> list[RowResult]:
        """Let each slot go on by one token, and by one more behind each of its `drafts` that is
        accepted. `logits_RV` has a row for the first and one for each draft, slot by slot."""
        best = self.kernels.argmax(logits_RV).tolist()
        found, first = [], 0
        for slot, guesses in zip(slots, drafts, strict=True):
            found.append(verify(guesses, partial(self._extend, logits_RV, best, slot, first)))
            first += 1 + len(guesses)
        return found

    def _extend(
        self, logits_RV: torch.Tensor, best: list[int], slot: Slot, first: int, i: int
    ) -> RowResult:
        got = self._sample_row(logits_RV[first + i], best[first + i], slot)
        for token in got.tokens:
            slot.append(token)
        return got

    def _sample_row(self, logits_V: torch.Tensor, best: int, slot: Slot) -> RowResult:
        token, error = self._choice(logits_V, best, slot)
        if token is None:
            return RowResult(tokens=[], error=error)
        logprobs = None
        if slot.params.logprobs is not None:
            logprobs = self.logprobs(logits_V[None], [token], slot.params.logprobs)
        return RowResult(tokens=[token], logprobs=logprobs)

    def _choice(
        self, logits_V: torch.Tensor, best: int, slot: Slot
    ) -> tuple[int | None, str | None]:
        """The token of a row whose largest logit is that of `best`, or an error."""
        if best < 0 or not math.isfinite(logits_V[best]):
            return None, NAN_ERROR
        token = best if _plain_greedy(slot) else self._choose(logits_V.clone(), slot)
        return token, FORBIDDEN_ERROR if token is None else None

    def logprobs(
        self, logits_BV: torch.Tensor, tokens: Sequence[int], count: int
    ) -> list[TokenLogprobs]:
        """Of each row, log-probabilities of its token and of its `count` most likely ones, with
        ranks. A row's do not depend on the others."""
        logprobs_BV = logits_BV - self.kernels.logsumexp(logits_BV)[:, None]
        chosen_B1 = logprobs_BV.gather(1, torch.tensor(tokens)[:, None])
        ranks = ((logprobs_BV > chosen_B1).sum(1) + 1).tolist()
        count = min(count, logprobs_BV.shape[1])
        top = torch.topk(logprobs_BV, count)
        top_ids, top_values = top.indices.tolist(), top.values.tolist()
        return [
            TokenLogprobs([token, *ids], [chosen, *values], [rank, *range(1, count + 1)])
            for token, chosen, rank, ids, values in zip(
                tokens, chosen_B1[:, 0].tolist(), ranks, top_ids, top_values, strict=True
            )
        ]

    def _choose(self, logits_V: torch.Tensor, slot: Slot) -> int | None:
        """The token, or None where none is allowed."""
        params = slot.params
        _constrain(logits_V, slot)
        _penalise(logits_V, slot)
        # A tiny repetition penalty can overflow; infinities would leave nothing to choose by.
        logits_V.clamp_(max=torch.finfo(torch.float32).max)
        best = int(self.kernels.argmax(logits_V[None])[0])
        largest = float(logits_V[best])
        if largest == -math.inf:
            return None
        if params.greedy:
            return best
        logits_V -= largest
        logits_V /= max(params.temperature, LEAST_TEMPERATURE)
        logits_V = _keep_likely(logits_V, params.min_p, params.top_k, params.top_p)
        noise_V = self.kernels.gumbel(slot.seed, slot.choice, len(slot.tokens), logits_V.shape[0])
        return int(self.kernels.argmax((logits_V + noise_V)[None])[0])


def _plain_greedy(slot: Slot) -> bool:
    """Nothing but the largest logit decides."""
    params = slot.params
    return (
        params.greedy
        and slot.output_counts is None
        and params.allowed_token_ids is None
        and slot.mask is None
        and not params.logit_bias
        and not slot.bad_words
        and slot.num_output >= params.min_tokens
    )


def _constrain(logits_V: torch.Tensor, slot: Slot) -> None:
    """Allowed tokens, bad words, min_tokens and bias, in place."""
    if slot.allowed is not None:
        kept = logits_V[slot.allowed]
        logits_V.fill_(-torch.inf)
        logits_V[slot.allowed] = kept
    if slot.mask is not None:
        logits_V.masked_fill_(~slot.mask, -torch.inf)
    for words in slot.bad_words:
        prefix = len(words) - 1
        if prefix <= slot.num_output and slot.tokens[len(slot.tokens) - prefix :] == words[:-1]:
            logits_V[words[-1]] = -torch.inf
    if slot.num_output < slot.params.min_tokens and slot.ends is not None:
        logits_V[slot.ends] = -torch.inf
    if slot.bias_ids is not None and slot.bias is not None:
        logits_V[slot.bias_ids] += slot.bias


def _penalise(logits_V: torch.Tensor, slot: Slot) -> None:
    """Repetition (prompt and output), frequency and presence (output) penalties, in place."""
    if slot.output_counts is None or slot.prompt_ids is None:
        return
    params = slot.params
    output_ids = slot.output_counts.ids
    if params.repetition_penalty != 1.0:
        seen = torch.cat([slot.prompt_ids, output_ids])  # one in both gets the same value twice
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / factor, values * factor)
    if len(output_ids):
        counts = slot.output_counts.counts
        logits_V[output_ids] -= params.frequency_penalty * counts + params.presence_penalty


def _keep_likely(logits_V: torch.Tensor, min_p: float, top_k: int, top_p: float) -> torch.Tensor:
    """-inf for tokens outside min-p, top-k or top-p. The most likely token always stays."""
    if min_p > 0.0:
        logits_V = logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), -torch.inf)
    size = logits_V.shape[0]
    if 0 < top_k < size:
        smallest = torch.topk(logits_V, top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, ids = logits_V.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered.double(), dim=0)
        # A token stays while the probability of those before it is below top_p.
        before = probabilities.cumsum(0) - probabilities
        drop = before >= top_p
        drop[0] = False
        logits_V = logits_V.index_fill(0, ids[drop], -torch.inf)
    return logits_V
