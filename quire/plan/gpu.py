"""A model on a GPU: which kernels and runner, how much memory they work in, what is captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from quire.comm.group import Group
from quire.config.options import Options
from quire.config.speculation import Speculation
from quire.errors import PlanError
from quire.formats.layout import BLOCK_FORMATS, is_quantized
from quire.hardware.machine import Gpu, Machine
from quire.kernels import capabilities
from quire.kernels.dense import DenseWeights
from quire.kernels.device_state import DeviceState, StepBuffers
from quire.kernels.sampling import Scratch as SamplingScratch
from quire.kv import most_blocks
from quire.layers.build import Build, CacheLayer, Kernels
from quire.layers.experts import StackedExperts
from quire.layers.linear import Linear
from quire.models.registry import ModelConfig, read_config
from quire.plan import memory
from quire.plan.architectures import describe
from quire.plan.facts import DTYPES, KernelFacts, ModelFacts
from quire.plan.kv_format import choose_kv_dtype
from quire.plan.place import (
    Place,
    build_all,
    choose_latent_form,
    held_formats,
    matrices,
    remaining,
    sum_weights,
)
from quire.plan.plan import Choice
from quire.plan.speculation import sampled_rows
from quire.plan.weight_parts import weight_parts

DENSE = ("f32", "f16", "bf16")
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 512, 8192
# Where layers keep state of each request, which may take tens of megabytes.
MAX_STATEFUL_SEQS = 256
# Ampere is the first to have bfloat16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)
HEAD_SIZES = range(16, 257, 8)
MAX_RANK, MAX_REST = 512, 128  # as in kernels/triton/attention/latent_attention.py
MOST_EXPERTS, MOST_EXPERTS_PER_TOKEN = 512, 16
# Beyond this many tokens a step computes for longer than its kernels take to launch.
LARGEST_MIXED_GRAPH = 2048
# CUDA's context, cuBLAS and its workspace, the kernels' code and attention's scratch.
RESERVE_BYTES = 1024 * 2**20
# What a captured graph itself takes of the GPU's memory, generously.
GRAPH_BYTES = 3 * 2**20
SMALLER = {
    "weights": "use a smaller or quantised model, or a GPU with more memory",
    "MTP module": "draft in another way, or not at all",
    "activations": "lower --max-num-batched-tokens",
    "request state": "lower --max-num-seqs or --max-model-len",
    "graphs": "use --runner eager",
    "context and libraries": "raise --gpu-memory-utilization, or free the GPU",
}


def choose_device(
    options: Options, machine: Machine, found: KernelFacts, choices: list[Choice]
) -> str:
    """ "cpu" or "cuda". Raises PlanError where a GPU was asked for and cannot be used."""
    asked, gpu = options.engine.device, machine.gpu
    if asked == "cpu":
        choices.append(Choice("device", "cpu", "asked for with --device"))
        return "cpu"
    why_not = machine.no_gpu if gpu is None else _unsupported(gpu, found)
    if gpu is not None and not why_not:
        choices.append(Choice("device", "cuda", gpu.name))
        choices.append(describe(gpu.architecture))
        return "cuda"
    if asked == "cuda":
        raise PlanError(
            "no_gpu", "--device cuda: no GPU can be used", why=why_not, fix="use --device cpu"
        )
    choices.append(Choice("device", "cpu", f"no GPU: {why_not}", downgrade=gpu is not None))
    return "cpu"


def _unsupported(gpu: Gpu, found: KernelFacts) -> str:
    if found.triton is None:
        return "Triton is not installed"
    if gpu.architecture.startswith("sm_") and gpu.capability < LEAST_CAPABILITY:
        return f"{gpu.name} is {gpu.architecture}; the kernels need sm_80 or newer"
    return ""


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
    gpu, engine, hf = machine.gpu, options.engine, model.hf_config
    assert gpu is not None
    build, _ = _build(hf, "bfloat16", group, "auto", engine.mtp)
    quantized = any(is_quantized(formats(name)) for name in matrices(build))
    dtype = _choose_dtype(options, hf, quantized, choices)
    kv_dtype = _choose_kv_dtype(options, model, dtype, build, choices)
    build, own = _build(hf, dtype, group, kv_dtype, engine.mtp)
    check_head_sizes(build)
    formats = held_formats(build, formats, dtype, choices)
    check_experts(read_config(hf), build, formats)
    packed = {f for f in map(formats, matrices(build)) if f in BLOCK_FORMATS and f not in DENSE}
    if packed:
        reason = f"there are no GPU kernels for {', '.join(sorted(packed))}"
        choices.append(Choice("weights", f"dequantised to {dtype}", reason, downgrade=True))
    deterministic = bool(engine.deterministic)
    runner = _choose_runner(options, choices)
    _choose_kernels(deterministic, found, choices)
    choose_latent_form(build, choices)
    _choose_quantized(build, formats, deterministic, gpu, choices)
    steps = _choose_steps(options, build, runner)
    parts = _memory_parts(options, read_config(hf), build, own, formats, dtype, steps)
    # What other programs hold, and this process's own context, is not ours to give out.
    limit = int(gpu.memory_bytes * engine.gpu_memory_utilization)
    limit = min(limit, gpu.available_bytes)
    return Place(
        device="cuda",
        device_name=gpu.name,
        threads=engine.threads or machine.cores,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kernels="triton",
        isa=f"{gpu.architecture}, triton {found.triton}",
        runner=runner,
        deterministic=deterministic,
        async_scheduling=engine.async_scheduling is not False,
        max_num_seqs=steps.sequences,
        max_num_batched_tokens=steps.tokens,
        build=build,
        weight_bytes=parts["weights"],
        activation_bytes=parts["activations"],
        graph_bytes=parts["graphs"],
        state_bytes=parts["request state"],
        reserve_bytes=RESERVE_BYTES,
        room=remaining(limit, f"the memory of {gpu.name}", parts, SMALLER),
        fill=True,
        max_sampled=steps.sampled,
        weight_parts=weight_parts(
            build.weights[:own],
            formats,
            lambda name: (
                multiplied_in_e4m3(formats(name), gpu, deterministic) and name in model.e4m3_tokens
            ),
        ),
        decode_graphs=steps.decode_graphs,
        mixed_graphs=steps.mixed_graphs,
        ahead=engine.speculation.ahead if engine.speculation and engine.mtp else 0,
        draft_bytes=parts.get("MTP module", 0),
        draft_parts=weight_parts(build.weights[own:], formats) if engine.mtp else (),
    )


class Steps(NamedTuple):
    """What the largest step has, and what is captured: rows of decode steps, tokens of others."""

    tokens: int
    sequences: int
    sampled: int
    decode_graphs: tuple[int, ...]
    mixed_graphs: tuple[int, ...]


def _choose_steps(options: Options, build: Build, runner: str) -> Steps:
    engine = options.engine
    tokens = engine.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
    sequences = engine.max_num_seqs or (MAX_STATEFUL_SEQS if build.states else MAX_NUM_SEQS)
    sampled = sampled_rows(engine, sequences, tokens)
    graphs: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
    if runner == "graph":
        graphs = graph_sizes(tokens, sampled, verifying=engine.speculation is not None)
    return Steps(tokens, sequences, sampled, *graphs)


def _memory_parts(
    options: Options,
    config: ModelConfig,
    build: Build,
    own: int,
    formats: Callable[[str], str],
    dtype: str,
    steps: Steps,
) -> dict[str, int]:
    """Bytes by what takes them, KV cache apart. The first `own` weights of `build` are the
    model's, what follows is the MTP module's."""
    tokens, sequences, sampled, decode, mixed = steps
    itemsize = DTYPES[dtype].itemsize
    longest = options.model.max_model_len or config.max_len
    groups = count_groups(build.caches)
    widest = 0 if options.engine.deterministic else widened_bytes(build, formats)
    drafting = sum_weights(build, formats, own)

    def activations(tokens: int) -> int:
        return widest + memory.gpu_activation_bytes(config, build.width, tokens, sampled, itemsize)

    parts = {
        "weights": sum_weights(build, formats) - drafting,
        "activations": activations(tokens) + build.scratch,
        "graphs": 0,
        "request state": DeviceState.nbytes(sequences, longest, config.vocab_size, groups)
        + StepBuffers.nbytes(sampled, tokens, groups, most_blocks(longest))
        + SamplingScratch.nbytes(sampled, config.vocab_size)
        + memory.state_bytes(build, sequences)
        # What is handed from the forward pass to sampling.
        + (build.output or config.hidden) * tokens * itemsize,
        "context and libraries": RESERVE_BYTES,
    }
    captured = 3 * len(decode) + len(mixed)
    if options.engine.mtp:
        asked = options.engine.speculation
        assert asked is not None
        # The module reads in one graph for each size of mixed steps, and guesses in two for each
        # number of rows, which hold as many passes as there are drafts.
        captured += len(mixed) + 2 * len(decode) * asked.num_speculative_tokens
        parts["MTP module"] = drafting
        parts["request state"] += _mtp_bytes(asked, config, build, sequences, tokens, itemsize)
        parts["request state"] += drafter_buffers(sequences, tokens, groups, longest)
    if decode:
        parts["graphs"] = activations(max(mixed, default=0)) + GRAPH_BYTES * captured
    return parts


def _build(
    hf: dict[str, Any], dtype: str, group: Group, kv_dtype: str, mtp: bool
) -> tuple[Build, int]:
    """As build_all, with the Build."""
    # A plan asks kernels only how much a weight takes; it must not need Triton.
    sizes = cast(Kernels, DenseWeights(DTYPES[dtype], torch.device("meta")))
    build = Build(sizes, dtype=DTYPES[dtype], group=group, kv_dtype=kv_dtype)
    return build, build_all(hf, build, mtp)


def count_groups(caches: Sequence[CacheLayer]) -> int:
    """KV groups of layers (memory.kv_groups), of which each has block tables of its own."""
    return len({(cache.window, cache.page, cache.block_size) for cache in caches})


def drafter_buffers(sequences: int, tokens: int, groups: int, longest: int) -> int:
    """Bytes of the inputs of what drafts, which reads a step's tokens and one more of each row."""
    return StepBuffers.nbytes(sequences, tokens + sequences, groups, most_blocks(longest))


