"""resolve(options, model, machine) -> Plan: a pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from quire.comm.group import Group
from quire.config.options import Options
from quire.errors import PlanError
from quire.hardware.machine import Machine
from quire.kv.groups import KVGroup
from quire.layers.build import Build, CacheLayer
from quire.models.registry import read_config
from quire.plan import cpu, gpu, memory
from quire.plan.draft_model import plan_draft_model, with_draft_model
from quire.plan.facts import KV_DTYPES, KernelFacts, ModelFacts
from quire.plan.place import Place, tensor_formats
from quire.plan.plan import Choice, Plan, format_bytes
from quire.plan.speculation import describe_speculation
from quire.plan.tiers import TierFacts, plan_tiers, tier_rates

# Bumped by hand whenever any kernel's bits can change.
NUMERICS_VERSION = 7
# A default KV cache on a CPU holds one request of the model's longest context, within these
# bounds, if half of what is left allows.
DEFAULT_CONTEXT_TOKENS = range(16384, 32769)
# No engine starts with room for fewer tokens than this.
LEAST_CONTEXT_TOKENS = 64


def resolve(
    options: Options,
    model: ModelFacts,
    machine: Machine,
    found: KernelFacts,
    group: Group | None = None,
    draft: ModelFacts | None = None,
    tiers: Sequence[TierFacts] = (),
) -> Plan:
    """Decide everything, or raise PlanError (with the numbers) or ModelError.

    `group`: the rank whose share of weights and caches is planned; one rank by default. `draft`:
    the model that drafts, where --speculative-config names one. `tiers`: what was measured of
    those of the KV cache.
    """
    choices: list[Choice] = []
    if model.scheme:
        choices.append(Choice("quantisation", model.scheme, model.scheme_from))
    formats = tensor_formats(model, options)
    device = gpu.choose_device(options, machine, found, choices)
    make = gpu.place if device == "cuda" else cpu.place
    place = make(options, model, formats, machine, found, group or Group(), choices)
    caches, table_bytes = list(place.build.caches), sum(place.build.rotary_bytes.values())
    speculation, drafter = options.engine.speculation, None
    if speculation is not None and draft is not None:
        drafter = plan_draft_model(options, draft, model.hf_config, place, choices)
        caches += drafter.layers
        table_bytes += drafter.rotary_bytes
        place = with_draft_model(place, drafter, speculation.ahead)
        speculation = replace(speculation, max_model_len=drafter.max_model_len)
    groups = _groups(options, caches, place.kv_dtype)
    place, slots = plan_tiers(options, groups, place, machine, tiers, choices)
    longest = read_config(model.hf_config).max_len
    max_len, tokens = _choose_context(options, longest, groups, place, table_bytes, choices)
    step, sequences = place.max_num_batched_tokens, place.max_num_seqs
    blocks = memory.pool_blocks(groups, tokens, place.step_tokens, sequences)
    _describe_caches(groups, place, choices)
    draft_bytes = place.draft_bytes if drafter is None else drafter.weight_bytes
    draft_parts = place.draft_parts if drafter is None else drafter.weight_parts
    if speculation is not None:
        ahead = options.engine.async_scheduling
        describe_speculation(speculation, place.max_sampled, ahead, draft_bytes, choices)
    plan = Plan(
        model=model.name,
        model_fingerprint=model.fingerprint,
        architecture=model.hf_config["architectures"][0],
        device=place.device,
        device_name=place.device_name,
        threads=place.threads,
        dtype=place.dtype,
        kv_dtype=place.kv_dtype,
        weight_formats=_describe_formats(place.build, formats),
        kernels=place.kernels,
        isa=place.isa,
        runner=place.runner,
        deterministic=place.deterministic,
        async_scheduling=place.async_scheduling and speculation is None,
        weight_bytes=place.weight_bytes,
        kv_bytes=memory.allocated_bytes(groups, blocks),
        activation_bytes=place.activation_bytes + table_bytes * max_len,
        graph_bytes=place.graph_bytes,
        state_bytes=place.state_bytes,
        reserve_bytes=place.reserve_bytes,
        max_model_len=max_len,
        context_tokens=tokens,
        max_num_seqs=sequences,
        max_num_batched_tokens=step,
        decode_graphs=place.decode_graphs,
        mixed_graphs=place.mixed_graphs,
        groups=groups,
        pool_blocks=blocks,
        choices=tuple(choices),
        numerics_version=NUMERICS_VERSION,
        max_sampled=place.max_sampled,
        weight_parts=place.weight_parts,
        speculation=speculation,
        draft_bytes=draft_bytes,
        draft_parts=draft_parts,
        draft_fingerprint="" if drafter is None else drafter.fingerprint,
        ranks=(group or Group()).size,
        recomputed_tokens=memory.recomputed_tokens(place.build),
        moe_routing=options.engine.moe_routing,
        tier_slots=slots,
        tier_rates=tier_rates(options, tiers),
        tier_bytes=memory.allocated_bytes(groups, slots) if slots else 0,
    )
    if options.engine.strict:
        _refuse_downgrades(choices)
    return plan


def _refuse_downgrades(choices: Sequence[Choice]) -> None:
    """Raises PlanError for the first one."""
    downgrade = next((choice for choice in choices if choice.downgrade), None)
    if downgrade is not None:
        raise PlanError(
            "downgrade",
            f"--strict: {downgrade.what} would be {downgrade.chosen}",
            why=downgrade.reason,
            fix="remove the cause, or start without --strict",
        )


def _describe_formats(build: Build, formats: Callable[[str], str]) -> str:
    """The formats of matrices with their counts, like "q4_1 x 210, q8_0 x 1"."""
    counts: dict[str, int] = {}
    for weight in build.weights:
        for info in weight.tensors():
            if len(info.shape) == 2:
                counts[formats(info.name)] = counts.get(formats(info.name), 0) + 1
    return ", ".join(f"{k} x {n}" for k, n in sorted(counts.items(), key=lambda i: -i[1]))


def _groups(options: Options, caches: Sequence[CacheLayer], kv_dtype: str) -> tuple[KVGroup, ...]:
    """Raises PlanError where checkpoints are asked for that the model's caches do not have."""
    asked = options.engine.checkpoint_tokens
    groups = memory.kv_groups(
        caches,
        KV_DTYPES[kv_dtype].itemsize,
        memory.CHECKPOINT_TOKENS if asked is None else asked,
    )
    if asked is not None and all(group.checkpoint is None for group in groups):
        raise PlanError(
            "no_checkpoints",
            f"--checkpoint-tokens {asked}: this model's windows are kept wherever there is room",
            why="only models with compressed entries keep windows at checkpoints",
            fix="leave it out",
        )
    return groups


