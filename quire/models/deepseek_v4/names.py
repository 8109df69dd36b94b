"""Names of DeepSeek V4's tensors: as published, which the layers here have too, and others."""

from __future__ import annotations

import re
from typing import Any

from quire.weights.renamed import RenamedSource
from quire.weights.source import WeightSource

# What transformers calls otherwise when it saves a model, by the part of the name that differs.
RESAVED = (
    (re.compile(r"^model\.hc_head\.hc_(fn|base|scale)$"), r"hc_head_\1"),
    (re.compile(r"^model\.embed_tokens\."), "embed."),
    (re.compile(r"^lm_head\."), "head."),
    (re.compile(r"^model\."), ""),
    (re.compile(r"\.attn\.norm\."), ".attn.kv_norm."),
    (re.compile(r"\.topk\.tid2eid$"), ".tid2eid"),
    (re.compile(r"\.gate\.e_score_correction_bias$"), ".gate.bias"),
)
# Copies of the target's embedding and head that some checkpoints keep in their MTP module.
SHARED = re.compile(r"^mtp\.\d+\.(?:emb|.*\.emb|head\.)")
DRAFTING = re.compile(r"^mtp\.")


def published(name: str) -> str:
    """The published name of a tensor."""
    for pattern, name_of in RESAVED:
        name = pattern.sub(name_of, name)
    return name


def adapt(hf: dict[str, Any], source: WeightSource, drafting: bool = False) -> WeightSource:
    """The model's tensors; with `drafting` those of MTP modules too, without copies of its own."""

    def rename(name: str) -> str | None:
        name = published(name)
        left_out = SHARED if drafting else DRAFTING
        return None if left_out.match(name) else name

    return RenamedSource(source, rename)
