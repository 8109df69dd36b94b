"""From options to a running engine.core: files, plan, model, weights, caches, scheduler."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, cast

import torch

from quire.config.options import Options
from quire.engine.api import EngineInfo
from quire.engine.core import EngineCore, Runner
from quire.engine.drafting import Drafting
from quire.engine.limits import Limits
from quire.engine.page_copies import Copier
from quire.engine.scheduler import Scheduler
from quire.engine.tier_start import make_slab, make_tiering, measure_tiers, open_tiers
from quire.engine.tiering import Tiering
from quire.engine.weights import (
    asked_quantization,
    dummy_source,
    kv_cache_format,
    kv_cache_scales,
    open_weights,
)
from quire.garbage import uncollected
from quire.hardware.machine import detect
from quire.kernels import native
from quire.kernels.reference import ops as reference_ops
from quire.kv.identity import BlockIdentity
from quire.kv.manager import KVManager
from quire.layers.build import Build, CacheLayer, CpuKernels, Kernels
from quire.models.checkpoint import checkpoint_scheme, declared_formats
from quire.models.registry import (
    MTP,
    Model,
    build_model,
    build_mtp,
    config_digest,
    load_weights,
    mtp_prefix,
    read_config,
)
from quire.plan.facts import DTYPES, KV_DTYPES, KernelFacts, ModelFacts, declared_dtype
from quire.plan.plan import Plan
from quire.plan.resolve import resolve
from quire.plan.shortage import explained
from quire.runner.eager import EagerRunner, allocate_caches, allocate_states
from quire.runner.pages import CpuPages, pool_tensors
from quire.speculative.proposer import make_proposer
from quire.tiers.cold import ColdTier
from quire.tokenization.special_tokens import eos_token_ids
from quire.weights import no_weights
from quire.weights.hub import ModelFiles
from quire.weights.hub import resolve as find_files
from quire.weights.source import WeightSource

if TYPE_CHECKING:
    from quire.kernels.triton.compile_kernels import Workers

Progress = Callable[[str, float], None]


@dataclass
class Engine:
    """A core ready for requests, and what its model was built with."""

    core: EngineCore
    plan: Plan
    info: EngineInfo
    files: ModelFiles
    build: Build


def kernel_facts() -> KernelFacts:
    """Which kernels this installation and machine have."""
    if not native.available():
        return KernelFacts(reference_ops, None, native.why_not(), triton=_triton_version())
    from quire.kernels.native import ops as native_ops

    return KernelFacts(reference_ops, native_ops, isa=native_ops.isa(), triton=_triton_version())


def _triton_version() -> str | None:
    """Without importing Triton, which takes a second."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def find_model(options: Options) -> ModelFiles:
    """The model's files. Raises ModelError or UsageError."""
    return find_files(options.model.model, options.model.revision, options.model.offline)


def make_plan(
    options: Options, files: ModelFiles, source: WeightSource | None, found: KernelFacts
) -> Plan:
    """Plan with what is known: formats of tensors where there are weights (or dummies, which are
    made for it without a `source`), else config.json alone."""
    facts = _facts(options, files, source)
    drafter = draft_options(options)
    draft = None
    if drafter is not None:
        theirs = find_model(drafter)
        draft = _facts(drafter, theirs, open_weights(drafter, theirs))
    machine = detect(gpu=options.engine.device != "cpu")
    tiers = measure_tiers(options, gpu=machine.gpu is not None)
    return resolve(options, facts, machine, found, draft=draft, tiers=tiers)


def draft_options(options: Options) -> Options | None:
    """The options of the model that --speculative-config has draft, as if it were the model."""
    asked = options.engine.speculation
    if asked is None or asked.model is None:
        return None
    return replace(
        options,
        model=replace(
            options.model,
            model=asked.model,
            revision=asked.revision,
            quantization=asked.quantization,
        ),
        engine=replace(options.engine, speculative_config=None),
    )


