"""Checkpoints of llama2.c (https://github.com/karpathy/llama2.c, version 0) as directories of
safetensors: `python -m tests.weights.llama2c FILE DIRECTORY`.

A file is seven int32 (sizes), then float32 tensors one after the other; what follows them is not
read, so a package that appends the tokenizer serves as it is.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

EPSILON = 1e-5  # the norms' in llama2.c


class Header(NamedTuple):
    """In the file's order. A negative vocabulary means a head of its own."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors in the file's order."""
        layers, hidden, wide = self.layers, self.hidden, self.intermediate
        kv = self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (abs(self.vocab), hidden),
            "attention_norm": (layers, hidden),
            "wq": (layers, hidden, hidden),
            "wk": (layers, kv, hidden),
            "wv": (layers, kv, hidden),
            "wo": (layers, hidden, hidden),
            "ffn_norm": (layers, hidden),
            "w1": (layers, wide, hidden),
            "w2": (layers, hidden, wide),
            "w3": (layers, wide, hidden),
            "norm": (hidden,),
            "cos": (self.seq_len, self.head_size // 2),
            "sin": (self.seq_len, self.head_size // 2),
        }
        return shapes if self.vocab > 0 else shapes | {"head": shapes["embedding"]}


Arrays = dict[str, np.ndarray]

_LAYER = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def read(file: Path) -> tuple[Header, Arrays, int]:
    """Sizes, tensors by llama2.c's names, and where the tensors end. Raises ValueError."""
    data = file.read_bytes()
    header = Header(*struct.unpack_from("<7i", data))
    at, tensors = struct.calcsize("<7i"), {}
    for name, shape in header.shapes().items():
        count = int(np.prod(shape))
        if at + 4 * count > len(data):
            raise ValueError(f"{file} ends in the middle of {name}")
        tensors[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count
    return header, tensors, at


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k whose rotary pairs are neighbours, as halves of each head."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def convert(file: Path, directory: Path) -> None:
    """Write config.json and model.safetensors."""
    header, tensors, _ = read(file)
    named = {
        "model.embed_tokens.weight": tensors["embedding"],
        "model.norm.weight": tensors["norm"],
    }
    if "head" in tensors:
        named["lm_head.weight"] = tensors["head"]
    heads = {"wq": header.heads, "wk": header.kv_heads}
    for name, ours in _LAYER.items():
        for i, tensor in enumerate(tensors[name]):
            value = halves(tensor, heads[name]) if name in heads else tensor
            named[f"model.layers.{i}.{ours}.weight"] = np.ascontiguousarray(value)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.hidden,
        "intermediate_size": header.intermediate,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "vocab_size": abs(header.vocab),
        "max_position_embeddings": header.seq_len,
        "rms_norm_eps": EPSILON,
        "rope_theta": 10000.0,
        "tie_word_embeddings": header.vocab > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(named, directory / "model.safetensors")


def vocabulary(data: bytes, count: int) -> list[str]:
    """Pieces of llama2.c's tokenizer.bin: the longest one's length, then score, length, text."""
    pieces, at = [], 4
    for _ in range(count):
        _, length = struct.unpack_from("<fi", data, at)
        at += 8
        pieces.append(data[at : at + length].decode())
        at += length
    return pieces


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
