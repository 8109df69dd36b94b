"""Where a model runs, and what that takes before the KV cache is sized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from quire.errors import ModelError, PlanError
from quire.formats.layout import ORDERED_FORMATS, QUANT_FORMATS
from quire.layers.build import Build, DenseKernels
from quire.layers.experts import StackedExperts
from quire.plan.plan import Choice, format_bytes

DENSE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Place:
    """One device's part of the plan; sizes are bytes, names as in Plan.

    `room`: what the KV cache and the rotary tables may take. `fill`: the KV cache takes it all by
    default, instead of a default number of tokens.
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
    decode_graphs: tuple[int, ...] = ()
    mixed_graphs: tuple[int, ...] = ()


def matrices(build: Build) -> list[str]:
    """Names of all weights that are matrices."""
    return [t.name for w in build.weights for t in w.tensors() if len(t.shape) == 2]


def held_formats(
    build: Build, formats: Callable[[str], str], dtype: str, device: str, choices: list[Choice]
) -> Callable[[str], str]:
    """The format in which each tensor is held: quantised ones that the kernels do not have are
    widened to `dtype` while loading."""
    stacked = [weight for weight in build.weights if isinstance(weight, StackedExperts)]
    experts = {tensor.name for weight in stacked for tensor in weight.tensors()}

    def is_widened(name: str) -> bool:
        kernels = build.kernels
        in_experts = name in experts
        kept = cast(DenseKernels, kernels).quantized_experts if in_experts else kernels.quantized
        known = formats(name) in QUANT_FORMATS or formats(name) in ORDERED_FORMATS
        return known and formats(name) not in kept

    widened = {formats(name) for name in matrices(build) if is_widened(name)}
    ordered = widened.intersection(ORDERED_FORMATS)
    reasons = []
    if plain := ", ".join(sorted(widened - ordered)):
        reasons.append(f"there are no {device} kernels for {plain}")
    if ordered:
        reasons.append(f"columns are ordered (desc_act) in {', '.join(sorted(ordered))}")
    for reason in reasons:
        choices.append(Choice("quantised weights", f"widened to {dtype}", reason, downgrade=True))

    def held(name: str) -> str:
        return DENSE[dtype] if is_widened(name) else formats(name)

    return held


def sum_weights(build: Build, formats: Callable[[str], str]) -> int:
    """Bytes of all weights as packed. Raises ModelError for what the kernels do not have."""
    try:
        return sum(weight.nbytes(formats) for weight in build.weights)
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
