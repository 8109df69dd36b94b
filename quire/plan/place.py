"""Where a model runs, and what that takes before the KV cache is sized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.config.options import Options
from quire.errors import ModelError, PlanError
from quire.formats.layout import is_quantized
from quire.layers.build import Build
from quire.layers.embedding import Embedding
from quire.layers.experts import StackedExperts
from quire.layers.latent import HeadProducts
from quire.layers.linear import Linear
from quire.models.deepseek_v4.parts import GroupedLinear
from quire.models.registry import build_model, build_mtp
from quire.plan.facts import ModelFacts, declared_dtype
from quire.plan.plan import Choice, WeightPart, format_bytes

DENSE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
DENSE_FORMATS = ("f64", "f32", "f16", "bf16")


@dataclass(frozen=True)
class Place:
    """One device's part of the plan; sizes are bytes, names as in Plan.

    `max_sampled`: rows of logits that a step samples from at most. `room`: what the KV cache and
    the rotary tables may take. `fill`: the KV cache takes it all by default, instead of a default
    number of tokens. `ahead`: tokens that a model drafts behind those of a step. `draft_bytes` and
    `draft_parts`: weights of the model's MTP module, where it drafts; its cache is in `build` with
    the others.
    """

    device: str
    device_name: str
    threads: int
    dtype: str
    kv_dtype: str
    kernels: str
    isa: str
    runner: str
    deterministic: bool
    async_scheduling: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    build: Build
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    state_bytes: int
    reserve_bytes: int
    room: int
    fill: bool
    max_sampled: int
    weight_parts: tuple[WeightPart, ...]
    decode_graphs: tuple[int, ...] = ()
    mixed_graphs: tuple[int, ...] = ()
    ahead: int = 0
    draft_bytes: int = 0
    draft_parts: tuple[WeightPart, ...] = ()

    @property
    def step_tokens(self) -> int:
        """Most tokens of one request that a step writes."""
        return self.max_num_batched_tokens + self.ahead


def tensor_formats(model: ModelFacts, options: Options) -> Callable[[str], str]:
    """The format each tensor will have before packing: --dtype changes dense ones."""
    dense = DENSE.get(options.model.dtype)
    fallback = DENSE[declared_dtype(model.hf_config)]

    def lookup(name: str) -> str:
        stored = (model.formats or {}).get(name, fallback)
        return dense if dense is not None and stored in DENSE_FORMATS else stored

    return lookup


def build_all(hf: dict[str, Any], build: Build, mtp: bool) -> int:
    """Build the model, and its MTP module where that drafts; how many weights are the model's own.
    Raises ModelError where it has no such module."""
    model = build_model(hf, build)
    own = len(build.weights)
    if mtp:
        build_mtp(hf, model, build)
    return own


def matrices(build: Build) -> list[str]:
    """Names of all weights that are matrices."""
    return [t.name for w in build.weights for t in w.tensors() if len(t.shape) == 2]


def held_formats(
    build: Build, formats: Callable[[str], str], dtype: str, choices: list[Choice]
) -> Callable[[str], str]:
    """The format in which each tensor is held: quantised ones that the kernels do not have are
    widened to `dtype` while loading."""
    widened: dict[str, str] = {}
    products: dict[str, str] = {}
    for weight in build.weights:
        if isinstance(weight, Linear | Embedding | StackedExperts | GroupedLinear):
            widened |= weight.widened(formats)
        elif isinstance(weight, HeadProducts):
            products |= weight.widened(formats)
    if widened:
        counts = Counter(widened.values())
        reason = "; ".join(f"{n} weights: {why}" for why, n in counts.items())
        if len(counts) == 1:
            reason = next(iter(counts))
        count = sum(is_quantized(formats(name)) for name in matrices(build))
        some = "" if count == len(widened) else f"{len(widened)} of {count} "
        chosen = f"{some}widened to {dtype}"
        choices.append(Choice("quantised weights", chosen, reason, downgrade=True))
    for reason in sorted(set(products.values())):
        # No kernel could do better: not a downgrade.
        choices.append(Choice("kv_b_proj", f"widened to {dtype}", reason))

    def held(name: str) -> str:
        return DENSE[dtype] if name in widened or name in products else formats(name)

    return held


def choose_latent_form(build: Build, choices: list[Choice]) -> None:
    """How attention over latents is computed, where a model has it."""
    if any(cache.latent for cache in build.caches):
        reason = (
            "prompts and decoding alike: queries are taken to the latents' space, so that keys and "
            "values are never made and a token's bits do not depend on how a prompt is cut"
        )
        choices.append(Choice("latent attention", "absorbed", reason))


def sum_weights(build: Build, formats: Callable[[str], str], first: int = 0) -> int:
    """Bytes of all weights as packed, from the `first` on. Raises ModelError for what the kernels
    do not have."""
    try:
        return sum(weight.nbytes(formats) for weight in build.weights[first:])
    except ValueError as error:
        raise ModelError(
            "unsupported_format",
            "a weight has a format or shape that the kernels do not have",
            why=str(error),
            fix="use another file of the model, such as bfloat16 safetensors or a q8_0 GGUF",
        ) from None


def remaining(available: int, where: str, parts: dict[str, int], flags: dict[str, str]) -> int:
    """What `parts` leave of `available`. Raises PlanError where they are too much: it names the
    largest part, and from `flags` what makes that smaller."""
    room = available - sum(parts.values())
    if room > 0:
        return room
    largest = max(parts, key=lambda name: parts[name])
    raise PlanError(
        "out_of_memory",
        f"the model does not fit in {where}",
        why=", ".join(f"{name} take {format_bytes(size)}" for name, size in parts.items())
        + f"; {format_bytes(available)} are available",
        fix=f"{largest} are the most: {flags[largest]}",
    )
