"""Which kernels hold which quantised weights, keys and values as codes, and what becomes of the
others.

The one table that kernel sets, the plan and docs/quantization.md follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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
WIDENED, FLOAT32 = "widened", "float32"
REGISTERS, MEMORY, INTEGERS, E4M3 = "registers", "memory", "integers", "e4m3"
# What becomes of weights, keys and values.
MEANINGS = {
    REGISTERS: "held as codes, which are decoded in registers for bf16 products; experts are "
    "grouped",
    MEMORY: "besides, for many tokens, codes are decoded to memory once, then cuBLAS",
    E4M3: "besides, e4m3 products of many tokens, where the scheme quantises activations",
    INTEGERS: "held as codes; integer products with activations rounded to 16 bits",
    FLOAT32: "held as codes, which are widened to float32 whenever they are read",
    WIDENED: "to the model's dtype, once, while it is loaded",
}
TESTED = "tested and measured on it"
COMPILED = "compiled for it in the tests, and never run on one"
# By architecture: the device, with which instructions, and what is known of the kernels there.
ARCHITECTURES = {
    "x86-64": ("CPU", "AVX-512 with VNNI, AVX2, or what any processor has", TESTED),
    "arm64": ("CPU", "what any processor has", "tested on x86-64, and never run on one"),
    "sm_80": ("GPU", "bf16 matrix products", COMPILED),
    "sm_90": ("GPU", "bf16 and e4m3 matrix products of Hopper, descriptors", TESTED),
    "sm_100": ("GPU", "bf16 matrix products", COMPILED),
    "sm_120": ("GPU", "bf16 matrix products", COMPILED),
    "gfx942": ("GPU", "bf16 matrix products", COMPILED),
}
E4M3_ARCHITECTURE = "sm_90"


@dataclass(frozen=True)
class Capability:
    """`kernels` hold weights of `formats` in `layers` as codes, and `computed_by` serves them, in
    words of MEANINGS. `e4m3`: on one architecture by products of quantised tokens, too."""

    kernels: str
    formats: tuple[str, ...]
    layers: tuple[str, ...]
    computed_by: str
    e4m3: bool = False


# Every pair of a format and a layer that is in no entry is widened while it is loaded.
CAPABILITIES = (
    Capability("native", GGUF_FORMATS, LAYERS, INTEGERS),
    Capability("triton", ("fp8", "fp8_block"), LAYERS, REGISTERS, e4m3=True),
    Capability(
        "triton", ("nvfp4", "mxfp4", *INTEGER_FORMATS), ("linear",), f"{REGISTERS}, {MEMORY}"
    ),
    Capability("triton", ("nvfp4", "mxfp4", *INTEGER_FORMATS), ("experts",), REGISTERS),
)
# How keys and values are kept in fp8, by kernel set: e4m3 and a scale for each head of a token.
# Latents, which all heads share, are not.
KV_CACHES = {"native": FLOAT32, "reference": FLOAT32, "triton": REGISTERS}
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


def served_by(kernels: str, format: str, layer: str, architecture: str = "") -> str:
    """What computes with weights of a format, on one of ARCHITECTURES where that matters."""
    for entry in CAPABILITIES:
        if entry.kernels == kernels and format in entry.formats and layer in entry.layers:
            e4m3 = entry.e4m3 and architecture == E4M3_ARCHITECTURE
            return f"{entry.computed_by}, {E4M3}" if e4m3 else entry.computed_by
    return FLOAT32 if kernels == "reference" and format in GGUF_FORMATS else WIDENED


def multiplied_in_e4m3(format: str, architecture: str) -> bool:
    """Whether there are products of quantised tokens with weights of a format. `architecture`: of
    a GPU, "sm_90a" for instance."""
    known = any(entry.e4m3 and format in entry.formats for entry in CAPABILITIES)
    return known and architecture.startswith(E4M3_ARCHITECTURE)


def matrix_markdown() -> str:
    """The tables of docs/quantization.md: formats that are alike share a row."""
    head = ["format", "layers", "kernels", *ARCHITECTURES]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for formats in (tuple(QUANT_FORMATS), GGUF_FORMATS):
        for kernels in KERNELS:
            for served, names, layers in _alike(kernels, formats):
                cells = ", ".join(names), ", ".join(layers), kernels, *served
                lines.append(f"| {' | '.join(cells)} |")
    for kernels, kept in KV_CACHES.items():
        served = _row(kernels, dict.fromkeys(ARCHITECTURES, kept).__getitem__)
        cells = "fp8", "KV cache, but for latents", kernels, *served
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- *{word}*: {meaning}" for word, meaning in MEANINGS.items()), ""]
    lines += ["| architecture | instructions | kernels are |", "|---|---|---|"]
    for name, (_, instructions, known) in ARCHITECTURES.items():
        lines.append(f"| {name} | {instructions} | {known} |")
    return "\n".join(lines) + "\n"


def _row(kernels: str, served: Callable[[str], str]) -> tuple[str, ...]:
    """A cell for each architecture: empty where the kernels are for another device, in brackets
    where they have never run."""
    cells = []
    for name, (device, _, known) in ARCHITECTURES.items():
        cell = served(name) if device == KERNELS[kernels] else ""
        cells.append(f"({cell})" if cell and known != TESTED else cell)
    return tuple(cells)


def _alike(
    kernels: str, formats: tuple[str, ...]
) -> list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    """(cells, formats, layers) of as few rows as say it all."""
    by_formats: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for layer in LAYERS:
        groups: dict[tuple[str, ...], list[str]] = {}
        for format in formats:
            cells = _row(kernels, partial(served_by, kernels, format, layer))
            groups.setdefault(cells, []).append(format)
        for served, names in groups.items():
            by_formats.setdefault((served, tuple(names)), []).append(layer)
    return [(served, names, tuple(layers)) for (served, names), layers in by_formats.items()]


if __name__ == "__main__":
    print(matrix_markdown(), end="")
