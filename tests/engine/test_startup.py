"""From a model's files to what the engine tells frontends and stops at."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from quire import LLM, SamplingParams
from quire.config.parse import build_options
from quire.engine import startup
from quire.engine.startup import find_model, kernel_facts, make_plan
from quire.engine.weights import open_weights
from quire.errors import PlanError
from quire.plan.plan import Plan
from quire.weights.source import WeightSource


@pytest.mark.parametrize("skip", [False, True])
def test_generation_ends_at_the_tokenizers_own_end_too(
    write_model: Callable[..., str], skip: bool
) -> None:
    model = write_model(eos_token_id=[2, 10**6])  # one of them outside the vocabulary
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    own = backend.token_to_id("</s>")
    (Path(model) / "tokenizer.json").write_text(backend.to_str())
    (Path(model) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    llm = LLM(model, load_format="dummy", skip_tokenizer_init=skip)
    for end, ends in ((2, True), (own, not skip), (7, False)):
        params = SamplingParams(max_tokens=4, temperature=0.0, logit_bias={end: 100.0})
        [output] = llm.generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == (1 if ends else 4)
        assert output.outputs[0].finish_reason == ("stop" if ends else "length")


@pytest.mark.parametrize("name", ["load_weights", "allocate_caches"])
def test_a_device_without_memory_is_an_error_of_the_plan(
    write_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(startup, name, fail)
    with pytest.raises(PlanError, match="no memory left") as caught:
        LLM(write_model(), load_format="dummy", skip_tokenizer_init=True)
    assert caught.value.code == "out_of_memory" and "the largest term is" in caught.value.fix


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_of_garbage_is_afterwards_as_it_was(
    write_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch, collecting: bool
) -> None:
    seen = []

    def fail(*given: Any) -> None:
        seen.append(gc.isenabled())
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    model, before = write_model(), gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        LLM(model, load_format="dummy", skip_tokenizer_init=True)
        assert gc.isenabled() == collecting
        monkeypatch.setattr(startup, "load_weights", fail)
        with pytest.raises(PlanError):
            LLM(model, load_format="dummy", skip_tokenizer_init=True)
        assert gc.isenabled() == collecting and seen == [False]
    finally:
        (gc.enable if before else gc.disable)()


def test_dummies_are_made_once_a_start(
    write_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], startup.dummy_source

    def counted(*given: Any) -> WeightSource:
        made.append(make(*given))
        return made[-1]

    monkeypatch.setattr(startup, "dummy_source", counted)
    LLM(write_model(), load_format="dummy", skip_tokenizer_init=True)
    assert len(made) == 1


def plan_of(model: str, **options: Any) -> Plan:
    built = build_options({"model": model, "load_format": "dummy", **options})
    return make_plan(built, find_model(built), None, kernel_facts())


def test_the_fingerprint_changes_with_config_values_that_no_tensor_shows(
    write_model: Callable[..., str],
) -> None:
    plain = plan_of(write_model())
    assert plan_of(write_model()).fingerprint == plain.fingerprint
    prints = {plain.fingerprint}
    for change in (
        {"rope_theta": 20000.0},
        {"rms_norm_eps": 1e-6},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ):
        prints.add(plan_of(write_model(**change)).fingerprint)
    prints.add(plan_of(write_model(), seed=1).fingerprint)
    prints.add(replace(plain, ranks=2).fingerprint)
    assert len(prints) == 7


def test_dummies_of_a_gguf_file_have_its_formats() -> None:
    real = build_options({"model": "smollm2"})
    files = find_model(real)
    source = open_weights(real, files)
    assert source is not None
    plan = plan_of("smollm2")
    assert "q4_1" in plan.weight_formats
    assert plan.weight_formats == make_plan(real, files, source, kernel_facts()).weight_formats
    llm = LLM("smollm2", load_format="dummy", max_model_len=64)
    assert llm.plan.weight_formats == plan.weight_formats
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1)
    [output] = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
    assert all(
        math.isfinite(p[t].logprob)
        for t, p in zip(output.outputs[0].token_ids, output.outputs[0].logprobs or [], strict=True)
    )
