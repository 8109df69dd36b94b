"""The GPU runner equals the CPU's: same tokens and log-probabilities, whatever is mixed.

Without a GPU the kernels run in Triton's interpreter on the CPU, and nothing is captured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton

from quire.config.parse import build_options
from quire.engine.startup import Engine, assemble, dummy_source, find_model, kernel_facts
from quire.engine.wire import Abort, Add
from quire.errors import PlanError
from quire.hardware.machine import Gpu, Machine
from quire.params import SamplingParams
from quire.plan.facts import KernelFacts, ModelFacts
from quire.plan.resolve import resolve

GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = Gpu("a GPU", "sm_90", (9, 0), 132, 232448, 140 * GIB, 139 * GIB)
MACHINE = Machine("a processor", "x86_64", 2, 8 * GIB, 8 * GIB, GPU, "")
WriteModel = Any


def engine(model: str, device: str, **given: Any) -> Engine:
    """An engine with seeded weights, in float32 unless `given` says otherwise.

    "cuda" without a GPU computes on the CPU, in Triton's interpreter.
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
    plan = resolve(options, ModelFacts("m", files.config(), None), MACHINE, found)
    where = DEVICE if device == "cuda" else torch.device("cpu")
    source = dummy_source(options, files.config(), where)
    made = assemble(options, files, plan, source, found, where, lambda phase, done: None)
    while made.core.warm():
        pass
    return made


def cramped(model: str, **given: Any) -> Engine:
    """An engine with hardly more KV cache than one request of its longest context needs."""
    size = 2.0**13
    while True:
        try:
            return engine(
                model, "cuda", kv_cache_memory=int(size), **{"max_model_len": 128} | given
            )
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
    engine: Engine, adds: list[Add], seed: int | None = None, aborts: float = 0.0
) -> dict[str, Got]:
    """All requests to their ends. With a `seed` they arrive between steps, at random, and before
    each step one of those that have arrived is aborted with probability `aborts`."""
    numbers = random.Random(seed)
    got = {add.request_id: Got() for add in adds}
    left, steps = list(adds), 0
    while left or not engine.core.idle:
        arriving = len(left) if seed is None else numbers.randint(0, 2)
        for add in left[:arriving]:
            assert not engine.core.add(add)
        del left[:arriving]
        if numbers.random() < aborts:
            engine.core.abort(
                Abort(numbers.choice(adds[: len(adds) - len(left)] or adds).request_id)
            )
        steps += 1
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
}


def test_a_tiny_model_equals_the_cpu_runner(write_model: WriteModel) -> None:
    """Small enough for the interpreter: a prompt in chunks, decoding, two requests."""
    model = write_model(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64}
    adds = [
        Add("a", list(range(3, 23)), SamplingParams(temperature=0.0, max_tokens=3, logprobs=1), 0),
        Add("b", [7, 9], SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True), seed=5),
    ]
    expected = run(engine(model, "cpu", kernels="reference", **small), adds)
    found = run(engine(model, "cuda", **small), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_tokens_and_logprobs_equal_the_cpu_runners(
    write_model: WriteModel, family: str, deterministic: bool
) -> None:
    model = write_model(**FAMILIES[family])
    adds = requests(8, 1)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    found = run(engine(model, "cuda", deterministic=deterministic), adds, seed=1)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=2e-4)


