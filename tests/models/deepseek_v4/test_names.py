"""Tensors by published and other names; files that lack one, or have one twice or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.deepseek_v4.oracle import HEAVY, SPARSE, Oracle
from models.harness import Loaded, text
from quire.errors import ModelError
from quire.models.deepseek_v4.names import adapt, published
from quire.weights.safetensors import SafetensorsSource


@pytest.fixture
def oracle(tmp_path: Path) -> Oracle:
    layers = {"layer_types": [SPARSE, HEAVY], "num_hidden_layers": 2, "num_hash_layers": 1}
    return Oracle(tmp_path, compress_rates={SPARSE: 4, HEAVY: 128}, **layers)


def change(oracle: Oracle, **changes: torch.Tensor | None) -> None:
    """Rewrites the published checkpoint; None takes a tensor out."""
    path = oracle.published / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("layers.3.attn.kv_norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.q_norm.weight", "layers.3.attn.q_norm.weight"),
        ("model.layers.3.attn.compressor.norm.weight", "layers.3.attn.compressor.norm.weight"),
        ("model.layers.3.attn_norm.weight", "layers.3.attn_norm.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_scale", "hc_head_scale"),
        ("model.layers.3.hc_attn_scale", "layers.3.hc_attn_scale"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("head.weight", "head.weight"),
        ("layers.0.ffn.gate.topk.tid2eid", "layers.0.ffn.gate.tid2eid"),
        ("model.layers.9.ffn.experts.3.w1.weight_scale", "layers.9.ffn.experts.3.w1.weight_scale"),
    ],
)
def test_other_names_mean_published_ones(stored: str, name: str) -> None:
    assert published(stored) == name
    assert published(name) == name


def test_the_modules_tensors_come_with_drafting_and_never_copies_of_the_models(
    oracle: Oracle,
) -> None:
    copies = {"mtp.0.emb.tok_emb.weight": torch.ones(2), "mtp.0.head.weight": torch.ones(2)}
    change(oracle, **copies)
    with SafetensorsSource(oracle.published) as source:
        target, both = adapt({}, source).names(), adapt({}, source, drafting=True).names()
    more = set(both) - set(target)
    assert not any(name.startswith("mtp") for name in target) and set(target) < set(both)
    assert all(name.startswith("mtp.0.") for name in more) and "mtp.0.hc_head_fn" in more
    assert not set(copies) & more
    assert Loaded(oracle.published, "reference").logits(text(3)).isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.compressor.ape",
        "layers.0.attn.indexer.compressor.wgate.weight",
        "layers.1.attn.attn_sink",
        "layers.0.ffn.gate.tid2eid",
        "hc_head_base",
    ],
)
def test_a_missing_tensor_is_named(oracle: Oracle, name: str) -> None:
    change(oracle, **{name: None})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")) as caught:
        Loaded(oracle.published, "reference")
    assert caught.value.code == "missing_tensor"


def test_a_tensor_under_two_names_is_refused(oracle: Oracle) -> None:
    change(oracle, **{"model.norm.weight": torch.ones(64)})
    with pytest.raises(ModelError, match=r"norm\.weight") as caught:
        Loaded(oracle.published, "reference")
    assert caught.value.code == "tensor_twice"


@pytest.mark.parametrize("wrong", [8, -1])
def test_a_table_that_names_no_expert_is_refused(oracle: Oracle, wrong: int) -> None:
    table = torch.zeros(160, 3, dtype=torch.int64)
    table[7, 1] = wrong
    change(oracle, **{"layers.0.ffn.gate.tid2eid": table})
    with pytest.raises(ModelError, match="tid2eid") as caught:
        Loaded(oracle.published, "reference")
    assert caught.value.code == "corrupt_tensor"


def test_a_renamed_source_reads_samples_and_counts_what_it_stands_for(oracle: Oracle) -> None:
    with SafetensorsSource(oracle.path) as stored:
        source = adapt({}, stored)
        name, saved = "layers.1.attn.kv_norm.weight", "model.layers.1.attn.norm.weight"
        assert torch.equal(source.read(name), stored.read(saved))  # type: ignore[arg-type]
        part = source.read("embed.weight", rows=slice(3, 5), columns=slice(1, 9))
        whole = stored.read("model.embed_tokens.weight")
        assert isinstance(part, torch.Tensor) and isinstance(whole, torch.Tensor)
        assert torch.equal(part, whole[3:5, 1:9])
        assert (source.info(name).name, source.info(name).shape) == (name, (32,))
        assert source.sample(name) == stored.sample(saved)
        assert source.fingerprint() == stored.fingerprint()
        with pytest.raises(ModelError):
            source.info(saved)