def _mtp_bytes(
    asked: Speculation,
    config: ModelConfig,
    build: Build,
    sequences: int,
    tokens: int,
    itemsize: int,
) -> int:
    """What the module's passes keep (quire/runner/device_mtp.py): hidden states of the tokens that
    it reads and two of each row, and drafts."""
    rows = 3 * sequences + tokens
    hidden = (build.output or config.hidden) * itemsize
    return hidden * rows + 4 * asked.num_speculative_tokens * sequences


def graph_sizes(
    tokens: int, sequences: int, verifying: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows of captured decode steps, and tokens of other captured steps; both ascending.

    Few enough to be captured in seconds, close enough that padding costs little. `verifying`: the
    other steps are also those of few requests with drafts, not only prompts, and tokens of padding
    read experts of their own.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4097, 32)]
    most = min(sequences, tokens)
    decode = [n for n in sizes if n < most] + [most]
    steps = [2, 3, 4, 6, 8] if verifying else []
    steps += [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, LARGEST_MIXED_GRAPH]
    return tuple(decode), tuple(n for n in steps if n <= tokens)


def _choose_dtype(
    options: Options, hf: dict[str, Any], quantized: bool, choices: list[Choice]
) -> str:
    asked = options.model.dtype
    if asked != "auto":
        choices.append(Choice("dtype", asked, "asked for with --dtype"))
        return asked
    declared = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if quantized and declared != "bfloat16":
        reason = f"kernels for quantised weights compute in it; config.json says {declared}"
        choices.append(Choice("dtype", "bfloat16", reason, downgrade=True))
        return "bfloat16"
    if declared in DTYPES:
        choices.append(Choice("dtype", declared, "the checkpoint's"))
        return declared
    choices.append(Choice("dtype", "bfloat16", f"config.json says {declared}", downgrade=True))
    return "bfloat16"


