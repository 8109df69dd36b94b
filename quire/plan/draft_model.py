"""A model that drafts, beside the one that answers: what it takes, in the plan of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from quire.config.options import Options
from quire.errors import PlanError
from quire.layers.build import Build, CacheLayer
from quire.models.registry import ModelConfig, build_model, read_config
from quire.plan import gpu, memory
from quire.plan.cpu import RECORDED_ROWS, native_misfit
from quire.plan.facts import DTYPES, ModelFacts, declared_dtype
from quire.plan.place import Place, held_formats, sum_weights, tensor_formats
from quire.plan.plan import Choice, WeightPart, format_bytes
from quire.plan.weight_parts import weight_parts


@dataclass(frozen=True)
class DraftModel:
    """What a model that drafts adds to a plan; sizes are bytes. `layers`: its caches, numbered
    behind those of the model. `rotary_bytes` per position. `max_model_len`: tokens of a request up
    to which it drafts."""

    weight_bytes: int
    weight_parts: tuple[WeightPart, ...]
    activation_bytes: int
    graph_bytes: int
    state_bytes: int
    rotary_bytes: int
    layers: tuple[CacheLayer, ...]
    fingerprint: str
    max_model_len: int


def plan_draft_model(
    options: Options, draft: ModelFacts, hf: dict[str, Any], place: Place, choices: list[Choice]
) -> DraftModel:
    """With the kernels, the number format and the place of the model whose config.json is `hf`.

    Raises PlanError or ModelError.
    """
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
        kv_dtype=place.kv_dtype,
        first_layer=len(place.build.caches),
    )
    build_model(draft.hf_config, build)
    if build.states or (place.kv_dtype == "fp8" and not build.packs_fp8):
        raise PlanError(
            "unsupported_draft_model",
            f"{draft.name} cannot draft",
            why="it keeps state of requests beside its blocks"
            if build.states
            else f"its layers cannot keep keys and values as {place.kv_dtype}",
            fix='use "method": "ngram"'
            + ("" if build.states else ", or leave out --kv-cache-dtype"),
        )
    widened = place.dtype if place.dtype in DTYPES else declared_dtype(draft.hf_config)
    formats = held_formats(build, tensor_formats(draft, options), widened, choices)
    add = _on_gpu if place.device == "cuda" else _on_cpu
    activations, graphs, state = add(options, theirs, build, place, formats)
    if place.device == "cuda":
        longest = options.model.max_model_len or ours.max_len
        groups = gpu.count_groups([*place.build.caches, *build.caches])
        step = place.max_num_seqs, place.max_num_batched_tokens
        state += gpu.drafter_buffers(*step, groups, longest)
    return DraftModel(
        sum_weights(build, formats),
        weight_parts(build.weights, formats),
        activations,
        graphs,
        state,
        sum(build.rotary_bytes.values()),
        tuple(build.caches),
        draft.fingerprint,
        _longest(options, draft.name, theirs.max_len),
    )


def _longest(options: Options, name: str, longest: int) -> int:
    speculation = options.engine.speculation
    asked = None if speculation is None else speculation.max_model_len
    if asked is not None and asked > longest:
        raise PlanError(
            "context_too_long",
            f"--speculative-config: max_model_len {asked} is more than {name} has",
            why=f"its longest context is {longest} tokens",
            fix="leave it out: it drafts as far as it can",
        )
    return asked or longest


Formats = Callable[[str], str]


def _on_cpu(
    options: Options, config: ModelConfig, build: Build, place: Place, formats: Formats
) -> tuple[int, int, int]:
    """Bytes of activations, graphs and state."""
    misfit = native_misfit(build.caches)
    if misfit and place.kernels == "native":
        raise PlanError(
            "unsupported_head_size",
            "the native kernels cannot compute the model that drafts",
            why=misfit,
            fix="use --kernels reference",
        )
    # A step's tokens, and one more behind each row.
    tokens = place.max_num_batched_tokens + place.max_num_seqs
    activations = memory.activation_bytes(config, build.width, tokens, place.max_num_seqs)
    if place.kernels == "reference":
        return activations + memory.reference_bytes(build, formats), 0, 0
    rows = min(RECORDED_ROWS, place.max_num_seqs)
    return activations, memory.recorded_bytes(config, build.width, rows), 0


def _on_gpu(
    options: Options, config: ModelConfig, build: Build, place: Place, formats: Formats
) -> tuple[int, int, int]:
    """Bytes of activations, graphs and state."""
    gpu.check_head_sizes(build)
    gpu.check_experts(config, build, formats)
    asked, itemsize = options.engine.speculation, DTYPES[place.dtype].itemsize
    assert asked is not None
    widest = 0 if place.deterministic else gpu.widened_bytes(build, formats)
    sequences, graphs = place.max_num_seqs, 0

    def activations(tokens: int) -> int:
        sizes = (config, build.width, tokens, sequences, itemsize)
        return widest + memory.gpu_activation_bytes(*sizes)

    if place.runner == "graph":
        # It reads in one graph for each size of mixed steps, and guesses in two for each number of
        # rows, which hold as many passes as there are drafts.
        passes = len(place.mixed_graphs)
        passes += 2 * len(place.decode_graphs) * asked.num_speculative_tokens
        graphs = gpu.GRAPH_BYTES * passes + activations(max(place.mixed_graphs, default=0))
    state = sequences * (config.hidden * itemsize + 4 * asked.num_speculative_tokens)
    return activations(place.max_num_batched_tokens + sequences), graphs, state


def with_draft_model(place: Place, draft: DraftModel, ahead: int) -> Place:
    """The place of a model beside which another drafts `ahead` tokens at a time: they never compute
    at the same time. Raises PlanError where they do not fit together."""
    activations = max(place.activation_bytes, draft.activation_bytes)
    room = place.room - draft.weight_bytes - draft.graph_bytes - draft.state_bytes
    room -= activations - place.activation_bytes
    if room <= 0:
        raise PlanError(
            "out_of_memory",
            "the model that drafts does not fit beside the other",
            why=f"its weights take {format_bytes(draft.weight_bytes)}; {format_bytes(place.room)} "
            "are left",
            fix='use a smaller one, or "method": "ngram"',
        )
    return replace(
        place,
        activation_bytes=activations,
        graph_bytes=place.graph_bytes + draft.graph_bytes,
        state_bytes=place.state_bytes + draft.state_bytes,
        room=room,
        ahead=ahead,
    )
