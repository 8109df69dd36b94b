"""What DeepSeek V4's config.json leaves unsaid: which matrices are not quantised, and experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.quant.names import EXPERTS
from quire.quant.scheme import Rule, Scheme
from quire.quant.storage import Mxfp4

MODEL_TYPE = "deepseek_v4"
# Matrices that are stored as they are: tables, the compressors' and indexers' small products.
DENSE = ("embed", "head", "gate", "compressor", "weights_proj")
# Whatever the experts of layers are, those of an MTP module are stored in four bits.
DRAFTING = "mtp.*.experts"


def with_experts(hf: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The quantisation config with `expert_dtype`, which stands beside it; four bits where it does
    not (Base checkpoints say fp8)."""
    return {"expert_dtype": hf.get("expert_dtype") or "fp4", **config}


def complete(scheme: Scheme) -> Scheme:
    """The scheme with what holds for every checkpoint of the family."""
    rules = scheme.rules
    if any(EXPERTS in rule.targets for rule in rules):
        rules = (Rule((DRAFTING,), Mxfp4()), *rules)
    return replace(scheme, rules=rules, ignore=(*scheme.ignore, *DENSE))