def _choose_kv_dtype(
    options: Options, model: ModelFacts, dtype: str, build: Build, choices: list[Choice]
) -> str:
    asked = options.model.kv_cache_dtype
    if asked not in ("auto", "fp8", dtype) and (dtype, asked) != ("float32", "bfloat16"):
        raise PlanError(
            "unsupported_kv_dtype",
            f"--kv-cache-dtype {asked} does not go with --dtype {dtype} on a GPU",
            why="the attention kernels read a cache of the model's own number format, or fp8, or "
            "bfloat16 under float32",
            fix="use --kv-cache-dtype auto",
        )
    return choose_kv_dtype(options, model, dtype, build, choices)


def check_experts(config: ModelConfig, build: Build, formats: Callable[[str], str]) -> None:
    """Raises PlanError. `formats`: those that weights are held in."""
    stacked = [weight for weight in build.weights if isinstance(weight, StackedExperts)]
    held = {formats(i.name) for weight in stacked for i in weight.tensors() if len(i.shape) == 2}
    dense = sorted(name for name in held if not is_quantized(name))
    if getattr(config, "expert_bias", False) and dense:
        raise PlanError(
            "unsupported_experts",
            f"the GPU kernels do not have {dense[0]} experts with biases",
            why="only kernels for quantised experts, which compute in bfloat16, add them",
            fix="use --dtype bfloat16 with a quantised checkpoint or --quantization nvfp4-experts, "
            "or --device cpu",
        )
    experts, chosen = getattr(config, "experts", 0), getattr(config, "experts_per_token", 0)
    if experts > MOST_EXPERTS or chosen > MOST_EXPERTS_PER_TOKEN:
        raise PlanError(
            "unsupported_experts",
            f"the GPU kernels do not have {chosen} of {experts} experts for each token",
            why=f"at most {MOST_EXPERTS_PER_TOKEN} of {MOST_EXPERTS}",
            fix="use --device cpu",
        )


