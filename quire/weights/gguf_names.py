"""GGUF tensor names to Hugging Face names, and what llama.cpp's converter did to the values.

Names: gguf-py/gguf/tensor_mapping.py; changes: convert_hf_to_gguf.py, both of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import ModelError
from quire.weights.gguf_header import GgufHeader, corrupt
from quire.weights.tensor_info import TensorInfo

ARCHITECTURES = ("deepseek2", "gemma3", "llama", "qwen2", "qwen3", "qwen3moe")
MAX_EXPERTS = 4096
# Read as configuration (gguf_config), not as weights.
CONFIGURATION_TENSORS = frozenset({"rope_freqs.weight"})

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_DEEPSEEK_BLOCK = {
    **_BLOCK,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
# What keys and values are made of: one tensor, or the converter's halves of it, or all three.
_LATENT = ("attn_kv_b", "attn_k_b", "attn_v_b")
_CORRECTION = "exp_probs_b"
_EXPERT_STACKS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}


@dataclass(frozen=True)
class Mapped:
    """A Hugging Face tensor inside a GGUF one.

    `first_row`: where its rows begin in the stored tensor (experts are stacked). `interleaved`:
    number of heads whose rotary halves the converter interleaved, 0 if it did not. `added`: what
    the converter added to each value. `widened`: the stored tensors, one or halves of each head,
    that it is made of in float32.
    """

    stored: str
    info: TensorInfo
    first_row: int = 0
    interleaved: int = 0
    added: float = 0.0
    widened: tuple[str, ...] = ()


def architecture(header: GgufHeader) -> str:
    """The architecture's GGUF name. ModelError if it is none that Quire knows."""
    name = header.text("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            code="unknown_architecture",
            what=f"{header.path} has the unknown architecture {name!r}",
            fix=f"known GGUF architectures: {', '.join(ARCHITECTURES)}",
        )
    return name


def map_names(header: GgufHeader) -> dict[str, Mapped]:
    """Every tensor by its Hugging Face name. ModelError if one has no known meaning."""
    kind = architecture(header)
    mapped: dict[str, Mapped] = {}
    for name, tensor in header.tensors.items():
        if name in CONFIGURATION_TENSORS:
            continue
        for entry in _map_tensor(header, kind, tensor.info):
            mapped[entry.info.name] = entry
    return mapped


def _map_tensor(header: GgufHeader, kind: str, info: TensorInfo) -> list[Mapped]:
    stem, _, suffix = info.name.rpartition(".")
    parts = stem.split(".")
    if suffix not in ("weight", "bias"):
        raise _unknown(header, info.name)
    if stem in _OUTER:
        return [_plain(header, kind, info, f"{_OUTER[stem]}.{suffix}", stem)]
    if len(parts) != 3 or parts[0] != "blk" or not (parts[1].isascii() and parts[1].isdigit()):
        raise _unknown(header, info.name)
    layer = f"model.layers.{int(parts[1])}"
    sparse = kind in ("qwen3moe", "deepseek2")
    if parts[2] in _EXPERT_STACKS and suffix == "weight" and sparse:
        return _experts(header, info, f"{layer}.mlp.experts", _EXPERT_STACKS[parts[2]])
    if kind == "deepseek2" and parts[2] in _LATENT and suffix == "weight":
        return _latent_products(header, info, parts[2], f"{layer}.self_attn.kv_b_proj.weight")
    if kind == "deepseek2" and parts[2] == _CORRECTION and suffix == "bias":
        name = f"{layer}.mlp.gate.e_score_correction_bias"
        return [_plain(header, kind, info, name, parts[2])]
    table = {"gemma3": _GEMMA_BLOCK, "deepseek2": _DEEPSEEK_BLOCK}.get(kind, _BLOCK)
    if parts[2] not in table:
        raise _unknown(header, info.name)
    return [_plain(header, kind, info, f"{layer}.{table[parts[2]]}.{suffix}", parts[2])]


def _plain(header: GgufHeader, kind: str, info: TensorInfo, name: str, stem: str) -> Mapped:
    if len(info.shape) > 2 or (info.packed and len(info.shape) != 2):
        raise corrupt(header.path, f"{info.name!r} has the shape {info.shape} in {info.format}")
    heads = 0
    if kind == "llama" and stem in ("attn_q", "attn_k"):
        heads = header.integer("llama.attention.head_count")
        if stem == "attn_k":
            heads = header.integer("llama.attention.head_count_kv", heads)
        if heads < 1 or info.shape[0] % (2 * heads):
            raise corrupt(header.path, f"{info.shape[0]} rows of {info.name!r} for {heads} heads")
    # Gemma's norms multiply by 1 + weight; the file holds the sum.
    added = 1.0 if kind == "gemma3" and stem.endswith("norm") else 0.0
    if added and info.packed:
        raise corrupt(header.path, f"the norm {info.name!r} is packed")
    renamed = TensorInfo(name, info.shape, "f32" if added else info.format)
    return Mapped(info.name, renamed, interleaved=heads, added=added)


def _latent_products(header: GgufHeader, info: TensorInfo, part: str, name: str) -> list[Mapped]:
    """`kv_b_proj`, by the first of the tensors that it is stored as; nothing by the others.

    Dense, as its halves are multiplied with in both directions.
    """
    stem = info.name.removesuffix(f"{part}.weight")
    whole = f"{stem}attn_kv_b.weight"
    if part == "attn_kv_b":
        if len(info.shape) != 2:
            raise corrupt(header.path, f"{info.name!r} has the shape {info.shape}")
        if not info.packed:
            return [Mapped(info.name, TensorInfo(name, info.shape, info.format))]
        dense = TensorInfo(name, info.shape, "f32", stored=info.nbytes)
        return [Mapped(info.name, dense, widened=(info.name,))]
    if part == "attn_v_b" or whole in header.tensors:
        return []
    values = header.tensors.get(f"{stem}attn_v_b.weight")
    if values is None:
        raise corrupt(header.path, f"it has {info.name!r} without its attn_v_b")
    # Keys [heads, rank, nope], transposed by the converter; values [heads, value, rank].
    keys, shape = info.shape, values.info.shape
    if len(keys) != 3 or len(shape) != 3 or keys[0] != shape[0] or keys[1] != shape[2]:
        raise corrupt(header.path, f"{info.name!r} of {keys} does not go with values of {shape}")
    rows = keys[0] * (keys[2] + shape[1])
    stored = info.nbytes + values.info.nbytes
    joined = TensorInfo(name, (rows, keys[1]), "f32", stored=stored)
    return [Mapped(info.name, joined, widened=(info.name, values.info.name))]


def _experts(header: GgufHeader, info: TensorInfo, prefix: str, name: str) -> list[Mapped]:
    if len(info.shape) != 3 or info.shape[0] > MAX_EXPERTS:
        raise corrupt(header.path, f"{info.name!r} has the shape {info.shape}")
    count, rows, columns = info.shape
    return [
        Mapped(
            stored=info.name,
            info=TensorInfo(f"{prefix}.{expert}.{name}.weight", (rows, columns), info.format),
            first_row=expert * rows,
        )
        for expert in range(count)
    ]


def _unknown(header: GgufHeader, name: str) -> ModelError:
    return ModelError(
        code="unknown_tensor",
        what=f"{header.path} has a tensor {name!r} of unknown meaning",
        why=f"architecture {header.text('general.architecture')!r} is not known to have it",
    )
