"""Plans of quantised checkpoints: from the config alone, with files, widened or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import LLAMA, QWEN3_MOE, of_scheme, tensors
from quant.stored import SCHEMES

from quire.config.parse import build_options
from quire.engine.startup import find_model, kernel_facts, make_plan
from quire.engine.weights import open_weights
from quire.errors import PlanError, QuireError
from quire.kernels.dense import DenseWeights
from quire.kernels.reference.packed import PackedWeight
from quire.layers.build import Build
from quire.layers.embedding import Embedding
from quire.layers.experts import StackedExperts
from quire.layers.linear import Linear
from quire.models.registry import build_model, load_weights
from quire.plan.place import held_formats
from quire.plan.plan import Choice, Plan

BF16 = {**LLAMA, "dtype": "bfloat16"}


def plan_of(path: Path, **options: Any) -> Plan:
    built = build_options({"model": str(path), "device": "cpu", **options})
    files = find_model(built)
    return make_plan(built, files, open_weights(built, files), kernel_facts())


def choice(plan: Plan, what: str) -> Choice:
    return next(c for c in plan.choices if c.what == what)


def config_only(path: Path, config: dict[str, Any], **extra: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, **extra}))
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_config_alone_tells_what_the_files_hold(scheme: str, tmp_path: Path) -> None:
    path, _ = of_scheme(tmp_path, scheme)
    with_files = plan_of(path)
    (path / "model.safetensors").unlink()
    alone, dummy = plan_of(path), plan_of(path, load_format="dummy")
    assert alone.weight_bytes == with_files.weight_bytes == dummy.weight_bytes
    assert re.search(rf"{SCHEMES[scheme][2]}(_g\d+|_row)? x 14", alone.weight_formats)
    assert alone.weight_formats == with_files.weight_formats == dummy.weight_formats


def test_weights_without_kernels_are_widened_and_the_plan_says_so(tmp_path: Path) -> None:
    path, _ = of_scheme(tmp_path, "ct nvfp4", BF16)
    for options, dtype, size in (({}, "bfloat16", 2), ({"dtype": "float32"}, "float32", 4)):
        found = plan_of(path, kernels="reference", **options)
        said = choice(found, "quantised weights")
        assert said.downgrade and said.chosen == f"widened to {dtype}" and "nvfp4" in said.reason
        linears = [s for n, s in tensors(BF16).items() if len(s) == 2 and "layers" in n]
        plain = 160 * 160 * 2 * size if dtype == "float32" else 160 * 160 * 2 * 4
        held = sum(rows * columns for rows, columns in linears) * size
        # Embedding and head are float32 in these files, norms always.
        assert found.weight_bytes == held + plain + 4 * 5 * 160
    with pytest.raises(PlanError) as caught:
        plan_of(path, strict=True)
    assert caught.value.code == "downgrade"


@pytest.mark.parametrize("scheme", ["gptq ordered", "ct w4a16 ordered"])
def test_columns_in_an_order_of_their_own_are_widened_and_strict_refuses(
    scheme: str, tmp_path: Path
) -> None:
    path, _ = of_scheme(tmp_path, scheme, BF16)
    size = plan_of(path, kernels="reference").weight_bytes
    (path / "model.safetensors").unlink()
    found = plan_of(path, kernels="reference")
    said = choice(found, "quantised weights")
    assert said.downgrade and said.chosen == "widened to bfloat16"
    assert "ordered (desc_act)" in said.reason and "int4_ordered x 14" in found.weight_formats
    linears = [s for n, s in tensors(BF16).items() if len(s) == 2 and "layers" in n]
    held = sum(rows * columns for rows, columns in linears) * 2
    # Embedding and head are float32 in the files, bfloat16 by the config; norms are always float32.
    assert size == held + 160 * 160 * 2 * 4 + 4 * 5 * 160
    with pytest.raises(PlanError, match="quantised weights") as caught:
        plan_of(path, kernels="reference", deterministic=False, strict=True)
    assert caught.value.code == "downgrade" and "desc_act" in caught.value.why


def test_experts_and_linears_are_widened_each_for_itself() -> None:
    """fp8_block on a GPU: blocks of gate and up of 96 rows cannot follow each other."""
    kernels: Any = DenseWeights(torch.bfloat16, torch.device("meta"))
    build, choices = Build(kernels, dtype=torch.bfloat16), list[Choice]()
    build_model(QWEN3_MOE, build)

    def stored(format: str) -> Callable[[str], str]:
        return lambda name: format if "proj" in name else "bf16"

    held = held_formats(build, stored("fp8_block"), "bfloat16", choices)
    layer = "model.layers.0"
    assert held(f"{layer}.self_attn.o_proj.weight") == "fp8_block"
    assert held(f"{layer}.mlp.experts.3.down_proj.weight") == "bf16"
    assert [c.chosen for c in choices] == ["24 of 32 widened to bfloat16"]
    assert "96 rows" in choices[0].reason
    choices.clear()
    held = held_formats(build, stored("nvfp4"), "bfloat16", choices)
    assert held(f"{layer}.mlp.experts.3.down_proj.weight") == "nvfp4" and not choices


@pytest.mark.parametrize("config", [BF16, {**QWEN3_MOE, "moe_intermediate_size": 128}])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_holds_the_bytes_that_were_planned(
    scheme: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """As loaded by the GPU's packing, on the CPU. Integers are planned with zero points."""
    path, _ = of_scheme(tmp_path, scheme, config)
    built = build_options({"model": str(path)})
    files = find_model(built)
    source = open_weights(built, files)
    assert source is not None
    kernels: Any = DenseWeights(torch.bfloat16, torch.device("cpu"))
    build = Build(kernels, dtype=torch.bfloat16)
    build_model(config, build)
    choices: list[Choice] = []
    held = held_formats(build, lambda name: source.info(name).format, "bfloat16", choices)
    planned = sum(weight.nbytes(held) for weight in build.weights)
    load_weights(build, source)
    found = sum(_held_bytes(weight) for weight in build.weights)
    integers = SCHEMES[scheme][2].startswith("int")
    assert found == pytest.approx(planned, rel=0.05 if integers else 0)
    # Groups of 16, and columns in an order of their own.
    assert bool(choices) == (scheme == "ct w4a16 zeros" or "ordered" in scheme)


