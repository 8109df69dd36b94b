"""Quantised weights as tools store them, made from random codes, with their values in float32.

Written for tests alone, from the descriptions of the formats: nothing of quire is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0] * 2) * torch.tensor(
    [1.0] * 8 + [-1.0] * 8
)
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)

Parts = dict[str, torch.Tensor]
Maker = Callable[[int, int, torch.Generator], tuple[Parts, torch.Tensor]]


def integers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=g)


def uniform(shape: tuple[int, ...], g: torch.Generator, size: float = 1.0) -> torch.Tensor:
    """Between 0.5 and 1.5 times `size`."""
    return (torch.rand(shape, generator=g) + 0.5) * size


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The last dimension packed into int32, the first code lowest."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per))
    total = torch.zeros(*codes.shape[:-1], codes.shape[-1] // per, dtype=torch.int64)
    for i in range(per):
        total += codes[..., i::per] << (bits * i)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def repeat(scales: torch.Tensor, size: int) -> torch.Tensor:
    return scales.repeat_interleave(size, dim=1)


def fp8_codes(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)


def fp8(
    per: str = "channel",
    name: str = "weight_scale",
    dtype: Any = torch.float32,
    static: bool = False,
) -> Maker:
    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        codes = fp8_codes(n, k, g)
        if per == "block":
            scales = uniform((-(-n // 128), -(-k // 128)), g, 0.2).to(dtype)
            spread = repeat(repeat(scales.float(), 128).T, 128).T[:n, :k]
        else:
            scales = uniform((n, 1) if per == "channel" else (1,), g, 0.2).to(dtype)
            spread = scales.float().reshape(-1, 1)
        parts = {"weight": codes, name: scales}
        if static:
            parts["input_scale"] = torch.tensor([0.5])
        return parts, codes.float() * spread

    return make


def fp4(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def nvfp4(convention: str) -> Maker:
    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        codes, scales = integers(0, 16, (n, k), g), uniform((n, k // 16), g, 8.0)
        stored, multiplier = scales.to(torch.float8_e4m3fn), torch.tensor(2.0**-7)
        values = E2M1[codes] * repeat(stored.float(), 16) * multiplier
        if convention == "modelopt":
            parts = {"weight": fp4(codes), "weight_scale_2": multiplier}
            parts["input_scale"] = torch.tensor(0.25)
        else:
            parts = {"weight_packed": fp4(codes), "weight_global_scale": 1 / multiplier[None]}
            parts["input_global_scale"] = torch.tensor([4.0])
        return {**parts, "weight_scale": stored}, values

    return make


def mxfp4(weight: str, scale: str, signed: bool = False, e8m0: bool = False) -> Maker:
    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        codes = integers(0, 16, (n, k), g)
        exponents = integers(122, 126, (n, k // 32), g)
        values = E2M1[codes] * repeat(2.0 ** (exponents - 127).float(), 32)
        packed, scales = fp4(codes), exponents.to(torch.uint8)
        packed = packed.view(torch.int8) if signed else packed
        scales = scales.view(torch.float8_e8m0fnu) if e8m0 else scales
        return {weight: packed, scale: scales}, values

    return make


def gptq(
    bits: int, group: int, ordered: bool = False, v2: bool = False, symmetric: bool = True
) -> Maker:
    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        size = k if group == -1 else group
        largest, middle = 1 << bits, 1 << (bits - 1)
        codes_KN = integers(0, largest, (k, n), g)
        index = torch.arange(k) // size
        if ordered:
            index = index[torch.randperm(k, generator=g)]
        scales = uniform((k // size, n), g, 0.3 / middle).half()
        zeros = torch.full((k // size, n), middle)
        if not symmetric:
            zeros = integers(1, largest, (k // size, n), g)
        values_KN = (codes_KN - zeros[index]) * scales.float()[index]
        return {
            "qweight": words(codes_KN.T.contiguous(), bits).T.contiguous(),
            "qzeros": words(zeros if v2 else zeros - 1, bits),
            "scales": scales,
            "g_idx": index.to(torch.int32),
        }, values_KN.T.contiguous()

    return make


def awq(group: int) -> Maker:
    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        codes_KN, zeros = integers(0, 16, (k, n), g), integers(0, 16, (k // group, n), g)
        scales = uniform((k // group, n), g, 0.04).half()
        values = (codes_KN - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(
            group, 0
        )

        def pack(codes: torch.Tensor) -> torch.Tensor:
            runs = codes.view(codes.shape[0], -1, 8)[:, :, list(AWQ_COLUMNS)]
            return words(runs.flatten(1), 4)

        return {
            "qweight": pack(codes_KN),
            "qzeros": pack(zeros),
            "scales": scales,
        }, values.T.contiguous()

    return make


def packed(bits: int, group: int, symmetric: bool = True, ordered: bool = False) -> Maker:
    """compressed-tensors pack-quantized; group 0 is the whole row."""

    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        size, middle = group or k, 1 << (bits - 1)
        codes = integers(0, 2 * middle, (n, k), g)
        index = torch.arange(k) // size
        if ordered:
            index = index[torch.randperm(k, generator=g)]
        scales = uniform((n, k // size), g, 0.3 / middle).bfloat16()
        zeros = torch.full((n, k // size), middle)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n, k]),
        }
        if not symmetric:
            zeros = integers(0, 2 * middle, (n, k // size), g)
            parts["weight_zero_point"] = words(zeros.T.contiguous(), bits).T.contiguous()
        if ordered:
            parts["weight_g_idx"] = index.to(torch.int32)
        return parts, (codes - zeros[:, index]) * scales.float()[:, index]

    return make


def int8(symmetric: bool = True) -> Maker:
    """compressed-tensors int-quantized, one scale for each row."""

    def make(n: int, k: int, g: torch.Generator) -> tuple[Parts, torch.Tensor]:
        codes, scales = integers(-128, 128, (n, k), g), uniform((n, 1), g, 0.003)
        zeros = torch.zeros(n, 1, dtype=torch.int64) if symmetric else integers(-9, 9, (n, 1), g)
        parts = {"weight": codes.to(torch.int8), "weight_scale": scales}
        if not symmetric:
            parts["weight_zero_point"] = zeros.to(torch.int8)
        return parts, (codes - zeros) * scales

    return make


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": more.pop("inputs", None),
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        **more,
    }


def float8(strategy: str, dynamic: bool = True, **more: Any) -> dict[str, Any]:
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, **more}
    return compressed("float-quantized", weights, inputs={"dynamic": dynamic, "type": "float"})


def whole_numbers(
    bits: int, group: int | None, symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    return {
        "type": "int", "num_bits": bits, "strategy": strategy, "group_size": group,
        "symmetric": symmetric, **more,
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*mlp.gate"]}
DEEPSEEK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip
FP4 = {"type": "float", "num_bits": 4}

# Every kind of checkpoint: its quantization_config, how its weights are made, the format they have.
SCHEMES: dict[str, tuple[dict[str, Any], Maker, str]] = {
    "fp8 tensor": ({"quant_method": "fp8"}, fp8("tensor"), "fp8"),
    "fp8 static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8("tensor", static=True),
        "fp8",
    ),
    "fp8 blocks": (DEEPSEEK, fp8("block", "weight_scale_inv"), "fp8_block"),
    "fp8 blocks ue8m0": (
        {**DEEPSEEK, "scale_fmt": "ue8m0"},
        fp8("block", "scale", torch.float8_e8m0fnu),
        "fp8_block",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8("channel"), "fp8"),
    "ct fp8 channel": (float8("channel"), fp8("channel", dtype=torch.bfloat16), "fp8"),
    "ct fp8 static": (float8("tensor", False), fp8("tensor", static=True), "fp8"),
    "ct fp8 blocks": (float8("block", block_structure=[128, 128]), fp8("block"), "fp8_block"),
    "ct nvfp4": (
        compressed("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}),
        nvfp4("compressed-tensors"),
        "nvfp4",
    ),
    "ct mxfp4": (
        compressed("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32}),
        mxfp4("weight_packed", "weight_scale"),
        "mxfp4",
    ),
    "ct w4a16": (compressed("pack-quantized", whole_numbers(4, 32)), packed(4, 32), "int4"),
    "ct w4a16 zeros": (
        compressed("pack-quantized", whole_numbers(4, 16, False)), packed(4, 16, False), "int4",
    ),
    "ct w4a16 ordered": (
        compressed("pack-quantized", whole_numbers(4, 32, actorder="group")),
        packed(4, 32, ordered=True),
        "int4_ordered",
    ),
    "ct w8a16": (compressed("pack-quantized", whole_numbers(8, None)), packed(8, 0), "int8"),
    "ct w8a8": (compressed("int-quantized", whole_numbers(8, None)), int8(), "int8"),
    "ct w8a8 zeros": (
        compressed("int-quantized", whole_numbers(8, None, False)), int8(False), "int8",
    ),
    "modelopt nvfp4": (MODELOPT, nvfp4("modelopt"), "nvfp4"),
    "modelopt fp8": (
        {**MODELOPT, "quant_algo": "FP8"}, fp8("tensor", static=True), "fp8",
    ),
    "gptq": (GPTQ, gptq(4, 32), "int4"),
    "gptq zeros": ({**GPTQ, "sym": False}, gptq(4, 32, symmetric=False), "int4"),
    "gptq v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(4, 32, v2=True, symmetric=False), "int4",
    ),
    "gptq int8 rows": ({**GPTQ, "bits": 8, "group_size": -1}, gptq(8, -1), "int8"),
    "gptq ordered": ({**GPTQ, "desc_act": True}, gptq(4, 32, ordered=True), "int4_ordered"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq(32),
        "int4",
    ),
}  # fmt: skip
