"""The operations of quire.kernels.triton.streams in plain torch, in float32 but for the results."""

from __future__ import annotations

import torch

from quire.kernels.compressed import Mix, StreamWeights
from quire.kernels.reference.streams.mixing import collapse, mixing, sigmoid, spread


def mix_streams(
    streams_TND: torch.Tensor,
    written: tuple[torch.Tensor, Mix] | None,
    weights: StreamWeights,
    norm_D: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, Mix]:
    if written is not None:
        streams_TND = write_streams(written[0], streams_TND, written[1])
    reads, writes, matrix = mixing(
        _logits(streams_TND, weights), weights.base, weights.scale,
        weights.streams, weights.stream_eps, weights.steps,
    )  # fmt: skip
    read_TD = collapse(streams_TND.float(), reads)
    square = read_TD.square().mean(-1, keepdim=True)
    x_TD = read_TD * torch.rsqrt(square + eps) * norm_D
    return streams_TND, x_TD.to(streams_TND.dtype), Mix(writes, matrix)


def write_streams(y_TD: torch.Tensor, streams_TND: torch.Tensor, mix: Mix) -> torch.Tensor:
    streams = spread(y_TD.float(), streams_TND.float(), mix.writes, mix.matrix)
    return streams.to(streams_TND.dtype)


def collapse_streams(streams_TND: torch.Tensor, weights: StreamWeights) -> torch.Tensor:
    reads = sigmoid(_logits(streams_TND, weights) * weights.scale + weights.base)
    return collapse(streams_TND.float(), reads + weights.stream_eps).to(streams_TND.dtype)


def _logits(streams_TND: torch.Tensor, weights: StreamWeights) -> torch.Tensor:
    flat = streams_TND.flatten(1).float()
    square = flat.square().mean(-1, keepdim=True)
    matrix: torch.Tensor = weights.matrix
    return flat @ matrix.T * torch.rsqrt(square + weights.eps)
