"""Whole engines with seeded weights, and requests to give them: what the runners' tests share.

Without a GPU the kernels run in Triton's interpreter on the CPU, and nothing is captured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from quire.config.parse import build_options
from quire.engine.gates import Gate
from quire.engine.startup import Engine, assemble, draft_options, find_model, kernel_facts
from quire.engine.weights import asked_quantization, dummy_source, open_weights
from quire.engine.wire import Abort, Add
from quire.errors import PlanError
from quire.hardware.machine import Gpu, Machine
from quire.models.checkpoint import checkpoint_scheme, declared_formats
from quire.params import SamplingParams
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.resolve import resolve

GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = Gpu("a GPU", "sm_90", (9, 0), 132, 232448, 140 * GIB, 139 * GIB)
MACHINE = Machine("a processor", "x86_64", 2, 8 * GIB, 8 * GIB, GPU, "")
WriteModel = Any


def engine(model: str, device: str, warm: bool = True, **given: Any) -> Engine:
    """An engine with seeded weights (those of the files with `load_format` auto), in float32 unless
    `given` says otherwise.

    "cuda" without a GPU computes on the CPU, in Triton's interpreter. `warm`: all that is to be
    captured or compiled beforehand is.
    """
    runner = "graph" if device == "cuda" and DEVICE.type == "cuda" else "eager"
    options = build_options(
        {"model": model, "load_format": "dummy", "device": device, "dtype": "float32"}
        | {"max_num_seqs": 4, "max_num_batched_tokens": 48, "kv_cache_memory": 2**21}
        | {"runner": runner, "max_model_len": 256}
        | given
    )
    files = find_model(options)
    found = kernel_facts()
    found = KernelFacts(found.reference, found.native, found.why_not, found.isa, "3.6.0")
    online = asked_quantization(options, files)
    formats = declared_formats(files.config(), checkpoint_scheme(files), online, options.engine.mtp)
    facts, draft = ModelFacts("m", files.config(), formats), draft_options(options)
    draft_facts = draft and ModelFacts("d", find_model(draft).config(), None)
    plan = resolve(options, facts, MACHINE, found, draft=draft_facts)
    where = DEVICE if device == "cuda" else torch.device("cpu")
    source = open_weights(options, files) or dummy_source(options, files)
    source.make_on(where)
    made = assemble(options, files, plan, source, found, where, lambda phase, done: None)
    while warm and made.core.warm():
        pass
    return made


def cramped(model: str, device: str = "cuda", **given: Any) -> Engine:
    """An engine with hardly more KV cache than one request of its longest context needs."""
    size, given = 2.0**13, {"max_model_len": 128} | given
    while True:
        try:
            return engine(model, device, kv_cache_memory=int(size), **given)
        except PlanError:
            size *= 1.2


@dataclass
class Got:
    """What a request was answered with: tokens, log-probabilities of them and of the prompt's, and
    how it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt: list[float] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


def run(
    engine: Engine,
    adds: list[Add],
    seed: int | None = None,
    gates: Mapping[str, Gate] | None = None,
    aborted: Mapping[str, int] | None = None,
    aborts: float = 0.0,
) -> dict[str, Got]:
    """All requests to their ends. With a `seed` they arrive between steps, at random. `gates` by
    request id; those in `aborted` are aborted before the step of that number, and before each step
    one of those that have arrived is aborted with probability `aborts`."""
    numbers = random.Random(seed)
    got = {add.request_id: Got() for add in adds}
    left, steps = list(adds), 0
    while left or not engine.core.idle:
        arriving = len(left) if seed is None else numbers.randint(0, 2)
        for add in left[:arriving]:
            assert not engine.core.add(add, (gates or {}).get(add.request_id))
        del left[:arriving]
        if numbers.random() < aborts:
            arrived = adds[: len(adds) - len(left)] or adds
            engine.core.abort(Abort(numbers.choice(arrived).request_id))
        steps += 1
        for request_id, at in (aborted or {}).items():
            if at == steps:
                engine.core.abort(Abort(request_id))
        assert steps < 5000
        for delta in engine.core.step() + engine.core.scheduler.take_finished():
            mine = got[delta.request_id]
            mine.tokens += delta.token_ids
            mine.logprobs += [p.logprobs[0] for p in delta.logprobs or []]
            mine.prompt += [p.logprobs[0] for p in delta.prompt_logprobs or []]
            mine.reason = delta.finish_reason or mine.reason
            mine.error = delta.error[0] if delta.error else None
        engine.core.scheduler.check_integrity()
    return got


def requests(count: int, seed: int, **params: Any) -> list[Add]:
    """Random prompts of 1 to 70 tokens of a vocabulary of 320; greedy unless `params` says."""
    numbers = random.Random(seed)
    return [
        Add(
            request_id=str(i),
            prompt_token_ids=[numbers.randrange(3, 320) for _ in range(numbers.randint(1, 70))],
            params=SamplingParams(
                **{"temperature": 0.0, "max_tokens": 12, "logprobs": 2, "ignore_eos": True} | params
            ),
            seed=i,
            choice=0,
        )
        for i in range(count)
    ]


