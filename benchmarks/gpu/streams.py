"""DeepSeek V4's streams at Flash's and Pro's sizes: writing, mixing and reading between layers.

    python -m benchmarks.gpu.streams

GB/s counts the streams, read and written once each, the layer's result, what is read of them, and
the matrix. No peer has the same operation as one function.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, TOKENS, copies, random
from quire.kernels.compressed import Mix, StreamWeights
from quire.kernels.triton.streams.mix_streams import collapse_streams, mix_streams
from quire.kernels.triton.streams.write_streams import write_and_multiply, write_streams

N = 4
HIDDEN = {"Flash": 4096, "Pro": 7168}


def weights_of(hidden: int, rows: int, scales: int) -> StreamWeights:
    matrix = torch.randn(rows, N * hidden, device=DEVICE) * (N * hidden) ** -0.5
    base, scale = torch.randn(rows, device=DEVICE), torch.ones(scales, device=DEVICE)
    return StreamWeights(matrix, base, scale, N, 1e-6, 1e-6, 20)


def cases(name: str, tokens: int, hidden: int) -> list[Timed]:
    rows = N * (N + 2)
    norm = torch.ones(hidden, device=DEVICE)
    streams, row, matrix = 2 * tokens * N * hidden, 2 * tokens * hidden, 4 * rows * N * hidden
    whole = 2 * streams + 2 * row + matrix
    runs: dict[str, list[partial[object]]] = {"mix": [], "parts": [], "write": [], "collapse": []}
    for _ in range(copies(whole)):
        weights, head = weights_of(hidden, rows, 3), weights_of(hidden, N, 1)
        x, y = random(tokens, N, hidden), random(tokens, hidden)
        mix = Mix(torch.rand(tokens, N, device=DEVICE), torch.rand(tokens, N, N, device=DEVICE) / N)
        runs["mix"].append(partial(mix_streams, x, (y, mix), weights, norm, 1e-6))
        runs["parts"].append(partial(write_and_multiply, x, (y, mix), weights.matrix))
        runs["write"].append(partial(write_streams, y, x, mix))
        runs["collapse"].append(partial(collapse_streams, x, head))
    sizes = {
        "mix": whole,
        "parts": whole - row,
        "write": 2 * streams + row,
        "collapse": streams + row + matrix * N // rows,
    }
    return [Timed(f"{kind} {name} T {tokens}", runs[kind], sizes[kind]) for kind in runs]


if __name__ == "__main__":
    command(__doc__)
    for model, size in HIDDEN.items():
        for count in TOKENS:
            report(cases(model, count, size))
