"""The GPU runner equals the CPU's: same tokens and log-probabilities, whatever is mixed.

Without a GPU the kernels run in Triton's interpreter on the CPU, and nothing is captured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from quant.stored import SCHEMES

from quire.engine.wire import Add
from quire.params import SamplingParams
from quire.runner import device as device_runner
from quire.runner.device import DeviceRunner
from quire.runner.shapes import Sampling, Shape
from runner.engines import (
    FAMILIES,
    SMALL,
    TINY,
    TINY_DEEPSEEK_V3,
    TINY_DEEPSEEK_V4,
    check_deterministic,
    check_mixed,
    cramped,
    engine,
    every_parameter,
    repeating,
    requests,
    run,
)

WriteModel = Any


def test_a_tiny_model_equals_the_cpu_runner(write_model: WriteModel) -> None:
    """A prompt in chunks, decoding, two requests."""
    model = write_model(**TINY)
    adds = [
        Add("a", list(range(3, 23)), SamplingParams(temperature=0.0, max_tokens=3, logprobs=1), 0),
        Add("b", [7, 9], SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True), seed=5),
    ]
    expected = run(engine(model, "cpu", kernels="reference", **SMALL), adds)
    found = run(engine(model, "cuda", **SMALL), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_contexts_that_become_long_leave_short_steps_and_change_no_bits(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block is short here: steps of such contexts have tables of one block."""
    monkeypatch.setattr(device_runner, "SHORT_CONTEXT", 16)
    launched = []
    run_key = DeviceRunner._run

    def watched(runner: DeviceRunner, key: Any, compute: Any) -> None:
        launched.append(key)
        run_key(runner, key, compute)

    monkeypatch.setattr(DeviceRunner, "_run", watched)
    model = write_model(**TINY)
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, ignore_eos=True)
    adds = [Add("a", list(range(3, 18)), params, seed=0)]
    found = run(engine(model, "cuda", dtype="bfloat16", **SMALL), adds)
    decoding = [key for key in launched if isinstance(key, Shape) and key.tokens == key.rows]
    assert [key.short for key in decoding[:2]] == [True, False]
    monkeypatch.setattr(device_runner, "short_rows", lambda *_: 0)
    launched.clear()
    assert run(engine(model, "cuda", dtype="bfloat16", **SMALL), adds) == found
    assert not any(key.short for key in launched if isinstance(key, Shape))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nan_that_no_logits_show_fails_its_request_in_the_step_that_computes_it(
    write_model: WriteModel, device: str
) -> None:
    """NaN in the first chunk of three, beyond what the window lets the last tokens see."""
    model = write_model(architectures=["MistralForCausalLM"], sliding_window=4, **TINY)
    given = SMALL | ({"kernels": "reference"} if device == "cpu" else {})
    core = engine(model, device, **given).core
    embedding = core.runner.model.embed  # type: ignore[attr-defined]
    with torch.inference_mode():
        embedding.packed.data[7] = torch.nan
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = [5] * 40
    for name, tokens in (("bad", [*prompt[:3], 7, *prompt[4:]]), ("good", prompt)):
        assert not core.add(Add(name, tokens, params, seed=0))
    deltas = core.step()
    assert [(d.request_id, d.error and d.error[0]) for d in deltas] == [("bad", "numerical_error")]
    assert not core.scheduler.kv.pools[0]._index
    found = [token for _ in range(9) for delta in core.step() for token in delta.token_ids]
    assert len(found) == 2 and core.idle


@pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_tiny_deepseek_equals_the_cpu_runner(
    write_model: WriteModel, deterministic: bool
) -> None:
    """A prompt in chunks, decoding, two requests; queries with and without a latent."""
    model = write_model(**TINY_DEEPSEEK_V3 | {"q_lora_rank": None if deterministic else 24})
    adds = [
        Add("a", list(range(3, 23)), SamplingParams(temperature=0.0, max_tokens=2, logprobs=1), 0),
        Add("b", [7, 9], SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True), seed=5),
    ]
    expected = run(engine(model, "cpu", kernels="reference", **SMALL), adds)
    found = run(engine(model, "cuda", deterministic=deterministic, **SMALL), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("deterministic", "kv"), [(False, "auto"), pytest.param(True, "fp8", marks=pytest.mark.full)]
)
def test_a_tiny_deepseek_v4_equals_the_cpu_runner(
    write_model: WriteModel, deterministic: bool, kv: str
) -> None:
    """A prompt in chunks, decoding, two requests, the second with a prefix that is cached."""
    model = write_model(**TINY_DEEPSEEK_V4)
    prompt = list(range(3, 40))
    adds = [
        Add("a", prompt, SamplingParams(temperature=0.0, max_tokens=2, logprobs=1), seed=0),
        Add("b", [*prompt[:33], 7], SamplingParams(temperature=1.0, max_tokens=2), seed=5),
    ]
    given: dict[str, Any] = {**SMALL, "max_num_seqs": 1, "kv_cache_dtype": kv}
    expected = run(engine(model, "cpu", kernels="reference", **given), adds)
    made = engine(model, "cuda", warm=False, deterministic=deterministic, **given)
    found = run(made, adds)
    assert made.core.scheduler.stats().prefix_hit_tokens > 0
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        # A value between two codes of e4m3 may get either.
        bound = 1e-4 if kv == "auto" else 5e-3
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=bound)


