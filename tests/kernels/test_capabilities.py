"""docs/quantization.md follows the table in code, and the kernel sets follow it too."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.formats.layout import QUANT_FORMATS
from quire.kernels import capabilities, native
from quire.kernels.capabilities import (
    KERNELS,
    KV_CACHES,
    LAYERS,
    MEANINGS,
    WIDENED,
    Capability,
    matrix_markdown,
    multiplied_in_e4m3,
    served_by,
)
from quire.kernels.dense import DenseWeights
from quire.kernels.reference import ops as reference

DOCS = Path(__file__).parents[2] / "docs" / "quantization.md"


def test_the_matrix_of_the_docs_is_the_table() -> None:
    """Regenerate with: python -m quire.kernels.capabilities"""
    text = DOCS.read_text()
    _, _, rest = text.partition("<!-- matrix -->\n")
    found, mark, _ = rest.partition("<!-- end of matrix -->")
    assert mark and found == matrix_markdown()
    for format in QUANT_FORMATS:
        assert f"`{format}`" in text


def test_kernel_sets_take_what_the_table_says() -> None:
    for format in QUANT_FORMATS:
        for layer in LAYERS:
            codes = served_by("triton", format, layer) != WIDENED
            dense = DenseWeights(torch.bfloat16, torch.device("meta"))
            assert codes == (dense.why_widened(format, 256, layer) == "")
            assert "no CPU kernels" in reference.why_widened(format, 256, layer)


def test_kernel_sets_have_pages_for_the_caches_that_the_table_says() -> None:
    dense = DenseWeights(torch.bfloat16, torch.device("meta"))
    sets: dict[str, Any] = {"triton": dense, "reference": reference}
    if native.available():
        from quire.kernels.native import ops

        sets["native"] = ops
    assert set(sets) <= set(KV_CACHES) == set(KERNELS)
    for kernels in sets.values():
        plain, coded = kernels.cache_page(2, 64), kernels.cache_page(2, 64, True)
        assert [prod(shape) for shape in plain] == 2 * [2 * 16 * 64]
        assert [prod(shape) for shape in coded] == 2 * [2 * 16 * 68]


def test_groups_and_dtypes_that_the_kernels_lack_are_named() -> None:
    dense = DenseWeights(torch.bfloat16, torch.device("meta"))
    for name in ("int4_g32", "int8_g64", "int4_g128", "int8_g384", "int4_row", "bf16", "q4_0"):
        assert not dense.why_widened(name, 768)
    assert "groups of 16" in dense.why_widened("int4_g16", 768)
    assert "groups of 96" in dense.why_widened("int8_g96", 768)
    assert not dense.why_widened("int8_g96", 96)  # which is the whole row
    half = DenseWeights(torch.float16, torch.device("meta"))
    assert "compute in bfloat16, not float16" in half.why_widened("nvfp4", 768)


def test_an_entry_changes_what_serves_its_formats_and_layers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Capability("triton", ("fp8", "nvfp4"), ("linear",), "a kernel")
    monkeypatch.setattr(capabilities, "CAPABILITIES", (entry,))
    assert served_by("triton", "fp8", "linear") == served_by("triton", "nvfp4", "linear")
    for args in (("triton", "fp8", "experts"), ("triton", "int4", "linear")):
        assert served_by(*args) == WIDENED
    rows = [line for line in matrix_markdown().splitlines() if "| triton |" in line]
    gpus = "(a kernel) | a kernel | (a kernel) | (a kernel) | (a kernel)"
    assert f"| fp8, nvfp4 | linear | triton |  |  | {gpus} |" in rows


def test_e4m3_products_are_said_of_the_architecture_that_has_them() -> None:
    for format in QUANT_FORMATS:
        fp8 = format in ("fp8", "fp8_block")
        assert multiplied_in_e4m3(format, "sm_90a") == fp8
        assert not multiplied_in_e4m3(format, "sm_100")
        assert ("e4m3" in served_by("triton", format, "linear", "sm_90")) == fp8
        assert "e4m3" not in served_by("triton", format, "linear", "sm_80")


def test_every_word_of_the_matrix_is_explained() -> None:
    rows = [line.split("|")[4:-1] for line in matrix_markdown().splitlines() if "| linear" in line]
    words = {word for row in rows for cell in row for word in re.findall(r"\w+", cell)}
    assert words and words | set(KV_CACHES.values()) == set(MEANINGS)


def test_every_format_and_layer_is_served_on_every_device() -> None:
    for kernels in KERNELS:
        for layer in LAYERS:
            for format in QUANT_FORMATS:
                assert capabilities.served_by(kernels, format, layer)