def _facts(options: Options, files: ModelFiles, source: WeightSource | None) -> ModelFacts:
    hf, scheme, online = (
        files.config(),
        checkpoint_scheme(files),
        asked_quantization(options, files),
    )
    fingerprint = "no weights"
    if options.model.load_format == "dummy":
        source = source or dummy_source(options, files)
        fingerprint = source.fingerprint()
    elif source is not None:
        fingerprint = files.commit or source.fingerprint()
    if source is None or online is not None:
        formats = declared_formats(hf, scheme, online, options.engine.mtp)
    if source is not None:
        formats = {name: source.info(name).format for name in source.names()}
    fp8 = [name for name, format in formats.items() if format.startswith("fp8")]
    facts = ModelFacts(
        files.name,
        hf,
        formats,
        f"{fingerprint} {config_digest(hf)}" + ("" if online is None else f" {online}"),
        kv_cache=kv_cache_format(scheme, source),
        kv_scales=bool(kv_cache_scales(source)),
        e4m3_tokens=frozenset(
            name
            for name in fp8
            if scheme is None or scheme.quantises_tokens(name.rpartition(".")[0])
        ),
    )
    if scheme is not None:
        facts = replace(facts, scheme=scheme.name)
    elif online is not None:
        facts = replace(
            facts, scheme=f"{online.method}, while loading", scheme_from="--quantization"
        )
    return facts


def start_engine(options: Options, progress: Progress | None = None) -> Engine:
    """Do all of start-up. Raises QuireError with what, why and fix."""
    gc.collect()  # what an engine before may have left
    # Nearly all that a start makes stays, and would be looked through again and again.
    with uncollected():
        return _start_engine(options, progress)


def _start_engine(options: Options, progress: Progress | None) -> Engine:
    say = progress or (lambda phase, fraction: None)
    say("finding the model", 0.0)
    files = find_model(options)
    read_config(files.config())  # a config that cannot be used comes before missing weights
    if options.engine.mtp:
        mtp_prefix(files.config())
    say("planning", 0.0)
    source = _weights(options, files)
    found = kernel_facts()
    plan = make_plan(options, files, source, found)
    device = torch.device(plan.device)
    source.make_on(device)
    return assemble(options, files, plan, source, found, device, say)


def _weights(options: Options, files: ModelFiles) -> WeightSource:
    """The files' weights, or dummies. Raises ModelError where there are neither."""
    source = open_weights(options, files)
    if source is None and options.model.load_format == "dummy":
        source = dummy_source(options, files)
    if source is None:
        raise no_weights(files)
    return source


def assemble(
    options: Options,
    files: ModelFiles,
    plan: Plan,
    source: WeightSource,
    found: KernelFacts,
    device: torch.device,
    say: Progress,
) -> Engine:
    """Make what the plan says: on `device` the model with weights and caches; runner, scheduler.

    Raises PlanError where the device has less memory than planned.
    """
    set_threads(plan.threads)
    with _compilers(plan) as compilers:
        build = Build(
            _gpu_kernels(plan, device) if plan.device != "cpu" else _cpu_kernels(plan, found),
            dtype=DTYPES.get(plan.dtype),
            widened=DTYPES[declared_dtype(files.config())],
            max_len=plan.max_model_len,
            device=device,
            moe_routing=options.engine.moe_routing,
            kv_dtype=plan.kv_dtype,
            kv_scales=kv_cache_scales(source),
        )
        say("loading weights", 0.0)
        with explained(plan, "weights were loaded"), torch.inference_mode():
            model = build_model(files.config(), build)
            mtp = build_mtp(files.config(), model, build) if options.engine.mtp else None
            load_weights(build, source, lambda done: say("loading weights", done))
            source.close()
            draft = _load_draft_model(options, build)
        say("allocating the KV cache", 0.0)
        info = engine_info(options, files, plan)
        cold = open_tiers(options, plan)
        with explained(plan, "the KV cache and the requests' state were allocated"):
            more = [] if draft is None else draft[1].caches
            allocate_caches(build, plan.groups, plan.pool_blocks, KV_DTYPES[plan.kv_dtype], more)
            allocate_states(build, plan.max_num_seqs)
            runner = _make_runner(plan, found, build, model, draft, mtp, info, compilers)
        scheduler = make_scheduler(options, plan, info)
        tiering = _make_tiering(options, plan, cold, scheduler, [*build.caches, *more])
        core = EngineCore(scheduler, runner, 2 if plan.async_scheduling else 1, tiering)
        if plan.device != "cpu":
            say("compiling kernels", 0.0)
            with explained(plan, "the largest step was computed for the first time"):
                runner.warm()  # most kernels are there then, and memory has sufficed
        return Engine(core, plan, info, files, build)


def _compilers(plan: Plan) -> AbstractContextManager[Workers | None]:
    """Processes that may compile a GPU's kernels, while the model is made."""
    if plan.device == "cpu":
        return nullcontext()
    from quire.kernels.triton.compile_kernels import early_workers

    return early_workers(plan.threads)


