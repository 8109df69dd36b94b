"""DeepSeek V4's quantised checkpoints give the logits of the values that they store."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.stored import Maker, fp8, mxfp4, nvfp4
from safetensors.torch import load_file, save_file

from models.deepseek_v4.oracle import HEAVY, SPARSE, Oracle
from models.harness import TOLERANCE, Loaded, text
from quire import LLM, SamplingParams
from quire.errors import ModelError
from quire.models.checkpoint import open_checkpoint
from quire.weights.hub import resolve

FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128], "scale_fmt": "ue8m0",
}  # fmt: skip
BLOCK = fp8("block", "scale", torch.float8_e8m0fnu)
FP4 = mxfp4("weight", "scale", signed=True, e8m0=True)
# What config.json says of experts, how they are stored, and how the other linear layers are.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], Maker, Maker]] = {
    "fp4 experts": ({"expert_dtype": "fp4"}, {}, FP4, BLOCK),
    "experts unsaid": ({}, {}, FP4, BLOCK),
    "base": ({"expert_dtype": "fp8"}, {}, fp8("block", "scale"), fp8("block", "scale")),
    "nvfp4": ({"expert_dtype": "fp4"}, {"moe_quant_algo": "NVFP4"}, nvfp4("modelopt"), BLOCK),
}
DENSE = ("embed", "head", "gate", "compressor", "weights_proj")


def quantise(
    oracle: Oracle, experts: Maker, linear: Maker, config: dict[str, Any]
) -> tuple[Path, Path]:
    """(the published checkpoint quantised, one of the same values that is not)."""
    generator = torch.Generator().manual_seed(3)
    drafting = experts if config.get("expert_dtype") == "fp8" else FP4
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(oracle.published / "model.safetensors").items():
        module, _, last = name.rpartition(".")
        if last != "weight" or tensor.dim() != 2 or set(module.split(".")) & set(DENSE):
            stored[name] = plain[name] = tensor
            continue
        make = linear
        if ".experts." in name:
            make = drafting if name.startswith("mtp.") else experts
        parts, values = make(*tensor.shape, generator)
        stored |= {f"{module}.{part}": value for part, value in parts.items()}
        plain[name] = values
    paths = oracle.published.with_name("quantised"), oracle.published.with_name("plain")
    given = json.loads((oracle.published / "config.json").read_text())
    for path, tensors, changes in ((paths[0], stored, config), (paths[1], plain, {})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**given, **changes}))
    return paths


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    rates = {SPARSE: 4, HEAVY: 128}
    sizes = {"moe_intermediate_size": 64, "layer_types": [SPARSE, HEAVY], "num_hidden_layers": 2}
    return Oracle(tmp_path, compress_rates=rates, num_hash_layers=1, **sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_quantised_checkpoint_gives_the_logits_of_its_values(name: str, oracle: Oracle) -> None:
    beside, inside, experts, linear = PUBLISHED[name]
    config = {**beside, "quantization_config": {**FP8, **inside}}
    quantised, plain = quantise(oracle, experts, linear, config)
    tokens = text(20)
    found, wanted = (Loaded(path, "reference").logits(tokens) for path in (quantised, plain))
    assert wanted.isfinite().all() and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    # The MTP module's tensors, too, are what the scheme says.
    files = resolve(str(quantised))
    with open_checkpoint(files, drafting=True) as source:
        names = [n for n in source.names() if n.endswith(".weight") and ".experts." in n]
        names = [n for n in names if n.startswith("mtp.0.")]
        assert len(names) == 3 * oracle.config.n_routed_experts
        formats = {source.info(n).format for n in names}
        assert formats == {"fp8_block" if name == "base" else "mxfp4"}


def test_experts_that_are_not_what_the_config_says_are_refused(oracle: Oracle) -> None:
    config = {"expert_dtype": "fp8", "quantization_config": FP8}
    quantised, _ = quantise(oracle, FP4, BLOCK, config)
    with pytest.raises(ModelError) as caught:
        Loaded(quantised, "reference")
    assert caught.value.code == "quantized_part_mismatch"


@pytest.mark.parametrize(
    ("inside", "routing"), [({}, "model"), ({"moe_quant_algo": "NVFP4"}, "uniform")]
)
def test_dummy_weights_of_a_quantised_config_generate(
    oracle: Oracle, inside: dict[str, Any], routing: str
) -> None:
    config = json.loads((oracle.published / "config.json").read_text())
    config |= {"expert_dtype": "fp4", "quantization_config": {**FP8, **inside}}
    (oracle.published / "config.json").write_text(json.dumps(config))
    llm = LLM(
        str(oracle.published),
        load_format="dummy",
        moe_routing=routing,
        skip_tokenizer_init=True,
        max_model_len=256,
        threads=1,
    )
    params = SamplingParams(temperature=0.0, max_tokens=5, logprobs=0, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": text(140)}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5
    assert math.isfinite(output.outputs[0].cumulative_logprob or math.nan)
