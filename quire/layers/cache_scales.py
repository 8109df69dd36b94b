"""Scales that a checkpoint gives for keys and values in e4m3."""

from __future__ import annotations

import torch

from quire.errors import ModelError
from quire.layers.build import Build

# Where tools put a scale of keys (k) or values (v) below an attention layer; the last is one for
# both. Some write the scale of a projection's output.
PLACES = (
    "{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale", "qkv_proj.{0}_scale",
    "{0}_proj.output_scale", "kv_scale",
)  # fmt: skip


def fixed_scales(build: Build, name: str, kv_heads: int, share: slice) -> torch.Tensor | None:
    """Scales of keys and values float32 [2, this rank's KV heads] of the attention layer `name`.
    None where the checkpoint has not both: each head of a token then gets its own. Raises
    ModelError for another number of scales than one, or one for each of `kv_heads`."""
    found = []
    for kind in ("k", "v"):
        places = (f"{name}.{place.format(kind)}" for place in PLACES)
        place = next((place for place in places if place in build.kv_scales), None)
        if place is None:
            return None
        scales = build.kv_scales[place]
        if scales.numel() not in (1, kv_heads):
            raise ModelError(
                "quantized_part_mismatch",
                f"{place!r} has {scales.numel()} scales",
                why=f"one, or one for each of {kv_heads} KV heads is needed",
                fix="use a complete copy of the checkpoint",
            )
        found.append(scales.reshape(-1).expand(kv_heads)[share])
    return torch.stack(found).to(build.device)