def _load_draft_model(options: Options, target: Build) -> tuple[Model, Build] | None:
    """The model that --speculative-config has draft, built like the target and beside it."""
    theirs = draft_options(options)
    if theirs is None:
        return None
    files = find_model(theirs)
    source = _weights(theirs, files)
    source.make_on(target.device)
    build = Build(
        target.kernels,
        dtype=target.dtype,
        group=target.group,
        widened=DTYPES[declared_dtype(files.config())],
        max_len=target.max_len,
        device=target.device,
        moe_routing=target.moe_routing,
        kv_dtype=target.kv_dtype,
        kv_scales=kv_cache_scales(source),
        first_layer=len(target.caches),
    )
    model = build_model(files.config(), build)
    load_weights(build, source)
    source.close()
    return model, build


def _gpu_kernels(plan: Plan, device: torch.device) -> Kernels:
    from quire.kernels.triton.ops import TritonKernels

    return cast(Kernels, TritonKernels(DTYPES[plan.dtype], device, plan.deterministic))


def _cpu_kernels(plan: Plan, found: KernelFacts) -> CpuKernels:
    kernels = found.native if plan.kernels == "native" else found.reference
    assert kernels is not None
    return kernels


def _make_runner(
    plan: Plan,
    found: KernelFacts,
    build: Build,
    model: Model,
    draft: tuple[Model, Build] | None,
    mtp: MTP | None,
    info: EngineInfo,
    compilers: Workers | None,
) -> Runner:
    if plan.device == "cpu":
        return EagerRunner(
            model,
            _cpu_kernels(plan, found),
            len(plan.groups),
            plan.max_num_seqs,
            plan.max_model_len,
            draft and draft[0],
            block_sizes=[group.block_size for group in plan.groups],
            stateful=bool(build.states),
            mtp=mtp,
        )
    from quire.runner.device import DeviceRunner

    return DeviceRunner(model, build, plan, info.vocab_size, draft, mtp, compilers)


def _make_tiering(
    options: Options,
    plan: Plan,
    cold: Sequence[tuple[ColdTier, float]],
    scheduler: Scheduler,
    caches: Sequence[CacheLayer],
) -> Tiering | None:
    """`caches`: of all layers of the plan's groups, by number."""
    if not plan.tier_slots:
        return None
    slab = make_slab(plan, pinned=plan.device != "cpu")
    pools = pool_tensors(caches, plan.groups)
    copier: Copier
    if plan.device == "cpu":
        copier = CpuPages(pools, slab)
    else:
        from quire.runner.device_pages import DevicePages

        copier = DevicePages(pools, slab)
    return make_tiering(options, cold, scheduler, slab, copier)


def set_threads(threads: int) -> None:
    """CPU threads of torch and of the native kernels."""
    torch.set_num_threads(threads)
    if native.available():
        from quire.kernels.native import ops as native_ops

        native_ops.set_num_threads(threads)


def make_scheduler(options: Options, plan: Plan, info: EngineInfo) -> Scheduler:
    """The scheduler that the plan sizes, over empty pools."""
    limits = Limits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        priority=options.engine.scheduling_policy == "priority",
        max_queue=options.engine.max_queue,
        recomputed_tokens=plan.recomputed_tokens,
    )
    identity = BlockIdentity(plan.cache_fingerprint)
    caching = options.engine.enable_prefix_caching
    kv = KVManager(plan.groups, plan.pool_blocks, identity, caching)
    return Scheduler(limits, kv, drafting=make_drafting(plan))


def make_drafting(plan: Plan) -> Drafting | None:
    """What the scheduler needs for drafts."""
    asked = plan.speculation
    if asked is None:
        return None
    drafts = asked.num_speculative_tokens
    proposer, ahead = make_proposer(asked), asked.ahead
    return Drafting(proposer, drafts, plan.max_sampled, ahead, asked.max_model_len)


def engine_info(options: Options, files: ModelFiles, plan: Plan) -> EngineInfo:
    """What frontends must know."""
    vocab_size = read_config(files.config()).vocab_size
    ends = eos_token_ids(files, tokenizer=not options.model.skip_tokenizer_init)
    return EngineInfo(
        model=options.server.served_model_name or files.name,
        max_model_len=plan.max_model_len,
        vocab_size=vocab_size,
        fingerprint=plan.fingerprint,
        plan=plan.to_dict(),
        default_params=default_params(files.generation_config()),
        eos_token_ids=[end for end in ends if end < vocab_size],  # others cannot be sampled
        max_queue=options.engine.max_queue,
        started=time.time(),
    )


def default_params(generation: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults from generation_config.json, as vLLM takes them."""
    names = {
        "temperature": "temperature",
        "top_p": "top_p",
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
    found = {ours: generation[hf] for hf, ours in names.items() if generation.get(hf) is not None}
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