def test_a_tiny_quantised_model_equals_the_cpu_runner(write_model: WriteModel) -> None:
    model = write_model(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, quantization_config=SCHEMES["modelopt nvfp4"][0],
    )  # fmt: skip
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64}
    adds = [Add("a", [7, 9], SamplingParams(temperature=0.0, max_tokens=3, logprobs=1), seed=5)]
    expected = run(engine(model, "cpu", kernels="reference", **small), adds)["a"]
    found = run(engine(model, "cuda", **small), adds)["a"]
    assert found.tokens == expected.tokens
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_give_the_cpu_runners_tokens(
    write_model: WriteModel, scheme: str, replayed: set[str]
) -> None:
    """Codes and scales are decoded on the GPU to the values that the CPU has."""
    sizes = {**FAMILIES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 96}
    model = write_model(**sizes, quantization_config=SCHEMES[scheme][0])
    adds = requests(4, 1)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    found = run(engine(model, "cuda"), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=2e-4)
    assert replayed >= {"decode", "sampling"}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fp8", "nvfp4", "nvfp4-experts"])
def test_weights_are_quantised_on_the_gpu_while_loading(
    write_model: WriteModel, method: str, replayed: set[str]
) -> None:
    sizes = {**FAMILIES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 96}
    model, adds = write_model(**sizes), requests(4, 1)
    expected = run(engine(model, "cpu", kernels="reference", quantization=method), adds)
    found = run(engine(model, "cuda", quantization=method), adds)
    assert {n: got.tokens for n, got in found.items()} == {
        n: got.tokens for n, got in expected.items()
    }
    assert replayed >= {"decode", "sampling"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_tokens_and_logprobs_equal_the_cpu_runners(
    write_model: WriteModel, family: str, deterministic: bool, replayed: set[str]
) -> None:
    model = write_model(**FAMILIES[family])
    adds = requests(8, 1)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    found = run(engine(model, "cuda", deterministic=deterministic), adds, seed=1)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=2e-4)
    assert replayed >= {"decode", "mixed", "sampling"}


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
    write_model: WriteModel, family: str, replayed: set[str]
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
    assert replayed >= {"decode", "mixed", "sampling"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampling_parameter_gives_the_cpu_runners_tokens(
    write_model: WriteModel, family: str, replayed: set[str]
) -> None:
    model = write_model(**FAMILIES[family])
    adds = every_parameter(24, 2)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    found = run(engine(model, "cuda"), adds, seed=2)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens, adds[int(name)].params
    assert replayed >= {"decode", "mixed", "sampling"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.full)])
def test_who_watches_sees_the_logits_of_a_prompt_in_their_order(
    write_model: WriteModel, device: str
) -> None:
    """Beside a request that wants none; their log-softmax is what the request is told."""
    model = write_model(**TINY)
    given = SMALL | ({"kernels": "reference"} if device == "cpu" else {})
    core = engine(model, device, **given).core
    seen: list[tuple[torch.Tensor, list[int]]] = []
    core.runner.watch = lambda logits, tokens: seen.append(  # type: ignore[attr-defined]
        (logits.clone(), tokens)
    )
    prompt = list(range(3, 40))
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    adds = [
        Add("a", prompt, params, seed=0),
        Add("b", [7, 9, 5], SamplingParams(temperature=0.0, max_tokens=2), seed=0),
    ]
    told = run(engine(model, device, **given), adds)["a"].prompt
    for add in adds:
        core.add(add)
    while not core.idle:
        core.step()
    assert [token for _, tokens in seen for token in tokens] == prompt[1:]
    logprobs = torch.log_softmax(torch.cat([logits for logits, _ in seen]).float(), 1).cpu()
    found = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert found == pytest.approx(told, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close_to_float32(
    write_model: WriteModel, family: str, replayed: set[str]
) -> None:
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
    found = [x for name in exact for x in rounded[name]]
    want = [x for name in exact for x in exact[name]]
    # A token whose experts, or entries it attends to, are others after rounding differs by more.
    bound = 0.2 if family == "deepseek_v4" else 0.05
    assert found == pytest.approx(want, abs=bound)
    differences = sorted(abs(x - y) for x, y in zip(found, want, strict=True))
    # The CPU's own bfloat16 is off by 0.0086 for Gemma 3, whose embeddings are multiplied by the
    # root of their width, and by 0.0009 at most for the other families but DeepSeek V4 (0.0013).
    assert differences[len(differences) * 9 // 10] < (0.02 if family == "gemma3" else 0.01)
    assert "mixed" in replayed


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_depend_on_the_request_alone(
    write_model: WriteModel, family: str, dtype: str, replayed: set[str]
) -> None:
    # Windows are bounded beforehand.
    preempted = "sliding_window" not in FAMILIES[family]
    check_deterministic(
        write_model(**FAMILIES[family]), every_parameter(16, 4), preempted, dtype=dtype
    )
    assert replayed >= {"decode", "mixed", "sampling"}


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
def test_nothing_is_allocated_or_compiled_once_all_is_warm(
    write_model: WriteModel, replayed: set[str]
) -> None:
    model = write_model(num_hidden_layers=2, max_position_embeddings=4096)
    sizes = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "max_model_len": 4096}
    made = engine(model, "cuda", kv_cache_memory=2**26, **sizes)
    assert not made.core.runner._graphs.failed  # type: ignore[attr-defined]
    long = [Add("long", [7] * 3000, SamplingParams(temperature=0.0, max_tokens=2), 0)]
    run(made, requests(4, 8))
    # Graphs that sample log-probabilities are made where a request asks for them: all of them now.
    runner: Any = made.core.runner
    runner._wanted += [Sampling(rows, "greedy", True) for rows in runner._shapes.decode]
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
    assert replayed >= {"packet", "decode", "mixed", "sampling"}
