"""How far next-token distributions and greedy texts are from a baseline's: the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Divergence:
    """Collects positions, in any number of pieces, from the logits that two models have there.

    Everything is computed in float64 from the logits as they are, over the whole vocabulary.
    """

    def __init__(self) -> None:
        self.kl: list[float] = []
        self._baseline_nll: list[float] = []
        self._candidate_nll: list[float] = []
        self._same_top = 0

    def add(
        self, baseline_BV: torch.Tensor, candidate_BV: torch.Tensor, targets: Sequence[int]
    ) -> None:
        """`targets` [B]: the tokens that the text has next."""
        p_BV = torch.log_softmax(baseline_BV.double(), dim=1)
        q_BV = torch.log_softmax(candidate_BV.double(), dim=1)
        self.kl += kl_divergence(p_BV, q_BV).tolist()
        index_B1 = torch.tensor(targets, device=p_BV.device)[:, None]
        self._baseline_nll += (-p_BV.gather(1, index_B1)[:, 0]).tolist()
        self._candidate_nll += (-q_BV.gather(1, index_B1)[:, 0]).tolist()
        self._same_top += int((baseline_BV.argmax(1) == candidate_BV.argmax(1)).sum())

    def figures(self) -> dict[str, float]:
        """KL divergence in nats, perplexities, and the share of positions with one top token."""
        count = len(self.kl)
        return {
            "positions": count,
            "kl_mean": math.fsum(self.kl) / count,
            "kl_worst": max(self.kl),
            "baseline_perplexity": perplexity(self._baseline_nll),
            "candidate_perplexity": perplexity(self._candidate_nll),
            "top_1_agreement": self._same_top / count,
        }


def kl_divergence(p_BV: torch.Tensor, q_BV: torch.Tensor) -> torch.Tensor:
    """sum over V of p (log p - log q), [B], from log-probabilities. Not below zero, which rounding
    alone would give."""
    terms_BV = torch.where(p_BV == -math.inf, 0.0, p_BV.exp() * (p_BV - q_BV))
    return terms_BV.sum(1).clamp(min=0.0)


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean of negative log-likelihoods; infinite where that is beyond a float."""
    mean = math.fsum(nll) / len(nll)
    return math.exp(mean) if mean < 700 else math.inf


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts of one length have in common at the beginning."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (left, right) in pairs if left != right), len(a))


def greedy_agreement(
    baseline: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]
) -> dict[str, float]:
    """The share of texts that are equal, and the mean place of the first difference; a text without
    one counts with its length."""
    places = [first_difference(a, b) for a, b in zip(baseline, candidate, strict=True)]
    equal = sum(place == len(text) for place, text in zip(places, baseline, strict=True))
    return {
        "greedy_agreement": equal / len(places),
        "mean_first_difference": math.fsum(places) / len(places),
    }
