"""resolve(options, model, machine) -> Plan: a pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quire.comm.group import Group
from quire.config.options import Options
from quire.errors import ModelError, PlanError
from quire.hardware.machine import Machine
from quire.kv.groups import KVGroup
from quire.layers.build import Build, Kernels
from quire.models.registry import build_model, read_config
from quire.plan import memory
from quire.plan.plan import Choice, Plan, format_bytes

# Bumped by hand whenever any kernel's bits can change.
NUMERICS_VERSION = 1
# Decode steps of up to this many rows are recorded and run again (quire/runner/recorded.py).
RECORDED_ROWS = 8
NATIVE_HEAD_SIZES = range(8, 257, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE_FORMATS = ("f64", "f32", "f16", "bf16")
# A default KV cache holds one request of the model's longest context, within these bounds, if half
# of what is left allows.
DEFAULT_CONTEXT_TOKENS = range(16384, 32769)
# No engine starts with room for fewer tokens than this.
LEAST_CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class ModelFacts:
    """What the plan must know of a model: its config.json, the format of each tensor by
    checkpoint name (None: no weights at hand, the config's dtype is assumed), its fingerprint."""

    name: str
    hf_config: dict[str, Any]
    formats: dict[str, str] | None
    fingerprint: str = ""


@dataclass(frozen=True)
class KernelFacts:
    """The kernels found on this machine: `native` None with the reason `why_not`."""

    reference: Kernels
    native: Kernels | None
    why_not: str = ""
    isa: str = ""


def resolve(
    options: Options,
    model: ModelFacts,
    machine: Machine,
    found: KernelFacts,
    group: Group | None = None,
) -> Plan:
    """Decide everything, or raise PlanError (with the numbers) or ModelError.

    `group`: the rank whose share of weights and caches is planned; one rank by default.
    """
    group = group or Group()
    engine = options.engine
    choices: list[Choice] = []
    dtype = DTYPES.get(options.model.dtype)
    shapes = Build(found.reference, dtype=dtype, group=group)
    build_model(model.hf_config, shapes)
    head_sizes = {cache.head_size for cache in shapes.caches}
    kernels_name, kernels = _choose_kernels(options, found, head_sizes, choices)
    build = Build(kernels, dtype=dtype, group=group)
    build_model(model.hf_config, build)
    deterministic = _choose_determinism(options, kernels_name, choices)
    choices.append(Choice("runner", "eager", "the device is a CPU: nothing to capture"))
    config = read_config(model.hf_config)
    kv_dtype = options.model.kv_cache_dtype
    if kv_dtype == "auto":
        kv_dtype = "float32" if options.model.dtype == "float32" else "bfloat16"
    formats = _formats(model, options)
    weight_bytes = _weight_bytes(build, formats)
    step_tokens, sequences = engine.max_num_batched_tokens, engine.max_num_seqs
    activations = memory.activation_bytes(config, build.width, step_tokens, sequences)
    graphs = 0
    if kernels_name == "reference":
        activations += memory.reference_bytes(build, formats)
    else:
        rows = min(RECORDED_ROWS, sequences)
        graphs = memory.recorded_bytes(config, build.width, rows)
        choices.append(
            Choice(
                "decode steps",
                f"recorded up to {rows} rows",
                "what lies between the kernels of a small step takes longer than the kernels",
            )
        )
    groups = memory.kv_groups(build.caches, DTYPES[kv_dtype].itemsize)
    room = _room(machine, weight_bytes, activations + graphs)
    table_bytes = sum(build.rotary_bytes.values())
    max_len, tokens = _choose_context(options, config.max_len, groups, room, table_bytes, choices)
    blocks = memory.pool_blocks(groups, tokens, step_tokens, sequences)
    plan = Plan(
        model=model.name,
        model_fingerprint=model.fingerprint,
        architecture=model.hf_config["architectures"][0],
        device="cpu",
        device_name=machine.name,
        threads=engine.threads or machine.cores,
        dtype=options.model.dtype,
        kv_dtype=kv_dtype,
        weight_formats=_describe_formats(build, formats),
        kernels=kernels_name,
        isa=found.isa if kernels_name == "native" else "torch",
        deterministic=deterministic,
        weight_bytes=weight_bytes,
        kv_bytes=memory.allocated_bytes(groups, blocks),
        activation_bytes=activations + table_bytes * max_len,
        graph_bytes=graphs,
        reserve_bytes=memory.RESERVE_BYTES,
        max_model_len=max_len,
        context_tokens=tokens,
        max_num_seqs=sequences,
        max_num_batched_tokens=step_tokens,
        groups=groups,
        pool_blocks=blocks,
        choices=tuple(choices),
        numerics_version=NUMERICS_VERSION,
    )
    downgrades = [c for c in choices if c.downgrade]
    if engine.strict and downgrades:
        raise PlanError(
            "downgrade",
            f"--strict: {downgrades[0].what} would be {downgrades[0].chosen}",
            why=downgrades[0].reason,
            fix="remove the cause, or start without --strict",
        )
    return plan


def _weight_bytes(build: Build, formats: Callable[[str], str]) -> int:
    try:
        return sum(weight.nbytes(formats) for weight in build.weights)
    except ValueError as error:
        raise ModelError(
            "unsupported_format",
            "a weight has a format or shape that the kernels do not have",
            why=str(error),
            fix="use another file of the model, such as bfloat16 safetensors or a q8_0 GGUF",
        ) from None


def _room(machine: Machine, weights: int, activations: int) -> int:
    """Bytes left for the KV cache. Raises PlanError where the rest alone is too much."""
    room = machine.available_bytes - weights - activations - memory.RESERVE_BYTES
    if room <= 0:
        raise PlanError(
            "out_of_memory",
            "the model does not fit in this machine's memory",
            why=f"weights take {format_bytes(weights)}, activations {format_bytes(activations)}, "
            f"the process {format_bytes(memory.RESERVE_BYTES)}; "
            f"{format_bytes(machine.available_bytes)} are available",
            fix="use a smaller or quantised model, or lower --max-num-batched-tokens",
        )
    return room


def _choose_kernels(
    options: Options, found: KernelFacts, head_sizes: set[int], choices: list[Choice]
) -> tuple[str, Kernels]:
    asked, why_not = options.engine.kernels, found.why_not
    fix = "install a C++ compiler and reinstall quire, or use --kernels reference"
    odd = sorted(head_sizes - set(NATIVE_HEAD_SIZES))
    if found.native is not None and odd:
        why_not = f"they do not have head size {odd[0]}: multiples of 8 up to 256"
        fix = "use --kernels reference"
    if asked == "native" and why_not:
        raise PlanError(
            "no_native_kernels",
            "--kernels native: the native kernels cannot be used",
            why=why_not,
            fix=fix,
        )
    if asked != "reference" and found.native is not None and not why_not:
        reason = f"built for this machine, instruction set {found.isa}"
        choices.append(Choice("kernels", "native", reason))
        return "native", found.native
    reason = "asked for with --kernels" if asked == "reference" else why_not
    choices.append(Choice("kernels", "reference", reason, downgrade=asked == "auto"))
    return "reference", found.reference


def _choose_determinism(options: Options, kernels: str, choices: list[Choice]) -> bool:
    if kernels == "native":
        reason = "every native kernel computes a row alike in any batch; it costs nothing here"
        choices.append(Choice("deterministic", "yes", reason))
        return True
    wanted = options.engine.deterministic
    reason = "torch's matrix products depend on the number of rows"
    choices.append(Choice("deterministic", "no", reason, downgrade=wanted))
    return False


def _formats(model: ModelFacts, options: Options) -> Callable[[str], str]:
    """The format each tensor will have before packing: --dtype changes dense ones."""
    dense = {"float32": "f32", "bfloat16": "bf16"}.get(options.model.dtype)
    declared = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype") or "bfloat16"
    fallback = {"float32": "f32", "float16": "f16"}.get(str(declared), "bf16")

    def lookup(name: str) -> str:
        stored = (model.formats or {}).get(name, fallback)
        return dense if dense is not None and stored in DENSE_FORMATS else stored

    return lookup


def _describe_formats(build: Build, formats: Callable[[str], str]) -> str:
    """The formats of matrices with their counts, like "q4_1 x 210, q8_0 x 1"."""
    counts: dict[str, int] = {}
    for weight in build.weights:
        for info in weight.tensors():
            if len(info.shape) == 2:
                counts[formats(info.name)] = counts.get(formats(info.name), 0) + 1
    return ", ".join(f"{k} x {n}" for k, n in sorted(counts.items(), key=lambda i: -i[1]))


def _choose_context(
    options: Options,
    longest: int,
    groups: Sequence[KVGroup],
    room: int,
    table_bytes: int,
    choices: list[Choice],
) -> tuple[int, int]:
    """(largest context of one request, tokens of KV in all). `table_bytes`: rotary tables take
    this much per position."""
    step, sequences = options.engine.max_num_batched_tokens, options.engine.max_num_seqs
    asked = options.model.max_model_len
    if asked is not None and asked > longest:
        raise PlanError(
            "context_too_long",
            f"--max-model-len {asked} is more than the model's {longest}",
            fix=f"use at most {longest}",
        )
    if options.engine.kv_cache_memory is not None:
        size, why = options.engine.kv_cache_memory, "--kv-cache-memory"
    else:
        least, most = DEFAULT_CONTEXT_TOKENS[0], DEFAULT_CONTEXT_TOKENS[-1]
        wanted = max(asked or min(longest, most), least)
        size = memory.bytes_for_tokens(groups, wanted, step, sequences)
        why = f"room for {wanted} tokens"
        if size > room // 2:
            size, why = room // 2, "half of the memory that is left"
    tokens = memory.tokens_that_fit(groups, size, step, sequences)
    max_len = min(asked or longest, tokens)
    if size + table_bytes * max_len > room:
        raise PlanError(
            "out_of_memory",
            f"a KV cache of {format_bytes(size)} does not fit",
            why=f"{format_bytes(room)} are left after weights, activations and reserve, and "
            f"rotary tables for {max_len} tokens take {format_bytes(table_bytes * max_len)}",
            fix="use a smaller --kv-cache-memory or --max-model-len",
        )
    needed = asked or min(longest, LEAST_CONTEXT_TOKENS)
    if tokens < needed:
        need = memory.bytes_for_tokens(groups, needed, step, sequences)
        raise PlanError(
            "out_of_memory",
            f"the KV cache would hold {tokens} tokens, {needed} are needed",
            why=f"its size is {format_bytes(size)} ({why}); {format_bytes(need)} are needed",
            fix="raise --kv-cache-memory, or lower --max-model-len or --max-num-seqs",
        )
    choices.append(Choice("kv cache", f"{tokens} tokens", why))
    reason = "--max-model-len" if asked else "the model's longest"
    if max_len < (asked or longest):
        reason = f"the model allows {longest}, the KV cache holds {tokens}"
    choices.append(Choice("context", f"{max_len} tokens", reason))
    return max_len, tokens
