"""Manifold-constrained hyper-connections: how a layer reads n streams and writes to them.

All in float32. Sums over streams are written out, and sigmoids are made of `exp`, because then a
token's bits do not depend on the others: torch rounds the ends of an array otherwise than the rest
where it has no vector form of an operation (sigmoid, softplus, silu).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add

import torch


def total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, one after another."""
    return reduce(add, parts)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


def mixing(
    logits_TM: torch.Tensor,
    base_M: torch.Tensor,
    scale_3: torch.Tensor,
    streams: int,
    eps: float,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much a layer reads of each stream [T, n], how much of its result each stream gets [T, n],
    and how streams pass into each other [T, n, n] (from, to).

    M = n (n + 2) logits: reads, writes, and the matrix row by row, which `steps` steps of Sinkhorn
    and Knopp make nearly doubly stochastic: `steps` over columns and one less over rows.
    """
    n = streams
    reads = sigmoid(logits_TM[:, :n] * scale_3[0] + base_M[:n]) + eps
    writes = 2 * sigmoid(logits_TM[:, n : 2 * n] * scale_3[1] + base_M[n : 2 * n])
    matrix = (logits_TM[:, 2 * n :] * scale_3[2] + base_M[2 * n :]).view(-1, n, n)
    matrix = matrix.softmax(-1) + eps
    matrix = matrix / (total(matrix.unbind(1))[:, None] + eps)
    for _ in range(steps - 1):
        matrix = matrix / (total(matrix.unbind(2))[:, :, None] + eps)
        matrix = matrix / (total(matrix.unbind(1))[:, None] + eps)
    return reads, writes, matrix


def collapse(streams_TND: torch.Tensor, weights_TN: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the streams: [T, D]."""
    weighted = zip(streams_TND.unbind(1), weights_TN.unbind(1), strict=True)
    return total(stream * weight[:, None] for stream, weight in weighted)


def spread(
    y_TD: torch.Tensor, streams_TND: torch.Tensor, writes_TN: torch.Tensor, matrix_TNN: torch.Tensor
) -> torch.Tensor:
    """The streams after a layer that gave y: each gets its part of y and of all streams before."""
    passed = zip(streams_TND.unbind(1), matrix_TNN.unbind(1), strict=True)
    kept = total(stream[:, None] * weights[:, :, None] for stream, weights in passed)
    return writes_TN[:, :, None] * y_TD[:, None] + kept
