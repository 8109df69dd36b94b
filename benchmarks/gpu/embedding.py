"""Token embedding of random ids, beside torch's.

python -m benchmarks.gpu.embedding
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from benchmarks.gpu.harness import Timed, command, report
from benchmarks.gpu.shapes import DEVICE, MODELS, TOKENS, copies, random
from quire.kernels.triton.embedding.embedding import embedding


def cases(name: str, t: int, table: torch.Tensor) -> list[Timed]:
    vocab, h = table.shape
    nbytes = 4 * t * h + 8 * t
    ids = [torch.randint(vocab, (t,), device=DEVICE) for _ in range(copies(nbytes))]
    ours = [partial(embedding, i, table, 1.0) for i in ids]
    peer = [partial(functional.embedding, i, table) for i in ids]
    return [
        Timed(f"embedding {name} T {t}", ours, nbytes),
        Timed(f"embedding of torch {name} T {t}", peer, nbytes),
    ]


if __name__ == "__main__":
    command(__doc__)
    for model in MODELS:
        table = random(model.vocab, model.hidden)
        for tokens in TOKENS:
            report(cases(model.name, tokens, table))