def check_head_sizes(build: Build) -> None:
    """Raises PlanError."""
    for latent in (cache for cache in build.caches if cache.latent):
        if latent.value_size > MAX_RANK or latent.key_size - latent.value_size > MAX_REST:
            raise PlanError(
                "unsupported_head_size",
                f"the GPU kernels do not have latents of {latent.value_size} and "
                f"{latent.key_size - latent.value_size} values",
                why=f"at most {MAX_RANK}, and {MAX_REST} that rotate",
                fix="use --device cpu",
            )
    paged = [cache for cache in build.caches if cache.by_kernels and not cache.latent]
    odd = sorted({cache.key_size for cache in paged} - set(HEAD_SIZES))
    if odd:
        raise PlanError(
            "unsupported_head_size",
            f"the GPU kernels do not have head size {odd[0]}",
            why=f"multiples of 8 from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}",
            fix="use --device cpu",
        )


def _choose_runner(options: Options, choices: list[Choice]) -> str:
    if options.engine.runner == "eager":
        choices.append(Choice("runner", "eager", "asked for with --runner"))
        return "eager"
    reason = "a CUDA graph starts a whole step's kernels at once"
    choices.append(Choice("runner", "graph", reason))
    return "graph"


def _choose_kernels(deterministic: bool, found: KernelFacts, choices: list[Choice]) -> None:
    """Which kernel serves which operation, as quire/kernels/triton/ops.py does it."""
    triton = f"triton {found.triton}"
    choices.append(Choice("norms, rotary, activations", triton, "fused, limited by memory"))
    if deterministic:
        choices.append(Choice("deterministic", "yes", "asked for with --deterministic"))
        one = "one kernel for any number of rows, so that no row's bits depend on the others"
        choices.append(Choice("matrix products", triton, one))
        choices.append(Choice("experts", triton, one))
        pieces = "keys in fixed pieces, combined in order, in decode and prefill alike"
        choices.append(Choice("attention", triton, pieces))
    else:
        choices.append(Choice("deterministic", "no", "it costs speed on a GPU: --deterministic"))
        few = "few rows read weights at the speed of memory; cuBLAS where arithmetic counts"
        choices.append(Choice("matrix products", f"{triton} for few rows, else cuBLAS", few))
        choices.append(Choice("experts", triton, "products grouped by expert"))
        choices.append(Choice("attention", triton, "split keys for decoding, tiles for prompts"))
    choices.append(Choice("sampling", triton, "on the device, so that the next step can start"))


def _choose_quantized(
    build: Build,
    formats: Callable[[str], str],
    deterministic: bool,
    gpu: Gpu,
    choices: list[Choice],
) -> None:
    """What computes with weights that are held as codes, as quire/kernels/triton/quantized does."""
    for kind, what in ((Linear, "linear layers"), (StackedExperts, "experts")):
        weights = [weight for weight in build.weights if isinstance(weight, kind)]
        names = {formats(i.name) for w in weights for i in w.tensors() if len(i.shape) == 2}
        for name in sorted(filter(is_quantized, names)):
            choices.append(Choice(f"{what} in {name}", *_served(kind, name, deterministic, gpu)))


def widened_bytes(build: Build, formats: Callable[[str], str]) -> int:
    """The largest weight that many tokens have decoded to bfloat16 before they are multiplied."""
    linears = [weight for weight in build.weights if isinstance(weight, Linear)]
    sizes = [w.values() for w in linears if any(_decoded(formats(i.name)) for i in w.tensors())]
    return 2 * max(sizes, default=0)


def multiplied_in_e4m3(format: str, gpu: Gpu, deterministic: bool) -> bool:
    """Whether many tokens are quantised for weights of a format, where the scheme does that."""
    return not deterministic and capabilities.multiplied_in_e4m3(format, gpu.architecture)


def _decoded(name: str) -> bool:
    return is_quantized(name) and not name.startswith("fp8")


def _served(kind: type, name: str, deterministic: bool, gpu: Gpu) -> tuple[str, str]:
    """(kernels, why)."""
    decoded = "held as codes, decoded in registers"
    if deterministic:
        return decoded, "one kernel for any number of tokens, which stay bfloat16"
    if kind is StackedExperts:
        decoded = f"{decoded}, grouped by expert"
        if _decoded(name):
            return decoded, "few tokens read each expert's codes by themselves"
    elif _decoded(name):
        return (
            f"{decoded}; for more than 64 tokens decoded to memory, then cuBLAS",
            "few tokens wait for the weight, many for arithmetic",
        )
    if not multiplied_in_e4m3(name, gpu, deterministic):
        return decoded, f"e4m3 products are used on sm_90, not on {gpu.architecture}"
    many = "e4m3 products of many tokens where the scheme quantises activations"
    return f"{decoded}; {many}", "few tokens wait for the weight, many for arithmetic"
