"""A model that drafts, beside the one that answers: what it takes, in the plan of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quire.config.options import Options
from quire.errors import PlanError
from quire.layers.build import Build, CacheLayer
from quire.models.registry import build_model, read_config
from quire.plan import memory
from quire.plan.facts import DTYPES, ModelFacts, declared_dtype
from quire.plan.place import NATIVE_HEAD_SIZES, Place, held_formats, sum_weights, tensor_formats
from quire.plan.plan import Choice, format_bytes


@dataclass(frozen=True)
class DraftModel:
    """What a model that drafts adds to a plan; sizes are bytes. `layers`: its caches, numbered
    behind those of the model. `rotary_bytes` per position."""

    weight_bytes: int
    activation_bytes: int
    rotary_bytes: int
    layers: tuple[CacheLayer, ...]
    fingerprint: str


def plan_draft_model(
    options: Options, draft: ModelFacts, hf: dict[str, Any], place: Place, choices: list[Choice]
) -> DraftModel:
    """With the kernels, the number format and the place of the model whose config.json is `hf`.

    Raises PlanError or ModelError.
    """
    if place.device != "cpu":
        raise PlanError(
            "no_draft_model",
            f"{draft.name} cannot draft on a GPU yet",
            why="the GPU runner verifies drafts, but computes one model only",
            fix='use "method": "ngram", or --device cpu',
        )
    ours, theirs = read_config(hf), read_config(draft.hf_config)
    if ours.vocab_size != theirs.vocab_size:
        raise PlanError(
            "draft_vocabulary",
            f"{draft.name} cannot draft: its vocabulary is another",
            why=f"it has {theirs.vocab_size} tokens, the model {ours.vocab_size}",
            fix="name a smaller model of the same family",
        )
    build = Build(
        place.build.kernels,
        dtype=DTYPES.get(place.dtype),
        group=place.build.group,
        first_layer=len(place.build.caches),
    )
    build_model(draft.hf_config, build)
    _check_head_sizes(build, place, draft)
    widened = place.dtype if place.dtype in DTYPES else declared_dtype(draft.hf_config)
    formats = held_formats(build, tensor_formats(draft, options), widened, choices)
    tokens = place.max_num_batched_tokens + place.max_num_seqs
    activations = memory.activation_bytes(theirs, build.width, tokens, place.max_num_seqs)
    if place.kernels == "reference":
        activations += memory.reference_bytes(build, formats)
    return DraftModel(
        sum_weights(build, formats),
        activations,
        sum(build.rotary_bytes.values()),
        tuple(build.caches),
        draft.fingerprint,
    )


def _check_head_sizes(build: Build, place: Place, draft: ModelFacts) -> None:
    odd = sorted({cache.head_size for cache in build.caches} - set(NATIVE_HEAD_SIZES))
    if odd and place.kernels == "native":
        raise PlanError(
            "unsupported_head_size",
            f"{draft.name} cannot draft: the native kernels do not have head size {odd[0]}",
            why="multiples of 8 up to 256",
            fix="use --kernels reference",
        )


def with_draft_model(place: Place, draft: DraftModel, ahead: int) -> Place:
    """The place of a model beside which another drafts `ahead` tokens at a time: they never compute
    at the same time. Raises PlanError where they do not fit together."""
    activations = max(place.activation_bytes, draft.activation_bytes)
    room = place.room - draft.weight_bytes - (activations - place.activation_bytes)
    if room <= 0:
        raise PlanError(
            "out_of_memory",
            "the model that drafts does not fit beside the other",
            why=f"its weights take {format_bytes(draft.weight_bytes)}; {format_bytes(place.room)} "
            "are left",
            fix='use a smaller one, or "method": "ngram"',
        )
    return replace(place, activation_bytes=activations, room=room, ahead=ahead)
