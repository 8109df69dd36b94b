"""Speculation changes no token, log-probability, finish reason or count, whoever drafts and however
wrong: against the same requests without it, in whole engines.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton

from quire import LLM, SamplingParams
from quire.engine.startup import Engine
from quire.engine.wire import Add
from quire.kernels import native
from quire.outputs import CompletionOutput
from quire.speculative.proposer import Drafter
from runner.engines import (
    FAMILIES,
    NGRAM,
    SMALL,
    TINY,
    Got,
    check_mixed,
    cramped,
    engine,
    every_parameter,
    repeating,
    requests,
    run,
)

WriteModel = Any

Guess = Callable[[list[int], int], list[int]]


class Guessing:
    """A proposer whose drafters all guess alike."""

    def __init__(self, guess: Guess):
        self.propose = guess

    def drafter(self) -> Drafter:
        return self


def knowing(adds: list[Add], expected: dict[str, Got], wrong: float = 0.0) -> Guess:
    """Guesses what is expected, and spoils each token with probability `wrong`."""
    numbers = random.Random(0)
    known = [add.prompt_token_ids + expected[add.request_id].tokens for add in adds]

    def guess(tokens: list[int], count: int) -> list[int]:
        found = next(each for each in known if each[: len(tokens)] == tokens)
        drafts = found[len(tokens) : len(tokens) + count]
        return [numbers.randrange(320) if numbers.random() < wrong else token for token in drafts]

    return guess


def guesses(made: Engine, guess: Guess) -> Engine:
    """The engine, with another proposer."""
    drafting = made.core.scheduler._drafting
    assert drafting is not None
    drafting._proposer = Guessing(guess)
    return made


def accepted(made: Engine) -> tuple[int, int]:
    """(accepted drafts, drafts)."""
    stats = made.core.scheduler.stats()
    return sum(stats.accepted_at), stats.draft_tokens


def drafted_by(model: str, drafts: int = 4) -> dict[str, Any]:
    return {"method": "draft_model", "model": model, "num_speculative_tokens": drafts}


def rewound(adds: list[Add]) -> list[Add]:
    """Prompts that repeat themselves, so that n-grams are found."""
    for add in adds:
        add.prompt_token_ids = (add.prompt_token_ids * 3)[:40]
    return adds


@pytest.mark.parametrize(
    ("kernels", "drafter"),
    [
        *(("native", drafter) for drafter in ("ngram", "right", "wrong", "often wrong")),
        ("reference", "often wrong"),
        *(pytest.param("reference", d, marks=pytest.mark.full) for d in ("ngram", "right")),
    ],
)
def test_every_sampling_parameter_gives_the_tokens_of_a_run_without_speculation(
    write_model: WriteModel, kernels: str, drafter: str
) -> None:
    """In chunks, preempted, from the prefix cache, aborted; with native kernels bit for bit."""
    model = write_model()
    adds = repeating(rewound(every_parameter(24, 12)), 12)
    expected = run(engine(model, "cpu", kernels=kernels, threads=1), adds)
    given = {
        "kernels": kernels,
        "threads": 1,
        "speculative_config": NGRAM,
        "max_num_batched_tokens": 24,
    }
    made = cramped(model, "cpu", max_num_seqs=6, **given)
    if drafter != "ngram":
        wrong = {"right": 0.0, "often wrong": 0.3, "wrong": 1.0}[drafter]
        guesses(made, knowing(adds, expected, wrong))
    for seed in (12, 13):
        found = run(made, adds, seed=seed, aborts=0.02)
        check_mixed(found, expected, adds)
        if kernels == "native":
            whole = [add.request_id for add in adds if found[add.request_id].reason != "abort"]
            assert {name: found[name] for name in whole} == {n: expected[n] for n in whole}
    stats = made.core.scheduler.stats()
    assert stats.prefix_hit_tokens > 0
    assert stats.preemptions > 0 or drafter == "right"  # whose requests are soon done
    right, drafts = accepted(made)
    assert drafts > 50
    least, most = {"right": (0.9, 1.0), "wrong": (0.0, 0.1)}.get(drafter, (0.05, 0.9))
    assert least <= right / drafts <= most


@pytest.mark.parametrize(
    "family", ["tiny_gemma", "tiny_deepseek", pytest.param("tiny_moe", marks=pytest.mark.full)]
)
def test_windows_latents_and_experts_give_the_same_bits(
    family: str, request: pytest.FixtureRequest
) -> None:
    if not native.available():
        pytest.skip(native.why_not())
    model = request.getfixturevalue(family)
    adds = rewound(every_parameter(10, 3))
    expected = run(engine(model, "cpu", dtype="bfloat16"), adds)
    for wrong in (0.0, 0.4):
        made = cramped(model, "cpu", dtype="bfloat16", speculative_config=NGRAM, max_num_seqs=5)
        found = run(guesses(made, knowing(adds, expected, wrong)), adds, seed=1)
        assert found == expected
        assert accepted(made)[0] > 20


def test_a_tiny_model_on_the_gpu_runner_equals_the_cpu_runner(write_model: WriteModel) -> None:
    """In the interpreter: a prompt in chunks, decoding, penalties, drafts right, wrong and none."""
    model = write_model(**TINY)
    common = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "logprobs": 1}
    adds = [
        Add("a", list(range(3, 23)), SamplingParams(**common, presence_penalty=0.5), seed=0),
        Add("b", [7, 9], SamplingParams(**(common | {"temperature": 1.0})), seed=5),
    ]
    expected = run(engine(model, "cpu", kernels="reference", **SMALL), adds)
    made = engine(model, "cuda", warm=False, speculative_config=NGRAM, **SMALL)
    assert made.core.depth == 1
    assert not made.build.kernels.own_requests  # drafts are rows beside their request's
    found = run(guesses(made, knowing(adds, expected, 0.3)), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)
    right, drafts = accepted(made)
    assert 0 < right < drafts


@pytest.mark.parametrize("sizes", [{}, pytest.param({"hidden_size": 16}, marks=pytest.mark.full)])
def test_a_tiny_model_drafts_on_the_gpu_runner_as_on_the_cpus(
    write_model: WriteModel, sizes: dict[str, int]
) -> None:
    """In the interpreter. Requests end at different times, so some want fewer drafts."""
    model = write_model(**TINY)
    common = {"max_tokens": 4, "ignore_eos": True}
    adds = [
        Add("a", [5, 6, 7, 8], SamplingParams(**common, temperature=0.0, logprobs=1), seed=0),
        Add("b", [7, 9], SamplingParams(**(common | {"max_tokens": 3}), temperature=1.0), seed=5),
    ]
    expected = run(engine(model, "cpu", kernels="reference", **SMALL), adds)
    drafter = write_model(**(TINY | {"head_dim": 16} | sizes))
    config = drafted_by(drafter, 2)
    made = engine(model, "cuda", warm=False, speculative_config=config, **SMALL)
    found = run(made, adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=1e-4)
    right, drafts = accepted(made)
    assert drafts >= 3 and (right == drafts or sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("runner", ["graph", "eager"])
def test_a_model_drafts_on_the_gpu_and_tokens_are_the_cpu_runners(
    write_model: WriteModel, family: str, runner: str, replayed: set[str]
) -> None:
    """Chunks, preemption, prefix hits, all sampling parameters, arrivals and aborts."""
    model = write_model(**FAMILIES[family])
    adds = repeating(every_parameter(24, 12), 12)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    other = write_model(architectures=["MistralForCausalLM"], sliding_window=24)
    for drafter, least in ((model, 0.8), (other, 0.0)):
        given = {"max_num_seqs": 6, "max_num_batched_tokens": 40, "runner": runner}
        given |= {"speculative_config": drafted_by(drafter, 3)}
        for made in (engine(model, "cuda", **given), cramped(model, "cuda", **given)):
            for seed in (12, 13):
                check_mixed(run(made, adds, seed=seed, aborts=0.02), expected, adds)
                while made.core.warm():  # graphs that requests have asked for
                    pass
            right, drafts = accepted(made)
            assert drafts > 100 and right >= least * drafts
    graphs = {"mixed", "sampling", "reading", "guessing"} if runner == "graph" else set()
    assert replayed >= graphs and bool(replayed) == bool(graphs)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafter", ["ngram", "right", "often wrong"])
def test_graphs_give_every_request_the_cpu_runners_tokens(
    write_model: WriteModel, family: str, drafter: str, replayed: set[str]
) -> None:
    """Chunks, preemption, prefix hits, all sampling parameters, arrivals and aborts."""
    model = write_model(**FAMILIES[family])
    adds = repeating(rewound(every_parameter(24, 12)), 12)
    expected = run(engine(model, "cpu", kernels="reference"), adds)
    given = {"max_num_seqs": 6, "max_num_batched_tokens": 40, "speculative_config": NGRAM}
    for made in (engine(model, "cuda", **given), cramped(model, "cuda", **given)):
        if drafter != "ngram":
            guesses(made, knowing(adds, expected, 0.0 if drafter == "right" else 0.3))
        for seed in (12, 13):
            check_mixed(run(made, adds, seed=seed, aborts=0.02), expected, adds)
            while made.core.warm():  # graphs that requests have asked for
                pass
        right, drafts = accepted(made)
        assert drafts > 50 and (right > 20 or drafter == "ngram")
    assert replayed >= {"mixed", "sampling"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_deterministic_bits_do_not_depend_on_speculation(
    write_model: WriteModel, family: str, dtype: str, replayed: set[str]
) -> None:
    model = write_model(**FAMILIES[family])
    adds = rewound(every_parameter(16, 4))
    common = {"deterministic": True, "dtype": dtype, "max_num_seqs": 5}
    expected = run(engine(model, "cuda", **common), adds)
    for runner in ("graph", "eager"):
        for wrong in (0.0, 0.3):
            made = engine(model, "cuda", runner=runner, speculative_config=NGRAM, **common)
            assert run(guesses(made, knowing(adds, expected, wrong)), adds, seed=4) == expected
            assert accepted(made)[0] > 20
    assert replayed >= {"mixed", "sampling"}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_nothing_is_allocated_or_compiled_with_drafts_once_all_is_warm(
    write_model: WriteModel, method: str, replayed: set[str]
) -> None:
    model = write_model()
    config = NGRAM if method == "ngram" else drafted_by(model)
    made = engine(model, "cuda", max_num_seqs=16, speculative_config=config)
    assert not made.core.runner._graphs.failed  # type: ignore[attr-defined]
    adds = rewound(requests(16, 8, logprobs=None, max_tokens=30))
    run(made, adds)
    while made.core.warm():
        pass
    compiled: list[str] = []
    knobs = triton.knobs.runtime
    before = torch.cuda.memory_stats()["num_device_alloc"]
    knobs.jit_post_compile_hook = lambda **given: compiled.append(str(given.get("repr")))
    try:
        for seed in (9, 10):
            run(made, adds, seed=seed)
    finally:
        knobs.jit_post_compile_hook = None
    assert accepted(made)[1] > 20
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert not compiled
    assert replayed >= {"mixed", "sampling"}


def bits(output: CompletionOutput) -> list[list[tuple[int, float]]]:
    return [[(t, e.logprob) for t, e in p.items()] for p in output.logprobs or []]


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_a_draft_model_that_is_the_model_drafts_what_it_chooses(
    write_model: WriteModel, kernels: str
) -> None:
    """Sampled at high temperature with every parameter: only equal noise makes all drafts right."""
    model = write_model()
    adds = every_parameter(12, 5)
    given: dict[str, Any] = {"kernels": kernels, "threads": 1}
    expected = run(engine(model, "cpu", **given), adds)
    made = engine(model, "cpu", speculative_config=drafted_by(model), **given)
    found = run(made, adds)
    check_mixed(found, expected, adds)
    assert kernels == "reference" or found == expected
    right, drafts = accepted(made)
    assert right == drafts > 100
    steps = made.core.scheduler.stats().steps
    assert steps < 40  # of 3 x 20 tokens and the prompts; four requests at a time


@pytest.mark.parametrize(
    "family", ["tiny_gemma", "tiny_llama", pytest.param("tiny_moe", marks=pytest.mark.full)]
)
def test_any_draft_model_changes_no_bit(
    write_model: WriteModel, family: str, request: pytest.FixtureRequest
) -> None:
    """In chunks, preempted, aborted, from the prefix cache; its layers have another window, head
    size and number than the model's, or share its groups."""
    if not native.available():
        pytest.skip(native.why_not())
    model = request.getfixturevalue(family)
    adds = repeating(every_parameter(20, 6), 6)
    expected = run(engine(model, "cpu"), adds)
    others = {
        "full": write_model(num_hidden_layers=1, head_dim=8),
        "window": write_model(architectures=["MistralForCausalLM"], sliding_window=24),
    }
    for other in others.values():
        sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 24}
        made = cramped(model, "cpu", speculative_config=drafted_by(other, 3), **sizes)
        for seed in (1, 2):
            found = run(made, adds, seed=seed, aborts=0.02)
            check_mixed(found, expected, adds)
            whole = [name for name, got in found.items() if got.reason != "abort"]
            assert {name: found[name] for name in whole} == {n: expected[n] for n in whole}
        assert accepted(made)[1] > 100
        assert made.core.scheduler.stats().prefix_hit_tokens > 0