def every_parameter(count: int, seed: int) -> list[Add]:
    """Requests whose parameters together use all of the sampler."""
    numbers = random.Random(seed)
    adds = requests(count, seed, max_tokens=20)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 40},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.7, "repetition_penalty": 0.8},
        {"logit_bias": {5: 4.0, 9: -3.0}},
        {"allowed_token_ids": [4, 7, 100, 200], "temperature": 1.0},
        {"min_tokens": 6, "stop_token_ids": [11, 12], "ignore_eos": False},
        {"temperature": 1.5, "prompt_logprobs": 1},
        {"temperature": 0.9, "logprobs": None},
    ]
    for add in adds:
        kind = numbers.choice(kinds)
        for name, value in kind.items():
            setattr(add.params, name, value)
        if numbers.random() < 0.2:
            add.bad_words = [[numbers.randrange(3, 320)], [7, numbers.randrange(3, 320)]]
    return adds


def repeating(adds: list[Add], seed: int, longest: int = 90) -> list[Add]:
    """Half of the prompts begin with another's, so that the prefix cache has them."""
    numbers = random.Random(seed)
    for i, add in enumerate(adds):
        if i and numbers.random() < 0.5:
            opening = adds[numbers.randrange(i)].prompt_token_ids
            add.prompt_token_ids = (opening + add.prompt_token_ids)[:longest]
    return adds


def check_mixed(found: dict[str, Got], expected: dict[str, Got], adds: list[Add]) -> None:
    """Aborted requests have the first of the expected tokens, the others all."""
    for add in adds:
        got, want = found[add.request_id], expected[add.request_id]
        cut = got.reason == "abort"
        tokens = want.tokens[: len(got.tokens)] if cut else want.tokens
        logprobs = want.logprobs[: len(got.logprobs)] if cut else want.logprobs
        prompt = want.prompt[: len(got.prompt)] if cut else want.prompt
        assert got.tokens == tokens, add.params
        assert got.logprobs == pytest.approx(logprobs, abs=2e-4), add.params
        assert got.prompt == pytest.approx(prompt, abs=2e-4), add.params
        assert cut or got.reason == want.reason


def check_deterministic(model: str, adds: list[Add], preempted: bool, **given: Any) -> None:
    """Alone, batched, in other chunks, preempted (whether that must happen is said), from the
    prefix cache, with graphs or without: the same tokens and bits of log-probabilities."""
    common = {"deterministic": True, **given}
    alone = run(engine(model, "cuda", max_num_seqs=1, **common), adds)
    ways = {
        "batched": engine(model, "cuda", max_num_seqs=16, max_num_batched_tokens=512, **common),
        "chunks": engine(model, "cuda", max_num_seqs=5, max_num_batched_tokens=19, **common),
        "eager": engine(model, "cuda", max_num_seqs=7, **common | {"runner": "eager"}),
        "cramped": cramped(model, max_num_seqs=16, **common),
    }
    for way, made in ways.items():
        found = run(made, adds, seed=4)
        for name, want in alone.items():
            assert found[name] == want, (way, name)
    assert ways["cramped"].core.scheduler.stats().preemptions > 0 or not preempted
    assert run(ways["batched"], adds) == alone, "from the prefix cache"
    assert ways["batched"].core.scheduler.stats().prefix_hit_tokens > 0


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 40},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 16,
        "num_hidden_layers": 2,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 20.0,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v4": {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 24,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": 8,
        # Heavily compressed by 16 and not the published 128: of prompts as short as the tests' that
        # would leave no entries, and nothing to find again.
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 3,
        "hc_eps": 1e-6,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 1,
        "num_hidden_layers": 4,
        "swiglu_limit": 1.0,
        "routed_scaling_factor": 1.5,
        "compress_rope_theta": 160000.0,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 64,
        },
    },
}

# Not a family of its own: its experts have biases, which the GPU's kernels add to quantised ones
# only, in bfloat16.
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "layer_types": None,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}

# Small enough for the interpreter.
TINY: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64}
TINY_DEEPSEEK_V3: dict[str, Any] = FAMILIES["deepseek_v3"] | TINY
TINY_DEEPSEEK_V3 |= {"first_k_dense_replace": 0, "n_routed_experts": 4, "n_group": 2}
TINY_DEEPSEEK_V3 |= {"topk_group": 1, "moe_intermediate_size": 16}
# Layers of all kinds, of which one chooses among its entries.
TINY_DEEPSEEK_V4: dict[str, Any] = FAMILIES["deepseek_v4"] | {
    "num_hidden_layers": 3,
    "layer_types": FAMILIES["deepseek_v4"]["layer_types"][:3],
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "hc_mult": 2,
    "vocab_size": 64,
    "index_topk": 3,
}

# Drafts wherever the last token was there before.
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
NGRAM |= {"prompt_lookup_max": 3}