def _describe_caches(groups: Sequence[KVGroup], place: Place, choices: list[Choice]) -> None:
    """What a request's KV consists of, where it is more than one kind."""
    checkpoint = next((g.checkpoint for g in groups if g.checkpoint is not None), None)
    if checkpoint is None:
        return
    compressed = [group for group in groups if group.window is None]
    tokens = max(group.block_size for group in groups)
    window = format_bytes(memory.window_bytes(groups))
    for what, chosen, reason in (
        (
            "compressed entries",
            f"{memory.entry_bytes(groups):.0f} bytes for each token",
            f"{sum(len(group.layers) for group in compressed)} layers, in pages of {tokens} tokens",
        ),
        ("windows", f"{window} for each request", "every layer keeps the last tokens as they are"),
        (
            "open windows",
            f"{format_bytes(memory.state_bytes(place.build, 1))} for each request",
            "tokens that are not in an entry yet; after a prefix hit the last "
            f"{memory.recomputed_tokens(place.build)} tokens before it are computed again",
        ),
        (
            "checkpoints",
            f"{window} for each",
            f"windows are kept for prefix hits at the end of prompts and every {checkpoint} "
            f"tokens; hits end at multiples of {tokens} tokens",
        ),
    ):
        choices.append(Choice(what, chosen, reason))


def _choose_context(
    options: Options,
    longest: int,
    groups: Sequence[KVGroup],
    place: Place,
    table_bytes: int,
    choices: list[Choice],
) -> tuple[int, int]:
    """(largest context of one request, tokens of KV in all). `table_bytes`: rotary tables take
    this much per position."""
    room, step, sequences = place.room, place.step_tokens, place.max_num_seqs
    asked = options.model.max_model_len
    if asked is not None and asked > longest:
        raise PlanError(
            "context_too_long",
            f"--max-model-len {asked} is more than the model's {longest}",
            fix=f"use at most {longest}",
        )
    if options.engine.kv_cache_memory is not None:
        size, why = options.engine.kv_cache_memory, "--kv-cache-memory"
    elif place.fill:
        size = room - table_bytes * (asked or longest)
        why = f"what --gpu-memory-utilization {options.engine.gpu_memory_utilization:g} leaves"
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