def test_a_draft_model_is_quantised_by_itself_and_drafts_up_to_its_length(
    write_model: WriteModel,
) -> None:
    """It is rounded and so not always right; and no draft lies beyond 60 of 420 tokens."""
    model = write_model()
    sampled = [SamplingParams(max_tokens=400, ignore_eos=True, seed=seed) for seed in range(8)]
    prompts = [{"prompt_token_ids": list(range(3, 23))}] * 8
    given = {"load_format": "dummy", "skip_tokenizer_init": True, "threads": 1}

    def run_with(**config: Any) -> tuple[list[list[int]], int, int]:
        asked = drafted_by(model) | config if config else None
        llm = LLM(model, **given, speculative_config=asked)
        outputs = llm.generate(prompts, sampled, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs], *accepted(llm._engine)

    expected, _, _ = run_with()
    same, right, drafts = run_with(quantization=None)
    assert same == expected and right == drafts > 2000
    rounded, right, drafts = run_with(quantization="nvfp4")
    assert rounded == expected and 2000 < right < drafts
    short, right, drafts = run_with(max_model_len=60)
    # Behind a row that ends at `end` comes its own token, and then what fits below 60.
    most = sum(min(4, 60 - 1 - end) for end in range(20, 60))
    assert short == expected and 8 * 20 < right == drafts <= 8 * most


