"""DeepSeek V3's MTP layer against one made of transformers' blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quant.checkpoints import DEEPSEEK, of_scheme
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config

from models.harness import TOLERANCE, Loaded, text
from models.mtp_v3 import WithMTP
from models.test_deepseek_v3 import V3
from quire.engine.startup import kernel_facts
from quire.errors import ModelError
from quire.layers.build import Build
from quire.models.checkpoint import open_checkpoint
from quire.models.registry import build_model, build_mtp, mtp_prefix
from quire.weights.hub import resolve


def tiny(path: Path, case: str = "as published") -> WithMTP:
    return WithMTP(path / "model", DeepseekV3Config(**{**V3.base, **V3.cases[case]}))


@pytest.mark.parametrize("case", ["as published", "queries without a latent", "halves rotate"])
def test_drafts_equal_those_of_transformers_blocks(case: str, kernels: str, tmp_path: Path) -> None:
    made = tiny(tmp_path, case)
    tokens = text(40)
    following = [*tokens[1:], 5]
    hidden, logits, wanted = made.expected(tokens, following)
    assert logits.std() > 0.5, "the logits have no spread: the comparison would prove little"
    ours = Loaded(made.path, kernels, drafting=True)
    assert ours.mtp is not None
    given = torch.tensor(following)
    for chunk in (None, 1, 7):
        with torch.inference_mode():
            parts = [
                ours.mtp.forward(hidden[part], given[part], positions, step)
                for part, positions, step in ours.steps(len(tokens), chunk)
            ]
            found = torch.cat(parts)
            assert (found - wanted).abs().max() < TOLERANCE
            assert (ours.mtp.logits(found) - logits).abs().max() < TOLERANCE


def test_a_quantised_module_gives_what_its_values_give(tmp_path: Path) -> None:
    """As published: its block in FP8 like the others, what stands at its ends is not."""
    generator = torch.Generator().manual_seed(2)
    size, ends = DEEPSEEK["hidden_size"], {}
    for name in ("enorm", "hnorm", "shared_head.norm"):
        ends[f"{name}.weight"] = torch.rand(size, generator=generator) + 0.5
    ends["eh_proj.weight"] = torch.randn(size, 2 * size, generator=generator) / 16
    hidden, tokens = torch.randn(12, size, generator=generator), torch.tensor(text(12))
    found = []
    for path in of_scheme(tmp_path, "fp8 blocks", DEEPSEEK):
        tensors = load_file(path / "model.safetensors")
        for name, tensor in list(tensors.items()):
            if name.startswith("model.layers.1."):
                tensors[name.replace("layers.1.", "layers.2.")] = tensor.clone()
        tensors |= {f"model.layers.2.{name}": tensor.clone() for name, tensor in ends.items()}
        save_file(tensors, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
        ours = Loaded(path, "reference", drafting=True)
        assert ours.mtp is not None
        [(_, positions, step)] = ours.steps(12)
        with torch.inference_mode():
            found.append(ours.mtp.logits(ours.mtp.forward(hidden, tokens, positions, step)))
    assert found[0].std() > 0.5 and (found[0] - found[1]).abs().max() < TOLERANCE


def test_the_model_is_the_same_with_its_module(tmp_path: Path) -> None:
    path, tokens = tiny(tmp_path).path, text(20)
    alone, both = (Loaded(path, "reference", drafting=mtp).logits(tokens) for mtp in (False, True))
    assert torch.equal(alone, both)


def test_a_tensor_of_the_module_that_is_missing_or_unknown_is_refused(tmp_path: Path) -> None:
    made = tiny(tmp_path)
    tensors = load_file(made.path / "model.safetensors")
    made.write(tensors | {f"{made.prefix}bonus.weight": torch.ones(3)})
    with pytest.raises(ModelError, match="would ignore"):
        Loaded(made.path, "reference", drafting=True)
    made.write({name: t for name, t in tensors.items() if "eh_proj" not in name})
    with pytest.raises(ModelError, match=r"no tensor.*eh_proj"):
        Loaded(made.path, "reference", drafting=True)
    made.write({name: t for name, t in tensors.items() if not name.startswith(made.prefix)})
    Loaded(made.path, "reference")
    with pytest.raises(ModelError) as caught:
        open_checkpoint(resolve(str(made.path)), drafting=True)
    assert caught.value.code == "no_drafter" and made.prefix in str(caught.value)


@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "LlamaForCausalLM"])
def test_a_model_without_module_is_refused(architecture: str, tmp_path: Path) -> None:
    config = json.loads((tiny(tmp_path).path / "config.json").read_text())
    config |= {"architectures": [architecture], "num_nextn_predict_layers": 0}
    build = Build(kernel_facts().reference)
    for call in (
        lambda: mtp_prefix(config),
        lambda: build_mtp(config, build_model(config, build), build),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        assert caught.value.code == "no_drafter"
