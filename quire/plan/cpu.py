"""A model on the CPU: which kernels, and how much memory they work in."""

from __future__ import annotations

from collections.abc import Callable

from quire.comm.group import Group
from quire.config.options import Options
from quire.errors import PlanError
from quire.hardware.machine import Machine
from quire.layers.build import Build, CacheLayer, Kernels
from quire.models.registry import read_config
from quire.plan import memory
from quire.plan.facts import DTYPES, KernelFacts, ModelFacts, declared_dtype
from quire.plan.kv_format import choose_kv_dtype
from quire.plan.place import (
    Place,
    build_all,
    choose_latent_form,
    held_formats,
    remaining,
    sum_weights,
)
from quire.plan.plan import Choice
from quire.plan.speculation import sampled_rows
from quire.plan.weight_parts import weight_parts

# Decode steps of up to this many rows are recorded and run again (quire/runner/recorded.py).
RECORDED_ROWS = 8
NATIVE_HEAD_SIZES, NATIVE_LATENT = range(8, 257, 8), 1024
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 64, 512
SMALLER = {
    "weights": "use a smaller model, or a .gguf file: its weights stay quantised here",
    "MTP module": "draft in another way, or not at all",
    "activations": "lower --max-num-batched-tokens or --max-num-seqs",
    "request state": "lower --max-num-seqs",
    "interpreter and libraries": "free memory",
}


def place(
    options: Options,
    model: ModelFacts,
    formats: Callable[[str], str],
    machine: Machine,
    found: KernelFacts,
    group: Group,
    choices: list[Choice],
) -> Place:
    """Raises PlanError or ModelError."""
    engine, hf = options.engine, model.hf_config
    if engine.runner == "graph":
        raise PlanError(
            "no_graphs",
            "--runner graph: there is nothing to capture on a CPU",
            fix="use --runner auto",
        )
    dtype = DTYPES.get(options.model.dtype)
    shapes = Build(found.reference, dtype=dtype, group=group)
    build_all(hf, shapes, engine.mtp)
    plain = "float32" if options.model.dtype == "float32" else "bfloat16"
    kv_dtype = choose_kv_dtype(options, model, plain, shapes, choices)
    read = [cache for cache in shapes.caches if cache.by_kernels]
    name, kernels = _choose_kernels(options, found, read, choices)
    build = Build(kernels, dtype=dtype, group=group, kv_dtype=kv_dtype)
    own = build_all(hf, build, engine.mtp)
    choose_latent_form(build, choices)
    deterministic = _choose_determinism(options, name, choices)
    choices.append(Choice("runner", "eager", "the device is a CPU: nothing to capture"))
    config = read_config(hf)
    widened = options.model.dtype if dtype is not None else declared_dtype(hf)
    formats = held_formats(build, formats, widened, choices)
    drafting = sum_weights(build, formats, own)
    weights = sum_weights(build, formats) - drafting
    tokens = engine.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    sequences = engine.max_num_seqs or MAX_NUM_SEQS
    sampled = sampled_rows(engine, sequences, tokens)
    activations = memory.activation_bytes(config, build.width, tokens, sampled) + build.scratch
    recorded = 0
    if name == "reference":
        activations += memory.reference_bytes(build, formats)
    elif build.states:
        reason = "layers keep state of requests, which no step may change twice"
        choices.append(Choice("decode steps", "computed one by one", reason))
    else:
        rows = min(RECORDED_ROWS, sequences)
        recorded = memory.recorded_bytes(config, build.width, rows)
        choices.append(
            Choice(
                "decode steps",
                f"recorded up to {rows} rows",
                "what lies between the kernels of a small step takes longer than the kernels",
            )
        )
    parts = {
        "weights": weights,
        **({"MTP module": drafting} if engine.mtp else {}),
        "activations": activations + recorded,
        "request state": memory.state_bytes(build, sequences),
        "interpreter and libraries": memory.RESERVE_BYTES,
    }
    return Place(
        device="cpu",
        device_name=machine.name,
        threads=engine.threads or machine.cores,
        dtype=options.model.dtype,
        kv_dtype=kv_dtype,
        kernels=name,
        isa=found.isa if name == "native" else "torch",
        runner="eager",
        deterministic=deterministic,
        async_scheduling=bool(engine.async_scheduling),
        max_num_seqs=sequences,
        max_num_batched_tokens=tokens,
        build=build,
        weight_bytes=weights,
        activation_bytes=activations,
        graph_bytes=recorded,
        state_bytes=parts["request state"],
        reserve_bytes=memory.RESERVE_BYTES,
        room=remaining(machine.available_bytes, "this machine's memory", parts, SMALLER),
        fill=False,
        max_sampled=sampled,
        weight_parts=weight_parts(build.weights[:own], formats),
        ahead=engine.speculation.ahead if engine.speculation is not None and engine.mtp else 0,
        draft_bytes=drafting,
        draft_parts=weight_parts(build.weights[own:], formats) if engine.mtp else (),
    )


def _choose_kernels(
    options: Options, found: KernelFacts, caches: list[CacheLayer], choices: list[Choice]
) -> tuple[str, Kernels]:
    asked, why_not = options.engine.kernels, found.why_not
    fix = "install a C++ compiler and reinstall quire, or use --kernels reference"
    if found.native is not None and (misfit := native_misfit(caches)):
        why_not, fix = misfit, "use --kernels reference"
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


def native_misfit(caches: list[CacheLayer]) -> str:
    """What of these layers the native kernels do not have, empty where they have all."""
    odd = sorted({c.key_size for c in caches if not c.latent} - set(NATIVE_HEAD_SIZES))
    wide = max((c.key_size for c in caches if c.latent), default=0)
    if odd:
        return f"they do not have head size {odd[0]}: multiples of 8 up to 256"
    if wide > NATIVE_LATENT:
        return f"they do not have latents of {wide} values: up to {NATIVE_LATENT}"
    return ""


def _choose_determinism(options: Options, kernels: str, choices: list[Choice]) -> bool:
    if kernels == "native":
        reason = "every native kernel computes a row alike in any batch; it costs nothing here"
        choices.append(Choice("deterministic", "yes", reason))
        return True
    wanted = options.engine.deterministic is not False
    reason = "torch's matrix products depend on the number of rows"
    choices.append(Choice("deterministic", "no", reason, downgrade=wanted))
    return False
