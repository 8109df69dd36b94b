"""Which kernels hold which quantised weights as codes, and what becomes of the others.

The one table that kernel sets, the plan and docs/quantization.md follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.formats.layout import BLOCK_FORMATS, QUANT_FORMATS

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
)


def held_as_codes(kernels: str, layer: str) -> frozenset[str]:
    """The formats of QuantTensor that a kernel set takes as they are."""
    return frozenset(f for f in QUANT_FORMATS if served_by(kernels, f, layer) != WIDENED)


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
    lines = ["| format | layers | device | kernels | weights |", "|---|---|---|---|---|"]
    for formats in (tuple(QUANT_FORMATS), GGUF_FORMATS):
        for kernels, device in KERNELS.items():
            for served, names, layers in _alike(kernels, formats):
                cells = ", ".join(names), ", ".join(layers), device, kernels, served
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
