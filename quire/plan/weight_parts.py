"""A model's weights by how often its steps read them, for what a step must at least take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from quire.layers.build import Weight
from quire.layers.embedding import Embedding
from quire.plan.plan import WeightPart

LAYERS, EXPERTS, HEAD, EMBEDDING = "layers", "experts", "head", "embedding"
_HEADS = ("lm_head", "head")


def weight_parts(
    weights: Sequence[Weight],
    formats: Callable[[str], str],
    in_e4m3: Callable[[str], bool] = lambda name: False,
) -> tuple[WeightPart, ...]:
    """`formats`: those that weights are held in; `in_e4m3`: whether many tokens are multiplied with
    a weight in e4m3. None are on a CPU, and by what drafts, whose passes are of few tokens."""
    tied = not any(_is_head(weight) for weight in weights)
    found = {name: [0, 0, 0] for name in (LAYERS, EXPERTS, HEAD, EMBEDDING)}
    layers: set[str] = set()
    for weight in weights:
        sums = found[_part_of(weight, tied)]
        sums[0] += weight.nbytes(formats)
        for tensor in weight.tensors():
            values = prod(tensor.shape)
            sums[1] += values
            sums[2] += values if in_e4m3(tensor.name) else 0
            layer, among_experts, _ = tensor.name.partition(".experts.")
            if among_experts:
                layers.add(layer)
    return tuple(
        WeightPart(name, nbytes, values, e4m3, len(layers) if name == EXPERTS else 0)
        for name, (nbytes, values, e4m3) in found.items()
    )


def _part_of(weight: Weight, tied: bool) -> str:
    if isinstance(weight, Embedding):
        return HEAD if tied else EMBEDDING
    if _is_head(weight):
        return HEAD
    return EXPERTS if any(".experts." in t.name for t in weight.tensors()) else LAYERS


def _is_head(weight: Weight) -> bool:
    return any(tensor.name.partition(".")[0] in _HEADS for tensor in weight.tensors())