def test_a_draft_model_goes_on_from_what_is_found_in_the_prefix_cache(
    write_model: WriteModel,
) -> None:
    model = write_model()
    made = engine(model, "cpu", threads=1, speculative_config=drafted_by(model))
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    for name in ("first", "again"):
        before = accepted(made)
        run(made, [Add(name, list(range(3, 73)), params, seed=3)])
        right, drafts = (b - a for a, b in zip(before, accepted(made), strict=True))
        assert right == drafts > 10
    assert made.core.scheduler.stats().prefix_hit_tokens == 64


def answers(llm: LLM, prompts: list[str], params: SamplingParams) -> list[Any]:
    """All that can be seen of each choice, log-probabilities to the last bit."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        (o.text, o.token_ids, o.finish_reason, o.stop_reason, bits(o))
        for output in outputs
        for o in output.outputs
    ]


def test_real_weights_stop_strings_choices_and_ends_are_those_without_speculation() -> None:
    if not native.available():
        pytest.skip(native.why_not())
    text = "the quick brown fox jumps over the lazy dog. "
    prompts = [text * 3 + "the quick", "a b c d a b c d a b", "1, 2, 3, 1, 2, 3, 1, 2"]
    plain = LLM("smollm2", max_model_len=512, threads=1)
    drafted = LLM("smollm2", max_model_len=512, threads=1, speculative_config=NGRAM)
    for params in (
        SamplingParams(temperature=0.0, max_tokens=16, stop=["lazy", "3, 1"], logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=7, min_tokens=3, ignore_eos=True),
        SamplingParams(temperature=0.6, seed=3, n=3, max_tokens=10, logprobs=0),
        SamplingParams(temperature=0.0, max_tokens=12, bad_words=["fox", " c"], logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=0.4),
    ):
        assert answers(drafted, prompts, params) == answers(plain, prompts, params)
    stats = drafted._engine.core.scheduler.stats()
    assert 20 < sum(stats.accepted_at) < stats.draft_tokens
    assert stats.generated_tokens == plain._engine.core.scheduler.stats().generated_tokens
    assert stats.steps < plain._engine.core.scheduler.stats().steps


def test_drafts_leave_the_distribution_as_it_is(write_model: WriteModel) -> None:
    """Pairs of tokens of a flat model over many seeds, by a chi-square test against the run without
    drafts, where the drafts are one fixed guess. (Equal tokens say more; this would hold without
    them.)"""
    model = write_model(num_hidden_layers=1, vocab_size=8)
    params = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True)
    count = 2000
    drawn = {}
    for seeds, config in ((0, None), (count, NGRAM)):
        adds = [Add(str(i), [3, 4, 5], params, seed=seeds + i) for i in range(count)]
        wide = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "max_queue": count}
        made = engine(model, "cpu", threads=1, speculative_config=config, **wide)
        if config is not None:
            guesses(made, lambda tokens, count: [6] * count)
        drawn[seeds] = Counter(tuple(got.tokens[1:]) for got in run(made, adds).values())
    assert accepted(made)[0] > count / 20
    statistic, cells = 0.0, 0
    for pair in drawn[0].keys() | drawn[count].keys():
        a, b = drawn[0][pair], drawn[count][pair]
        statistic += (a - b) ** 2 / (a + b)
        cells += 1
    # Of cells - 1 degrees of freedom; four standard deviations are a chance of 1 in 10^4 or less.
    assert statistic < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5, (statistic, cells)
