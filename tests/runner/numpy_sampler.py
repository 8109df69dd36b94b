"""vLLM's sampling, written again in numpy and float64 from the order in quire/runner/sampler.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quire.params import SamplingParams

Row = npt.NDArray[np.float64]


def processed(
    logits: Any,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    end_tokens: list[int],
    bad_words: list[list[int]],
) -> Row:
    """Logits after everything that comes before the temperature."""
    row = np.array(logits, dtype=np.float64)
    if params.allowed_token_ids is not None:
        row[[t for t in range(len(row)) if t not in params.allowed_token_ids]] = -np.inf
    for word in bad_words:
        *before, last = word
        if not before or output[-len(before) :] == before:
            row[last] = -np.inf
    if len(output) < params.min_tokens:
        row[end_tokens] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    for token in set(prompt + output):
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    for token in set(output):
        row[token] -= params.frequency_penalty * output.count(token)
        row[token] -= params.presence_penalty
    return row


def distribution(row: Row, params: SamplingParams) -> Row:
    """Probabilities after temperature, min-p, top-k and top-p."""
    scaled = row / params.temperature
    p = softmax(scaled)
    scaled[p < params.min_p * p.max()] = -np.inf
    if 0 < params.top_k < len(row):
        kth = np.sort(scaled)[-params.top_k]
        scaled[scaled < kth] = -np.inf
    p = softmax(scaled)
    # The least likely tokens that together have no more than 1 - top_p are left out.
    ascending = np.argsort(p, kind="stable")
    drop = np.cumsum(p[ascending]) <= 1 - params.top_p
    drop[-1] = False
    if params.top_p < 1:
        scaled[ascending[drop]] = -np.inf
    return softmax(scaled)


def softmax(row: Row) -> Row:
    weights: Row = np.exp(row - row.max())
    return weights / weights.sum()
