"""Small GGUF files written by the `gguf` package, with what the converter does to the values."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, LAYERS, VOCAB = 64, 4, 2, 16, 96, 2, 40

Arrays = dict[str, np.ndarray]


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama (LlamaModel.permute)."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def tensors(**extra: tuple[int, ...]) -> Arrays:
    """A plain transformer's tensors by GGUF name, normal(0, 1) float32."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        block = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD, HIDDEN),
            "attn_k": (KV_HEADS * HEAD, HIDDEN),
            "attn_v": (KV_HEADS * HEAD, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        shapes.update({f"blk.{layer}.{name}.weight": shape for name, shape in block.items()})
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in extra.items()})
    generator = np.random.default_rng(5)
    return {
        name: generator.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()
    }


def write(
    path: Path,
    arch: str,
    arrays: Arrays,
    packed: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Writes a file; `packed` gives the format of some tensors, `metadata` adds or replaces."""
    writer = gguf.GGUFWriter(path, arch)
    items: dict[str, Any] = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **(metadata or {}),
    }
    for key, value in items.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in arrays.items():
        if name in (packed or {}):
            kind = gguf.GGMLQuantizationType[(packed or {})[name].upper()]
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
