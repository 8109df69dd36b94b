"""Engines whose keys and values are e4m3 with scales: the GPU's runner gives the CPU's tokens, and
in deterministic mode bits do not depend on how a prompt is cut, on preemption or on hits.

Without a GPU the kernels run in Triton's interpreter on the CPU, and nothing is captured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import LLAMA, QWEN3_MOE, of_scheme
from safetensors.torch import load_file, save_file

from quire.engine.startup import Engine
from quire.engine.wire import Add
from quire.errors import ModelError
from quire.kernels import native
from quire.kernels.reference.attention.fp8_cache import codes_and_scales
from quire.params import SamplingParams
from runner.engines import (
    FAMILIES,
    SMALL,
    TINY,
    check_deterministic,
    cramped,
    engine,
    every_parameter,
    repeating,
    requests,
    run,
)

WriteModel = Any
FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
# A value near the middle of two codes may get either where sums were rounded another way.
ROUNDING = 0.02
EXTRAS = {"architectures": ["MistralForCausalLM"], "sliding_window": 12}


def add(name: str, prompt: int, tokens: int) -> Add:
    """A greedy request for all log-probabilities."""
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=1, prompt_logprobs=0
    )
    return Add(name, list(range(3, 3 + prompt)), params, seed=0)


@pytest.mark.parametrize("family", [{}, pytest.param(EXTRAS, marks=pytest.mark.full)])
def test_a_tiny_model_equals_the_cpu_runner(
    write_model: WriteModel, family: dict[str, Any]
) -> None:
    """A prompt in chunks, decoding, two requests."""
    model, adds = write_model(**TINY, **family), [add("a", 18, 3), add("b", 2, 2)]
    expected = run(engine(model, "cpu", kernels="reference", **SMALL, **FP8), adds)
    found = run(engine(model, "cuda", **SMALL, **FP8), adds)
    for name, want in expected.items():
        assert found[name].tokens == want.tokens
        assert found[name].logprobs == pytest.approx(want.logprobs, abs=ROUNDING)
        assert found[name].prompt == pytest.approx(want.prompt, abs=ROUNDING)


def test_bits_do_not_depend_on_how_a_prompt_is_cut(write_model: WriteModel) -> None:
    """Whole, in chunks, and token by token, in the GPU's deterministic mode."""
    model, found = write_model(**TINY), []
    for tokens in (8, 3, 1):
        given = {**SMALL, "max_num_seqs": 1, "max_num_batched_tokens": tokens}
        made = engine(model, "cuda", deterministic=True, **given, **FP8)
        found.append(run(made, [add("a", 7, 2)]))
    assert found[0] == found[1] == found[2]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_deterministic_bits_depend_on_the_request_alone(
    write_model: WriteModel, family: str, replayed: set[str]
) -> None:
    model, adds = write_model(**FAMILIES[family]), repeating(every_parameter(16, 4), 5)
    # Windows are bounded beforehand.
    preempted = "sliding_window" not in FAMILIES[family]
    check_deterministic(model, adds, preempted, dtype="bfloat16", **FP8)
    assert replayed >= {"decode", "mixed", "sampling"}


@pytest.mark.parametrize("family", [n for n in FAMILIES if not n.startswith("deepseek")])
def test_on_the_cpu_bits_are_those_of_the_request_alone(
    write_model: WriteModel, family: str
) -> None:
    """Batched, in other chunks, preempted and from the prefix cache."""
    if not native.available():
        pytest.skip("determinism is the native kernels' promise")
    model, given = write_model(**FAMILIES[family]), repeating(requests(10, 1), 2)
    alone = run(engine(model, "cpu", max_num_seqs=1, **FP8), given)
    chunks = engine(model, "cpu", max_num_seqs=5, max_num_batched_tokens=19, **FP8)
    tight = cramped(model, "cpu", max_num_seqs=8, **FP8)
    for made in (chunks, tight):
        assert run(made, given, seed=3) == alone
    assert run(chunks, given) == alone and chunks.core.scheduler.stats().prefix_hit_tokens > 0
    if "sliding_window" not in FAMILIES[family]:  # windows are bounded beforehand
        assert tight.core.scheduler.stats().preemptions > 0
    plain = run(engine(model, "cpu", kv_cache_dtype="float32"), given)
    assert plain != alone, "the cache was rounded"


def test_a_model_that_drafts_keeps_its_keys_the_same_way(write_model: WriteModel) -> None:
    model = write_model()
    drafts = {"speculative_config": {"model": model, "num_speculative_tokens": 2}}
    expected = run(engine(model, "cpu", **FP8), requests(4, 2))
    made = engine(model, "cpu", **FP8, **drafts)
    assert {n: got.tokens for n, got in run(made, requests(4, 2)).items()} == {
        n: got.tokens for n, got in expected.items()
    }
    assert made.core.scheduler.stats().accepted_tokens > 0


def kv_checkpoint(directory: Path, config: dict[str, Any], scales: dict[str, Any]) -> Path:
    """A checkpoint whose weights are FP8 and whose first layers have these scales."""
    path, _ = of_scheme(directory, "ct fp8 channel", config)
    file = path / "model.safetensors"
    attention = "model.layers.{}.self_attn"
    stored = load_file(file) | {
        f"{attention.format(layer)}.{name}": torch.tensor(value)
        for layer, parts in scales.items()
        for name, value in parts.items()
    }
    save_file(stored, file)
    return path


def layers(made: Engine) -> list[Any]:
    model: Any = made.core.runner.model  # type: ignore[attr-defined]
    return [layer.attention for layer in model.layers]


SCALES = {
    0: {"k_scale": [0.25], "v_scale": [0.5]},
    1: {"k_proj.k_scale": [0.125, 0.25], "v_proj.v_scale": 2.0},
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_checkpoints_scales_are_those_of_its_cache(device: str, tmp_path: Path) -> None:
    """One for all heads of a layer, one for each, and none at all."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    path = kv_checkpoint(tmp_path, {**LLAMA, **sizes}, SCALES)
    given = {"load_format": "auto", "max_num_seqs": 1, "max_num_batched_tokens": 16}
    made = engine(str(path), device, warm=False, max_model_len=32, **given, **FP8)
    run(made, [add("a", 2, 1)])
    for i, layer in enumerate(layers(made)):
        # Block 1 is the first that is given out, and has two tokens.
        first = [codes_and_scales(cache)[1][1, :, :2] for cache in layer.cache.tensors]
        if i == 2:
            assert layer.fixed_scales is None
            assert len(set(torch.cat(first).flatten().tolist())) == 8
            continue
        k, v = SCALES[i].values()
        for scales, want in zip(first, (k, v), strict=True):
            wanted = torch.tensor(want).reshape(-1).expand(2)
            assert torch.equal(scales.cpu(), wanted[:, None].expand(2, 2))


def test_scales_of_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    scales = {0: {"attn.k_scale": [1.0, 1.0, 1.0], "attn.v_scale": [1.0]}}
    path = kv_checkpoint(tmp_path, {**QWEN3_MOE, "num_hidden_layers": 1}, scales)
    with pytest.raises(ModelError) as caught:
        engine(str(path), "cpu", load_format="auto", **FP8)
    assert caught.value.code == "quantized_part_mismatch"