def _held_bytes(weight: Any) -> int:
    if isinstance(weight, Linear):
        parts = [packed for packed, _ in weight._parts]
    elif isinstance(weight, StackedExperts):
        parts = [weight.gate_up_EIH, weight.down_EHI]
    else:
        parts = [weight.packed if isinstance(weight, Embedding) else weight.weight]
    return sum(p.data.nbytes if isinstance(p, PackedWeight) else p.nbytes for p in parts)


def test_a_quantised_kv_cache_is_recognised_and_the_plan_says_what_is_kept(tmp_path: Path) -> None:
    config, _, _ = SCHEMES["ct fp8 channel"]
    for scheme, kept in (({"num_bits": 8, "type": "float"}, "fp8"), ({"num_bits": 4}, "bfloat16")):
        both = {**config, "kv_cache_scheme": scheme}
        path = config_only(tmp_path / kept, BF16, quantization_config=both)
        found = plan_of(path)
        said = choice(found, "kv cache format")
        assert found.kv_dtype == kept and said.downgrade == (kept != "fp8")
        assert kept in said.chosen and "the checkpoint was made for" in said.reason
        asked = plan_of(path, kv_cache_dtype="float32")
        assert asked.kv_dtype == "float32"
        assert all(choice.what != "kv cache format" for choice in asked.choices)


def test_the_file_of_modelopt_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    path = config_only(tmp_path / "m", BF16)
    inner = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    file = path / "hf_quant_config.json"
    file.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": inner}))
    assert "nvfp4 x 14" in plan_of(path).weight_formats
    file.write_text("[1]")
    with pytest.raises(QuireError) as caught:
        plan_of(path)
    assert caught.value.code == "bad_config"


@pytest.mark.parametrize("method", ["fp8", "nvfp4", "nvfp4-experts"])
def test_quantisation_while_loading_is_planned_from_the_config(method: str, tmp_path: Path) -> None:
    path = config_only(tmp_path / "m", QWEN3_MOE)
    found = plan_of(path, quantization=method)
    experts, others = 2 * 4 * 3, 2 * 4
    count = experts if method == "nvfp4-experts" else experts + others
    assert f"{method.removesuffix('-experts')} x {count}" in found.weight_formats
    assert choice(found, "quantisation").chosen == f"{method}, while loading"
    assert found.fingerprint != plan_of(path).fingerprint


def test_quantisation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    quantised, _ = of_scheme(tmp_path, "gptq")
    plain = config_only(tmp_path / "m", LLAMA)
    odd = config_only(tmp_path / "odd", {**LLAMA, "intermediate_size": 200})
    for path, method, code in (
        (quantised, "fp8", "already_quantized"),
        (plain, "nvfp4-experts", "nothing_to_quantize"),
        (odd, "nvfp4", "quantized_group"),
        (plain, "int4", "invalid_option"),
    ):
        with pytest.raises(QuireError) as caught:
            plan_of(path, quantization=method)
        assert caught.value.code == code


@pytest.mark.parametrize("scheme", ["ct nvfp4", "ct mxfp4", "gptq", "awq", "ct w4a16"])
def test_a_width_that_groups_do_not_divide_is_refused_by_the_plan_of_a_config(
    scheme: str, tmp_path: Path
) -> None:
    config = {**LLAMA, "intermediate_size": 200}
    path = config_only(tmp_path / "m", config, quantization_config=SCHEMES[scheme][0])
    with pytest.raises(QuireError, match="down_proj") as caught:
        plan_of(path)
    assert caught.value.code == "quantized_group"


def test_an_unknown_scheme_is_refused_by_the_plan_of_a_config(tmp_path: Path) -> None:
    path = config_only(tmp_path / "m", LLAMA, quantization_config={"quant_method": "hqq"})
    with pytest.raises(QuireError, match="hqq") as caught:
        plan_of(path)
    assert caught.value.code == "unknown_quantization"