def test_tiny_requests_that_are_chunked_preempted_and_aborted_equal_the_cpu_runners(
    write_model: WriteModel,
) -> None:
    """The mix of the next test, small enough for the interpreter."""
    model = write_model(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    small = {"max_num_seqs": 3, "max_num_batched_tokens": 32}
    common: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 9}, {"temperature": 0.8}]
    # Three of 31 tokens, each in need of a third block for its second token: there are seven.
    opening = list(range(3, 34))
    prompts = [opening, opening[::-1], [*opening[:-1], 60], [7, *opening[1:]], [9, 7, *opening[2:]]]
    adds = [
        Add(str(i), prompt, SamplingParams(**common | kinds[i % 3]), seed=i)
        for i, prompt in enumerate(prompts)
    ]
    expected = run(engine(model, "cpu", kernels="reference", max_model_len=64, **small), adds)
    made = cramped(model, max_model_len=64, **small)
    found = run(made, adds, seed=3, aborts=0.1)
    check_mixed(found, expected, adds)
    stats = made.core.scheduler.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert {got.reason for got in found.values()} == {"abort", "length"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_mixed_at_random_gives_the_cpu_runners_tokens(
    write_model: WriteModel, family: str
) -> None:
    """Chunks, preemption, prefix hits, all sampling parameters, arrivals and aborts."""
    model = write_model(**FAMILIES[family])
    adds = repeating(every_parameter(24, 12), 12)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    made = cramped(model, max_num_seqs=6, max_num_batched_tokens=24)
    reasons = set()
    for seed in (12, 13):
        found = run(made, adds, seed=seed, aborts=0.03)
        check_mixed(found, expected, adds)
        reasons |= {got.reason for got in found.values()}
    stats = made.core.scheduler.stats()
    assert reasons >= {"abort", "length"} and stats.prefix_hit_tokens > 0
    if "sliding_window" not in FAMILIES[family]:  # windows are bounded beforehand
        assert stats.preemptions > 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampling_parameter_gives_the_cpu_runners_tokens(
    write_model: WriteModel, family: str
) -> None:
    model = write_model(**FAMILIES[family])
    adds = every_parameter(24, 2)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    found = run(engine(model, "cuda"), adds, seed=2)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens, adds[int(name)].params


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close_to_float32(write_model: WriteModel, family: str) -> None:
    """Log-probabilities of given tokens: sampling is restricted to one token at a time."""
    model = write_model(**FAMILIES[family])
    adds = requests(6, 3, prompt_logprobs=1, max_tokens=1)
    exact, rounded = ({}, {})  # type: dict[str, list[float]], dict[str, list[float]]
    for dtype, into in (("float32", exact), ("bfloat16", rounded)):
        core = engine(model, "cuda", dtype=dtype).core
        for add in adds:
            core.add(add)
        while not core.idle:
            for delta in core.step():
                values = [p.logprobs[0] for p in delta.prompt_logprobs or []]
                into.setdefault(delta.request_id, []).extend(values)
    for name, want in exact.items():
        assert rounded[name] == pytest.approx(want, abs=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_depend_on_the_request_alone(
    write_model: WriteModel, family: str, dtype: str
) -> None:
    """Alone, batched, in other chunks, preempted, from the prefix cache, with graphs or without:
    the same tokens and the same bits of log-probabilities."""
    model = write_model(**FAMILIES[family])
    adds = every_parameter(16, 4)
    common = {"deterministic": True, "dtype": dtype}
    alone = run(engine(model, "cuda", max_num_seqs=1, **common), adds)
    ways = {
        "batched": engine(model, "cuda", max_num_seqs=16, max_num_batched_tokens=512, **common),
        "chunks": engine(model, "cuda", max_num_seqs=5, max_num_batched_tokens=19, **common),
        "eager": engine(model, "cuda", runner="eager", max_num_seqs=7, **common),
        "cramped": cramped(model, max_num_seqs=16, **common),
    }
    for way, made in ways.items():
        found = run(made, adds, seed=4)
        for name, want in alone.items():
            assert found[name] == want, (way, name)
    if "sliding_window" not in FAMILIES[family]:  # windows are bounded beforehand
        assert ways["cramped"].core.scheduler.stats().preemptions > 0
    assert run(ways["batched"], adds) == alone, "from the prefix cache"
    assert ways["batched"].core.scheduler.stats().prefix_hit_tokens > 0


@pytest.mark.gpu
def test_nan_fails_only_the_request_that_has_it(write_model: WriteModel) -> None:
    """One token's embedding is NaN: requests with it fail; blocks they leave spoil nobody."""
    model = write_model()
    adds = requests(12, 5)
    for add in adds[::3]:
        add.prompt_token_ids[-1:] = [300]
    made = cramped(model, deterministic=True)
    expected = run(made, [add for add in adds if 300 not in add.prompt_token_ids])
    with torch.inference_mode():
        made.core.runner.model.embed.packed.data[300] = torch.nan  # type: ignore[attr-defined]
    made.core.scheduler.kv.clear_cache()
    for seed in (6, 7):
        found = run(made, adds, seed=seed)
        for add in adds:
            if 300 in add.prompt_token_ids:
                assert found[add.request_id].error == "numerical_error"
            else:
                assert found[add.request_id] == expected[add.request_id]


@pytest.mark.gpu
def test_nothing_is_allocated_or_compiled_once_all_is_warm(write_model: WriteModel) -> None:
    model = write_model(num_hidden_layers=2, max_position_embeddings=4096)
    sizes = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "max_model_len": 4096}
    made = engine(model, "cuda", kv_cache_memory=2**26, **sizes)
    assert not made.core.runner._graphs.failed  # type: ignore[attr-defined]
    long = [Add("long", [7] * 3000, SamplingParams(temperature=0.0, max_tokens=2), 0)]
    run(made, requests(4, 8))
    while made.core.warm():
        pass
    compiled: list[str] = []
    knobs = triton.knobs.runtime
    before = torch.cuda.memory_stats()["num_device_alloc"]
    knobs.jit_post_compile_hook = lambda **given: compiled.append(str(given.get("repr")))
    try:
        for seed in (9, 10):
            run(made, requests(20, seed), seed=seed)
        run(made, long)
    finally:
        knobs.jit_post_compile_hook = None
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert not compiled
