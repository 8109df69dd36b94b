"""gpt-oss on a GPU: MXFP4 experts with biases, sinks, sliding and full layers in turn.

The GPU's kernels have its experts in bfloat16 only, so its tokens are not the CPU runner's: graphs
are held to the same kernels launched one by one, and log-probabilities to the CPU's in float32.
"""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import PlanError
from quire.runner.device import DeviceRunner
from runner.engines import (
    GPT_OSS,
    Got,
    check_deterministic,
    cramped,
    engine,
    every_parameter,
    repeating,
    requests,
    run,
)

WriteModel = Any
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}


def test_its_experts_are_refused_where_no_kernel_adds_their_biases(write_model: WriteModel) -> None:
    """Which is why it is no family of the other tests, in float32."""
    with pytest.raises(PlanError, match="experts with biases"):
        engine(write_model(**GPT_OSS), "cuda")


@pytest.mark.gpu
def test_graphs_give_the_bits_of_the_kernels_they_hold(
    write_model: WriteModel, replayed: set[str]
) -> None:
    """Chunks, preemption, prefix hits, all sampling parameters, arrivals and aborts."""
    model = write_model(**GPT_OSS)
    adds = repeating(every_parameter(24, 12), 12)
    given = {"max_num_seqs": 6, "max_num_batched_tokens": 24, **BFLOAT16}
    graphs, plain = cramped(model, **given), cramped(model, **given)
    runner = plain.core.runner
    assert isinstance(runner, DeviceRunner)
    runner.replaying = False
    reasons = set()
    for seed in (12, 13):
        expected = run(plain, adds, seed=seed, aborts=0.03)
        assert run(graphs, adds, seed=seed, aborts=0.03) == expected
        reasons |= {got.reason for got in expected.values()}
    assert reasons >= {"abort", "length"}
    stats = graphs.core.scheduler.stats()
    assert stats.prefix_hit_tokens > 0 and stats.preemptions > 0
    assert replayed >= {"decode", "mixed", "sampling"}


@pytest.mark.gpu
def test_deterministic_bits_depend_on_the_request_alone(
    write_model: WriteModel, replayed: set[str]
) -> None:
    """Of the runner without graphs too, whose steps have no padding."""
    adds = repeating(every_parameter(16, 4), 4)
    for add in adds:
        add.params.max_tokens = 36
    check_deterministic(write_model(**GPT_OSS), adds, preempted=True, **BFLOAT16)
    assert replayed >= {"decode", "mixed", "sampling"}


def of_prompts(got: dict[str, Got]) -> list[float]:
    return [logprob for each in got.values() for logprob in each.prompt]


@pytest.mark.gpu
@pytest.mark.parametrize("runner", ["graph", "eager"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_log_probabilities_of_prompts_are_close_to_the_cpu_runners(
    write_model: WriteModel, runner: str, deterministic: bool, kv: str
) -> None:
    model = write_model(**GPT_OSS)
    adds = requests(6, 3, prompt_logprobs=1, max_tokens=1)
    common = {"kv_cache_dtype": kv}
    given = {"runner": runner, "deterministic": deterministic, **BFLOAT16, **common}
    exact = of_prompts(run(engine(model, "cpu", kernels="reference", **common), adds))
    found = of_prompts(run(engine(model, "cuda", **given), adds))
    # As for the other families in bfloat16 (test_device.py): one token in 240 has other experts
    # after rounding and is off by 0.15, on the CPU in bfloat16 too, the others by 0.005 at most.
    assert found == pytest.approx(exact, abs=0.2)
    differences = sorted(abs(x - y) for x, y in zip(found, exact, strict=True))
    assert differences[len(differences) * 9 // 10] < 0.01
