"""From options to a running engine core: files, plan, model, weights, caches, scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quire.config.options import Options
from quire.engine.api import EngineInfo
from quire.engine.core import EngineCore
from quire.engine.scheduler import Limits, Scheduler
from quire.errors import ModelError
from quire.hardware.machine import detect
from quire.kernels import native
from quire.kernels.reference import ops as reference_ops
from quire.kv.identity import BlockIdentity
from quire.kv.manager import KVManager
from quire.layers.build import Build
from quire.models.registry import build_model, load_weights, read_config
from quire.plan.plan import Plan
from quire.plan.resolve import DTYPES, KernelFacts, ModelFacts, resolve
from quire.runner.eager import EagerRunner, allocate_caches
from quire.weights import open_source
from quire.weights.dummy import DummySource
from quire.weights.hub import ModelFiles
from quire.weights.hub import resolve as find_files
from quire.weights.source import TensorInfo, WeightSource

Progress = Callable[[str, float], None]


@dataclass
class Engine:
    """A core ready for requests."""

    core: EngineCore
    plan: Plan
    info: EngineInfo
    files: ModelFiles


def kernel_facts() -> KernelFacts:
    """Which kernels this installation and machine have."""
    if not native.available():
        return KernelFacts(reference_ops, None, native.why_not())
    from quire.kernels.native import ops as native_ops

    return KernelFacts(reference_ops, native_ops, isa=native_ops.isa())


def find_model(options: Options) -> ModelFiles:
    """The model's files. Raises ModelError or UsageError."""
    return find_files(options.model.model, options.model.revision, options.model.offline)


def make_plan(
    options: Options, files: ModelFiles, source: WeightSource | None, found: KernelFacts
) -> Plan:
    """Plan with what is known: tensor formats where there are weights, else config.json alone."""
    formats = None
    fingerprint = f"dummy {options.model.seed}"
    if source is not None and not isinstance(source, DummySource):
        formats = {name: source.info(name).format for name in source.names()}
        fingerprint = files.commit or source.fingerprint()
    facts = ModelFacts(files.name, files.config(), formats, fingerprint)
    return resolve(options, facts, detect(), found)


def open_weights(options: Options, files: ModelFiles) -> WeightSource | None:
    """The source that --load-format names; None where there is only config.json."""
    wanted = options.model.load_format
    if wanted == "dummy" or (wanted == "auto" and files.kind == "config"):
        return None
    return open_source(files)


def dummy_source(options: Options, hf_config: dict[str, Any]) -> DummySource:
    """Seeded weights of the model's shapes."""
    build = Build(reference_ops)
    build_model(hf_config, build)
    declared = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16")
    dense = {"float32": "f32", "float16": "f16"}.get(declared, "bf16")
    infos = [TensorInfo(t.name, t.shape, dense) for w in build.weights for t in w.tensors()]
    return DummySource(infos, options.model.seed)


def start_engine(options: Options, progress: Progress | None = None) -> Engine:
    """Do all of start-up. Raises QuireError with what, why and fix."""
    say = progress or (lambda phase, fraction: None)
    say("finding the model", 0.0)
    files = find_model(options)
    read_config(files.config())  # a config that cannot be used comes before missing weights
    say("planning", 0.0)
    source = open_weights(options, files)
    if source is None:
        if options.model.load_format == "auto":
            raise ModelError(
                "no_weights",
                f"{files.name} has a config.json and no weights",
                fix="give a directory with .safetensors files, or --load-format dummy",
            )
        source = dummy_source(options, files.config())
    found = kernel_facts()
    plan = make_plan(options, files, source, found)
    kernels = found.native if plan.kernels == "native" else found.reference
    assert kernels is not None
    set_threads(plan.threads)
    say("loading weights", 0.0)
    build = Build(kernels, dtype=DTYPES.get(plan.dtype), max_len=plan.max_model_len)
    model = build_model(files.config(), build)
    with torch.inference_mode():
        load_weights(build, source, lambda done: say("loading weights", done))
    source.close()
    say("allocating the KV cache", 0.0)
    allocate_caches(build, plan.groups, plan.pool_blocks, DTYPES[plan.kv_dtype])
    runner = EagerRunner(model, kernels, len(plan.groups), plan.max_num_seqs, plan.max_model_len)
    info = engine_info(options, files, plan)
    scheduler = make_scheduler(options, plan, info)
    core = EngineCore(scheduler, runner, depth=2 if options.engine.async_scheduling else 1)
    return Engine(core, plan, info, files)


def set_threads(threads: int) -> None:
    """CPU threads of torch and of the native kernels."""
    torch.set_num_threads(threads)
    if native.available():
        from quire.kernels.native import ops as native_ops

        native_ops.set_num_threads(threads)


def make_scheduler(options: Options, plan: Plan, info: EngineInfo) -> Scheduler:
    limits = Limits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        priority=options.engine.scheduling_policy == "priority",
        max_queue=options.engine.max_queue,
    )
    identity = BlockIdentity(plan.cache_fingerprint)
    caching = options.engine.enable_prefix_caching
    return Scheduler(limits, KVManager(plan.groups, plan.pool_blocks, identity, caching))


def engine_info(options: Options, files: ModelFiles, plan: Plan) -> EngineInfo:
    """What frontends must know."""
    hf, generation = files.config(), files.generation_config()
    eos = generation.get("eos_token_id", hf.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [eos]
    return EngineInfo(
        model=options.server.served_model_name or files.name,
        max_model_len=plan.max_model_len,
        vocab_size=read_config(hf).vocab_size,
        fingerprint=plan.fingerprint,
        plan=plan.to_dict(),
        default_params=default_params(generation),
        eos_token_ids=[i for i in ids if isinstance(i, int)],
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
