"""What a plan must be told of the model and of the kernels found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quire.layers.build import CpuKernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of caches; in fp8 their layers count bytes (quire/kernels/reference/attention/fp8_cache.py and
# quire/kernels/reference/compressed/entries.py).
KV_DTYPES = {**DTYPES, "fp8": torch.uint8}


@dataclass(frozen=True)
class ModelFacts:
    """What the plan must know of a model: its config.json, the format of each tensor by
    checkpoint name (the config's dtype is assumed for others), its fingerprint. `scheme`: how it
    is quantised, for people, and `scheme_from`: who says so; `kv_cache`: the format of the KV cache
    that it was quantised for, and `kv_scales`: whether it has scales for that. `e4m3_tokens`: the
    FP8 weights that are meant for activations in e4m3."""

    name: str
    hf_config: dict[str, Any]
    formats: dict[str, str] | None
    fingerprint: str = ""
    scheme: str = ""
    scheme_from: str = "its quantisation config"
    kv_cache: str = ""
    kv_scales: bool = False
    e4m3_tokens: frozenset[str] = frozenset()


def declared_dtype(hf: dict[str, Any]) -> str:
    """The dtype that config.json names for weights, bfloat16 where it names none of DTYPES."""
    declared = str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch.")
    return declared if declared in DTYPES else "bfloat16"


@dataclass(frozen=True)
class KernelFacts:
    """The kernels found here. CPU: `native` None with the reason `why_not`, `isa` its instruction
    set. GPU: the version of Triton, None where there is none."""

    reference: CpuKernels
    native: CpuKernels | None
    why_not: str = ""
    isa: str = ""
    triton: str | None = None
