"""Write a model as a checkpoint of another format: each weight rounded to nearest, by itself.

    python -m benchmarks.quantize_checkpoint MODEL FORMAT DIRECTORY

FORMAT is float32 (quantised weights dequantised), fp8_block, mxfp4, int4-gN or int8-gN in groups of
N columns. Real tools do better than rounding (GPTQ, AWQ); this shows the format alone. Embeddings,
head and router stay as they are. Names are those of the family's layers in Quire.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quire.formats.float4 import unpack_nibbles
from quire.formats.quantized import QuantTensor
from quire.formats.scaled import quantize_fp8_block, quantize_integer, quantize_mxfp4
from quire.layers.read import to_dense
from quire.models.checkpoint import open_checkpoint
from quire.quant.names import usually_dense
from quire.weights.hub import ModelFiles, resolve

Parts = dict[str, torch.Tensor]
Config = dict[str, Any]


def convert(model: str, format: str, directory: Path) -> None:
    """Raises ValueError for a format that is not known or does not divide a weight's columns."""
    files = resolve(model)
    config = {k: v for k, v in files.config().items() if k not in ("torch_dtype", "dtype")}
    config |= {"dtype": "float32"} | quantization_config(format)
    tensors: Parts = {}
    with open_checkpoint(files) as source:
        for name in source.names():
            values = to_dense(source.read(name), torch.float32)
            module, _, last = name.rpartition(".")
            if (
                format == "float32"
                or values.dim() != 2
                or last != "weight"
                or usually_dense(module)
            ):
                tensors[name] = values.contiguous().clone()
                continue
            parts = encode(values, format)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    copy_tokenizer(files, directory)


def encode(values: torch.Tensor, format: str) -> Parts:
    """The parts of a weight [N, K], by the names of its scheme."""
    if format == "fp8_block":
        weight = quantize_fp8_block(values)
        return {"weight": weight.codes, "weight_scale_inv": weight.scales}
    if format == "mxfp4":
        weight = quantize_mxfp4(values)
        return {"weight_packed": weight.codes, "weight_scale": weight.scales}
    bits, group = integers(format)
    weight = quantize_integer(values, bits, group)
    return {
        "weight_packed": words(weight),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def words(weight: QuantTensor) -> torch.Tensor:
    """Integer codes in int32 words, the first in the lowest bits."""
    codes = unpack_nibbles(weight.codes) if weight.format == "int4" else weight.codes
    bits = 4 if weight.format == "int4" else 8
    lanes = codes.to(torch.int64).view(codes.shape[0], -1, 32 // bits)
    total = (lanes << torch.arange(0, 32, bits)).sum(2)
    return torch.where(total < 2**31, total, total - 2**32).to(torch.int32)


def integers(format: str) -> tuple[int, int]:
    """Bits and group size of int4-gN and int8-gN."""
    match = re.fullmatch(r"int([48])-g([1-9]\d*)", format)
    if match is None:
        raise ValueError(f"{format!r} is not float32, fp8_block, mxfp4, int4-gN or int8-gN")
    return int(match[1]), int(match[2])


def quantization_config(format: str) -> Config:
    """What config.json says of the format; DeepSeek's for fp8_block, else compressed-tensors'."""
    if format == "float32":
        return {"quantization_config": None}
    if format == "fp8_block":
        method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {"quantization_config": {**method, "weight_block_size": [128, 128]}}
    if format == "mxfp4":
        form, weights = "mxfp4-pack-quantized", {"type": "float", "num_bits": 4, "group_size": 32}
    else:
        bits, group = integers(format)
        form, weights = "pack-quantized", {"type": "int", "num_bits": bits, "group_size": group}
    weights |= {"strategy": "group", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    found = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return {"quantization_config": {**found, "ignore": ["lm_head"]}}


def copy_tokenizer(files: ModelFiles, directory: Path) -> None:
    """Of a directory; a GGUF file's tokenizer is not one that can be copied."""
    if files.kind != "gguf":
        for found in files.path.glob("*token*.json"):
            shutil.copy(found, directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("format")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    convert(arguments.model, arguments.format, arguments.directory)
