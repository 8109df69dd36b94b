"""DeepSeek V2 and V3 in GGUF files (architecture deepseek2), as llama.cpp's converter writes them:
the logits are those of the safetensors that they were made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.harness import TOLERANCE, Family, Loaded, check_logits, text
from models.test_deepseek_v3 import V2, V3
from quire.config.parse import build_options
from quire.engine.startup import start_engine
from quire.errors import ModelError
from quire.weights.gguf import GgufSource
from quire.weights.gguf_config import hf_config
from quire.weights.gguf_header import read_header

ARCH = "deepseek2"
FAMILIES = {"v2": V2, "v3": V3}
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight")


def metadata(config: Any, before: bool) -> dict[str, Any]:
    """The keys of a converted model; `before`: as they were before llama.cpp's converter made keys
    and values one latent."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    rank, third = config.kv_lora_rank, config.architectures == ["DeepseekV3ForCausalLM"]
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_attention_heads if before else 1,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": rope,
        "attention.kv_lora_rank": rank,
        "attention.key_length": nope + rope if before else rank + rope,
        "attention.value_length": value if before else rank,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    if not before:
        keys |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": value}
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if third:
        keys |= {"expert_gating_func": 2, "expert_weights_norm": bool(config.norm_topk_prob)}
    scaling = config.rope_parameters
    if scaling["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling["factor"],
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
        }
    return {f"{ARCH}.{key}": value for key, value in keys.items()}


def arrays(path: Path, config: Any, before: bool) -> dict[str, np.ndarray]:
    """The tensors of a converted model by their GGUF names."""
    found, stacks = {}, dict[str, dict[int, np.ndarray]]()
    for name, tensor in load_file(path / "model.safetensors").items():
        values = tensor.float().numpy()
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            stack = f"{expert[1]}.{expert[3]}.weight"
            stacks.setdefault(stack, {})[int(expert[2])] = values
        elif name.endswith("kv_b_proj.weight") and not before:
            heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, rest = np.split(heads, [config.qk_nope_head_dim], axis=1)
            found[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = rest
        else:
            found[name.replace("e_score_correction_bias", "e_score_correction.bias")] = values
    for stack, parts in stacks.items():
        found[stack] = np.stack([parts[i] for i in range(len(parts))])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    renamed = {names.get_name(name, (".weight", ".bias")): array for name, array in found.items()}
    assert None not in renamed
    return renamed


def write(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    packed: tuple[str, ...] = (),
) -> Path:
    """A GGUF file; tensors whose names hold one of `packed` are in q8_0."""
    writer = gguf.GGUFWriter(path, ARCH)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(key, value)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors.items():
        if any(part in name for part in packed):
            writer.add_tensor(name, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(path: Path, family: Family, case: str, before: bool = False) -> tuple[Path, Any]:
    """A case's GGUF file, and the transformers model in it."""
    made, model = family.make(path, case)
    keys = metadata(model.config, before)
    return write(path / "m.gguf", keys, arrays(made, model.config, before)), model


@pytest.mark.parametrize(
    ("family", "case", "before"),
    [
        ("v3", "as published", False),
        ("v3", "as published", True),
        ("v3", "plain rope", False),
        ("v3", "queries without a latent", False),
        ("v2", "as published", False),
        ("v2", "lite", True),
    ],
)
def test_the_logits_are_those_of_the_original(
    family: str, case: str, before: bool, kernels: str, tmp_path: Path
) -> None:
    """With keys and values apart, as converters write them now, and in one (`before`)."""
    file, model = converted(tmp_path, FAMILIES[family], case, before)
    check_logits(file, model, kernels)
    config = hf_config(read_header(file))
    assert config["architectures"] == model.config.architectures


@pytest.mark.parametrize("before", [False, True])
def test_what_keys_and_values_are_made_of_is_widened(
    before: bool, kernels: str, tmp_path: Path
) -> None:
    """What is packed gives the logits of its own values, in float32 where keys and values are made
    of it."""
    sizes = {"qk_nope_head_dim": 32, "kv_lora_rank": 64}
    made, model = Family(V3.config, {"wide": sizes}, {}, [], V3.base).make(tmp_path, "wide")
    tensors, keys = arrays(made, model.config, before), metadata(model.config, before)
    packed = ("attn_kv_b", "attn_k_b", "attn_v_b", "ffn_up_shexp", "ffn_gate_exps")
    file = write(tmp_path / "packed.gguf", keys, tensors, packed)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(array, q8_0), q8_0).reshape(array.shape)
        if any(part in name for part in packed)
        else array
        for name, array in tensors.items()
    }
    plain = write(tmp_path / "plain.gguf", keys, rounded)
    found, wanted = (Loaded(path, kernels).logits(text(30)) for path in (file, plain))
    # Native kernels round what a packed weight is multiplied with.
    limit = TOLERANCE if kernels == "reference" else 0.05 * wanted.std()
    assert (found - wanted).abs().max() < limit
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    with GgufSource(file) as source, GgufSource(plain) as other:
        assert source.info(name).format == "f32"
        part = source.read(name, slice(5, 40))
        assert torch.equal(part, other.read(name, slice(5, 40)))
        assert source.info(name).nbytes < other.info(name).nbytes
        assert len(source.sample(name)) == 4096 and source.sample(name) != other.sample(name)
    options = {"model": str(file), "skip_tokenizer_init": True, "kernels": kernels}
    made_engine = start_engine(build_options({**options, "device": "cpu", "max_model_len": 128}))
    assert made_engine.plan.architecture == "DeepseekV3ForCausalLM"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expert_gating_func": 3}, "expert_gating_func is 3"),
        ({"rope.dimension_count": 24}, "24 of 20 values of a key are rotary"),
        ({"nextn_predict_layers": 1}, "multi-token prediction"),
        ({"attention.kv_lora_rank": 0}, "kv_lora_rank is 0"),
    ],
)
def test_what_a_file_says_that_cannot_be_is_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    made, model = V3.make(tmp_path, "as published")
    keys = metadata(model.config, False) | {f"{ARCH}.{key}": v for key, v in change.items()}
    file = write(tmp_path / "m.gguf", keys, arrays(made, model.config, False))
    with pytest.raises(ModelError) as caught:
        hf_config(read_header(file))
    assert says in str(caught.value)


def test_half_of_keys_and_values_alone_is_refused(tmp_path: Path) -> None:
    made, model = V3.make(tmp_path, "as published")
    keys, tensors = metadata(model.config, False), arrays(made, model.config, False)
    alone = {name: array for name, array in tensors.items() if "blk.1.attn_v_b" not in name}
    with pytest.raises(ModelError, match="without its attn_v_b"):
        GgufSource(write(tmp_path / "alone.gguf", keys, alone))
    tensors["blk.1.attn_v_b.weight"] = tensors["blk.1.attn_v_b.weight"][:, :, :-1]
    with pytest.raises(ModelError, match="does not go with values"):
        GgufSource(write(tmp_path / "odd.gguf", keys, tensors))


def test_the_scale_of_angles_is_that_of_all_dimensions(tmp_path: Path) -> None:
    file, _ = converted(tmp_path, V2, "as published")
    scaling = hf_config(read_header(file))["rope_scaling"]
    assert scaling["mscale"] == scaling["mscale_all_dim"] == 0.707 and scaling["factor"] == 8
