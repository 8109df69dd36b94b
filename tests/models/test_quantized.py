"""Quantised checkpoints through the whole engine: as the same model with the values that the codes
stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quant.checkpoints import DEEPSEEK, LLAMA, QWEN3_MOE, of_scheme, write
from quant.stored import SCHEMES

from models.harness import Loaded, text
from quire import LLM, SamplingParams

MOE_SCHEMES = ["fp8 blocks", "ct fp8 channel", "ct nvfp4", "modelopt nvfp4", "ct mxfp4", "gptq"]


def check_same(paths: tuple[Path, Path], kernels: str) -> None:
    quantised, plain = (Loaded(path, kernels) for path in paths)
    tokens = text(40)
    expected = plain.logits(tokens)
    assert expected.std() > 0.3, "the logits have no spread: the comparison would prove little"
    for chunk in (None, 17):
        difference = (quantised.logits(tokens, chunk) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_a_quantised_llama_are_those_of_its_values(
    scheme: str, kernels: str, tmp_path: Path
) -> None:
    check_same(of_scheme(tmp_path, scheme), kernels)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct nvfp4", "gptq"])
def test_logits_of_a_quantised_deepseek_are_those_of_its_values(
    scheme: str, kernels: str, tmp_path: Path
) -> None:
    check_same(of_scheme(tmp_path, scheme, DEEPSEEK), kernels)


@pytest.mark.parametrize("scheme", MOE_SCHEMES)
def test_logits_of_a_quantised_moe_are_those_of_its_values(
    scheme: str, kernels: str, tmp_path: Path
) -> None:
    check_same(of_scheme(tmp_path, scheme, QWEN3_MOE), kernels)


def generate(path: Path, kernels: str, **options: Any) -> list[list[int]]:
    llm = LLM(
        str(path),
        kernels=kernels,
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=24,
        max_num_seqs=3,
        kv_cache_memory="8MiB",
        threads=1,
        **options,
    )
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": text(length, length)} for length in (1, 9, 40)]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(("scheme", "config"), [("gptq", LLAMA), ("modelopt nvfp4", QWEN3_MOE)])
def test_greedy_tokens_of_the_engine_are_those_of_the_values(
    scheme: str, config: dict[str, Any], kernels: str, tmp_path: Path
) -> None:
    quantised, plain = of_scheme(tmp_path, scheme, config)
    assert generate(quantised, kernels) == generate(plain, kernels)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "ct nvfp4", "awq", "gptq ordered"])
def test_dummy_weights_of_a_quantised_config_run(scheme: str, kernels: str, tmp_path: Path) -> None:
    path, _ = of_scheme(tmp_path, scheme)
    (path / "model.safetensors").unlink()
    tokens = generate(path, kernels, load_format="dummy")
    assert tokens == generate(path, kernels, load_format="dummy")


def test_without_a_dtype_weights_are_widened_to_what_the_config_declares(tmp_path: Path) -> None:
    path, _ = of_scheme(tmp_path, "ct fp8 channel", {**LLAMA, "dtype": "bfloat16"})
    from quire.config.parse import build_options
    from quire.engine.startup import start_engine

    options = {
        "model": str(path),
        "skip_tokenizer_init": True,
        "kernels": "reference",
        "threads": 1,
    }
    engine = start_engine(build_options(options))
    layer = engine.core.runner.model.layers[0]  # type: ignore[attr-defined]
    assert layer.mlp.down._parts[0][0].data.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["fp8", "nvfp4", "nvfp4-experts"])
def test_quantising_while_loading_gives_the_values_of_the_encoders(
    method: str, kernels: str, tmp_path: Path
) -> None:
    """The same tokens as a checkpoint that holds the rounded values."""
    from safetensors.torch import load_file, save_file

    from quire.formats.scaled import quantize_fp8, quantize_nvfp4

    path, rounded = write(tmp_path, QWEN3_MOE, None, None)
    tensors = load_file(rounded / "model.safetensors")
    for name, values in tensors.items():
        kept = any(part in name for part in ("embed", "lm_head", "mlp.gate.", "norm"))
        if kept or (method == "nvfp4-experts" and "experts" not in name):
            continue
        encode = quantize_fp8 if method == "fp8" else quantize_nvfp4
        tensors[name] = encode(values).dequantize()
    save_file(tensors, rounded / "model.safetensors")
    found = generate(path, kernels, quantization=method)
    assert found == generate(rounded, kernels) != generate(path, kernels)
