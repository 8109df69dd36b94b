"""Which kernels hold which quantised weights, keys and values as codes, and what becomes of the
others.

The one table that kernel sets, the plan and docs/quantization.md follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.formats.layout import (
    BLOCK_FORMATS,
    INTEGER_FORMATS,
    ORDERED_FORMATS,
    QUANT_FORMATS,
    group_of,
    is_quantized,
    ungrouped,
)

LAYERS = ("linear", "experts")
# Kernel sets by the names of plans, with the device that each is for.
KERNELS = {"native": "CPU", "reference": "CPU", "triton": "GPU"}
GGUF_FORMATS = tuple(f for f in BLOCK_FORMATS if f not in ("f32", "f16", "bf16"))
WIDENED = "widened to the model's dtype"


@dataclass(frozen=True)
class Capability:
    """`kernels` hold weights of `formats` in `layers` as codes, and `computed_by` serves them."""

    kernels: str
    formats: tuple[str, ...]
    layers: tuple[str, ...]
    computed_by: str


# Every pair of a format and a layer that is in no entry is widened while it is loaded.
CAPABILITIES = (
    Capability(
        "native", GGUF_FORMATS, LAYERS, "integer products with activations rounded to 16 bits"
    ),
    Capability(
        "triton",
        ("fp8", "fp8_block"),
        ("linear",),
        "codes; decoded in registers for bf16 products; many tokens on Hopper: e4m3 products, "
        "where the scheme quantises activations",
    ),
    Capability(
        "triton",
        ("nvfp4", "mxfp4", *INTEGER_FORMATS),
        ("linear",),
        "codes; decoded in registers for bf16 products, for many tokens once to memory",
    ),
    Capability(
        "triton",
        ("fp8", "fp8_block"),
        ("experts",),
        "codes; grouped by expert: decoded in registers for bf16 products; many tokens on Hopper: "
        "e4m3 products, where the scheme quantises activations",
    ),
    Capability(
        "triton",
        ("nvfp4", "mxfp4", *INTEGER_FORMATS),
        ("experts",),
        "codes; decoded in registers for bf16 products, grouped by expert",
    ),
)
# How keys and values are kept in fp8, by kernel set; latents, which all heads share, are not.
KV_CACHES = {
    "native": "e4m3 and a scale for each head of a token; widened to float32 as they are read",
    "reference": "e4m3 and a scale for each head of a token; widened to float32 as they are read",
    "triton": "e4m3 and a scale for each head of a token; decoded in registers for bf16 products",
}
# Of integers; whole rows, too.
GROUPS, GROUPS_OF_MANY = (32, 64), 128


def why_widened(kernels: str, layer: str, name: str, columns: int, dtype: str) -> str:
    """Why a weight is widened while it is loaded; empty where it is held as it is stored.

    `name`: its format as layout.grouped has it; `columns`: of this rank's share; `dtype`: what the
    kernels compute in, "bfloat16" for instance.
    """
    format = ungrouped(name)
    if not is_quantized(name):
        return ""
    if name in ORDERED_FORMATS:
        return f"columns are ordered (desc_act) in {name}"
    if served_by(kernels, format, layer) == WIDENED:
        return f"there are no {KERNELS[kernels]} kernels for {format}"
    if dtype != "bfloat16":
        return f"the kernels for {format} compute in bfloat16, not {dtype}"
    group = group_of(name, columns)
    if format in INTEGER_FORMATS and not (
        group in GROUPS or group % GROUPS_OF_MANY == 0 or group == columns
    ):
        return (
            f"{format} has groups of {group}: the kernels have {', '.join(map(str, GROUPS))}, "
            f"multiples of {GROUPS_OF_MANY} and whole rows"
        )
    return ""


def served_by(kernels: str, format: str, layer: str) -> str:
    """What computes with weights of a format."""
    for entry in CAPABILITIES:
        if entry.kernels == kernels and format in entry.formats and layer in entry.layers:
            return entry.computed_by
    if kernels == "reference" and format in GGUF_FORMATS:
        return "widened to float32"
    return WIDENED


def matrix_markdown() -> str:
    """The table of docs/quantization.md: formats that are alike share a row."""
    lines = ["| format | layers | device | kernels | held as |", "|---|---|---|---|---|"]
    for formats in (tuple(QUANT_FORMATS), GGUF_FORMATS):
        for kernels, device in KERNELS.items():
            for served, names, layers in _alike(kernels, formats):
                cells = ", ".join(names), ", ".join(layers), device, kernels, served
                lines.append(f"| {' | '.join(cells)} |")
    for kernels, device in KERNELS.items():
        cells = "fp8", "KV cache, but for latents", device, kernels, KV_CACHES[kernels]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _alike(
    kernels: str, formats: tuple[str, ...]
) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(what serves, formats, layers) of as few rows as say it all."""
    by_formats: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for layer in LAYERS:
        groups: dict[str, list[str]] = {}
        for format in formats:
            groups.setdefault(served_by(kernels, format, layer), []).append(format)
        for served, names in groups.items():
            by_formats.setdefault((served, tuple(names)), []).append(layer)
    return [(served, names, tuple(layers)) for (served, names), layers in by_formats.items()]


if __name__ == "__main__":
    print(matrix_markdown(), end="")
